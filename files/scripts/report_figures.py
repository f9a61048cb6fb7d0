"""The key figures of a run, and the same ones of earlier runs.

A figure is ``{id, stage, label, value, unit, n, n_of, better, conditions}``: ``value`` is null when it was not
measured, ``n`` counts the ``n_of`` that it was made of.  Figures of two runs may be compared when their ``conditions``
are equal and the same kind of accelerator computed them.  No formula is here: every value is one that a stage wrote,
except the share of lines without an error and the quotients of the stages' own checks (``tensor_metrics.ratio``).

Units: ms; requests/s; tokens/s; requests (a number at a time); ratio (a share or an error rate, 1 is all); x floor
(multiples of the noise floor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensor_metrics import ratio

HISTORY_RUNS = 20  # of the last ones
NOISE_LAYERS = ("logits", "hidden_states")  # have a figure of their own; the others' worst is one


def figure(
    identity: str, label: str, value: float | None, unit: str, n: int, n_of: str, better: str, **conditions: Any
) -> dict[str, Any]:
    """One key figure; the identity begins with the stage."""
    return {
        "id": identity,
        "stage": identity.split(".")[0],
        "label": label,
        "value": value,
        "unit": unit,
        "n": n,
        "n_of": n_of,
        "better": better,
        "conditions": " ".join(f"{name}={told(value)}" for name, value in conditions.items() if value is not None),
    }


def told(value: Any) -> str:
    """A condition's value as a word."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def some(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """These arguments of a stage, for its conditions."""
    return {name: arguments.get(name) for name in names}


def smoke(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines read without an error: the pooled rate is in the check's own text."""
    for check in stage["checks"]:
        if samples := check.get("samples"):
            right = sum(sample["cer"] == 0 for sample in samples)
            conditions = some(stage["arguments"], "scale") | {"lines": len(samples)}
            yield figure(
                "ocr_smoke.right", "Lines read right", right / len(samples), "ratio", len(samples), "lines", "higher",
                **conditions,
            )  # fmt: skip


def bench(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The document's figures, time to first token, and where the sweep saturates."""
    work = stage["workload"] or {}
    base = some(work, "kind", "input_tokens", "max_tokens", "ignore_eos", "distinct")
    base |= {"pixels": work["image"]["pixels"]} if work.get("image") else {}
    for phase in stage["phases"]:
        load, latency, ok = phase["workload"], phase["latency_ms"], phase["counts"]["ok"]
        conditions = base | some(load, "requests", "concurrency", "rate")
        if phase["name"] == "latency":
            for name, key, statistic, label in (
                ("ttft_mean", "ttft", "mean", "Time to first token, mean"),
                ("ttft_p50", "ttft", "p50", "Time to first token, median"),
                ("tpot_mean", "tpot", "mean", "Time per output token, mean"),
                ("latency_mean", "e2e", "mean", "Latency, mean"),
                ("latency_p50", "e2e", "p50", "Latency, median"),
            ):
                distribution = latency[key]
                yield figure(
                    f"ocr_bench.{name}", label, distribution[statistic], "ms", distribution["n"], "requests", "lower",
                    **conditions,
                )  # fmt: skip
            yield figure(
                "ocr_bench.latency_p99", "Latency, 99th percentile", latency["e2e"]["p99"], "ms", latency["e2e"]["n"],
                "requests", "lower", **conditions,
            )  # fmt: skip
        if phase["name"] == "throughput":
            for name, label, unit in (
                ("requests_per_second", "Throughput", "requests/s"),
                ("output_tokens_per_second", "Token throughput", "tokens/s"),
            ):
                value = phase["throughput"][name]
                yield figure(f"ocr_bench.{name}", label, value, unit, ok, "requests", "higher", **conditions)
            blocks = phase["throughput"].get("blocks") or {"requests_per_second": []}
            yield figure(
                "ocr_bench.throughput_median", "Throughput, median of blocks",
                blocks.get("median_requests_per_second"), "requests/s", len(blocks["requests_per_second"]), "blocks",
                "higher", **conditions,
            )  # fmt: skip
    if sweep := stage["sweep"]:
        levels = [level["concurrency"] for level in sweep["levels"]]
        sent = sum(phase["counts"]["ok"] for phase in stage["phases"] if phase["name"].startswith("sweep_"))
        conditions = base | {"levels": levels}
        rates = [level["requests_per_second"] for level in sweep["levels"]]
        yield figure(
            "ocr_bench.sweep_best", "Highest throughput of the sweep",
            max((rate for rate in rates if rate is not None), default=None), "requests/s", sent, "requests", "higher",
            **conditions,
        )  # fmt: skip
        yield figure(
            "ocr_bench.saturation", "Saturation, requests at a time", sweep["saturation_concurrency"], "requests",
            len(levels), "levels", "higher", **conditions,
        )  # fmt: skip


def accuracy(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Multiples of the noise floor, and agreement."""
    if not stage["layers"] or not stage["positions"]:
        return
    conditions = some(stage["arguments"], "device", "images", "scale", "decided_margin")
    by_name = {row["layer"]: row for row in stage["layers"]}
    for name, label in zip(NOISE_LAYERS, ("Error of the logits", "Error of the hidden states"), strict=True):
        if row := by_name.get(name):
            yield figure(
                f"ocr_accuracy.noise_{name}", label, row["noise_ratio"], "x floor", row["device"]["values"], "values",
                "lower", **conditions,
            )  # fmt: skip
    inner = [row["noise_ratio"] for row in stage["layers"] if row["layer"] not in NOISE_LAYERS]
    # A layer without a ratio is worse than any: then there is no worst one to name.
    worst = None if None in inner else max(inner, default=None)
    yield figure(
        "ocr_accuracy.noise_layers", "Error of the worst layer", worst, "x floor", len(inner), "layers", "lower",
        **conditions,
    )  # fmt: skip
    label = "First token agreed on, device"
    yield agreement("ocr_accuracy.top1", label, stage["positions"]["device"], conditions)


def served(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The served path in multiples of the noise floor, images and text apart, and agreement."""
    if not stage["positions"]:
        return
    conditions = some(stage["arguments"], "images", "scale", "top_k", "max_tokens", "decided_margin")
    for kind, label in (("image", "Noise of the served path, images"), ("text", "Noise of the served path, text")):
        side, floor = stage["positions"][kind]["served"], stage["positions"][kind]["noise_floor"]
        value = ratio(side["kl_noise"], floor["kl_noise"])
        yield figure(
            f"served_accuracy.kl_{kind}", label, value, "x floor", side["positions"], "positions", "lower", **conditions
        )
    label = "First token agreed on, served path"
    yield agreement("served_accuracy.top1", label, stage["positions"]["all"]["served"], conditions)


def agreement(identity: str, label: str, summary: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The share of first tokens agreed on where the reference is sure."""
    n = summary["decided_positions"]
    return figure(identity, label, summary["decided_top1_agreement"], "ratio", n, "positions", "higher", **conditions)


def quality(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The error of each kind of page."""
    conditions = some(stage["arguments"], "samples", "max_tokens", "omnidocbench")
    for kind in stage["kinds"]:
        yield figure(
            f"ocr_quality.{kind['kind']}", f"Error of {kind['kind']}", kind["error"], "ratio", kind["replies"],
            "replies", "lower", **conditions,
        )  # fmt: skip


FIGURES: dict[str, Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]] = {
    "ocr_smoke": smoke,
    "ocr_bench": bench,
    "ocr_quality": quality,
    "served_accuracy": served,
    "ocr_accuracy": accuracy,
}
"""By stage, in the order of the report."""


def key_figures(stages: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """The key figures of the usable stages, which follow their schemas."""
    return [entry for name, make in FIGURES.items() if (stage := stages.get(name)) for entry in make(stage)]


def history(report: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]], skipped: Sequence[str]) -> dict[str, Any]:
    """What ``earlier`` reports of the same host say of this report's figures, the oldest first.

    ``figures`` of a run holds those that may be compared; ``skipped`` says which reports could not be used and why.
    """
    own = {entry["id"]: entry for entry in report["key_figures"]}
    own_accelerator = (report["deployment"] or {}).get("accelerator")
    runs = []
    for other in earlier:
        deployment = other["deployment"] or {}
        comparable = {
            entry["id"]: {"value": entry["value"], "n": entry["n"]}
            for entry in other["key_figures"]
            if (mine := own.get(entry["id"]))
            and mine["conditions"] == entry["conditions"]
            and deployment.get("accelerator") == own_accelerator
        }
        runs.append(
            {
                "run": other["run"],
                "started_at": other["started_at"],
                "verdict": other["verdict"],
                "image_id": (deployment.get("image") or {}).get("id"),
                "figures": comparable,
            }
        )
    runs.sort(key=lambda run: (run["started_at"] or "", run["run"]))
    return {"runs": runs[-HISTORY_RUNS:], "older": max(0, len(runs) - HISTORY_RUNS), "skipped": list(skipped)}
