"""A front with an engine behind it.  Needs root and HAProxy, and says so; nothing is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import front as fronts


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    fronts.requirement()


@pytest.fixture(scope="module")
def open_front() -> Iterator[tuple[fronts.Front, fronts.Engine]]:
    """One for all that only ask."""
    variables = {"ocr_front_body_limit_mib": 1, "ocr_front_requests_per_10_seconds": 100_000}
    with fronts.running(**variables) as front, fronts.serving(front.socket) as engine:
        front.open()
        yield front, engine


@pytest.fixture
def hasty_front() -> Iterator[tuple[fronts.Front, fronts.Engine]]:
    """One that gives a client a second for its headers, and one for its body."""
    with fronts.running(ocr_front_request_timeout_seconds=1) as front, fronts.serving(front.socket) as engine:
        front.open()
        yield front, engine
