"""Results of every stage for the tests of the report, each made by its own script.

The benchmark and the OCR quality are real runs against the stand-ins; the accuracy stages, whose passes need torch, are
the scripts' own judgements of measurements made by hand.

    PYTHONPATH=files/scripts:tests/support python tests/support/stage_results.py DIR

writes stages, five earlier runs and a second host to DIR, merges them, and says where the pages are: to look at the
page without a lab.  The figures are no measurement of anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accuracy_cases
import accuracy_report
import bench_perf
import eval_accuracy
import eval_ocr
import eval_served
import merge_fleet
import merge_report
import ocr_pages
import ocr_readings
import smoke
from fake_service import SCALE, SEED, Service, serving
from scheduled_mock import ScheduledMock, served
from tensor_metrics import ErrorSums, Position

DEPLOYMENT: dict[str, Any] = {
    "host": "npu-01",
    "image": {"name": "quay.io/ascend/vllm-ascend:v0.18.0rc1", "id": "sha256:0123456789abcdef"},
    "container_engine": "docker",
    "accelerator": "Ascend 910B2",
    "command": ["vllm", "serve", "/weights", "--port", "8000", "--api-key", "s3cret", "--api-key=s3cret"],
    "environment": {"OMP_NUM_THREADS": 1, "VLLM_API_KEY": "s3cret", "HF_TOKEN": "s3cret"},
}
OCR_SAMPLES = 2
OCR_SEED = 5
LAYERS = (
    *(f"vision.{index}" for index in range(24)),
    "vision.merger",
    *(f"text.{index}" for index in range(16)),
    eval_accuracy.HIDDEN_STATES,
    eval_accuracy.LOGITS,
)


def check(identity: str, verdict: str = "PASS") -> dict[str, Any]:
    """A check of a smoke made by hand."""
    entry = {
        "id": identity,
        "verdict": verdict,
        "expected": "HTTP 200",
        "found": "HTTP 200",
        "latency_ms": 12.5,
        "http_status": 200,
    }
    return entry if verdict == "PASS" else entry | {"found": "HTTP 500", "response_body": "<b>", "fix": "Look."}


def smoke_stage(verdict: str = "PASS", read: str = "ORDER 4821 PAGE") -> dict[str, Any]:
    """A smoke made by hand."""
    sample = {"expected": "ORDER 4821 PAGE", "found": read, "cer": 0.0, "latency_ms": 80.0, "finish_reason": "stop"}
    checks = [check(name) for name in ("health", "models", "text")]
    return {
        "schema_version": "1.0",
        "stage": "ocr_smoke",
        "verdict": verdict,
        "started_at": "2026-01-02T03:04:05.678+00:00",
        "finished_at": "2026-01-02T03:04:09+00:00",
        "arguments": {"seed": 7, "max_cer": 0.1},
        "engine": {"vllm": "0.18.0", "torch-npu": None},
        "checks": [*checks, check("image", verdict) | {"samples": [sample]}],
    }


def result(path: Path) -> dict[str, Any]:
    """What a script wrote."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def ocr_smoke(folder: Path, misread: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A smoke of the stand-in; ``misread`` maps letters to what is read instead."""
    output = folder / "ocr_smoke.json"
    with serving() as service:
        for url, drawn in service.pictures.items():
            text = drawn
            for letter, read in (misread or {}).items():
                text = text.replace(letter, read)
            service.pictures[url] = text
        arguments = ["--base-url", service.url, "--model", "glm-ocr", "--max-model-len", "8192", "--seed", str(SEED)]
        smoke.main([*arguments, "--scale", str(SCALE), "--output", str(output)])
    return result(output)


def ocr_bench(folder: Path, *more: str, itl: float = 0.001) -> dict[str, Any]:
    """A benchmark of the scheduled mock, ``itl`` seconds between its tokens."""
    output = folder / "ocr_bench.json"
    with served(ScheduledMock(ttft=2 * itl, itl=itl)) as mock:
        arguments = ["--url", mock.url, "--output", str(output), "--input-len", "16", "--max-tokens", "8"]
        bench_perf.main([*arguments, *(more or ("--sweep", "1,2,4", "--throughput-requests", "8"))])
    return result(output)


def ocr_quality(folder: Path, misread: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All kinds of pages, read by the stand-in; a kind in ``misread`` is read with that text before it."""
    output = folder / "ocr_quality.json"
    limits = {**dict.fromkeys(eval_ocr.KINDS, 0.2), "seal": None, "repetition": 0.0}
    with serving() as service:
        for kind in eval_ocr.KINDS:
            for index in range(OCR_SAMPLES):
                page = ocr_pages.page(kind, index, OCR_SEED)
                teach(service, page, (misread or {}).get(kind, "") + page.expected)
        arguments = ["run", "--base-url", service.url, "--output", str(output), "--thresholds", json.dumps(limits)]
        eval_ocr.main([*arguments, "--samples", str(OCR_SAMPLES), "--seed", str(OCR_SEED), "--line-scale", "1"])
    return result(output)


def teach(service: Service, page: ocr_pages.Page, reading: str) -> None:
    """Have the stand-in read a page so."""
    service.pictures[f"data:image/png;base64,{ocr_readings.png(page.image)}"] = reading


def comparison(factor: float, worst_layer: str | None = None) -> eval_accuracy.Comparison:
    """An error that grows from layer to layer, times ``factor``, five times that in ``worst_layer``; 200 positions."""
    made = eval_accuracy.Comparison()
    rng = random.Random(round(1000 * factor))
    for index, layer in enumerate(LAYERS):
        error = factor * 0.001 * 1.08**index * (5 if layer == worst_layer else 1)
        made.errors[layer] = ErrorSums(
            count=100_000,
            abs_error=80_000 * error,
            squared_error=100_000 * error**2,
            relative_error_sum=90_000 * error,
            squared_reference=100_000.0,
            squared_measured=100_000.0,
            product=100_000 * (1 - error**2 / 2),
            max_abs=6 * error,
        )
    made.positions = [Position((factor * rng.gauss(0, 0.01)) ** 2, True, 2.0) for _ in range(200)]
    return made


def ocr_accuracy(worst_layer: str | None = None) -> dict[str, Any]:
    """The script's report of measurements made by hand."""
    config = eval_accuracy.parse_args(["--model", "/weights", "--output", "accuracy.json", "--images", "2"])
    report = accuracy_report.envelope(
        "ocr_accuracy", vars(config), "note", "prompts", "table", "layers", "positions", "resources"
    )
    floor, device = comparison(1.0), comparison(1.01, worst_layer)
    prompts = accuracy_cases.cases(config.images, 1, config.seed)
    report |= {
        "prompts": [{"name": one.name, "kind": one.kind, "prompt": one.prompt, "reply": one.drawn} for one in prompts],
        "table": eval_accuracy.table(config, floor, device),
        "layers": eval_accuracy.layer_rows(floor, device),
        "positions": eval_accuracy.position_rows(config, floor, device),
        "resources": {
            "checkpoint_bytes": 2**31,
            "anonymous_peak_bytes": 2**31,
            "anonymous_limit_bytes": 5 * 2**30,
            "resident_peak_bytes": None,
            "seconds": {"forward": 60.0},
            "time_ratio": 1.12,
        },
    }
    report["checks"] += eval_accuracy.judge(config, floor, device, report, 2**31, 5 * 2**30)
    return accuracy_report.closed(report)


def served_accuracy(noise: float = 1.0) -> dict[str, Any]:
    """The script's report of a service whose noise on images is ``noise`` times the floor's."""
    config = eval_served.parse_args(["--model", "/weights", "--output", "served.json", "--images", "2"])
    report = accuracy_report.envelope("served_accuracy", vars(config), "samples", "positions")
    rng = random.Random(1)
    cases, results = accuracy_cases.cases(config.images, 1, config.seed), []
    for case in cases:
        sides: dict[str, list[Mapping[int, float]]] = {"reference": [], "floor": [], "served": []}
        for _ in range(50):
            logits = [rng.gauss(0, 3) for _ in range(12)]
            for side, sigma in (("reference", 0.0), ("floor", 0.01), ("served", 0.01)):
                factor = noise if (side, case.kind) == ("served", "image") else 1.0
                sides[side].append(log_softmax([value + rng.gauss(0, sigma * factor) for value in logits]))
        ids = list(range(30))
        peer = eval_served.Served(
            prompt_ids=ids,
            reply_ids=list(range(21)),
            prompt=sides["served"][:29],
            reply=sides["served"][29:],
            text=(case.drawn or "A reply.").replace("0", "O"),
            finish_reason="stop",
        )
        results.append(eval_served.compare_case(case, ids, peer, sides["reference"], sides["floor"], config.top_k))
    report["samples"] = [one["sample"] for one in results]
    report["positions"] = {
        kind: eval_served.summaries([one for one in results if kind in ("all", one["sample"]["kind"])], 1.0)
        for kind in ("image", "text", "all")
    }
    report["checks"] += eval_served.judge(config, results, report["positions"])
    return accuracy_report.closed(report)


def log_softmax(logits: list[float]) -> dict[int, float]:
    """ln p by token."""
    total = math.log(sum(map(math.exp, logits)))
    return {token: value - total for token, value in enumerate(logits)}


def every_stage(folder: Path) -> dict[str, dict[str, Any]]:
    """A PASS of each, in ``folder`` by its name, the pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        made = {
            "ocr_smoke": ocr_smoke(folder),
            "ocr_bench": ocr_bench(folder),
            "ocr_accuracy": ocr_accuracy(),
            "served_accuracy": served_accuracy(),
            "ocr_quality": ocr_quality(folder),
        }
    for name in ("ocr_accuracy", "served_accuracy"):
        (folder / f"{name}.json").write_text(json.dumps(made[name]), encoding="utf-8")
    return made


def example(folder: Path) -> None:
    """Runs of two hosts, and the fleet's page."""
    expected = ",".join(merge_report.STAGE_SCHEMAS)
    runs = [f"2026010{day}T030405Z" for day in range(1, 7)]
    for host, host_runs in (("npu-01", runs), ("npu-02", runs[-1:])):
        for number, run in enumerate(host_runs, 1):
            output = folder / host / run
            stages = output / "stages"
            made = every_stage(stages)
            load = ["--latency-iters", "40", "--throughput-requests", "120", "--throughput-concurrency", "8"]
            load += ["--sweep", "1,2,4,8,16,32", "--rate", "40", "--rate-requests", "100"]
            made["ocr_bench"] = ocr_bench(stages, *(load if run == runs[-1] else load[:6]), itl=0.002 + 0.0001 * number)
            if host == "npu-02":
                made["ocr_accuracy"] = ocr_accuracy("text.9")
                made["served_accuracy"] = served_accuracy(2.6)
                made["ocr_smoke"] = ocr_smoke(stages, {"A": "4", "E": ""})
                made["ocr_quality"] = ocr_quality(stages, {"table": "<b>|x|</b> ", "line": "字 " * 90, "document": "é"})
            for name, stage in made.items():
                stage["started_at"] = f"2026-01-0{runs.index(run) + 1}T03:04:05.000+00:00"
                (stages / f"{name}.json").write_text(json.dumps(stage), encoding="utf-8")
            deployment = output / "deployment.json"
            deployment.write_text(json.dumps(DEPLOYMENT | {"host": host}), encoding="utf-8")
            places = ["--stages", str(stages), "--deployment", str(deployment), "--output", str(output)]
            merge_report.main([*places, "--expected", expected, "--history", str(folder / host)])
    merge_fleet.main(["--reports", str(folder), "--run", runs[-1], "--hosts", "npu-01,npu-02,npu-03"])


if __name__ == "__main__":
    example(Path(sys.argv[1]))
