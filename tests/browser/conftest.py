"""A real browser, and the pages it opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import browsing
import stage_results


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with browsing.chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reports: a host that passes, one that does not, one that is missing, and the fleet's page."""
    folder = tmp_path_factory.mktemp("reports")
    stage_results.example(folder)
    return folder
