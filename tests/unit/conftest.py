"""A stand-in for the service: a real HTTP server on a free loopback port, healthy unless told otherwise."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fake_service import Service, serving


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with serving() as fake:
        yield fake


@pytest.fixture
def closed_url() -> Iterator[str]:
    """A port that is bound, so that nobody else takes it, and not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
