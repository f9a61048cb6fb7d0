"""Promote runs to the baseline of a group of hosts, and compare a later run with it.

    python baseline.py --reports reports --hosts npu-01,npu-02 --output inventory/baselines/ascend910.json [--runs 5]

Takes the last ``--runs`` runs of each host in which every ``--require``d figure was measured, and writes
``files/schemas/baseline.schema.json``.  ``merge_report.py --baseline FILE`` compares a run with it.

The method, for each key figure (``report_figures``), one run against k of the baseline:

- s is the standard deviation of the k values, of their logarithms for rates, times and multiples of the noise floor.  A
  run is the unit, so that what differs between runs counts.  Inside a run, throughput is the median of successive
  blocks (``bench_stats.blocks``), so that a disturbance shorter than half the load does not move it.
- The worsening w is the distance of the run's value from the mean of the k, positive for worse.
- With 99 % confidence an unchanged run lies within m = t(0.99, k-1) s sqrt(1 + 1/k) of that mean: the one-sided
  prediction interval for one more value of a normal sample (Hahn and Meeker, Statistical Intervals, 1991, 4.7).
- FAIL when even w - m is beyond the tolerance: a change that is large enough to matter and cannot be noise.
- A worsening of tolerance + m + t(0.95, k-1) s sqrt(1 + 1/k) is so caught in about 95 of 100 runs: ``detectable``.  A
  figure whose runs vary so much that it is over the rule's ``catch`` is left out, with the reason: a check that could
  not fail would be none.

Exit status: 0 written, 2 not (runs that cannot be promoted, a required figure that cannot be judged).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from report_files import UnusableError, load, schema
from stage_result import EXIT_STATUS, now, positive, write_json

STAGE = "baseline"  # the name under which a report holds the comparison
CONFIDENCE, POWER = 0.99, 0.95
MIN_RUNS = 5  # under that, t(0.99) is so large that next to nothing is detectable
REQUIRED = "ocr_bench.throughput_median"


@dataclass(frozen=True)
class Rule:
    """What a unit's figures may worsen by, and the worsening that must be seen: shares, or the figure's own unit."""

    tolerance: float
    catch: float
    relative: bool = True


RULES: Mapping[str, Rule] = {
    REQUIRED: Rule(0.03, 0.10),
    "ocr_bench.latency_p50": Rule(0.10, 1.00),
    "ocr_bench.ttft_p50": Rule(0.10, 1.00),
    "x floor": Rule(0.10, 0.50),
    "ratio": Rule(0.02, 0.10, relative=False),
}
"""By figure or by unit.  Of rates and times the medians alone: a mean takes in every disturbance of the host, so that
an unchanged run would alarm.  The saturation moves in steps.  Latencies are judged down to a doubling: on a noisy host
that is still worth a red run, and what is caught stands beside each figure."""


def rule_of(figure: Mapping[str, Any]) -> Rule | None:
    """The rule of a figure; None for one that is not judged."""
    return RULES.get(figure["id"]) or RULES.get(figure["unit"])


@cache
def student_t(probability: float, freedom: int) -> float:
    """The quantile of Student's t for ``probability`` from 0.5 to below 1.

    The distribution is Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole degrees of freedom; by bisection.
    """

    def cumulative(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        # The terms of the series: cos^(2j) or cos^(2j+1), each with the factors before it.
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for step in range(2 + odd, freedom + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (step - 1) / step
        series = math.sin(angle) * total
        return 0.5 + ((angle + series) / math.pi if odd else series / 2)

    low, high = 0.0, 1.0
    while cumulative(high) < probability:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cumulative(middle) < probability else (low, middle)
    return high


@dataclass(frozen=True)
class Noise:
    """A figure's values in the baseline, on the scale on which they are compared."""

    center: float
    margin: float
    """What one more unchanged run stays within, with the confidence."""
    power: float
    """What a worsening must be over tolerance and margin to be caught."""
    limit: float
    """The tolerance on this scale."""
    relative: bool
    sign: int

    @classmethod
    def of(cls, figure: Mapping[str, Any]) -> Noise:
        """From a figure of the baseline; ``values`` are two or more, above 0 where relative."""
        relative, tolerance, sign = figure["relative"], figure["tolerance"], 1 if figure["better"] == "lower" else -1
        scaled = [math.log(value) if relative else value for value in figure["values"]]
        spread = statistics.stdev(scaled)
        if not relative and figure["better"] == "higher":
            # A share of n that are right or wrong: runs that agree exactly still do not tell more than one in n.
            spread = max(spread, 1 / max(1, min(figure["n"])))
        spread *= math.sqrt(1 + 1 / len(scaled))
        margin, power = (student_t(level, len(scaled) - 1) * spread for level in (CONFIDENCE, POWER))
        limit = sign * math.log(1 + sign * tolerance) if relative else tolerance
        return cls(statistics.fmean(scaled), margin, power, limit, relative, sign)

    def worsening(self, value: float) -> float:
        """How much worse than the baseline, on its scale; a rate of 0 is infinitely worse."""
        scaled = value if not self.relative else math.log(value) if value > 0 else -math.inf
        return self.sign * (scaled - self.center)

    def told(self, worsening: float) -> float:
        """A worsening as a share of the baseline, or in the figure's own unit."""
        return self.sign * (math.exp(self.sign * worsening) - 1) if self.relative else worsening

    @property
    def mean(self) -> float:
        """In the figure's unit: the geometric mean of a relative rule, otherwise the arithmetic one."""
        return math.exp(self.center) if self.relative else self.center

    @property
    def detectable(self) -> float:
        """The worsening that is caught in about 95 of 100 runs, as ``told``."""
        return self.told(self.limit + self.margin + self.power)


def promote(reports: Sequence[Mapping[str, Any]], group: str, required: Sequence[str] = (REQUIRED,)) -> dict[str, Any]:
    """The baseline made of these merged reports.  Raises ``UnusableError`` with what to do."""
    if len(reports) < MIN_RUNS:
        raise UnusableError(
            f"expected at least {MIN_RUNS} runs to tell noise from change, found {len(reports)} that measured "
            f"{', '.join(required)}; run validate.yml {MIN_RUNS - len(reports)} times more"
        )
    for report in reports:
        name = f"the run {report['run']} of {report['host']}"
        # What an earlier baseline says of a run must not keep the next one from being made.
        stages = [stage["verdict"] if stage else "ERROR" for key, stage in report["stages"].items() if key != STAGE]
        if report["problems"] or report["deployment"] is None or set(stages) != {"PASS"}:
            raise UnusableError(f"{name} did not pass: expected PASS in every stage; mend what its report names, rerun")
    identities = [(report["host"], report["run"]) for report in reports]
    if len(set(identities)) < len(identities):
        raise UnusableError("expected different runs, found one twice; name each run once")
    accelerators = sorted({report["deployment"]["accelerator"] for report in reports})
    images = sorted({str(report["deployment"]["image"]["id"]) for report in reports})
    for label, met in (("accelerator", accelerators), ("image", images)):
        if len(met) > 1:
            raise UnusableError(
                f"expected one {label} in all runs, found {', '.join(met)}; run validate.yml {MIN_RUNS} times on one, "
                "or name fewer runs"
            )
    figures, left_out = [], []
    for identity in dict.fromkeys(entry["id"] for report in reports for entry in report["key_figures"]):
        entries: list[Mapping[str, Any]] = [
            entry for report in reports for entry in report["key_figures"] if entry["id"] == identity
        ]
        if not (rule := rule_of(entries[0])):
            continue
        made, reason = gathered(entries, len(reports), rule)
        if reason is None:
            figures.append(made)
        else:
            left_out.append({"id": identity, "reason": reason})
    reasons = {entry["id"]: entry["reason"] for entry in left_out}
    for identity in required:
        if identity not in {figure["id"] for figure in figures}:
            raise UnusableError(
                f"{identity} cannot be judged: {reasons.get(identity, 'not measured, or a mean, a tail or a step')}"
            )
    return {
        "schema_version": "1.0",
        "group": group,
        "promoted_at": now(),
        "accelerator": accelerators[0],
        "image_id": images[0],
        "runs": [{"host": report["host"], "run": report["run"]} for report in reports],
        "figures": figures,
        "left_out": left_out,
    }


def gathered(entries: Sequence[Mapping[str, Any]], runs: int, rule: Rule) -> tuple[dict[str, Any], str | None]:
    """A figure of the baseline from its entries in the ``runs``, and why it cannot be judged; None when it can."""
    first = entries[0]
    figure = {key: first[key] for key in ("id", "label", "unit", "better", "n_of", "conditions")}
    measured = [entry for entry in entries if entry["value"] is not None]
    figure |= {"values": [entry["value"] for entry in measured], "n": [entry["n"] for entry in measured]}
    if len(measured) < runs:
        return figure, f"measured in {len(measured)} of {runs} runs"
    if len({entry["conditions"] for entry in entries}) > 1:
        return figure, "the runs measured it under different conditions; run validate.yml again with the present ones"
    if rule.relative and min(figure["values"]) <= 0:
        return figure, "a change in percent needs values above 0"
    figure |= {"tolerance": rule.tolerance, "relative": rule.relative}
    noise = Noise.of(figure)
    figure["detectable"] = round(noise.detectable, 6)
    if noise.detectable > rule.catch:
        return figure, (
            f"the runs vary too much: {percent(noise.detectable)} % worse is the least that would be seen, and "
            f"{percent(rule.catch)} % must be; keep the host quiet, promote more runs, have each make more requests"
        )
    return figure, None


def percent(share: float) -> str:
    """A share in percent, or a difference of shares in points."""
    return f"{100 * share:.3g}"


def compare(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    """The comparison as a stage result, ``files/schemas/comparison.schema.json``.

    Of the stages that ``report`` has; None when the baseline has figures of none of them, or nothing was measured.
    """
    judged = [figure for figure in baseline["figures"] if figure["id"].split(".")[0] in report["stages"]]
    if not judged or report["finished_at"] is None:
        return None
    accelerator = (report["deployment"] or {}).get("accelerator")
    checks: list[dict[str, Any]] = []
    if accelerator != baseline["accelerator"]:
        checks.append(
            {
                "id": "accelerator",
                "verdict": "ERROR",
                "expected": baseline["accelerator"],
                "found": accelerator,
                "fix": "Figures of another accelerator do not compare: give this group a baseline of its own.",
            }
        )
    else:
        own = {entry["id"]: entry for entry in report["key_figures"]}
        checks += [check(figure, own.get(figure["id"])) for figure in judged]
    return {
        "schema_version": "1.0",
        "stage": STAGE,
        "verdict": max((entry["verdict"] for entry in checks), key=list(EXIT_STATUS).index),
        # When it was measured, not when it was compared.
        "started_at": report["finished_at"],
        "finished_at": report["finished_at"],
        "baseline": {key: baseline[key] for key in ("group", "promoted_at", "image_id", "runs", "left_out")},
        "confidence": CONFIDENCE,
        "checks": checks,
    }


def check(figure: Mapping[str, Any], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """One figure of the baseline against the run's, None when the run has it not."""
    noise, runs = Noise.of(figure), len(figure["values"])
    unit = "%" if noise.relative else "percentage points"
    entry: dict[str, Any] = {
        "id": figure["id"],
        "verdict": "ERROR",
        "expected": f"{shown(noise.mean, figure['unit'])} (mean of {runs} runs), and at most "
        f"{percent(figure['tolerance'])} {unit} worse",
        "label": figure["label"],
        "unit": figure["unit"],
        "value": None,
        "n": 0,
        "n_of": figure["n_of"],
        "baseline": noise.mean,
        "baseline_n": runs,
        "relative": noise.relative,
        "worse": None,
        "surely_worse": None,
        "tolerance": figure["tolerance"],
        "detectable": noise.detectable,
    }
    fix = "Look at why the stage did not measure it, or promote a baseline without it."
    if found is None or found["value"] is None:
        return entry | {"found": None, "fix": fix}
    entry |= {"value": found["value"], "n": found["n"]}
    if (found["conditions"], found["unit"]) != (figure["conditions"], figure["unit"]):
        fix = "Measure as the baseline's runs did, or promote runs under the new conditions."
        difference = f"other conditions: {found['conditions']} instead of {figure['conditions']}"
        return entry | {"found": difference, "fix": fix}
    worsening = noise.worsening(found["value"])
    worse, surely = noise.told(worsening), noise.told(worsening - noise.margin)
    failed = worsening - noise.margin > noise.limit
    entry |= {
        "verdict": "FAIL" if failed else "PASS",
        "found": f"{shown(found['value'], figure['unit'])} (n = {found['n']} {found['n_of']}): "
        + f"{percent(abs(worse))} {unit} {'worse' if worse > 0 else 'better'}"
        + (f", at least {percent(surely)} with {100 * CONFIDENCE:g} % confidence" if failed else ""),
        "worse": worse,
        "surely_worse": surely,
    }
    fix = "Run validate.yml again: noise does not repeat. If it does, compare image, flags and host with those then."
    return entry | {"fix": fix} if failed else entry


def shown(value: float, unit: str) -> str:
    """A value with its unit."""
    return f"{percent(value)} %" if unit == "ratio" else f"{value:.4g} {unit}"


def last_runs(folder: Path, host: str, count: int, required: Sequence[str]) -> list[dict[str, Any]]:
    """The last ``count`` reports in ``folder`` of the host with every required figure, the oldest first.

    Reports that cannot be read (another version wrote them) are passed over.
    """
    found = []
    for path in folder.glob("*/report.json"):
        if path.parent.is_symlink():  # `latest` is a run already
            continue
        try:
            report = load(path, schema("report"))
        except UnusableError:
            continue
        measured = {entry["id"] for entry in report["key_figures"] if entry["value"] is not None}
        if report["host"] == host and measured.issuperset(required):
            found.append(report)
    return sorted(found, key=lambda report: (report["started_at"], report["run"]))[-count:]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the baseline; the last line is JSON: ``{"baseline", "runs", "figures"}``.  Returns the exit status."""
    parser = argparse.ArgumentParser(description="Promote runs to the baseline of a group of hosts.")
    parser.add_argument("--reports", type=Path, required=True, help="folder with <host>/<run>/report.json")
    parser.add_argument("--hosts", required=True, help="comma-separated hosts whose runs are promoted")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, named after the group")
    parser.add_argument("--runs", type=positive, default=MIN_RUNS, help="last runs of each host")
    parser.add_argument("--require", default=REQUIRED, help="comma-separated figures that must be judged")
    options = parser.parse_args(argv)
    required = [name.strip() for name in options.require.split(",") if name.strip()]
    try:
        reports = [
            report
            for host in options.hosts.split(",")
            for report in last_runs(options.reports / host, host, options.runs, required)
        ]
        made = promote(reports, options.output.stem, required)
        write_json(options.output, made)
    except (UnusableError, OSError) as error:
        print(f"baseline.py: no baseline was written to {options.output}: {error}", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    for figure in made["figures"]:
        noise = Noise.of(figure)
        print(
            f"{figure['id']}: {shown(noise.mean, figure['unit'])}, n = {len(figure['values'])} runs; tolerance "
            f"{percent(figure['tolerance'])} %, {percent(figure['detectable'])} % worse is caught"
        )
    for entry in made["left_out"]:
        print(f"{entry['id']}: not judged, {entry['reason']}")
    print(json.dumps({"baseline": str(options.output), "runs": len(reports), "figures": len(made["figures"])}))
    return EXIT_STATUS["PASS"]


if __name__ == "__main__":
    sys.exit(main())
