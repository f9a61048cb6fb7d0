"""What must not get in, each with the status it gets, and within a second; the engine sees nothing of it."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

import pytest

from front import KEYS, Answer, Engine, Front, answer

Build = Callable[[Front], bytes]
AUTH = f"Authorization: Bearer {KEYS['alice']}"


def raw(lines: str, body: str = "") -> Build:
    """A request as text; {host} and {key} are good headers."""
    return lambda front: (
        (lines.replace("\n", "\r\n") + "\r\n\r\n" + body)
        .replace("{host}", f"Host: 127.0.0.1:{front.port}")
        .replace("{key}", AUTH)
    ).encode("latin-1")


def get(target: str, key: str | None = "alice", method: str = "GET", **headers: str) -> Build:
    return lambda front: front.head(target, key, method, **headers)


#: failure-modes: everything but the named paths, in every spelling.
PATHS = [
    *("/invocations", "//invocations", "/%69nvocations", "/v1/../invocations", "/inference/v1/generate", "/tokenize"),
    *("/scale_elastic_ep", "/detokenize", "/version", "/ping", "/load", "/docs", "/openapi.json", "/redoc", "/", "//"),
    *("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/audio/transcriptions", "/start_profile", "/sleep"),
    *("/v1%2fmodels", "/v1/%6dodels", "/v1/models/", "/v1//models", "/v1/./models", "/v1/models%00", "/V1/MODELS"),
    *("/v1/models?a=b", "/v1/models;a", "/health/../invocations", "/metrics/", "/.well-known/x", "*", "v1/models"),
]
CHAT = "POST /v1/chat/completions HTTP/1.1\n{host}\n{key}\n"
SHAPES: list[tuple[str, Build, set[int]]] = [
    ("absolute form", lambda front: front.head(f"http://127.0.0.1:{front.port}/v1/models"), {404}),
    ("absolute form of another host", get("http://evil.example/v1/models"), {400}),
    ("absolute form, encoded", lambda front: front.head(f"http://127.0.0.1:{front.port}/%69nvocations"), {404}),
    ("authority form", get("evil.example:443", method="CONNECT"), {400}),
    ("fragment", get("/v1/models#x"), {400}),
    ("another method", get("/v1/models", method="DELETE"), {405}),
    ("chat by GET", get("/v1/chat/completions"), {405}),
    ("models by POST", get("/v1/models", method="POST", Content_Length="0"), {405}),
    ("OPTIONS", get("/v1/models", method="OPTIONS"), {405}),
    ("TRACE", get("/v1/models", method="TRACE"), {405}),
    ("CVE-2026-48746 with a key", get("/v1/chat/completions", Host="a/?", method="POST"), {400}),
    ("another Host", get("/v1/models", Host="evil.example"), {400}),
    ("another port in Host", get("/v1/models", Host="127.0.0.1:1"), {400}),
    ("a list in Host", lambda front: front.head("/v1/models", Host=f"127.0.0.1:{front.port}, evil"), {400}),
    ("a user in Host", lambda front: front.head("/v1/models", Host=f"evil@127.0.0.1:{front.port}"), {400}),
    ("an empty Host", get("/v1/models", Host=""), {400}),
    ("two Hosts", raw("GET /v1/models HTTP/1.1\n{host}\nHost: evil.example\n{key}"), {400}),
    ("no Host", raw("GET /v1/models HTTP/1.1\n{key}"), {400}),
    ("HTTP/1.0 without Host", raw("GET /v1/models HTTP/1.0\n{key}"), {400}),
    ("HTTP/2 preface", lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    ("HTTP/3.0", raw("GET /v1/models HTTP/3.0\n{host}\n{key}"), {400}),
    ("no HTTP at all", lambda _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
    ("two lengths", raw(CHAT + "Content-Length: 5\nContent-Length: 6", "abcdef"), {400}),
    ("two lengths in one", raw(CHAT + "Content-Length: 5, 6", "abcdef"), {400}),
    ("length and chunked", raw(CHAT + "Content-Length: 5\nTransfer-Encoding: chunked", "0\r\n\r\n"), {400, 411}),
    ("chunked", raw(CHAT + "Transfer-Encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"), {411}),
    ("chunked, another", raw(CHAT + "Transfer-Encoding: xchunked", "0\r\n\r\n"), {400}),
    ("chunked not last", raw(CHAT + "Transfer-Encoding: chunked, identity", "0\r\n\r\n"), {400}),
    ("chunked twice", raw(CHAT + "Transfer-Encoding: chunked\nTransfer-Encoding: chunked", "0\r\n\r\n"), {400, 411}),
    ("chunked, a space before the colon", raw(CHAT + "Transfer-Encoding : chunked", "0\r\n\r\n"), {400}),
    ("chunked, a tab", raw(CHAT + "Transfer-Encoding:\tchunked", "0\r\n\r\n"), {400, 411}),
    ("negative length", raw(CHAT + "Content-Length: -5"), {400}),
    ("signed length", raw(CHAT + "Content-Length: +5", "abcde"), {400}),
    ("hexadecimal length", raw(CHAT + "Content-Length: 0x5", "abcde"), {400}),
    ("length beyond 64 bits", raw(CHAT + "Content-Length: 99999999999999999999999"), {400}),
    ("a body of 30 MB announced", raw(CHAT + "Content-Length: 30000000"), {413}),
    ("a body of one byte too many", raw(CHAT + "Content-Length: 1048577"), {413}),
    ("a GET with a body", raw("GET /v1/models HTTP/1.1\n{host}\n{key}\nContent-Length: 5", "abcde"), {400}),
    ("100 KB in a header", get("/v1/models", X="a" * 100_000), {431}),
    ("17 KB in headers", get("/v1/models", X="a" * 9_000, Y="a" * 8_000), {431}),
    ("500 headers", raw("GET /v1/models HTTP/1.1\n{host}\n{key}" + "\nX: a" * 500), {400}),
    ("100 KB of path", get("/" + "a" * 100_000), {404}),
    ("a header without a name", raw("GET /v1/models HTTP/1.1\n{host}\n{key}\n: x"), {400}),
    ("a control character in the path", raw("GET /v1/mo\x01dels HTTP/1.1\n{host}\n{key}"), {400}),
    ("bytes beyond ASCII in the path", raw("GET /v1/mod\xe9ls HTTP/1.1\n{host}\n{key}"), {400, 404}),
]
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
    started = time.monotonic()
    reply = front.ask(build(front))
    assert time.monotonic() - started < 1
    assert len(engine.requests) == seen, "the engine saw it"
    # What is no HTTP is refused by HAProxy's parser, in its own words.
    assert (reply.status == 400 and b"invalid request" in reply.body) or reply.error["code"] == reply.status
    return reply


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["alice", None])
def test_only_named_paths_are_there(path: str, key: str | None, open_front: tuple[Front, Engine]) -> None:
    expected = {404} if path.startswith(("/", "*")) else {400, 404}
    assert refused(*open_front, get(path, key)).status in expected
    assert refused(*open_front, get(path, key, "POST", Content_Length="0")).status in expected


@pytest.mark.parametrize(("name", "build", "statuses"), SHAPES, ids=[name for name, *_ in SHAPES])
def test_a_request_of_another_shape_is_refused(
    name: str, build: Build, statuses: set[int], open_front: tuple[Front, Engine]
) -> None:
    assert refused(*open_front, build).status in statuses


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
    assert 1 <= time.monotonic() - started < 5
    assert not engine.requests


def test_a_body_that_ends_early_does_not_reach_the_engine(hasty_front: tuple[Front, Engine]) -> None:
    front, engine = hasty_front
    with front.connect() as connection:
        connection.sendall(front.post(b'{"a":', Content_Length="1000"))
        connection.shutdown(socket.SHUT_WR)
        # Refused, or nobody is thought to listen any more.
        assert connection.recv(4096)[:13] in (b"HTTP/1.1 400 ", b"")
    assert not engine.requests
