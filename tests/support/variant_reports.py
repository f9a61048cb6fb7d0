"""Merged reports with what the comparison of variants reads of them, made by hand."""

from __future__ import annotations

from typing import Any

import stage_results

RUN = "20260102T030405Z"
NOTE = "The engine is the CPU lab engine."


def report(bench: dict[str, Any] | None, verdict: str = "PASS") -> dict[str, Any]:
    """A merged report with what the comparison reads of it."""
    deployment = stage_results.DEPLOYMENT | {"release": "0123456789abcdef"}
    return {
        "schema_version": "1.1",
        "run": RUN,
        "host": "npu-01",
        "verdict": verdict,
        "engine_note": NOTE,
        "started_at": None,
        "finished_at": None,
        "deployment": deployment,
        "key_figures": [],
        "stages": {"ocr_bench": bench},
        "history": None,
        "problems": [] if bench else ["ocr_bench: no result"],
    }


def phase(name: str, concurrency: int, rate: float | None = None, **figures: Any) -> dict[str, Any]:
    told = {"requests": 1.25, "tokens": 160.0, "p50": 700.0, "p99": None, "n": 20, "failed": 0} | figures
    return {
        "name": name,
        "workload": {"concurrency": concurrency, "rate": rate},
        "throughput": {"requests_per_second": told["requests"], "output_tokens_per_second": told["tokens"]},
        "latency_ms": {"e2e": {"p50": told["p50"], "p99": told["p99"], "n": told["n"]}},
        "counts": {"failed": told["failed"]},
    }


def bench(*phases: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": "PASS", "phases": list(phases)}
