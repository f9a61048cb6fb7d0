"""How the two accuracy stages say what they found: checks, a line of progress, the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stage_result import EXIT_STATUS, engine_versions, now, write_json


def envelope(stage: str, arguments: dict[str, Any], *members: str) -> dict[str, Any]:
    """The result of a stage that has measured nothing yet; ``members`` are its own, null until measured."""
    started_at = now()
    return {
        "schema_version": "1.0",
        "stage": stage,
        "verdict": "ERROR",
        "started_at": started_at,
        "finished_at": started_at,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "engine": engine_versions(),
        **dict.fromkeys(members),
        "checks": [],
    }


def check(
    identity: str, passed: bool, expected: str, found: str, fix: str, warning: str | None = None
) -> dict[str, Any]:
    """One entry of ``checks``; the ``fix`` is kept for a failure, the ``warning`` for a pass."""
    entry = {"id": identity, "verdict": "PASS" if passed else "FAIL", "expected": expected, "found": found}
    return entry | ({"warning": warning} if warning else {}) if passed else entry | {"fix": fix}


def unmeasured(identity: str, expected: str, found: str, fix: str) -> dict[str, Any]:
    """The entry of ``checks`` that says why there is no measurement."""
    return {"id": identity, "verdict": "ERROR", "expected": expected, "found": found, "fix": fix}


def closed(report: dict[str, Any]) -> dict[str, Any]:
    """The same report with the verdict of its worst check."""
    report["verdict"] = max((entry["verdict"] for entry in report["checks"]), key=list(EXIT_STATUS).index)
    report["finished_at"] = now()
    return report


def shown(value: float | None) -> str:
    """A number for a person."""
    return "not measured" if value is None else f"{value:.6g}"


def progress(text: str) -> None:
    """What is being done, on one line of a terminal; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def finish(report: dict[str, Any], output: Path, script: str) -> int:
    """Print one line per check, write the JSON; returns the exit status."""
    progress("")
    for entry in report["checks"]:
        problem = "" if entry["verdict"] == "PASS" else f"; expected: {entry['expected']}; fix: {entry['fix']}"
        print(f"{entry['verdict']:5} {entry['id']:19} {entry['found']}{problem}")
        if "warning" in entry:
            print(f"WARN  {entry['id']:19} {entry['warning']}")
    try:
        write_json(output, report)
    except OSError as error:
        print(f"{script}: cannot write {output} ({error}); pass a writable --output", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    passed = sum(entry["verdict"] == "PASS" for entry in report["checks"])
    print(f"{report['stage']}: {report['verdict']} ({passed}/{len(report['checks'])} checks)")
    return EXIT_STATUS[report["verdict"]]
