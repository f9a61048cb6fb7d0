"""Fixtures of the fault table: every fault and the healthy runs are measured once a session, whatever asks first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_lab import BASELINE, FAULT_RESULTS, HEALTHY_RESULTS, MEASURE, FaultLab, as_json
from fault_list import Fault
from fault_table import Measured
from lab import NODE, node_named

#: Keeps what earlier sessions measured, to go on after an interruption; the table is of one state of the project only
#: when it is not set.
RESUME = bool(os.environ.get("FAULT_TABLE_RESUME"))
#: Fewer where time is short; the table says how many there were.
HEALTHY_RUNS = int(os.environ.get("FAULT_TABLE_HEALTHY_RUNS", "20"))
BASELINE_RUNS = int(os.environ.get("FAULT_TABLE_BASELINE_RUNS", "10"))
#: The lab's machine is never quiet: its throughput may vary too much to be judged.
BASELINE_REQUIRED = ["ocr_bench.ttft_p50"]


def remembered(path: Path, measure: Callable[[], Any], *, fresh: set[Path]) -> Any:
    """What is in the file, measured now unless this session, or the one that is resumed, did."""
    if not path.exists() or not (RESUME or path in fresh):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = measure()
        path.write_text(json.dumps(made, indent=2))
    fresh.add(path)
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultLab]:
    """The lab, healed at the end."""
    made = FaultLab(node_named(NODE), tmp_path_factory.mktemp("faults"))
    yield made
    made.heal()


@pytest.fixture(scope="session")
def fresh() -> set[Path]:
    return set()


@pytest.fixture(scope="session")
def known(fresh: set[Path]) -> Callable[[Path], Any]:
    """``known(path)``: what this session, or the one that is resumed, has measured so far; None: not measured."""
    return lambda path: json.loads(path.read_text()) if path in fresh or (RESUME and path.exists()) else None


@pytest.fixture(scope="session")
def baseline(lab: FaultLab, fresh: set[Path]) -> dict[str, Any]:
    """Healthy runs, promoted."""

    def promoted() -> Any:
        lab.heal()
        for _ in range(BASELINE_RUNS):
            assert lab.validated()["verdict"] == "PASS"
        settings = {
            "validation_report_baseline": str(BASELINE),
            "validation_report_baseline_runs": BASELINE_RUNS,
            "validation_report_baseline_required": BASELINE_REQUIRED,
        }
        status, output = lab.play("playbooks/baseline_promote.yml", **MEASURE | settings)
        assert status == 0, output
        return json.loads(BASELINE.read_text())

    return dict(remembered(BASELINE, promoted, fresh=fresh))


@pytest.fixture(scope="session")
def healthy(lab: FaultLab, baseline: dict[str, Any], fresh: set[Path]) -> list[str]:
    """The verdicts of healthy runs in a row, the baseline's comparison included; each is kept when it is there."""
    lab.heal()

    def verdict() -> Any:
        return lab.validated(validation_report_baseline=str(BASELINE))["verdict"]

    paths = [HEALTHY_RESULTS / f"{number:02}.json" for number in range(1, HEALTHY_RUNS + 1)]
    return [str(remembered(path, verdict, fresh=fresh)) for path in paths]


@pytest.fixture(scope="session")
def measured(lab: FaultLab, baseline: dict[str, Any], fresh: set[Path]) -> Callable[[Fault], Measured]:
    """``measured(fault)``: what its run saw."""

    def of(fault: Fault) -> Measured:
        path = FAULT_RESULTS / f"{fault.id}.json"
        return Measured.from_json(remembered(path, lambda: as_json(lab.measure(fault)), fresh=fresh))

    return of
