"""wait_ready.py: only a real generation counts, and a dead engine is not waited for."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import socket
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import engine_socket
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


@contextlib.contextmanager
def engine_at(path: Path, status: int) -> Iterator[None]:
    """An engine that listens on a Unix socket, for its own user alone, and generates or does not."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            # Answered before it is read, a request may still be being sent when the connection closes: EPIPE.
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(GENERATED.encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        path.chmod(0o600)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_an_error_whose_text_does_not_come_is_no_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(tmp_path / "s"))
        engine.listen()

        def answer() -> None:
            connection, _ = engine.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\n")
                asked.wait()

        asked = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        found = wait_ready.generates("http://engine", "glm-ocr", 0.2, str(tmp_path / "s"))
        asked.set()
        thread.join()
    assert "timed out" in found


def waited_behind_the_front(path: Path, group: str, monkeypatch: pytest.MonkeyPatch) -> int:
    # A URL that nothing answers at: the socket is asked, whatever the front speaks.
    arguments = ["--url", "https://127.0.0.1:1", "--model", "glm-ocr", "--timeout", "0"]
    monkeypatch.setattr("sys.argv", ["wait_ready.py", *arguments, "--socket", str(path), "--open-to", group])
    return wait_ready.main()


@pytest.mark.parametrize(("status", "exit_status", "mode"), [(200, 0, 0o660), (503, 2, 0o600)])
def test_the_socket_is_open_to_the_front_once_it_generates_and_not_before(
    status: int, exit_status: int, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    with engine_at(tmp_path / "s", status):
        assert waited_behind_the_front(tmp_path / "s", group, monkeypatch) == exit_status
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode


def test_a_front_without_its_group_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine_at(tmp_path / "s", 200):
        assert waited_behind_the_front(tmp_path / "s", "no-such-group", monkeypatch) == 3
    assert "to the group no-such-group; found: " in capsys.readouterr().err


def test_an_engine_without_a_socket_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited_behind_the_front(tmp_path / "absent", "root", monkeypatch) == 2


@pytest.mark.parametrize("kind", ["a link to a file", "a link to a socket", "a file", "a folder"])
def test_what_an_engine_puts_in_the_place_of_its_socket_is_not_touched(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, target = tmp_path / "engine.sock", tmp_path / "target"
    group = grp.getgrgid(os.getgid()).gr_name
    with contextlib.ExitStack() as stack:
        if kind == "a link to a socket":
            stack.enter_context(engine_at(target, 200))
        elif kind == "a folder":
            target.mkdir()
        else:
            target.write_text("secret")
        if kind.startswith("a link"):
            place.symlink_to(target)
        else:
            place = target
        target.chmod(0o640)
        before = target.stat()
        assert (engine_socket.open_to(str(place), group), engine_socket.close(str(place))) == (3, 3)
        after = target.stat()
    assert (after.st_mode, after.st_gid, after.st_ctime_ns) == (before.st_mode, before.st_gid, before.st_ctime_ns)
    told = capsys.readouterr().err
    assert told.count(f"expected to give the socket {place} mode ") == 2


def test_an_open_socket_is_closed_as_the_unit_does(tmp_path: Path) -> None:
    """As a program of its own, with what the unit puts beside it and nothing else."""
    with engine_at(tmp_path / "s", 200):
        (tmp_path / "s").chmod(0o660)
        subprocess.run([sys.executable, "-I", "-B", engine_socket.__file__, tmp_path / "s"], check=True)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
