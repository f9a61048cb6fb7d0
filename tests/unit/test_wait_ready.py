"""wait_ready.py: only a real generation counts, and a dead engine is not waited for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import wait_ready
from fake_service import Service

GENERATED = json.dumps({"choices": [{}], "usage": {"completion_tokens": 1}})


def waited(url: str, monkeypatch: pytest.MonkeyPatch, timeout: str = "0") -> int:
    monkeypatch.setattr("sys.argv", ["wait_ready.py", "--url", url, "--model", "glm-ocr", "--timeout", timeout])
    return wait_ready.main()


def test_a_generation_is_ready(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.override["text"] = (200, GENERATED)
    assert waited(service.url, monkeypatch) == 0


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, json.dumps({"usage": {"completion_tokens": 0}}), "no token was generated"),
        (200, "{}", "usage"),
        (200, "<html>", "Expecting value"),
        (503, "loading", "HTTP 503: loading"),
    ],
)
def test_anything_less_is_not(
    status: int,
    body: str,
    told: str,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service.override["text"] = (status, body)
    assert waited(service.url, monkeypatch) == 2
    assert told in capsys.readouterr().err


def test_a_bound_port_that_never_answers_is_not_ready(silent_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(silent_url, monkeypatch) == 2


def test_an_engine_that_ended_is_not_waited_for(closed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setenv("MAINPID", str(ended.pid))
    assert waited(closed_url, monkeypatch, timeout="900") == 1
