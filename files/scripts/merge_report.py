"""Merge the stage results of one validation run into report.json and report.html, on the controller.

    python merge_report.py --stages DIR --deployment deployment.json --output DIR --expected ocr_smoke

``--deployment -`` reads standard input, so that what is hidden in the report is never on the disk either.
The last line of standard output is JSON: ``{"host", "run", "verdict", "report"}``.  Exit status: 0 PASS, 1 FAIL,
2 ERROR (a stage is missing or unusable, or nothing could be written).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jsonschema

import redaction

FILES = Path(__file__).resolve().parents[1]
SCHEMAS = FILES / "schemas"
TEMPLATE = FILES.parent / "templates" / "report.html.j2"
STANDARD_INPUT = Path("-")
EXIT_STATUS = {"PASS": 0, "FAIL": 1, "ERROR": 2}  # in order of severity


@dataclass(frozen=True)
class Config:
    """The command line; ``expected`` names the stages without which there is no PASS."""

    stages: Path
    deployment: Path
    output: Path
    expected: tuple[str, ...]
    run: str
    template: Path


class UnusableError(Exception):
    """A file that cannot be used; the text names it, the cause and the fix."""


class Span(NamedTuple):
    """A piece of a text, and whether the other text differs there."""

    text: str
    differs: bool


def run(config: Config) -> dict[str, Any]:
    """The merged report, following ``files/schemas/report.schema.json``; reads files, writes none."""
    problems: list[str] = []
    stages: dict[str, dict[str, Any] | None] = {}
    for name in dict.fromkeys([*config.expected, *sorted(path.stem for path in config.stages.glob("*.json"))]):
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
    return merge(stages, deployment, problems, config.run)


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
        "schema_version": "1.0",
        "run": run_name,
        "host": deployment["host"] if deployment else None,
        "verdict": max(verdicts, key=list(EXIT_STATUS).index),
        "engine_note": engine_note(deployment),
        # All are UTC, so that the order of the texts is the order of the times.
        "started_at": min((stage["started_at"] for stage in usable), default=None),
        "finished_at": max((stage["finished_at"] for stage in usable), default=None),
        "deployment": deployment,
        "stages": dict(stages),
        "problems": list(problems),
    }


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
    """A stage result that follows the schema and bears the name of its file.  Raises ``UnusableError``."""
    stage = load(path, schema("stage"))
    if stage["stage"] != path.stem:
        raise UnusableError(f"{path.name}: expected stage {path.stem!r}, found {stage['stage']!r}; rename the file")
    return stage


def schema(name: str) -> dict[str, Any]:
    """A schema of ``files/schemas``.  Raises ``UnusableError``."""
    return dict(json.loads(read(SCHEMAS / f"{name}.schema.json")))


def load(path: Path, rules: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that follows the schema ``rules``.  Raises ``UnusableError``."""
    try:
        data = json.loads(read(path), parse_constant=_refuse_constant)
    except ValueError as error:
        raise UnusableError(f"{path.name}: expected JSON, found other text ({error}); write it again") from error
    if fault := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(rules).iter_errors(data)):
        raise UnusableError(
            f"{path.name}: against the schema at {fault.json_path}: {fault.message[:300]}; "
            "write it with the scripts of this version"
        )
    return dict(data)


def read(path: Path) -> str:
    """The text of a file, of standard input for ``-``.  Raises ``UnusableError``."""
    if path == STANDARD_INPUT:
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UnusableError(f"{path.name}: expected in {path.parent}, found nothing; run what writes it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(f"{path.name}: cannot be read ({error}); check the file and its permissions") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; what was not measured is null")


def compared(expected: str, found: str) -> tuple[list[Span], list[Span]]:
    """Both texts in pieces, white space normalised, with what differs marked (Ratcliff/Obershelp, ``difflib``)."""
    a, b = " ".join(expected.split()), " ".join(found.split())
    left, right = [], []
    for tag, a_from, a_to, b_from, b_to in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left.append(Span(a[a_from:a_to], tag != "equal"))
        right.append(Span(b[b_from:b_to], tag != "equal"))
    return [span for span in left if span.text], [span for span in right if span.text]


def render(report: Mapping[str, Any], template: str) -> str:
    """The report as one self-contained HTML page.  Raises ``jinja2.TemplateError``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        compared=compared, shell_quoted=shlex.join, without_npu=without_npu(report["deployment"])
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # Chinese stays readable, the order is kept
    return environment.from_string(template).render(report=report)


def write(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing.  Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Merge stage results into report.json and report.html.")
    parser.add_argument("--stages", type=Path, required=True, help="folder with one <stage>.json per stage")
    parser.add_argument("--deployment", type=Path, required=True, help="JSON that says what was deployed; - for stdin")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the report to")
    parser.add_argument("--expected", default="ocr_smoke", help="comma-separated stages that must be there and pass")
    parser.add_argument("--run", help="name of the run; the name of the output folder by default")
    parser.add_argument("--template", type=Path, default=TEMPLATE, help="Jinja2 template of the page")
    arguments = parser.parse_args(argv)
    expected = tuple(name.strip() for name in arguments.expected.split(",") if name.strip())
    name = arguments.run or arguments.output.resolve().name
    return Config(arguments.stages, arguments.deployment, arguments.output, expected, name, arguments.template)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files and print the verdict; returns the exit status."""
    config = parse_args(argv)
    try:
        report = run(config)
        jsonschema.Draft202012Validator(schema("report")).validate(report)
        write(config.output / "report.json", json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
        page = config.output / "report.html"
        write(page, render(report, read(config.template)))
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
