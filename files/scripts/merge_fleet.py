"""Put the reports of all hosts of one run beside each other, on the controller.

    python merge_fleet.py --reports reports --run 20260102T030405Z --hosts npu-01,npu-02

Reads ``<reports>/<host>/<run>/report.json`` as merge_report.py wrote it, and writes ``index.html``, ``index.zh.html``
and ``index.json`` to ``<reports>/fleet/<run>``, each in one step.  A named host without a usable report is an ERROR;
without ``--hosts``, those that have a report of the run are taken.  The last line of standard output is JSON:
``{"run", "verdict", "hosts", "report"}``.  Exit status: 0 PASS, 1 FAIL, 2 ERROR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jsonschema

import report_page
from report_files import UnusableError, load, schema
from stage_result import EXIT_STATUS, write_json, write_text

PAGES = {"en": "index.html", "zh": "index.zh.html"}


@dataclass(frozen=True)
class Config:
    """The command line; empty ``hosts`` are those found."""

    reports: Path
    run: str
    hosts: tuple[str, ...]
    output: Path
    template: Path


def run(config: Config) -> dict[str, Any]:
    """The fleet's report, following ``files/schemas/fleet.schema.json``; reads files, writes none."""
    problems: list[str] = []
    hosts: dict[str, dict[str, Any] | None] = {}
    # A link is not followed: `latest` would be a run twice.
    found = (path for path in config.reports.glob(f"*/{config.run}/report.json") if not path.parent.is_symlink())
    for name in config.hosts or sorted(path.parents[1].name for path in found):
        path = config.reports / name / config.run / "report.json"
        try:
            report = load(path, schema("report"))
            if report["host"] not in (name, None):
                raise UnusableError(f"{path.name}: expected host {name!r}, found {report['host']!r}; validate it again")
            hosts[name] = entry(report, os.path.relpath(path.parent, config.output))
        except UnusableError as error:
            hosts[name] = None
            problems.append(f"{name}: {error}")
    if not hosts:
        problems.append(f"{config.reports}: no host has a report of the run {config.run}; run the validation first")
    verdicts = [host["verdict"] for host in hosts.values() if host] + ["ERROR"] * bool(problems)
    return {
        "schema_version": "1.0",
        "run": config.run,
        "verdict": max(verdicts, key=list(EXIT_STATUS).index),
        "hosts": hosts,
        "differences": differences(hosts),
        "problems": problems,
    }


def entry(report: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What the fleet's report says of one host; ``folder`` leads from the fleet's page to the host's."""
    deployment = report["deployment"] or {}
    return {
        "verdict": report["verdict"],
        "folder": folder,
        "engine_note": report["engine_note"],
        "started_at": report["started_at"],
        "finished_at": report["finished_at"],
        "accelerator": deployment.get("accelerator"),
        "image_id": (deployment.get("image") or {}).get("id"),
        "versions": report_page.versions(report),
        "stages": {name: stage["verdict"] if stage else "ERROR" for name, stage in report["stages"].items()},
        "failures": [f"{check['stage']}: {check['id']}" for check in report_page.failures(report)],
        "key_figures": report["key_figures"],
    }


def differences(hosts: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """In what the hosts differ though one fleet should not: image, accelerator, versions."""
    found = []
    for member, label in (("image_id", "image id"), ("accelerator", "accelerator"), ("versions", "versions")):
        met: dict[str, list[str]] = {}
        for name, host in hosts.items():
            if host:
                met.setdefault(told(host[member]), []).append(name)
        if len(met) > 1:
            found.append(f"{label}: " + "; ".join(f"{', '.join(names)}: {value}" for value, names in met.items()))
    return found


def told(value: Any) -> str:
    """A member of a host's entry for a person."""
    if isinstance(value, dict):
        return ", ".join(f"{package} {'/'.join(versions)}" for package, versions in sorted(value.items())) or "none"
    return "unknown" if value is None else str(value)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Put the reports of all hosts of one run beside each other.")
    parser.add_argument("--reports", type=Path, required=True, help="folder with <host>/<run>/report.json")
    parser.add_argument("--run", required=True, help="the run's id")
    parser.add_argument("--hosts", default="", help="comma-separated hosts that must have a report; those found")
    parser.add_argument("--output", type=Path, help="folder to write to; <reports>/fleet/<run>")
    parser.add_argument(
        "--template", type=Path, default=report_page.TEMPLATES / "fleet.html.j2", help="Jinja2 template of the page"
    )
    arguments = parser.parse_args(argv)
    return Config(
        reports=arguments.reports,
        run=arguments.run,
        hosts=tuple(dict.fromkeys(name.strip() for name in arguments.hosts.split(",") if name.strip())),
        output=arguments.output or arguments.reports / "fleet" / arguments.run,
        template=arguments.template,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the verdict; returns the exit status."""
    config = parse_args(argv)
    try:
        fleet = run(config)
        jsonschema.Draft202012Validator(schema("fleet")).validate(fleet)
        texts = {name: report_page.fleet_html(fleet, config.template, language) for language, name in PAGES.items()}
        for name, text in texts.items():
            write_text(config.output / name, text)
        write_json(config.output / "index.json", fleet)
    except (UnusableError, OSError, jinja2.TemplateError, jsonschema.ValidationError) as error:
        print(f"merge_fleet.py: no complete report in {config.output}: {error}", file=sys.stderr)
        print(json.dumps({"run": config.run, "verdict": "ERROR", "hosts": {}, "report": None}))
        return EXIT_STATUS["ERROR"]
    for problem in fleet["problems"]:
        print(f"problem: {problem}")
    verdicts = {name: host["verdict"] if host else "ERROR" for name, host in fleet["hosts"].items()}
    page = str(config.output / PAGES["en"])
    print(json.dumps({"run": config.run, "verdict": fleet["verdict"], "hosts": verdicts, "report": page}))
    return EXIT_STATUS[fleet["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
