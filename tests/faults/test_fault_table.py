"""Every injected fault is caught by a stage, healthy runs pass, and docs/fault-table.md tells: `make fault-table`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import fault_table
from fault_lab import FOLDER
from fault_list import FAULTS, Fault
from fault_table import PASS, Measured
from lab import NODE
from rendering import PROJECT

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_is_caught(fault: Fault, measured: Callable[[Fault], Measured]) -> None:
    found = measured(fault)
    assert found.caught_by, found


def test_healthy_runs_pass(healthy: list[str]) -> None:
    assert healthy == [PASS] * len(healthy)


def test_the_table_is_written(
    measured: Callable[[Fault], Measured], healthy: list[str], baseline: dict[str, Any]
) -> None:
    faults = [measured(fault) for fault in FAULTS]
    report = json.loads((FOLDER / NODE / "latest" / "report.json").read_text())
    engine = next(stage["engine"] for stage in report["stages"].values() if stage)
    text = fault_table.render(faults, healthy, baseline, engine)
    (PROJECT / "docs" / "fault-table.md").write_text(text, encoding="utf-8")
