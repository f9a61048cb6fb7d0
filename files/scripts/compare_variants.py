"""Put the benchmarks of a host's variants beside each other, on the controller.

    python compare_variants.py --folder reports/compare/npu-01/20260102T030405Z --host npu-01 --run 20260102T030405Z

Reads what came of each variant from standard input, ``{"variants": [{"name", "variables", "failure"}],
"restore_failure"}``, and ``<folder>/<name>/<host>/latest/report.json`` as merge_report.py wrote it.  Writes
``comparison.json``, which follows ``files/schemas/variants.schema.json``, and ``comparison.md``, each in one step, and
prints the latter.  What was not measured is null.  Exit status: 0 PASS, 1 FAIL, a variant failed, 2 ERROR, the
inventory's choice is not back.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from redaction import MASK, SECRET_NAME
from report_files import STANDARD_INPUT, UnusableError, load, schema
from stage_result import EXIT_STATUS, write_json, write_text

STAGE = "ocr_bench"
COLUMNS = {
    "requests_per_second": "Requests/s",
    "output_tokens_per_second": "Output tokens/s",
    "latency_p50_ms": "Latency p50, ms",
    "latency_p99_ms": "Latency p99, ms",
    "samples": "n",
    "failed": "failed",
}
HEADER = ("Variant", "Load", *COLUMNS.values())
NOTE = (
    "n requests were answered; latency is until the last token. -: not measured, or too few for the percentile: a p99"
    " needs 100. One run each: a difference may be noise. Nothing here was compared with another host."
)


def compared(told: Mapping[str, Any], folder: Path, host: str, run: str) -> dict[str, Any]:
    """The comparison; reads the variants' reports, writes nothing."""
    variants = [variant(outcome, folder / outcome["name"] / host / "latest") for outcome in told["variants"]]
    not_back = told["restore_failure"]
    failed = any(one["failure"] for one in variants)
    return {
        "schema_version": "1.0",
        "run": run,
        "host": host,
        "verdict": "ERROR" if not_back else "FAIL" if failed else "PASS",
        "restore_failure": not_back,
        "variants": variants,
    }


def variant(outcome: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What came of one variant.  One that failed may have been measured all the same, for instance below a limit."""
    failure, report = outcome["failure"], None
    try:
        report = load(folder / "report.json", schema("report"))
    except UnusableError as error:
        failure = failure or str(error)
    bench = report["stages"].get(STAGE) if report else None
    if not bench:
        failure = failure or f"expected a result of {STAGE}, found none: {folder / 'report.json'}"
    deployment = (report["deployment"] if report else None) or {}
    return {
        "name": outcome["name"],
        "variables": shown(outcome["variables"]),
        "failure": failure,
        "release": deployment.get("release"),
        "engine_note": report["engine_note"] if report else None,
        "loads": [load_of(phase) for phase in bench["phases"]] if bench else [],
    }


def shown(value: Any) -> Any:
    """``value`` without what a name marks as a secret."""
    if isinstance(value, dict):
        return {name: MASK if SECRET_NAME.search(name) else shown(item) for name, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list) else value


def load_of(phase: Mapping[str, Any]) -> dict[str, Any]:
    """One phase of the benchmark, as bench.schema.json has it."""
    throughput, latency = phase["throughput"], phase["latency_ms"]["e2e"]
    return {
        "name": phase["name"],
        "concurrency": phase["workload"]["concurrency"],
        "rate": phase["workload"]["rate"],
        "requests_per_second": throughput["requests_per_second"],
        "output_tokens_per_second": throughput["output_tokens_per_second"],
        "latency_p50_ms": latency["p50"],
        "latency_p99_ms": latency["p99"],
        "samples": latency["n"],
        "failed": phase["counts"]["failed"],
    }


# --- for people -------------------------------------------------------------------------------------------


def markdown(comparison: Mapping[str, Any]) -> str:
    """A table of all variants under all loads, then what each was and why one failed."""
    lines = [f"# {comparison['verdict']}: variants on {comparison['host']}, run {comparison['run']}", ""]
    lines += [row(HEADER), row(["---"] * len(HEADER))]
    for one in comparison["variants"]:
        name = f"{one['name']}{' (failed)' if one['failure'] else ''}"
        rows = [[name, told(load), *(figure(load[member]) for member in COLUMNS)] for load in one["loads"]]
        lines += [row(cells) for cells in rows or [[name, "none", *["-"] * len(COLUMNS)]]]
    lines += ["", *sorted({one["engine_note"] for one in comparison["variants"] if one["engine_note"]}), NOTE, ""]
    for one in comparison["variants"]:
        variables = json.dumps(one["variables"], ensure_ascii=False)
        lines.append(f"- **{one['name']}**, release {one['release'] or 'unknown'}: `{variables}`")
        lines += [f"  Failed: {cell(one['failure'])}"] if one["failure"] else []
    back = comparison["restore_failure"]
    lines += [
        "",
        f"What the inventory wants is NOT back: {cell(back)}" if back else "What the inventory wants is back.",
    ]
    return "\n".join(lines) + "\n"


def told(load: Mapping[str, Any]) -> str:
    return f"{load['name']}, {load['concurrency']} at a time" if load["rate"] is None else f"{load['rate']:g} a second"


def figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(cell, cells))} |"


def cell(text: str) -> str:
    """On one line, and of one cell."""
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Put the benchmarks of a host's variants beside each other.")
    parser.add_argument("--folder", type=Path, required=True, help="with a folder for each variant")
    parser.add_argument("--host", required=True, help="the host's name in the inventory")
    parser.add_argument("--run", required=True, help="the run's id")
    arguments = parser.parse_args(argv)
    try:
        told = load(STANDARD_INPUT)
        comparison = compared(told, arguments.folder, arguments.host, arguments.run)
        jsonschema.Draft202012Validator(schema("variants")).validate(comparison)
        page = markdown(comparison)
        write_json(arguments.folder / "comparison.json", comparison)
        write_text(arguments.folder / "comparison.md", page)
    except (UnusableError, OSError, jsonschema.ValidationError) as error:
        print(f"compare_variants.py: no complete comparison in {arguments.folder}: {error}", file=sys.stderr)
        return EXIT_STATUS["ERROR"]
    print(page, end="")
    return EXIT_STATUS[comparison["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
