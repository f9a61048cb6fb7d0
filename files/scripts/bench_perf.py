"""Benchmark of a served model through its chat API: latency, throughput, a fixed rate, a concurrency sweep.

    python bench_perf.py --url http://localhost:8000/v1/chat/completions --model glm-ocr --max-tokens 128 \
        --latency-iters 5 --throughput-requests 10 --throughput-concurrency 2 [--output bench.json]

Exit status: 0 measured and every limit kept, 1 a limit missed (failed requests, reply length, goodput, throughput),
2 could not measure (a load without one success). With ``--output`` the JSON is written in all three cases; what was
not measured is null. Definitions are in ``bench_stats``, the form in ``files/schemas/bench.schema.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_load
import bench_server
from bench_client import Client, Run, Target, TargetError, connect, encode
from bench_stats import SLO_METRICS, summary
from bench_workload import Workload, image_workload, text_workload
from stage_result import EXIT_STATUS, engine_versions, finite, now, positive, write_json, write_text

FIX_LOG = "Look at the service's log for the cause."
FIX = {
    "unreachable": "Start the service, or correct --url, then look at its log if the port stays closed.",
    "timeout": "Look whether the engine hangs or is only busy (its log); raise --timeout for long replies.",
    "aborted": "The service was stopped while it answered: let it finish, and measure again.",
    "empty": "Pass --ignore-eos, or another --input-len: the model ended its reply at once.",
    "not_a_stream": "Make sure that vLLM itself, and no other server, answers at --url.",
    "malformed": "Make sure that vLLM itself, and no other server, answers at --url.",
    "http_400": "Lower --max-tokens or --input-len: together they must fit in the service's --max-model-len.",
    "http_401": "Set VLLM_API_KEY in the environment of this script to the key of the service.",
    "http_404": "Make --model equal to the service's --served-model-name, and --url its /v1/chat/completions.",
    "http_413": "Send smaller pages (--image).",
    "http_429": "The front limits the rate: measure the service behind it, or raise its limit.",
    "interrupted": "Let it run to its end.",
}
ENVIRONMENT = ("npu", "driver", "cann", "model_sha256", "serve_arguments")


@dataclass(frozen=True)
class Config:
    """The command line; lengths in tokens, ``image`` in pixels, ``goodput`` in milliseconds, ``rate`` per second."""

    url: str
    model: str
    max_tokens: int
    latency_iters: int
    throughput_requests: int
    throughput_concurrency: int
    rate: float | None
    rate_requests: int
    rate_concurrency: int
    distribution: str
    sweep: tuple[int, ...]
    warmup: int
    input_len: int
    image: tuple[int, int] | None
    distinct: int
    ignore_eos: bool
    seed: int
    timeout: float
    goodput: dict[str, float]
    min_goodput: float | None
    min_throughput: float | None
    max_failed: float
    metadata: dict[str, str]
    output: Path | None
    csv: Path | None
    vllm_json: Path | None
    requests_jsonl: Path | None


@dataclass(frozen=True)
class Load:
    """One load to put on the service; ``rate`` None is a closed loop."""

    name: str
    requests: int
    concurrency: int
    rate: float | None = None


@dataclass
class Result:
    """The report, and the raw loads behind its phases, for the exports."""

    report: dict[str, Any]
    runs: list[Run]


def loads(config: Config) -> list[Load]:
    """The phases that were asked for, in order."""
    found = [
        Load("latency", config.latency_iters, 1),
        Load("throughput", config.throughput_requests, config.throughput_concurrency),
    ]
    if config.rate:
        found.append(Load("rate", config.rate_requests, config.rate_concurrency, config.rate))
    for concurrency in config.sweep:
        found.append(Load(f"sweep_{concurrency}", max(config.throughput_requests, 4 * concurrency), concurrency))
    return [load for load in found if load.requests]


def run(config: Config, progress: Callable[[str], None] = lambda _: None) -> Result:
    """Every load; the report follows ``files/schemas/bench.schema.json``."""
    report: dict[str, Any] = {
        "schema_version": "1.0",
        "stage": "ocr_bench",
        "verdict": "ERROR",
        "started_at": now(),
        "finished_at": "",
        "tool": {"name": "bench_perf.py", "python": sys.version.split()[0]},
        "arguments": arguments(config),
        "engine": engine_versions(),
        "env": dict.fromkeys(ENVIRONMENT) | {"server_version": None, "max_model_len": None} | config.metadata,
        "workload": None,
        "headline": dict.fromkeys(HEADLINE),
        "warmup": None,
        "phases": [],
        "sweep": None,
        "checks": [],
    }
    result = Result(report, [])
    try:
        target, opened = connect(config.url)
        client = Client(target, opened, config.timeout)
        try:
            measure(config, target, client, result, progress)
        finally:
            client.close()
    except TargetError as error:
        report["checks"].append(check("service", "ERROR", "a connection", str(error), FIX["unreachable"]))
    except ImportError as error:
        fix = "Install Pillow, or measure without --image."
        report["checks"].append(check("workload", "ERROR", "Pillow to draw the pages with", str(error), fix))
    except KeyboardInterrupt:
        report["checks"].append(check("service", "ERROR", "a complete run", "interrupted", FIX["interrupted"]))
    report["headline"] = headline(report["phases"])
    report["verdict"] = max((entry["verdict"] for entry in report["checks"]), key=list(EXIT_STATUS).index)
    report["finished_at"] = now()
    return result


def measure(config: Config, target: Target, client: Client, result: Result, progress: Callable[[str], None]) -> None:
    """Warm up, then every load, into ``result``."""
    report, planned = result.report, loads(config)
    total = config.warmup + sum(load.requests for load in planned)
    workload = prepare(config, client, total)
    requests = [encode(target, body) for body in workload.bodies]
    report["env"] |= service_facts(config, target, client)
    report["workload"] = {
        "kind": "image" if workload.image_pixels else "text",
        "input_tokens": config.input_len if workload.image_pixels is None else None,
        "input_tokens_exact": workload.input_tokens is not None if workload.image_pixels is None else None,
        "image": workload.image_pixels
        and {"pixels": list(workload.image_pixels), "bytes": workload.image_bytes, "format": "png"},
        "body_bytes_max": max(map(len, workload.bodies)),
        "max_tokens": config.max_tokens,
        "ignore_eos": config.ignore_eos,
        "distinct": len(requests),
        "repeated_requests": max(total - len(requests), 0),
        "seed": config.seed,
    }
    if config.warmup:
        load = Load("warmup", config.warmup, min(config.warmup, config.throughput_concurrency))
        report["warmup"], _ = put(config, client, load, requests, progress)
        entry = counts_check(report["warmup"], 1.0)
        report["checks"].append(entry)
        if entry["verdict"] != "PASS":
            return
    at = config.warmup
    for load in planned:
        turn = at % len(requests)
        phase, raw = put(config, client, load, requests[turn:] + requests[:turn], progress)
        at += load.requests
        report["phases"].append(phase)
        result.runs.append(raw)
        report["checks"] += [counts_check(phase, config.max_failed), *limits(config, phase)]
        if raw.interrupted:
            raise KeyboardInterrupt
    if config.sweep:
        report["sweep"] = sweep(report["phases"])


def prepare(config: Config, client: Client, total: int) -> Workload:
    """The request bodies; raises ``ImportError`` when pages are wanted and Pillow is not there."""
    options: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.ignore_eos:
        options |= {"ignore_eos": True, "min_tokens": config.max_tokens}
    count = min(config.distinct, total)
    if config.image:
        return image_workload(config.model, *config.image, count, options, config.seed)
    return text_workload(config.model, config.input_len, count, options, config.seed, client.fetch)


def service_facts(config: Config, target: Target, client: Client) -> dict[str, Any]:
    """The server's version and the model's context length; None where it does not say."""
    facts: dict[str, Any] = {}
    prefix = target.path.removesuffix("/chat/completions")
    for key, path in (("server_version", "/version"), ("max_model_len", f"{prefix}/models")):
        status, body = client.fetch(path)
        try:
            answer = json.loads(body) if status == 200 else {}
            models = {model["id"]: model.get("max_model_len") for model in answer.get("data", [])}
            facts[key] = answer.get("version") if key == "server_version" else models.get(config.model)
        except (ValueError, LookupError, TypeError, AttributeError):
            facts[key] = None
    return facts


def put(
    config: Config, client: Client, load: Load, requests: Sequence[bytes], progress: Callable[[str], None]
) -> tuple[dict[str, Any], Run]:
    """Put one load on the service: its entry of ``phases``, and the raw run."""
    offsets = load.rate and bench_load.offsets(load.requests, load.rate, config.distribution, config.seed)
    before, started_at = server_metrics(client), now()
    began = time.perf_counter()

    def tick(finished: int) -> None:
        progress(f"{load.name}: {finished}/{load.requests} requests, {time.perf_counter() - began:.0f} s")

    raw = client.run(requests, load.requests, load.concurrency, offsets or None, tick)
    phase = {
        "name": load.name,
        "started_at": started_at,
        "workload": {
            "mode": "open" if offsets else "closed",
            "requests": load.requests,
            "concurrency": load.concurrency,
            "rate": load.rate,
            "distribution": config.distribution if offsets else None,
        },
        **summary(raw, load.concurrency, config.goodput),
        "server": bench_server.comparison(before, server_metrics(client)),
    }
    return phase, raw


def server_metrics(client: Client) -> bench_server.Metrics | None:
    """What ``/metrics`` says now; None where it does not answer."""
    status, body = client.fetch("/metrics")
    return bench_server.parse(body.decode("utf-8", "replace")) if status == 200 else None


def sweep(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The levels of the sweep, and the concurrency at which more of it buys under 5 % of throughput."""
    levels = [
        (phase["workload"]["concurrency"], phase["throughput"]["requests_per_second"])
        for phase in phases
        if phase["name"].startswith("sweep_")
    ]
    return {
        "levels": [{"concurrency": level, "requests_per_second": rate} for level, rate in levels],
        "saturation_concurrency": bench_load.saturation(levels),
    }


HEADLINE = (
    "latency_mean_ms",
    "latency_p99_ms",
    "latency_max_ms",
    "latency_samples",
    "requests_per_second",
    "output_tokens_per_second",
    "throughput_samples",
)


def headline(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The four figures of the deployment document, with their sample counts."""
    figures: dict[str, Any] = dict.fromkeys(HEADLINE)
    for phase in phases:
        if phase["name"] == "latency":
            e2e = phase["latency_ms"]["e2e"]
            figures |= {f"latency_{key}_ms": e2e[key] for key in ("mean", "p99", "max")} | {"latency_samples": e2e["n"]}
        if phase["name"] == "throughput":
            figures |= {key: phase["throughput"][key] for key in ("requests_per_second", "output_tokens_per_second")}
            figures["throughput_samples"] = phase["counts"]["ok"]
    return figures


def check(identity: str, verdict: str, expected: str, found: str, fix: str) -> dict[str, Any]:
    """One entry of ``checks``; the fix belongs to failures."""
    entry = {"id": identity, "verdict": verdict, "expected": expected, "found": found}
    return entry if verdict == "PASS" else entry | {"fix": fix}


def counts_check(phase: dict[str, Any], max_failed: float) -> dict[str, Any]:
    """No success is an ERROR: nothing was measured. Too many failures are a FAIL."""
    numbers = phase["counts"]
    found = f"{numbers['ok']} of {numbers['sent']} requests succeeded"
    kinds = sorted(numbers["by_error"], key=lambda kind: -numbers["by_error"][kind])
    for kind in kinds:
        found += f"; {numbers['by_error'][kind]} {kind} ({numbers['examples'][kind]})"
    failed = numbers["failed"] / numbers["sent"] if numbers["sent"] else 1.0
    verdict = "ERROR" if not numbers["ok"] else "FAIL" if failed > max_failed else "PASS"
    fix = FIX.get(kinds[0], FIX_LOG) if kinds else FIX_LOG
    return check(phase["name"], verdict, f"at most {100 * max_failed:g} % of the requests fail", found, fix)


def limits(config: Config, phase: dict[str, Any]) -> list[dict[str, Any]]:
    """The limits that were set, on one phase; a phase without a success has its ERROR already."""
    if not phase["counts"]["ok"]:
        return []
    found, name = [], phase["name"]
    if config.ignore_eos:
        tokens = phase["tokens"]["completion"]
        exact = tokens["min"] == tokens["max"] == config.max_tokens
        found.append(
            check(
                f"{name}_length",
                "PASS" if exact else "FAIL",
                f"{config.max_tokens} tokens in every reply",
                f"{tokens['min']} to {tokens['max']} tokens",
                "ignore_eos and min_tokens were not honoured: measure vLLM itself, not a front that drops them.",
            )
        )
    # A rate is what a promise is about; without one, the throughput phase.
    if name != ("rate" if config.rate else "throughput"):
        return found
    if config.min_goodput is not None:
        share = phase["goodput"]["share"]
        met = ", ".join(f"{metric} {limit:g} ms" for metric, limit in config.goodput.items())
        found.append(
            check(
                "goodput",
                "PASS" if share >= config.min_goodput else "FAIL",
                f"at least {100 * config.min_goodput:g} % of the requests within {met}",
                f"{100 * share:g} %",
                "Lower the load, or look at the phase's latencies for the limit that is missed.",
            )
        )
    if config.min_throughput is not None:
        rate = phase["throughput"]["requests_per_second"]
        found.append(
            check(
                "min_throughput",
                "PASS" if rate >= config.min_throughput else "FAIL",
                f"at least {config.min_throughput:g} requests per second",
                f"{rate:g}",
                "Compare the serve arguments and the host's load with those of the run the limit came from.",
            )
        )
    return found


def arguments(config: Config) -> dict[str, Any]:
    """The command line as JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def text_report(report: dict[str, Any]) -> str:
    """What people read: the four figures, one line per phase, the checks that did not pass."""
    figures, lines = report["headline"], []

    def number(value: float | None, unit: str, form: str = ".1f") -> str:
        return "not measured" if value is None else f"{value:{form}} {unit}"

    samples = figures["latency_samples"]
    p99, note = figures["latency_p99_ms"], f"{samples} samples"
    if p99 is None and samples:
        p99, note = figures["latency_max_ms"], f"the maximum of {samples} samples; a p99 needs 100"
    lines.append(f"Latency mean      {number(figures['latency_mean_ms'], 'ms')} ({samples or 0} samples)")
    lines.append(f"Latency p99       {number(p99, 'ms')}" + (f" ({note})" if samples else ""))
    lines.append(f"Throughput        {number(figures['requests_per_second'], 'req/s', '.2f')}")
    lines.append(f"Token throughput  {number(figures['output_tokens_per_second'], 'tok/s', '.2f')}")
    for phase in report["phases"]:
        numbers, latency, tokens = phase["counts"], phase["latency_ms"], phase["tokens"]["completion"]["mean"]
        load = phase["workload"]
        rate = (
            f"{load['rate']:g} req/s {load['distribution']}" if load["rate"] else f"concurrency {load['concurrency']}"
        )
        e2e, ttft = (latency[name + ("_sched" if load["rate"] else "")]["p50"] for name in ("e2e", "ttft"))
        lines.append(
            f"{phase['name']:<12} {rate}: {numbers['ok']}/{numbers['sent']} ok, "
            f"{number(phase['throughput']['requests_per_second'], 'req/s', '.2f')}, "
            f"TTFT {number(ttft, 'ms')}, TPOT {number(latency['tpot']['p50'], 'ms', '.2f')}, "
            f"E2E {number(e2e, 'ms')} (medians), {number(tokens, 'tokens')} per reply"
            + (", LIMITED BY THIS CLIENT" if phase["client"]["limited"] else "")
        )
    if report["sweep"]:
        point = report["sweep"]["saturation_concurrency"]
        lines.append(f"Saturation        {'not reached in the sweep' if point is None else f'at concurrency {point}'}")
    for entry in report["checks"]:
        if entry["verdict"] != "PASS":
            problem = f"{entry['found']}; expected: {entry['expected']}; fix: {entry['fix']}"
            lines.append(f"{entry['verdict']:5} {entry['id']} {problem}")
    passed = sum(entry["verdict"] == "PASS" for entry in report["checks"])
    return "\n".join([*lines, f"ocr_bench: {report['verdict']} ({passed}/{len(report['checks'])} checks)"])


def count(text: str) -> int:
    """An argparse type: a whole number from 0 up."""
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if (number := finite(text)) == 0:
        raise ValueError(text)
    return number


def share(text: str) -> float:
    """An argparse type: a ratio from 0 to 1."""
    if (number := finite(text)) > 1:
        raise ValueError(text)
    return number


def pixels(text: str) -> tuple[int, int]:
    """An argparse type: ``1024x1024``."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise ValueError(text)
    width, height = int(match[1]), int(match[2])
    if not (28 <= width <= 8192 and 28 <= height <= 8192):
        raise ValueError(text)
    return width, height


def levels(text: str) -> tuple[int, ...]:
    """An argparse type: ``1,2,4``, ascending."""
    found = tuple(positive(part) for part in text.split(","))
    if list(found) != sorted(set(found)):
        raise ValueError(text)
    return found


def limit(text: str) -> tuple[str, float]:
    """An argparse type: ``ttft:200``, milliseconds."""
    name, _, value = text.partition(":")
    if name not in SLO_METRICS:
        raise ValueError(text)
    return name, above_zero(value)


def pair(text: str) -> tuple[str, str]:
    """An argparse type: ``key=value``."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(text)
    return key, value


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Benchmark of a served model through its chat API.")
    add = parser.add_argument
    add("--url", default="http://localhost:8000/v1/chat/completions", help="chat completions, plain http")
    add("--model", default="glm-ocr", help="served model name")
    add("--max-tokens", type=positive, default=128, help="longest reply in tokens")
    add("--latency-iters", type=count, default=5, help="requests one after the other; 0 leaves the phase out")
    add("--throughput-requests", type=count, default=10, help="requests of the throughput phase; 0 leaves it out")
    add("--throughput-concurrency", type=positive, default=2, help="requests under way at once in it")
    add("--rate", type=above_zero, help="also send at this rate, requests per second, whatever the replies do")
    add("--rate-requests", type=positive, default=100, help="requests of the rate phase")
    add("--rate-concurrency", type=positive, default=1024, help="requests under way at once in it, at most")
    add("--distribution", choices=("poisson", "constant"), default="poisson", help="of the rate's arrivals")
    add("--sweep", type=levels, default=(), metavar="1,2,4", help="also find the saturation over these concurrencies")
    add("--warmup", type=count, default=2, help="requests before the first phase, counted apart")
    add("--input-len", type=positive, default=128, help="prompt length in tokens, of text requests")
    add("--image", type=pixels, metavar="WIDTHxHEIGHT", help="send drawn pages of this size instead of text")
    add("--distinct", type=positive, default=64, help="different prompts or pages; then they repeat")
    add("--ignore-eos", action="store_true", help="replies of exactly --max-tokens")
    add("--seed", type=int, default=0, help="of prompts, pages and arrivals")
    add("--timeout", type=above_zero, default=120.0, help="seconds to wait for one reply")
    add("--goodput", type=limit, nargs="+", default=[], metavar="ttft:MS", help="limits: ttft, tpot, e2e in ms")
    add("--min-goodput", type=share, help="fail when a smaller share of the requests is within --goodput")
    add("--min-throughput", type=finite, help="fail under this many requests per second")
    add("--max-failed", type=share, default=0.0, help="highest accepted share of failed requests in a phase")
    add("--metadata", type=pair, nargs="+", default=[], metavar="KEY=VALUE", help="facts to record, such as npu=910B2")
    add("--output", type=Path, help="JSON to write")
    add("--csv", type=Path, help="CSV to write, one line per phase")
    add("--vllm-json", type=Path, help="the last phase in the form of `vllm bench serve`, to write")
    add("--requests-jsonl", type=Path, help="every request with its times, to write")
    found = vars(parser.parse_args(argv))
    found |= {"goodput": dict(found["goodput"]), "metadata": dict(found["metadata"])}
    config = Config(**found)
    if config.min_goodput is not None and not config.goodput:
        parser.error("--min-goodput needs the limits: --goodput ttft:200 e2e:2000")
    if not loads(config):
        parser.error("nothing to measure: --latency-iters, --throughput-requests, --rate or --sweep")
    return config


class Progress:
    """One line that is overwritten, on a terminal only."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._on:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def write(config: Config, result: Result) -> None:
    """Every file that was asked for.  Raises ``OSError``."""
    import bench_export  # only when asked for: start-up is part of what a benchmark costs

    report = result.report
    if config.output:
        write_json(config.output, report)
    if config.csv:
        write_text(config.csv, bench_export.to_csv(report["phases"]))
    if config.vllm_json and result.runs:
        write_json(config.vllm_json, bench_export.to_vllm(report, report["phases"][-1], result.runs[-1]))
    if config.requests_jsonl:
        names = [phase["name"] for phase in report["phases"]]
        write_text(config.requests_jsonl, bench_export.to_jsonl(list(zip(names, result.runs, strict=True))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the figures, write the files; returns the exit status."""
    config = parse_args(argv)
    progress = Progress()
    result = run(config, progress)
    progress("")
    print(text_report(result.report))
    try:
        write(config, result)
    except OSError as error:
        print(f"bench_perf.py: cannot write ({error}); pass writable paths", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    return EXIT_STATUS[result.report["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
