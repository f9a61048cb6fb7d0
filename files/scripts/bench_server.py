"""What vLLM says about itself before and after a load: ``/metrics``, beside the client's figures."""

from __future__ import annotations

import re
from typing import Any

LINE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? ([^ ]+)$", re.MULTILINE)
REASON = re.compile(r'finished_reason="(\w+)"')
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total")
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)

Metrics = dict[str, float]


def parse(text: str) -> Metrics | None:
    """The ``vllm:`` samples of a Prometheus page, summed over engines; None when there are none."""
    found: Metrics = {}
    for metric, labels, value in LINE.findall(text):
        reason = REASON.search(labels) if metric == "request_success_total" else None
        name = f"{metric}.{reason[1]}" if reason else metric
        if not name.endswith("_bucket"):
            found[name] = found.get(name, 0.0) + float(value)
    return found or None


def comparison(before: Metrics | None, after: Metrics | None) -> dict[str, Any] | None:
    """What the load changed: counters as differences, histograms as the mean of what was added, gauges as they were.

    None without both readings, and for a metric that one of them lacks.
    """
    if before is None or after is None:
        return None

    def added(name: str) -> float | None:
        # A labelled counter appears with its first event; one that shrank belongs to a restarted server.
        if name not in after:
            return None
        difference = after[name] - before.get(name, 0.0)
        return difference if difference >= 0 else None

    def mean_ms(name: str) -> float | None:
        total, number = added(f"{name}_sum"), added(f"{name}_count")
        return round(1000 * total / number, 4) if number and total is not None else None

    finished = sorted(name for name in after if name.startswith("request_success_total."))
    return {
        "gauges_before": {name: before.get(name) for name in GAUGES},
        "gauges_after": {name: after.get(name) for name in GAUGES},
        "added": {name: added(name) for name in COUNTERS},
        "finished": {name.partition(".")[2]: added(name) for name in finished},
        "mean_ms": {name.removesuffix("_seconds"): mean_ms(name) for name in HISTOGRAMS},
    }
