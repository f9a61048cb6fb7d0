"""The wait before a drain's stop: until the metrics say that nothing is in flight, and no longer than allowed."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_idle
from playing import HERE, play, stub

#: As vLLM 0.18 prints them, one engine; and other metrics that must not be counted.
METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="glm-ocr"}} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="glm-ocr"}} {waiting}
vllm:num_requests_waiting_by_reason{{engine="0",model_name="glm-ocr",reason="capacity"}} 7.0
vllm:prompt_tokens_total{{engine="0",model_name="glm-ocr"}} 1234.0
"""


def metrics(running: float, waiting: float) -> str:
    return METRICS.format(running=running, waiting=waiting)


class Engine:
    """Answers /metrics with ``answers``, one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            engine.asked.append(self.path)
            status, text = engine.answers.pop(0) if len(engine.answers) > 1 else engine.answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    engine.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield engine
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes while the module sleeps, and only then."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize(
    ("text", "requests", "found"),
    [
        (metrics(0.0, 0.0), 0, "0 running, 0 waiting"),
        (metrics(2.0, 1.0), 3, "2 running, 1 waiting"),
        (metrics(0.0, 1.0) + metrics(1.0, 0.0).replace('engine="0"', 'engine="1"'), 2, "1 running, 1 waiting"),
    ],
)
def test_requests_are_counted_over_all_engines(text: str, requests: int, found: str) -> None:
    assert vllm_idle.in_flight(text) == (requests, found)


@pytest.mark.parametrize("text", ["", "# HELP vllm:num_requests_running 0", "vllm:num_requests_running{} 0.0\n"])
def test_metrics_that_do_not_tell_are_not_idle(text: str) -> None:
    assert vllm_idle.in_flight(text)[0] is None


def test_it_waits_until_nothing_is_in_flight_and_no_longer(engine: Engine, clock: list[float]) -> None:
    engine.answers = [(200, metrics(2.0, 0.0)), (503, ""), (200, metrics(0.0, 1.0)), (200, metrics(0.0, 0.0))]
    assert vllm_idle.wait(engine.url, 60) == (True, "0 running, 0 waiting")
    assert engine.asked == ["/metrics"] * 4
    assert clock[0] == 1.5


def test_a_service_that_stays_busy_is_waited_for_no_longer_than_allowed(engine: Engine, clock: list[float]) -> None:
    engine.answers = [(200, metrics(3.0, 4.0))]
    assert vllm_idle.wait(engine.url, 10) == (False, "3 running, 4 waiting")
    assert clock[0] == 10


def test_with_no_time_it_asks_once(engine: Engine, clock: list[float]) -> None:
    engine.answers = [(200, metrics(3.0, 4.0))]
    assert vllm_idle.wait(engine.url, 0) == (False, "3 running, 4 waiting")
    assert len(engine.asked) == 1


def test_a_service_that_is_stopped_has_nothing_in_flight(clock: list[float]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert vllm_idle.wait(f"http://127.0.0.1:{bound.getsockname()[1]}", 60) == (True, "nothing listens")
    assert clock[0] == 0


def test_a_service_that_does_not_answer_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_idle, "QUESTION_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        idle, found = vllm_idle.wait(f"http://127.0.0.1:{silent.getsockname()[1]}", 1)
    assert not idle
    assert "timed out" in found


def test_check_mode_asks_and_stops_nothing(tmp_path: Path, engine: Engine) -> None:
    engine.answers = [(200, metrics(2.0, 1.0))]
    stub(tmp_path / "bin", "systemctl", f"echo $@ >> {tmp_path}/asked; echo ActiveState=active; echo LoadState=loaded")
    played = play(tmp_path, "playbooks/drain.yml", {"npu-01": {**HERE, "glm_ocr_base_url": engine.url}}, "--check")
    assert played.rc == 0
    assert "Requests are still in flight after" in played.output
    assert "2 running, 1 waiting" in played.output
    assert played.recap("npu-01")["changed"] == 1
    assert "stop" not in (tmp_path / "asked").read_text()
