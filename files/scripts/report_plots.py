"""The plots of each stage, from the figures that it wrote.  Pure; the texts go through ``translate``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from svg_plots import Bar, Point, Row, Series, bars, lines, ranges, short

Translate = Callable[[str], str]
Stage = Mapping[str, Any]
SIGNS = {"ratio": "%", "x floor": "\N{MULTIPLICATION SIGN}"}  # units that are shown by a sign
UNMEASURED = "\N{EN DASH}"
MARKS = ("p50", "p90", "p95", "p99", "max")


class Plot(NamedTuple):
    """A plot under its title; the caption says what was counted."""

    title: str
    svg: str
    caption: str


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit for a person; a ratio in percent, a multiple of the noise floor as one."""
    if value is None:
        return UNMEASURED
    return f"{short(scaled(value, unit))} {SIGNS.get(unit, unit)}"


def scaled(value: float, unit: str) -> float:
    """The value as it is shown: a ratio in percent."""
    return 100 * value if unit == "ratio" else value


def bench(stage: Stage, _: Translate) -> Iterator[Plot]:
    """Latency by phase; throughput and latency against concurrency."""
    phases = stage["phases"]
    # Of an open loop the latency counts from the intended time, so that a stalled server cannot hide.
    for title, closed, scheduled in (
        (_("End-to-end latency by phase"), "e2e", "e2e_sched"),
        (_("Time to first token by phase"), "ttft", "ttft_sched"),
    ):
        rows = []
        for phase in phases:
            figures = phase["latency_ms"][scheduled if phase["workload"]["mode"] == "open" else closed]
            failed = f", {_('failed')} {figures['failed']}" if figures["failed"] else ""
            label = f"{phase['name']}: n = {figures['n']}{failed}"
            rows.append(Row(label, {name: figures[name] for name in MARKS}))
        if rows:
            caption = _("n requests. A percentile needs 1/(1-q) requests and is absent with fewer: a p99 needs 100.")
            if any(phase["workload"]["mode"] == "open" for phase in phases):
                caption += " " + _("Of an open loop, counted from the intended time of sending.")
            yield Plot(title, ranges(f"{title}. " + "; ".join(row.label for row in rows), rows, unit="ms"), caption)
    if stage["sweep"]:
        yield from sweep(stage, _)


def sweep(stage: Stage, _: Translate) -> Iterator[Plot]:
    """Throughput and latency against concurrency, the saturation marked."""
    by_level = {
        phase["workload"]["concurrency"]: phase for phase in stage["phases"] if phase["name"].startswith("sweep")
    }
    levels = stage["sweep"]["levels"]
    counted = ", ".join(f"{level}: {phase['counts']['ok']}" for level, phase in by_level.items())
    caption = _("Requests answered at each concurrency: {counted}.").format(counted=counted)
    saturation = stage["sweep"]["saturation_concurrency"]
    found = None if saturation is None else (float(saturation), f"{_('saturation')}: {saturation}")
    said = found[1] if found else _("no saturation up to the last level")
    points = []
    for level in levels:
        concurrency, rate = level["concurrency"], level["requests_per_second"]
        n = by_level[concurrency]["counts"]["ok"] if concurrency in by_level else 0
        points.append(Point(concurrency, rate, f"{concurrency}: {quantity(rate, 'requests/s')}, n = {n}"))
    title = _("Throughput against concurrency")
    yield Plot(
        title,
        lines(
            f"{title}. " + "; ".join(point.title for point in points) + f"; {said}",
            [Series(_("throughput"), points)],
            x_label=_("requests at a time"),
            y_label="requests/s",
            mark_at=found,
        ),
        f"{caption} {said[0].upper()}{said[1:]}. "
        + _("Saturation is the smallest concurrency with 95 % of the highest throughput."),
    )
    series = []
    for name in ("p50", "p90", "max"):
        line = []
        for level, phase in by_level.items():
            figures = phase["latency_ms"]["e2e"]
            line.append(
                Point(level, figures[name], f"{level}: {name} {quantity(figures[name], 'ms')}, n = {figures['n']}")
            )
        series.append(Series(name, line))
    if by_level:
        title = _("End-to-end latency against concurrency")
        said = "; ".join(point.title for one in series for point in one.points)
        drawn = lines(f"{title}. {said}", series, x_label=_("requests at a time"), y_label="ms", mark_at=found)
        yield Plot(title, drawn, caption)


def accuracy(stage: Stage, _: Translate) -> Iterator[Plot]:
    """Error by layer beside the noise floor, and their quotient."""
    rows = stage["layers"]
    if not rows:
        return
    names = [row["layer"] for row in rows]
    series = []
    for label, side in ((_("device"), "device"), (_("noise floor (bf16 on the CPU)"), "noise_floor")):
        points = [
            Point(
                index,
                row[side]["rmse"],
                f"{row['layer']}: {label} {quantity(row[side]['rmse'], 'rmse')}, n = {row[side]['values']}",
            )
            for index, row in enumerate(rows)
        ]
        series.append(Series(label, points))
    undrawn = sum(not point.y for one in series for point in one.points)
    title = _("Error by layer against fp32")
    caption = _("rmse over {n} layers in the order of computation, {values} values; no unit.").format(
        n=len(rows), values=f"{sum(row['device']['values'] for row in rows):,}"
    )
    if undrawn:
        caption += " " + _("{n} values are zero or not finite and are not drawn.").format(n=undrawn)
    yield Plot(
        title,
        lines(f"{title}. {caption}", series, x_label=_("layer"), y_label="rmse", y_log=True, x_names=names),
        caption,
    )
    limit = float(stage["arguments"]["fail_ratio"])
    points = [
        Point(index, row["noise_ratio"], f"{row['layer']}: {quantity(row['noise_ratio'], 'x floor')}")
        for index, row in enumerate(rows)
    ]
    title = _("Error in multiples of the noise floor")
    measured = [point for point in points if point.y is not None]
    caption = _(
        "{n} of {all} layers have a quotient; 1 is a healthy bf16 implementation, the limit is {limit}."
    ).format(n=len(measured), all=len(points), limit=short(limit))
    if measured:
        highest = max(measured, key=lambda point: point.y or 0)
        caption += " " + _("Highest: {layer}.").format(layer=highest.title)
    drawn = lines(
        f"{title}. {caption}",
        [Series(_("device / noise floor"), points)],
        x_label=_("layer"),
        y_label=SIGNS["x floor"],
        x_names=names,
        limit=(limit, f"{_('limit')} {short(limit)}"),
    )
    yield Plot(title, drawn, caption)


def served(stage: Stage, _: Translate) -> Iterator[Plot]:
    """KL of the served path beside the noise floor's."""
    positions = stage["positions"]
    if not positions:
        return
    rows = []
    for kind in ("image", "text"):
        for side, label in (("served", _("service")), ("noise_floor", _("noise floor (bf16 on the CPU)"))):
            figures = positions[kind][side]
            name = f"{_(kind)}, {label}: n = {figures['positions']}"
            rows.append(Row(name, {mark: figures[f"kl_{mark}"] for mark in ("mean", "p99", "max")}))
    title = _("KL by position against fp32")
    yield Plot(
        title,
        ranges(f"{title}. " + "; ".join(row.label for row in rows), rows, unit="nat", log=True),
        _("n positions of prompt and reply. The p99 is absent under 100 positions. A zero is not drawn."),
    )


def quality(stage: Stage, _: Translate) -> Iterator[Plot]:
    """Error by kind of page, with its limit."""
    rows = []
    for kind in stage["kinds"]:
        error, threshold = kind["error"], kind["threshold"]
        limit = _("not judged") if threshold is None else f"{_('limit')} {quantity(threshold, 'ratio')}"
        rows.append(
            Bar(
                f"{_(kind['kind'])}: {quantity(error, 'ratio')} ({limit}), n = {kind['replies']}",
                None if error is None else 100 * error,
                None if threshold is None else 100 * threshold,
            )
        )
    if rows:
        title = _("Error by kind of page")
        caption = _("n pages read. The error is a character error rate, or what the table below says.")
        top = None
        if any(row.value is not None and row.value > 100 for row in rows):
            top, caption = 100.0, f"{caption} {_('A bar over 100 % is cut.')}"
        yield Plot(title, bars(f"{title}. " + "; ".join(row.label for row in rows), rows, unit="%", top=top), caption)


PLOTS: dict[str, Callable[[Stage, Translate], Iterator[Plot]]] = {
    "ocr_bench": bench,
    "ocr_accuracy": accuracy,
    "served_accuracy": served,
    "ocr_quality": quality,
}


def stage_plots(stage: Stage, translate: Translate) -> list[Plot]:
    """The plots of a stage that follows its schema."""
    make = PLOTS.get(stage["stage"])
    return list(make(stage, translate)) if make else []


def run_name(name: str) -> str:
    """A run's id as day and minute, or its beginning."""
    found = re.fullmatch(r"\d{4}(\d\d)(\d\d)T(\d\d)(\d\d)\d\dZ", name)
    return "{}-{} {}:{}".format(*found.groups()) if found else name[:11]


def over_runs(report: Mapping[str, Any], figure: Mapping[str, Any], translate: Translate) -> Plot | None:
    """A key figure over the earlier runs that may be compared and this one, the last; None without an earlier one."""
    runs = [run for run in (report["history"] or {"runs": []})["runs"] if figure["id"] in run["figures"]]
    if not runs:
        return None
    taken = [(run["run"], run["figures"][figure["id"]]) for run in runs] + [(report["run"], figure)]
    points = [
        Point(
            index,
            None if entry["value"] is None else scaled(entry["value"], figure["unit"]),
            f"{name}: {quantity(entry['value'], figure['unit'])}, n = {entry['n']}",
        )
        for index, (name, entry) in enumerate(taken)
    ]
    title = translate(figure["label"])
    drawn = lines(
        f"{title}. " + "; ".join(point.title for point in points),
        [Series(f"{len(points)} {translate('runs')}", points)],
        x_label=translate("run (UTC)"),
        y_label=SIGNS.get(figure["unit"], figure["unit"]),
        x_names=[run_name(name) for name, _ in taken],
    )
    return Plot(title, drawn, f"n = {figure['n']} {translate(figure['n_of'])}; {figure['conditions']}")


def fleet(figure_id: str, hosts: Mapping[str, Mapping[str, Any] | None], translate: Translate) -> Plot:
    """A key figure of every host beside each other."""
    rows: list[Bar] = []
    found: list[Mapping[str, Any]] = []
    for name, host in hosts.items():
        figure = next((entry for entry in (host or {}).get("key_figures", []) if entry["id"] == figure_id), None)
        if figure is None:
            rows.append(Bar(f"{name}: {translate('not measured')}", None))
            continue
        found.append(figure)
        value = None if figure["value"] is None else scaled(figure["value"], figure["unit"])
        rows.append(Bar(f"{name}: {quantity(figure['value'], figure['unit'])}, n = {figure['n']}", value))
    first = found[0]
    unit = SIGNS.get(first["unit"], first["unit"])
    title = translate(first["label"])
    conditions = list(dict.fromkeys(entry["conditions"] for entry in found))
    caption = f"n: {translate(first['n_of'])}; " + " | ".join(conditions)
    if len(conditions) > 1:
        caption = translate("Measured under different conditions: do not compare.") + " " + caption
    return Plot(title, bars(f"{title}. " + "; ".join(row.label for row in rows), rows, unit=unit), caption)
