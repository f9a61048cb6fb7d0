"""What must not get in, each with the status it gets, and within a second; the engine sees nothing of it."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from front import KEYS, SECONDS, Answer, Engine, Front, answer, running, serving
from promptness import REFUSAL_SECONDS, promptly
from raw_requests import BODY, CHAT, MODELS, RAW, REWRITTEN, Raw, tell

Build = Callable[[Front], bytes]
AUTH = f"Authorization: Bearer {KEYS['alice']}"


def raw(lines: str) -> Build:
    """A request as text; {host} is a good header."""
    return lambda front: (lines.replace("\n", "\r\n") + "\r\n\r\n").replace("{host}", f"Host: {front.host}").encode()


KEYLESS: list[tuple[str, str]] = [
    ("wrong", "Authorization: Bearer " + "x" * 32),
    ("empty", "Authorization: Bearer "),
    ("another scheme", f"Authorization: Basic {KEYS['alice']}"),
    ("no scheme", f"Authorization: {KEYS['alice']}"),
    ("two spaces", f"Authorization: Bearer  {KEYS['alice']}"),
    ("two keys in one", f"Authorization: Bearer {KEYS['alice']} {KEYS['bob']}"),
    ("a list", f"Authorization: Bearer {KEYS['alice']}, Bearer x"),
    ("two headers", f"{AUTH}\nAuthorization: Bearer x"),
    ("two headers, the good one last", f"Authorization: Bearer x\n{AUTH}"),
    ("the start of a key", f"Authorization: Bearer {KEYS['alice'][:-1]}"),
    ("in another header", f"X-API-Key: {KEYS['alice']}"),
    ("trusted by a forwarder", "X-Forwarded-For: 127.0.0.1\nX-Real-IP: 127.0.0.1\nForwarded: for=127.0.0.1"),
]


def refused(front: Front, engine: Engine, build: Build) -> Answer:
    seen = len(engine.requests)
    reply, seconds = promptly(lambda: front.ask(build(front)))
    assert seconds < REFUSAL_SECONDS
    assert len(engine.requests) == seen, "the engine saw it"
    assert reply.error["code"] == reply.status
    return reply


@pytest.mark.parametrize("bad", RAW, ids=lambda bad: bad.name)
def test_a_request_of_another_shape_is_refused(bad: Raw, open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    seen = len(engine.requests)
    told, seconds = promptly(lambda: tell(front.address, bad.sent(front.host, KEYS["alice"]), bad.cut))
    assert told.answers[0] in bad.statuses
    assert seconds < REFUSAL_SECONDS
    assert told.closed, "what comes behind it would be served"
    assert len(engine.requests) == seen, "the engine saw it"


@pytest.mark.parametrize("bad", [bad for bad in RAW if not bad.cut], ids=lambda bad: bad.name)
def test_a_request_behind_a_refused_one_is_not_served(bad: Raw, open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    seen = len(engine.requests)
    sent = bad.sent(front.host, KEYS["alice"]) + front.head("/v1/models")
    told, seconds = promptly(lambda: tell(front.address, sent))
    assert len(told.answers) == 1
    assert told.answers[0] in bad.statuses
    assert told.closed
    assert seconds < REFUSAL_SECONDS
    assert len(engine.requests) == seen, "the engine saw it"


@pytest.mark.parametrize("odd", REWRITTEN, ids=lambda odd: odd.name)
def test_what_is_odd_and_allowed_is_written_anew_for_the_engine(odd: Raw, open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    seen = len(engine.requests)
    # The second is there to see where the first one ended.
    told = tell(front.address, odd.sent(front.host, KEYS["alice"]) + front.head("/health", Connection="close"))
    assert told.answers == (200, 200)
    (path, headers, body), (behind, *_) = engine.requests[seen:]
    assert (path, behind) == (CHAT if body else MODELS, "/health")
    assert body in (BODY.encode(), b"")
    assert set(headers) <= {"host", "content-type", "content-length", "user-agent", "x-request-id", "connection"}
    assert headers["connection"] == "close"


@pytest.mark.parametrize(("name", "header"), KEYLESS, ids=[name for name, _ in KEYLESS])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics")],
)
def test_no_key_no_route(method: str, path: str, name: str, header: str, open_front: tuple[Front, Engine]) -> None:
    length = "\nContent-Length: 0" if method == "POST" else ""
    reply = refused(*open_front, raw(f"{method} {path} HTTP/1.1\n{{host}}\n{header}{length}"))
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("part", ["headers", "body"])
def test_what_trickles_in_ends_in_bounded_time_and_costs_the_engine_nothing(
    part: str, hasty_front: tuple[Front, Engine]
) -> None:
    front, engine = hasty_front
    begun = front.head("/v1/models")[:-2] if part == "headers" else front.post(b"", Content_Length="1000")
    more = b"X: a\r\n" if part == "headers" else b" "
    started = time.monotonic()
    with front.connect() as connection:
        connection.sendall(begun)
        # The trickle: something every 0.1 s, as long as nothing comes back.
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(more)
        assert answer(connection).status == 408
    assert 1 <= time.monotonic() - started < SECONDS
    assert not engine.requests


def test_a_body_that_ends_early_does_not_reach_the_engine(hasty_front: tuple[Front, Engine]) -> None:
    front, engine = hasty_front
    with front.connect() as connection:
        connection.sendall(front.post(b'{"a":', Content_Length="1000"))
        connection.shutdown(socket.SHUT_WR)
        # Refused, or nobody is thought to listen any more.
        assert connection.recv(4096)[:13] in (b"HTTP/1.1 400 ", b"")
    assert not engine.requests


def test_a_kept_connection_without_a_request_ends() -> None:
    with running(ocr_front_keep_alive_seconds=1) as front, serving(front.socket):
        front.open()
        told = tell(front.address, front.head("/v1/models"))
    assert told.answers == (200,)
    assert told.closed
    assert told.seconds >= 1


def test_an_address_that_many_share_may_take_more_connections_and_no_other_may() -> None:
    limits = {"ocr_front_max_connections": 12, "ocr_front_connections_per_source": 3}
    with running(**limits, ocr_front_shared_sources=["127.0.0.2", "127.0.1.0/24"]) as front, serving(front.socket):
        front.open()
        for shared in ("127.0.0.2", "127.0.1.9"):
            assert [status_from(front, shared, held) for held in (0, 4)] == [200, 200]
        assert [status_from(front, "127.0.0.3", held) for held in (0, 3)] == [200, 0]


def status_from(front: Front, source: str, held: int) -> int:
    """What a request from there gets while so many connections from there are open; 0 for a closed connection."""
    with ExitStack() as stack:
        for _ in range(held):
            kept = stack.enter_context(socket.create_connection(front.address, SECONDS, (source, 0)))
            kept.sendall(front.head("/v1/models"))
            assert answer(kept).status == 200
        try:
            # On a busy machine it is closed before its maker hears that it was open.
            asking = stack.enter_context(socket.create_connection(front.address, SECONDS, (source, 0)))
            asking.sendall(front.head("/v1/models", Connection="close"))
            return int((asking.recv(4096) or b"HTTP/1.1 0").split(b" ")[1])
        except ConnectionError:
            return 0


def test_one_address_does_not_take_all_connections() -> None:
    with running(ocr_front_max_connections=5, ocr_front_connections_per_source=3) as front, serving(front.socket):
        front.open()
        held = [front.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(front.head("/v1/models"))
            assert answer(connection).status == 200
        assert tell(front.address, front.head("/v1/models")).body == b""
        with socket.create_connection(front.address, SECONDS, ("127.0.0.2", 0)) as another:
            another.sendall(front.head("/v1/models"))
            assert answer(another).status == 200
        held.pop().close()
        # The place is free when HAProxy has seen the end of it.
        deadline = time.monotonic() + SECONDS
        while tell(front.address, front.head("/v1/models", Connection="close")).answers != (200,):
            assert time.monotonic() < deadline
        for connection in held:
            connection.close()
