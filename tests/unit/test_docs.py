"""The documents say what is there."""

from __future__ import annotations

import re

from rendering import PROJECT


def test_every_test_that_the_failure_modes_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (PROJECT / "docs" / "failure-modes.md").read_text()))
    there = {name for path in PROJECT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named
    assert named <= there


def test_every_failure_mode_says_how_it_was_provoked() -> None:
    rows = re.findall(r"^\| \d+ \|.*$", (PROJECT / "docs" / "failure-modes.md").read_text(), re.MULTILINE)
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
