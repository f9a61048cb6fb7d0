"""Merge the stage results of one validation run into one verdict and its report, on the controller.

    python merge_report.py --stages DIR --deployment deployment.json --output DIR --expected ocr_smoke

Writes ``report.html`` and ``report.zh.html`` for people, ``report.md`` for a ticket and ``report.json`` for programs,
each in one step.  ``--deployment -`` reads standard input, so that what is hidden in the report is never on the disk
either.  ``--latest LINK`` is moved to the run, also to one that came to nothing.  ``--history DIR`` is the folder of
the host's runs: earlier key figures are shown beside this run's.  ``--baseline FILE``, of ``baseline.py``, adds the
comparison with it as one more stage.

The last line of standard output is JSON: ``{"host", "run", "verdict", "report"}``.  Exit status: 0 PASS, 1 FAIL,
2 ERROR (a stage is missing or unusable, or nothing could be written).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jsonschema

import baseline
import redaction
import report_figures
import report_page
from report_files import UnusableError, follow, load, schema
from stage_result import EXIT_STATUS, link, write_json, write_text

STAGE_SCHEMAS = {
    "ocr_smoke": None,
    "ocr_bench": "bench",
    "ocr_quality": "ocr_quality",
    "served_accuracy": "accuracy",
    "ocr_accuracy": "accuracy",
}
"""The stages in the order of the report, and the schema that each follows beside ``stage``, which has the smoke's."""


@dataclass(frozen=True)
class Config:
    """The command line; ``expected`` names the stages without which there is no PASS."""

    stages: Path
    deployment: Path
    output: Path
    expected: tuple[str, ...]
    run: str
    history: Path | None
    baseline: Path | None
    latest: Path | None
    template: Path


def run(config: Config) -> dict[str, Any]:
    """The merged report, following ``files/schemas/report.schema.json``; reads files, writes none."""
    problems: list[str] = []
    stages: dict[str, dict[str, Any] | None] = {}
    for name in in_order({*config.expected, *(path.stem for path in config.stages.glob("*.json"))}):
        try:
            stages[name] = load_stage(config.stages / f"{name}.json")
        except UnusableError as error:
            stages[name] = None
            problems.append(str(error))
    if not stages:
        problems.append(f"{config.stages}: no stage was expected and none was found; run the validation first")
    deployment = None
    try:
        deployment = masked(load(config.deployment, schema("report")["$defs"]["deployment"]))
    except UnusableError as error:
        problems.append(str(error))
    problems += stale(deployment)
    compared_with = None
    if config.baseline:
        try:
            compared_with = load(config.baseline, schema("baseline"))
        except UnusableError as error:
            problems.append(f"baseline: {error}; playbooks/baseline_promote.yml writes it")
    report = merge(stages, deployment, problems, config.run)
    if compared_with and (compared := baseline.compare(report, compared_with)):
        report = merge(stages | {baseline.STAGE: compared}, deployment, problems, config.run)
    if config.history:
        report["history"] = history(config.history, report)
    return report


def stale(deployment: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the image that runs: nothing, or that it is not the one that the inventory names."""
    image = deployment["image"] if deployment else {}
    if not image.get("id") or "wanted_id" not in image or image["id"] == image["wanted_id"]:
        return []
    wanted = f"the image {image['wanted_id']}" if image["wanted_id"] else "no image on the host"
    return [
        f"deployment: expected the image that {image['name']} means, found a service of {image['id']}, and the name "
        f"means {wanted}; run deploy.yml, or name the image that runs in glm_ocr_image"
    ]


def in_order(names: set[str]) -> list[str]:
    """The stages in the order of the report, unknown ones last."""
    known = list(STAGE_SCHEMAS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def merge(
    stages: Mapping[str, dict[str, Any] | None],
    deployment: dict[str, Any] | None,
    problems: Sequence[str],
    run_name: str,
) -> dict[str, Any]:
    """The report of valid ``stages`` (None: missing or unusable); any problem makes it an ERROR."""
    usable = [stage for stage in stages.values() if stage]
    verdicts = [stage["verdict"] for stage in usable] + ["ERROR"] * bool(problems)
    return {
        "schema_version": "1.1",
        "run": run_name,
        "host": deployment["host"] if deployment else None,
        "verdict": max(verdicts, key=list(EXIT_STATUS).index),
        "engine_note": engine_note(deployment),
        # All are UTC, so that the order of the texts is the order of the times.
        "started_at": min((stage["started_at"] for stage in usable), default=None),
        "finished_at": max((stage["finished_at"] for stage in usable), default=None),
        "deployment": deployment,
        "key_figures": report_figures.key_figures(stages),
        "stages": dict(stages),
        "history": None,
        "problems": list(problems),
    }


def history(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the other runs in ``folder/*/report.json`` say of this report's figures; only earlier ones of its host."""
    earlier, skipped = [], []
    # `latest` is a link to a run: links are not followed, so that none is counted twice.
    for path in sorted(path for path in folder.glob("*/report.json") if not path.parent.is_symlink()):
        try:
            other = load(path, schema("report"))
        except UnusableError as error:
            skipped.append(f"{path.parent.name}/{error}")
            continue
        if other["host"] != report["host"]:
            skipped.append(f"{path.parent.name}/{path.name}: of the host {other['host']}")
        elif other["run"] != report["run"] and (other["started_at"] or "") < (report["started_at"] or ""):
            earlier.append(other)
    return report_figures.history(report, earlier, skipped)


def engine_note(deployment: Mapping[str, Any] | None) -> str:
    """What did the computing, so that a lab result cannot pass for one of an NPU."""
    if deployment is None:
        return "The engine is unknown: the deployment record is missing or unusable."
    if without_npu(deployment):
        return "The engine is the CPU lab engine: no NPU was involved. Nothing here speaks of speed or accuracy on one."
    return f"Accelerator: {deployment['accelerator']}."


def without_npu(deployment: Mapping[str, Any] | None) -> bool:
    """True when the deployment says that it has no accelerator."""
    return deployment is not None and deployment["accelerator"].lower().startswith("none")


def masked(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """The deployment without the values of secrets: environment names such as ``VLLM_API_KEY``, and ``--api-key``."""
    variables = deployment["environment"].items()
    environment = {name: redaction.MASK if redaction.SECRET_NAME.search(name) else value for name, value in variables}
    return {**deployment, "environment": environment, "command": redaction.masked(deployment["command"])}


def load_stage(path: Path) -> dict[str, Any]:
    """A stage result that follows its schemas and bears the name of its file.  Raises ``UnusableError``."""
    if path.stem not in STAGE_SCHEMAS:
        known = ", ".join(STAGE_SCHEMAS)
        raise UnusableError(f"{path.name}: expected one of the stages {known}; remove the file or correct the name")
    stage = load(path, schema("stage"))
    if stage["stage"] != path.stem:
        raise UnusableError(f"{path.name}: expected stage {path.stem!r}, found {stage['stage']!r}; rename the file")
    if own := STAGE_SCHEMAS[path.stem]:
        follow(path, stage, schema(own))
    return stage


def rendered(report: Mapping[str, Any], config: Config) -> Iterator[tuple[str, str]]:
    """The report's pages: file name and text.  Raises ``jinja2.TemplateError`` and ``OSError``."""
    shown = report_page.pictures(report["stages"].get("ocr_quality"), config.stages)
    for language, name in report_page.LANGUAGES.items():
        yield name, report_page.report_html(report, config.template, language, shown)
    yield "report.md", report_page.report_markdown(report)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Merge stage results into one verdict and its report.")
    parser.add_argument("--stages", type=Path, required=True, help="folder with one <stage>.json per stage")
    parser.add_argument("--deployment", type=Path, required=True, help="JSON that says what was deployed; - for stdin")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the report to")
    parser.add_argument("--expected", default="ocr_smoke", help="comma-separated stages that must be there and pass")
    parser.add_argument("--run", help="name of the run; the name of the output folder by default")
    parser.add_argument("--history", type=Path, help="folder with the host's runs, <run>/report.json each")
    parser.add_argument("--baseline", type=Path, help="the baseline to compare with, of baseline.py; none by default")
    parser.add_argument("--latest", type=Path, help="link beside the output folder to move to it")
    parser.add_argument(
        "--template", type=Path, default=report_page.TEMPLATES / "report.html.j2", help="Jinja2 template of the page"
    )
    arguments = parser.parse_args(argv)
    expected = tuple(name.strip() for name in arguments.expected.split(",") if name.strip())
    name = arguments.run or arguments.output.resolve().name
    return Config(
        stages=arguments.stages,
        deployment=arguments.deployment,
        output=arguments.output,
        expected=expected,
        run=name,
        history=arguments.history,
        baseline=arguments.baseline,
        latest=arguments.latest,
        template=arguments.template,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the verdict; returns the exit status."""
    config = parse_args(argv)
    page = config.output / report_page.LANGUAGES["en"]
    try:
        if config.latest:
            link(config.latest, config.output)
        report = run(config)
        jsonschema.Draft202012Validator(schema("report")).validate(report)
        # All are rendered before the first is written.
        for name, text in list(rendered(report, config)):
            write_text(config.output / name, text)
        write_json(config.output / "report.json", report)
    except (UnusableError, OSError, jinja2.TemplateError, jsonschema.ValidationError) as error:
        print(f"merge_report.py: no complete report in {config.output}: {error}", file=sys.stderr)
        print(json.dumps({"host": None, "run": config.run, "verdict": "ERROR", "report": None}))
        return EXIT_STATUS["ERROR"]
    for problem in report["problems"]:
        print(f"problem: {problem}")
    for name, stage in report["stages"].items():
        print(f"{name}: {stage['verdict'] if stage else 'ERROR'}")
    print(json.dumps({"host": report["host"], "run": report["run"], "verdict": report["verdict"], "report": str(page)}))
    return EXIT_STATUS[report["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
