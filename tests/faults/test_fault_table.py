"""Every injected fault is caught by a stage, healthy runs pass, and docs/fault-table.md tells: `make fault-table`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fault_lab import BASELINE, FAULT_RESULTS, FOLDER, HEALTHY_RESULTS
from fault_list import FAULTS, Fault
from fault_table import DOCUMENT, PASS, RECORD, Measured, render
from lab import NODE

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_is_caught(fault: Fault, measured: Callable[[Fault], Measured]) -> None:
    found = measured(fault)
    assert found.caught_by, found


def test_healthy_runs_pass(healthy: list[str]) -> None:
    assert healthy
    assert set(healthy) == {PASS}, healthy


def test_the_table_is_written(known: Callable[[Path], Any]) -> None:
    """Of what was measured, and no more."""
    baseline = known(BASELINE)
    assert baseline, "expected a baseline; run the tests before this one"
    results = {fault.id: known(FAULT_RESULTS / f"{fault.id}.json") for fault in FAULTS}
    report = json.loads((FOLDER / NODE / baseline["runs"][0]["run"] / "report.json").read_text())
    record = {
        "engine": next(stage["engine"] for stage in report["stages"].values() if stage),
        "baseline": baseline,
        "healthy": [verdict for path in sorted(HEALTHY_RESULTS.glob("*.json")) if (verdict := known(path))],
        "faults": [result for result in results.values() if result],
        "unmeasured": [identity for identity, result in results.items() if not result],
    }
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    DOCUMENT.write_text(render(record), encoding="utf-8")
