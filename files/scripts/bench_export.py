"""The benchmark in other forms: CSV, the JSON of ``vllm bench serve --save-result``, one line per request."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from bench_client import Exchange, Run
from bench_stats import PERCENTILES, times_of, tokens_of

METRICS = ("ttft", "ttft_sched", "tpot", "itl", "icl", "e2e", "e2e_sched")
STATISTICS = ("n", "mean", "std", *(f"p{q}" for q in PERCENTILES), "max")


def to_csv(phases: Sequence[dict[str, Any]]) -> str:
    """One row per load; an empty field was not measured."""
    rows = []
    for phase in phases:
        row = {
            "phase": phase["name"],
            "mode": phase["workload"]["mode"],
            "concurrency": phase["workload"]["concurrency"],
            "rate": phase["workload"]["rate"],
            "sent": phase["counts"]["sent"],
            "ok": phase["counts"]["ok"],
            "failed": phase["counts"]["failed"],
            "duration_seconds": phase["duration_seconds"],
            "requests_per_second": phase["throughput"]["requests_per_second"],
            "output_tokens_per_second": phase["throughput"]["output_tokens_per_second"],
            "inflight_peak": phase["inflight"]["peak"],
            "goodput_requests_per_second": (phase["goodput"] or {}).get("requests_per_second"),
        }
        for metric in METRICS:
            row |= {
                f"{metric}_{name}_ms" if name != "n" else f"{metric}_n": phase["latency_ms"][metric][name]
                for name in STATISTICS
            }
        rows.append(row)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def to_vllm(report: dict[str, Any], phase: dict[str, Any], run: Run) -> dict[str, Any]:
    """The result of one load with the keys of ``vllm bench serve --save-result --save-detailed`` (vLLM 0.18).

    By this benchmark's definitions: the role chunk is no token, percentiles without the samples for them are null,
    and so is everything when nothing succeeded (there it is 0). ``generated_texts`` is not kept.
    """
    workload, exchanges = phase["workload"], run.exchanges
    good = [exchange for exchange in exchanges if not exchange.error]
    times = {exchange.index: times_of(exchange) for exchange in good}
    seconds, rates = phase["duration_seconds"], phase["throughput"]
    result = {
        "date": report["started_at"],
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": None,
        "model_id": report["arguments"]["model"],
        "tokenizer_id": None,
        "num_prompts": len(exchanges),
        "request_rate": workload["rate"] or "inf",
        "burstiness": {"poisson": 1.0, "constant": None}.get(workload["distribution"] or "poisson"),
        "max_concurrency": workload["concurrency"],
        "duration": seconds,
        "completed": len(good),
        "failed": len(exchanges) - len(good),
        "total_input_tokens": phase["tokens"]["prompt"]["total"],
        "total_output_tokens": phase["tokens"]["completion"]["total"],
        "request_throughput": rates["requests_per_second"],
        "request_goodput": (phase["goodput"] or {}).get("requests_per_second"),
        "output_throughput": rates["output_tokens_per_second"],
        "total_token_throughput": rates["total_tokens_per_second"],
        "input_lens": [exchange.reply.prompt_tokens for exchange in exchanges],
        "output_lens": [0 if exchange.error else tokens_of(exchange) for exchange in exchanges],
        "ttfts": [times[exchange.index]["ttft"] if exchange.index in times else None for exchange in exchanges],
        "itls": [list(exchange.reply.gaps) for exchange in exchanges],
        "latencies": [times[exchange.index]["e2e"] if exchange.index in times else None for exchange in exchanges],
        "start_times": [exchange.sent for exchange in exchanges],
        "errors": [exchange.error or "" for exchange in exchanges],
        "max_concurrent_requests": phase["inflight"]["peak"],
    }
    for name, metric in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "icl"), ("e2el", "e2e")):
        figures = phase["latency_ms"][metric]
        result |= {
            f"mean_{name}_ms": figures["mean"],
            f"median_{name}_ms": figures["p50"],
            f"std_{name}_ms": figures["std"],
            f"p99_{name}_ms": figures["p99"],
        }
    return result


def to_jsonl(phases: Sequence[tuple[str, Run]]) -> str:
    """One line per request, times in seconds after the start of its load."""
    return "".join(
        json.dumps({"phase": name, **request_line(exchange, run.started)}, allow_nan=False) + "\n"
        for name, run in phases
        for exchange in run.exchanges
    )


def request_line(exchange: Exchange, start: float) -> dict[str, Any]:
    """One request; null is what did not happen."""
    reply = exchange.reply

    def after(time: float | None) -> float | None:
        return None if time is None else round(time - start, 6)

    return {
        "index": exchange.index,
        "error": exchange.error,
        "detail": exchange.explain() or None,
        "t_sched": after(exchange.scheduled),
        "t_send": after(exchange.sent),
        "t_first": after(reply.first),
        "t_last": after(reply.last),
        "t_done": after(exchange.done),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "content_chunks": reply.chunks,
        "finish_reason": reply.finish_reason,
        "gaps": [round(gap, 6) for gap in reply.gaps],
        "gap_tokens": list(reply.gap_tokens),
    }
