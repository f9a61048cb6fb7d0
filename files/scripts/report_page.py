"""The report as pages: English and Chinese HTML from one template, and a short Markdown text for a ticket.

The English texts are in the templates; ``templates/report.zh.json`` maps each to its Chinese one.  What the stages'
scripts wrote (expected, found, fix) is shown as they wrote it.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

import report_plots
from report_figures import FIGURES
from svg_plots import short

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
LANGUAGES = {"en": "report.html", "zh": "report.zh.html"}  # and the names of their pages
PICTURE_BYTES = 3_000_000  # of all pictures of a page together, before base64
SAMPLES = 4  # of a kind, the worst
COMPARED_CHARACTERS = 4000  # of a text
PNG = b"\x89PNG\r\n\x1a\n"

STAGE_TITLES = {
    "ocr_smoke": "Smoke test",
    "ocr_bench": "Benchmark",
    "ocr_quality": "OCR quality",
    "served_accuracy": "Accuracy of the served path",
    "ocr_accuracy": "Accuracy of the model on the device",
    "baseline": "Comparison with the baseline",
}


class Span(NamedTuple):
    """A piece of a text, and whether the other text differs there."""

    text: str
    differs: bool


class Pictures(NamedTuple):
    """The pictures of a page as data URIs by the names that the stages gave them, and why others are absent."""

    found: Mapping[str, str]
    absent: Mapping[str, str]


def compared(expected: str, found: str, *, spaces: bool = False) -> tuple[list[Span], list[Span]]:
    """Both texts in pieces, with what differs marked; white space is normalised unless ``spaces`` count, as in code.

    The marks are those of one shortest series of edits (Levenshtein 1966), which the character error rate counts.
    Only the first ``COMPARED_CHARACTERS`` of each are shown.
    """
    a, b = (text.strip("\n").rstrip() if spaces else " ".join(text.split()) for text in (expected, found))
    long_a, long_b = a[COMPARED_CHARACTERS:], b[COMPARED_CHARACTERS:]
    a, b = a[:COMPARED_CHARACTERS], b[:COMPARED_CHARACTERS]
    left, right = [], []
    for edit in Levenshtein.opcodes(a, b):
        left.append(Span(a[edit.src_start : edit.src_end], edit.tag != "equal"))
        right.append(Span(b[edit.dest_start : edit.dest_end], edit.tag != "equal"))
    for side, rest in ((left, long_a), (right, long_b)):
        if rest:
            side.append(Span(f" … (+{len(rest)})", False))
    return [span for span in left if span.text], [span for span in right if span.text]


def worst(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples to show: those without a reading, then those with the largest error."""

    def badness(sample: Mapping[str, Any]) -> float:
        return float("inf") if sample["error"] is None else sample["error"]

    return sorted(samples, key=badness, reverse=True)[:SAMPLES]


def pictures(stage: Mapping[str, Any] | None, folder: Path) -> Pictures:
    """The pictures of the shown samples of ``ocr_quality``, as many as ``PICTURE_BYTES`` allows, every kind in turn.

    A picture has to be a PNG inside ``folder``; anything else is named with the reason and not read.
    """
    shown = [worst(kind["samples"]) for kind in (stage or {"kinds": []})["kinds"]]
    names = [samples[rank]["picture"] for rank in range(SAMPLES) for samples in shown if rank < len(samples)]
    found, absent, left = {}, {}, PICTURE_BYTES
    for name in names:
        try:
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                absent[name] = "outside the stages' folder"
                continue
            if not path.is_file():
                absent[name] = "not beside the result"
                continue
            if path.stat().st_size > left:
                absent[name] = "left out to keep the page small"
                continue
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            absent[name] = str(error)
            continue
        if not content.startswith(PNG):
            absent[name] = "no PNG"
            continue
        left -= len(content)
        found[name] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Pictures(found, absent)


def flag_lines(command: Sequence[str]) -> list[str]:
    """A command, quoted for a shell, with every flag and its values on a line of their own."""
    found: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return [shlex.join(words) for words in found if words]


def failures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks that did not pass, each with its stage."""
    return [
        check | {"stage": name}
        for name, stage in report["stages"].items()
        if stage
        for check in stage.get("checks", [])
        if check["verdict"] != "PASS"
    ]


def versions(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The versions of the engine's packages that the stages met; more than one where they differ."""
    met: dict[str, list[str]] = {}
    for stage in report["stages"].values():
        for package, version in ((stage or {}).get("engine") or {}).items():
            if version is not None and version not in met.setdefault(package, []):
                met[package].append(version)
    return {package: found for package, found in met.items() if found}


def earlier(report: Mapping[str, Any], figure: Mapping[str, Any]) -> dict[str, Any] | None:
    """The median of a figure over the earlier runs, and this run's change from it; None without one."""
    runs = (report["history"] or {"runs": []})["runs"]
    values = sorted(
        run["figures"][figure["id"]]["value"]
        for run in runs
        if run["figures"].get(figure["id"], {"value": None})["value"] is not None
    )
    if not values:
        return None
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    change = None if figure["value"] is None or not median else figure["value"] / median - 1
    return {"median": median, "runs": len(values), "change": change}


def chinese() -> dict[str, str]:
    """English text to Chinese text."""
    return dict(json.loads((TEMPLATES / "report.zh.json").read_text(encoding="utf-8")))


def translator(language: str) -> report_plots.Translate:
    """From the English text to that of the language; a text without a translation stays English."""
    if language == "en":
        return lambda text: text
    messages = chinese()
    return lambda text: messages.get(text, text)


@lru_cache
def environment(folder: Path) -> jinja2.Environment:
    """Where the templates of ``folder`` and what they include are compiled, once for all languages."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(folder), jinja2.FileSystemLoader(TEMPLATES)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_page(template: Path, language: str, **names: Any) -> str:
    """A self-contained page.  Raises ``jinja2.TemplateError``, also for a template that cannot be read."""
    return (
        environment(template.parent)
        .get_template(template.name)
        .render(
            **names,
            _=translator(language),
            language=language,
            stage_titles=STAGE_TITLES,
            quantity=report_plots.quantity,
            short=short,
        )
    )


def report_html(report: Mapping[str, Any], template: Path, language: str, shown: Pictures) -> str:
    """The page of a run.  Raises as ``html_page`` does."""
    translate = translator(language)

    def safe(plots: Iterable[report_plots.Plot]) -> list[report_plots.Plot]:
        return [plot._replace(svg=Markup(plot.svg)) for plot in plots]

    def history_plots(stage: str) -> list[report_plots.Plot]:
        own = [figure for figure in report["key_figures"] if figure["stage"] == stage]
        return safe(plot for figure in own if (plot := report_plots.over_runs(report, figure, translate)))

    return html_page(
        template,
        language,
        report=report,
        pictures=shown,
        compared=compared,
        earlier=lambda figure: earlier(report, figure),
        failures=failures(report),
        flag_lines=flag_lines,
        history_plots=history_plots,
        stage_plots=lambda stage: safe(report_plots.stage_plots(stage, translate)),
        versions=versions(report),
        worst=worst,
    )


def fleet_html(fleet: Mapping[str, Any], template: Path, language: str) -> str:
    """The page of all hosts of a run.  Raises as ``html_page`` does."""
    translate = translator(language)
    met = {figure["id"]: figure for host in fleet["hosts"].values() if host for figure in host["key_figures"]}
    order = list(FIGURES)
    plots: dict[str, list[report_plots.Plot]] = {}
    for figure in sorted(met.values(), key=lambda entry: order.index(entry["stage"])):
        plot = report_plots.fleet(figure["id"], fleet["hosts"], translate)
        plots.setdefault(figure["stage"], []).append(plot._replace(svg=Markup(plot.svg)))
    return html_page(template, language, fleet=fleet, plots=plots)


def markdown(text: object) -> str:
    """A text that Markdown shows as it is, on one line."""
    line = " ".join(html.escape(str(text), quote=False).split())
    # An underscore inside a word means nothing in Markdown.
    return re.sub(r"([\\`*{}\[\]|~#@]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report in short, for a ticket.  Raises ``jinja2.TemplateError``."""
    escape: Callable[[object], object] = lambda value: value if isinstance(value, Markup) else markdown(value)  # noqa: E731
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md.j2").render(
        report=report, failures=failures(report), versions=versions(report), quantity=report_plots.quantity
    )
