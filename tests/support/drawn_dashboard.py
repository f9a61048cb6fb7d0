"""Draws the dashboard's panels with what a Prometheus answers to their queries: tests have no Grafana.

It shows that the queries give curves with the units and names that the panels say, not how Grafana draws them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from html import escape
from typing import Any

from rendering import PROJECT
from svg_plots import Point, Series, lines

STYLE = (PROJECT / "templates" / "report_style.css").read_text()
#: For each unit of Grafana's, what to multiply by and what to call it.
UNITS = {
    "percentunit": (100.0, "%"),
    "percent": (1.0, "%"),
    "s": (1.0, "s"),
    "reqps": (1.0, "1/s"),
    "celsius": (1.0, "°C"),
    "d": (1.0, "d"),
}
POINTS = 30

Ask = Callable[..., Any]


def drawn(dashboard: dict[str, Any], ask: Ask, seconds: float) -> str:
    """A page of all panels, of the last ``seconds``; ``ask`` is Prometheus' API."""
    end = time.time()
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(dashboard['title'])}</title><style>{STYLE}\n"
        "body{max-width:none} main{display:grid;grid-template-columns:repeat(24,1fr);gap:8px}"
        " section{border:1px solid var(--line);padding:6px;min-width:0} h3{margin:0;font-size:13px}</style><main>"
        + "".join(panel_of(panel, ask, end, seconds) for panel in dashboard["panels"])
        + "</main>"
    )


def panel_of(panel: dict[str, Any], ask: Ask, end: float, seconds: float) -> str:
    if panel["type"] == "row":
        return f'<h2 style="grid-column:1/-1">{escape(panel["title"])}</h2>'
    body = number(panel, ask) if panel["type"] == "stat" else curve(panel, ask, end, seconds)
    width = panel["gridPos"]["w"]
    return f'<section style="grid-column:span {width}"><h3>{escape(panel["title"])}</h3>{body}</section>'


def number(panel: dict[str, Any], ask: Ask) -> str:
    found = ask("query", query=expression(panel["targets"][0]))["result"]
    return f'<p style="font-size:28px;margin:4px 0">{escape(found[0]["value"][1] if found else "no data")}</p>'


def curve(panel: dict[str, Any], ask: Ask, end: float, seconds: float) -> str:
    factor, unit = UNITS.get(panel["fieldConfig"]["defaults"].get("unit", ""), (1.0, ""))
    step = seconds / POINTS
    at = [end - seconds + step * (index + 1) for index in range(POINTS)]
    series = []
    for target in panel["targets"]:
        query = {"query": expression(target), "start": str(at[0]), "end": str(at[-1]), "step": str(step)}
        for found in ask("query_range", **query)["result"]:
            name = legend(target["legendFormat"], found["metric"])
            values = {round(float(moment) - at[0]): float(value) * factor for moment, value in found["values"]}
            measured = [values.get(round(moment - at[0]), math.nan) for moment in at]
            points = [Point(x, None if math.isnan(y) else y, name) for x, y in enumerate(measured)]
            series.append(Series(name, points))
    if not any(point.y is not None for one in series for point in one.points):
        return "<p>no data</p>"
    names = [f"-{round(end - moment)} s" for moment in at]
    return lines(panel["title"], series, x_label="", y_label=unit, x_names=names)


def legend(form: str, labels: dict[str, str]) -> str:
    """As Grafana fills it in."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), form).strip()


def expression(target: dict[str, Any]) -> str:
    return str(target["expr"]).replace("$host", ".*")
