"""Smoke test of a served GLM-OCR: four checks, one of them reading freshly drawn text from images.

    python smoke.py --base-url http://127.0.0.1:8000 --model glm-ocr --max-model-len 8192 --output smoke.json

Exit status: 0 every check passed, 1 a check failed, 2 could not measure (service unreachable).  The JSON is
written in all three cases; what was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import chat_api
import ocr_lines
from stage_result import EXIT_STATUS, engine_versions, finite, now, positive, write_json
from text_metrics import character_error_rate

TEXT_PROMPT = "请用一句话介绍 GLM-OCR 模型。"
TEXT_MAX_TOKENS = 128
IMAGE_PROMPT = "Text Recognition:"
IMAGE_MAX_TOKENS = 64
BODY_CHARACTERS = 2000

FIX_UNREACHABLE = "Start the service, or correct --base-url, then look at its log if the port stays closed."
FIX_SCRIPT = "Ship the whole files/scripts folder, fonts included, and check that Pillow and requests are installed."
FIX_LOG = "Look at the service's log for the cause, then restart it."
FIX_STATUS = {
    401: "Set VLLM_API_KEY in the environment of this script to the key of the service.",
    404: "Make --model equal to the service's --served-model-name, and --base-url its root without /v1.",
    503: "The engine is dead: look at the service's log, then restart it.",
}
FIX_IMAGE = (
    "If only this check fails, the vision path is at fault. On an NPU suspect the rotary embedding of vllm-ascend "
    "0.18.0rc1 (issues 6925 and 12765): mount a corrected one (vllm_service_overlays). Otherwise check the weights."
)


@dataclass(frozen=True)
class Config:
    """The command line; ``scale`` multiplies the 28 px line height, ``max_cer`` is a ratio."""

    base_url: str
    model: str
    max_model_len: int
    output: Path
    lines: int
    scale: int
    max_cer: float
    seed: int
    timeout: float


class CheckFailure(Exception):
    """A check that did not hold: what was found, and what to do about it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


@dataclass
class Probe:
    """The requests of one check and what came back; ``last`` is None while the latest has no reply."""

    config: Config
    last: chat_api.Response | None = None
    latencies_ms: list[float] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def send(self, path: str, payload: dict[str, Any] | None = None) -> str:
        """The body of a 200 reply.  Raises ``CheckFailure`` for another status, and as ``chat_api.send`` does."""
        url = self.config.base_url.rstrip("/") + path
        self.last = None
        self.last = response = chat_api.send(url, payload, timeout_seconds=self.config.timeout)
        self.latencies_ms.append(response.latency_ms)
        if response.status != 200:
            message = chat_api.server_message(response.body)
            raise CheckFailure(f"HTTP {response.status}: {message}", FIX_STATUS.get(response.status, FIX_LOG))
        return response.body

    def chat(self, prompt: str, image_url: str | None = None, *, max_tokens: int) -> chat_api.Reply:
        """The model's reply.  Raises as ``send`` and ``chat_api.parse_reply`` do."""
        payload = chat_api.chat_request(self.config.model, prompt, image_url, max_tokens=max_tokens)
        return chat_api.parse_reply(self.send("/v1/chat/completions", payload))


def check_health(probe: Probe) -> str:
    """``GET /health`` answers 200."""
    probe.send("/health")
    return "HTTP 200"


def check_models(probe: Probe) -> str:
    """The served model and its context length, in tokens, are the configured ones."""
    config = probe.config
    lengths = {entry["id"]: entry.get("max_model_len") for entry in json.loads(probe.send("/v1/models"))["data"]}
    if config.model not in lengths:
        raise CheckFailure(
            f"only {', '.join(map(repr, lengths)) or 'no model'} is served",
            f"Serve with --served-model-name {config.model}, or pass the served name to --model.",
        )
    found = f"{config.model}, max_model_len {lengths[config.model]}"
    if lengths[config.model] != config.max_model_len:
        raise CheckFailure(found, f"Serve with --max-model-len {config.max_model_len}, or correct it here.")
    return found


def check_text(probe: Probe) -> str:
    """Any non-empty reply will do: free chat is not what the model was trained for."""
    reply = probe.chat(TEXT_PROMPT, max_tokens=TEXT_MAX_TOKENS)
    if not reply.text.strip():
        raise CheckFailure(f"an empty reply (finish_reason {reply.finish_reason})", FIX_LOG)
    return f"{len(reply.text)} characters"


def check_image(probe: Probe) -> str:
    """Freshly drawn lines are read within the error rate; one request per line."""
    config = probe.config
    rng = random.Random(config.seed)
    for text in [ocr_lines.readable_text(rng) for _ in range(config.lines)]:
        image_url = ocr_lines.data_url(ocr_lines.render(text, scale=config.scale))
        reply = probe.chat(IMAGE_PROMPT, image_url, max_tokens=IMAGE_MAX_TOKENS)
        probe.samples.append(
            {
                "expected": text,
                "found": reply.text,
                "cer": character_error_rate([text], [normalised(reply.text)]),
                "latency_ms": probe.latencies_ms[-1],
                "finish_reason": reply.finish_reason,
            }
        )
    truths = [sample["expected"] for sample in probe.samples]
    cer = character_error_rate(truths, [normalised(sample["found"]) for sample in probe.samples])
    found = f"character error rate {'unknown' if cer is None else format(cer, '.4f')} on {len(truths)} lines"
    if cer is None or cer > config.max_cer:
        raise CheckFailure(found, FIX_IMAGE)
    return found


def normalised(text: str) -> str:
    """Runs of white space become one space: a line break is no misreading."""
    return " ".join(text.split())


def run_check(identity: str, expected: str, check: Callable[[Probe], str], config: Config) -> dict[str, Any]:
    """One entry of ``checks``; never raises.  ``latency_ms`` is the mean over the check's complete replies."""
    probe = Probe(config)
    fix = None
    try:
        verdict, found = "PASS", check(probe)
    except CheckFailure as error:
        verdict, found, fix = "FAIL", str(error), error.fix
    except chat_api.UnreachableError as error:
        verdict, found, fix = "ERROR", str(error), FIX_UNREACHABLE
    except chat_api.NoReplyError as error:
        verdict, found, fix = "FAIL", str(error), FIX_LOG
    except Exception as error:  # a report, not a traceback, whatever the service answers
        # Without a reply it was this script that broke, and the service was not measured.
        verdict = "FAIL" if probe.last else "ERROR"
        found = f"{'unexpected reply' if probe.last else 'the check itself broke'}: {error!r}"
        fix = "Make sure that vLLM itself, and no other server, answers at --base-url." if probe.last else FIX_SCRIPT
    last = probe.last
    entry: dict[str, Any] = {
        "id": identity,
        "verdict": verdict,
        "expected": expected,
        "found": found,
        "latency_ms": round(statistics.fmean(probe.latencies_ms), 1) if probe.latencies_ms else None,
        "http_status": last.status if last else None,
    }
    if verdict != "PASS":
        entry |= {"response_body": last.body[:BODY_CHARACTERS] if last else None, "fix": fix}
    if check is check_image:
        entry["samples"] = probe.samples
    return entry


def run(config: Config) -> dict[str, Any]:
    """Every check, whatever the others found; the result follows ``files/schemas/stage.schema.json``."""
    started_at = now()
    checks = [
        run_check("health", "HTTP 200", check_health, config),
        run_check("models", f"{config.model}, max_model_len {config.max_model_len}", check_models, config),
        run_check("text", "a non-empty reply", check_text, config),
        run_check(
            "image",
            f"character error rate at most {config.max_cer:g} on {config.lines} lines",
            check_image,
            config,
        ),
    ]
    return {
        "schema_version": "1.0",
        "stage": "ocr_smoke",
        "verdict": max((check["verdict"] for check in checks), key=list(EXIT_STATUS).index),
        "started_at": started_at,
        "finished_at": now(),
        "arguments": asdict(config) | {"output": str(config.output)},
        "engine": engine_versions(),
        "checks": checks,
    }


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Smoke test of a served GLM-OCR.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="root of the service, without /v1")
    parser.add_argument("--model", default="glm-ocr", help="served model name")
    parser.add_argument("--max-model-len", type=positive, default=8192, help="context length in tokens")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--lines", type=positive, default=3, help="lines of text to draw and have read")
    parser.add_argument("--scale", type=positive, default=4, help="size of the drawing in multiples of 28 px a line")
    parser.add_argument("--max-cer", type=finite, default=0.1, help="highest accepted character error rate, a ratio")
    parser.add_argument("--seed", type=int, default=None, help="of the drawn texts; new in each run by default")
    parser.add_argument("--timeout", type=finite, default=120.0, help="seconds to wait for one reply")
    arguments = vars(parser.parse_args(argv))
    if arguments["seed"] is None:
        arguments["seed"] = secrets.randbelow(2**32)
    return Config(**arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print one line per check, write the JSON; returns the exit status."""
    config = parse_args(argv)
    report = run(config)
    for check in report["checks"]:
        latency = "" if check["latency_ms"] is None else f" ({check['latency_ms']:.0f} ms)"
        problem = "" if check["verdict"] == "PASS" else f"; expected: {check['expected']}; fix: {check['fix']}"
        print(f"{check['verdict']:5} {check['id']:6} {check['found']}{latency}{problem}")
    try:
        write_json(config.output, report)
    except OSError as error:
        print(f"smoke.py: cannot write {config.output} ({error}); pass a writable --output", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    passed = sum(check["verdict"] == "PASS" for check in report["checks"])
    print(f"ocr_smoke: {report['verdict']} ({passed}/{len(report['checks'])} checks)")
    return EXIT_STATUS[report["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
