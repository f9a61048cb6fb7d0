"""Needs Debian's prometheus packages, unpacked into .venv, and says so; nothing is skipped."""

from __future__ import annotations

import pytest

import monitored


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    monitored.requirement()
