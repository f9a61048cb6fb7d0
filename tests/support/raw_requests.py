"""Requests as bytes that must not get in, as data: before HAProxy alone, and before real vLLM.

Every one gets one of its statuses and its connection is closed, so that nothing that comes behind it is served.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
#: What an engine that gets one of these would answer.
BODY = json.dumps({"model": "glm-ocr", "messages": [{"role": "user", "content": "OK"}], "max_tokens": 1})
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"
HOST, KEY = "Host: {host}", "Authorization: Bearer {key}"
#: Closed without an answer.
CLOSED = 0


@dataclass(frozen=True)
class Raw:
    """``text`` is Latin-1, with {host} and {key} for good ones; of one that is ``cut`` the client sends no more."""

    name: str
    text: str
    statuses: frozenset[int]
    cut: bool = False

    def sent(self, host: str, key: str) -> bytes:
        return self.text.replace("{host}", host).replace("{key}", key).encode("latin-1")


def head(line: str, *headers: str) -> str:
    return "\r\n".join([line, *headers, "", ""])


def get(name: str, *statuses: int, target: str = MODELS, method: str = "GET", more: tuple[str, ...] = ()) -> Raw:
    """With a good Host and a good key."""
    return Raw(name, head(f"{method} {target} HTTP/1.1", HOST, KEY, *more), frozenset(statuses))


def post(name: str, *statuses: int, more: tuple[str, ...], body: str = BODY, cut: bool = False) -> Raw:
    given = (HOST, KEY, "Content-Type: application/json", *more)
    return Raw(name, head(f"POST {CHAT} HTTP/1.1", *given) + body, frozenset(statuses), cut)


def whole(name: str, *statuses: int, line: str = f"GET {MODELS} HTTP/1.1", headers: tuple[str, ...]) -> Raw:
    """As it is written, without a Host or a key of itself."""
    return Raw(name, head(line, *headers), frozenset(statuses))


#: Everything but the named paths, in every spelling.
PATHS = [
    *("/invocations", "//invocations", "/%69nvocations", "/v1/../invocations", "/inference/v1/generate", "/tokenize"),
    *("/scale_elastic_ep", "/detokenize", "/version", "/ping", "/load", "/docs", "/openapi.json", "/redoc", "/", "//"),
    *("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/audio/transcriptions", "/start_profile", "/sleep"),
    *("/v1%2fmodels", "/v1/%6dodels", "/v1/models/", "/v1//models", "/v1/./models", "/v1/models%00", "/V1/MODELS"),
    *("/v1/models?a=b", "/v1/models;a", "/health/../invocations", "/metrics/", "/.well-known/x", "*", "v1/models"),
    *("/%2e%2e/invocations", "/v1/%2e%2e/invocations", "/v1/models%0d%0aX:%20a", "/v1\\models", "/v1/models%20", "/%"),
]
#: In a request line or a header none of these is one of HTTP's characters. Tab and line ends are below.
CONTROLS = [0x00, 0x01, 0x08, 0x0B, 0x0C, 0x0E, 0x1B, 0x1F, 0x7F]
#: Not a length: sign, base, list, rubbish, too large.
LENGTHS = {
    "signed": "+{n}",
    "negative": "-{n}",
    "hexadecimal": "0x{n}",
    "with a fraction": "{n}.0",
    "with an exponent": "{n}e0",
    "quoted": '"{n}"',
    "empty": "",
    "a word": "chunked",
    "two words": "{n} {n}",
    "a list of two": "{n}, 0",
    "a list that ends in nothing": "{n},",
    "a list with a sign": "{n}, +{n}",
    "with a semicolon": "{n};",
    "with an underscore": "1_0",
    "superscript": "\xb2",
    "behind a no-break space": "\xa0{n}",
    "behind a vertical tab": "\x0b{n}",
    "with NUL behind it": "{n}\x00",
    "beyond 63 bits": str(2**63),
    "beyond 64 bits": str(2**64 + len(BODY)),
    "of a hundred digits": "9" * 100,
}
#: How a server may be told that chunks come, or be made to believe that none do.
ENCODINGS = [
    *("chunked", "\tchunked", "chunked ", "chunked\t", "Chunked", "CHUNKED", "chunked;q=1", "chunked, identity"),
    *("identity, chunked", "identity", "xchunked", "x-chunked", '"chunked"', "'chunked'", "chunked\x0b", "\x0bchunked"),
    *("chunked\x00", "\x00chunked", "chunk", "gzip, chunked", "chunked, chunked", ",chunked", "chunked,", ""),
    *("\xa0chunked", "chunked\xa0", "cow", "chunked identity", "\xffchunked", "deflate"),
]
#: Chunks that end early, late or never, for one of two servers.
CHUNKINGS = {
    "no size": "\r\n" + BODY,
    "a size that is none": f"g\r\n{BODY}\r\n0\r\n\r\n",
    "a negative size": f"-1\r\n{BODY}\r\n0\r\n\r\n",
    "a signed size": f"+{CHUNKS}",
    "a size with 0x": f"0x{CHUNKS}",
    "a size beyond 64 bits": f"{'f' * 17}\r\n{BODY}",
    "a size that wraps to the right one": f"1{len(BODY):016x}\r\n{BODY}\r\n0\r\n\r\n",
    "a size with a space": CHUNKS.replace("\r\n", " \r\n", 1),
    "a size with an underscore": f"0_{CHUNKS}",
    "an extension": CHUNKS.replace("\r\n", ";a=b\r\n", 1),
    "an extension with a line feed": CHUNKS.replace("\r\n", ";\n", 1),
    "an extension with NUL": CHUNKS.replace("\r\n", ";\x00\r\n", 1),
    "64 KB of extension": CHUNKS.replace("\r\n", f";{'a' * 65536}\r\n", 1),
    "line feeds alone": CHUNKS.replace("\r\n", "\n"),
    "a carriage return alone": CHUNKS.replace("\r\n", "\r", 1),
    "no end of a chunk": CHUNKS.replace("}\r\n0", "}0"),
    "a chunk longer than it says": f"1\r\n{BODY}\r\n0\r\n\r\n",
    "an end of many zeros": CHUNKS.replace("\r\n0\r\n", "\r\n0000000000\r\n"),
    "a length as a trailer": CHUNKS[:-2] + "Content-Length: 0\r\n\r\n",
    "a key as a trailer": CHUNKS[:-2] + KEY + "\r\n\r\n",
    "nothing behind the end": CHUNKS[:-2],
}


def paths() -> Iterator[Raw]:
    for path in PATHS:
        yield get(f"path {path}", 404 if path.startswith(("/", "*")) else 400, target=path)
        if path[0] == "/":
            yield Raw(f"path {path}, no key", head(f"GET {path} HTTP/1.1", HOST), frozenset({404}))
    for code in CONTROLS:
        yield get(f"path with 0x{code:02x}", 400, 404, target=f"/v1/mod{chr(code)}els")
    yield get("path with a tab", 400, target="/v1/mod\tels")
    yield get("path with a space", 400, target="/v1/mod els")
    yield get("path with a line feed", 400, target="/v1/mod\nels")
    yield get("path with a carriage return", 400, target="/v1/mod\rels")
    yield get("path with bytes beyond ASCII", 400, 404, target="/v1/mod\xe9ls")
    yield get("path with overlong UTF-8", 400, 404, target="/v1\xc0\xafmodels")
    yield get("path of 100 KB", 404, 431, target="/" + "a" * 100_000)
    yield get("fragment", 400, target="/v1/models#x")
    yield get("absolute form", 404, target="http://{host}/v1/models")
    yield get("absolute form, encoded", 404, target="http://{host}/%69nvocations")
    yield get("absolute form of another host", 400, target="http://evil.example/v1/models")
    yield get("absolute form with a user", 400, 404, target="http://evil@{host}/v1/models")
    yield get("absolute form of another scheme", 400, 404, target="file:///v1/models")
    yield get("absolute form without a host", 400, 404, target="http:///v1/models")
    yield get("authority form", 400, 404, target="{host}")
    yield get("authority form, to connect elsewhere", 400, target="evil.example:443", method="CONNECT")
    yield get("authority form, to connect here", 400, 404, 405, target="{host}", method="CONNECT")
    yield get("no target", 400, target="")


def methods() -> Iterator[Raw]:
    for method in ("DELETE", "OPTIONS", "TRACE", "HEAD", "PUT", "PATCH", "PROPFIND", "get", "A" * 1000):
        yield get(f"method {method[:10]}", 405, method=method)
    yield get("chat by GET", 405, target=CHAT)
    yield get("models by POST", 405, method="POST", more=("Content-Length: 0",))
    yield get("method with NUL", 400, method="GE\x00T")
    yield get("method in brackets", 400, method="{GET}")


def versions() -> Iterator[Raw]:
    good = (HOST, KEY)
    yield Raw("HTTP/0.9", f"GET {MODELS}\r\n", frozenset({400}))
    yield whole("HTTP/0.9 with headers", 400, line=f"GET {MODELS}", headers=good)
    for version in ("HTTP/0.9", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/3.0", "HTTP/1.10", "HTTP/11"):
        yield whole(f"as {version}", 400, line=f"GET {MODELS} {version}", headers=good)
    for version in (
        "http/1.1",
        "HTTP /1.1",
        "HTTP/1,1",
        "HTTP/1.1\x00",
        "HTTP/-1.1",
        "HTCPCP/1.1",
        "ICAP/1.0",
        "RTSP/1.0",
    ):
        yield whole(f"as {version!r}", 400, line=f"GET {MODELS} {version}", headers=good)
    yield whole("HTTP/1.0, kept", 400, line=f"GET {MODELS} HTTP/1.0", headers=(*good, "Connection: keep-alive"))
    yield whole("HTTP/1.0 without Host", 400, line=f"GET {MODELS} HTTP/1.0", headers=(KEY,))
    yield Raw(
        "HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", frozenset({400})
    )
    yield Raw("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", frozenset({400, CLOSED}))
    yield Raw("PROXY protocol", f"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\nGET {MODELS} HTTP/1.1\r\n", frozenset({400}))
    yield Raw("SSH", "SSH-2.0-OpenSSH_9.2\r\n", frozenset({400}))
    yield Raw("NUL alone", "\x00" * 64, frozenset({400}))


def hosts() -> Iterator[Raw]:
    for name, host in (
        ("another", "evil.example"),
        ("another port", "127.0.0.1:1"),
        ("a list", "{host}, evil"),
        ("a user", "evil@{host}"),
        ("a path", "{host}/v1"),
        ("a path that hides the request's (CVE-2026-48746)", "a/?"),
        ("a query", "{host}?"),
        ("empty", ""),
        ("a tab inside", "{host}\tevil"),
        ("NUL behind it", "{host}\x00"),
        ("bytes beyond ASCII", "\xe9"),
        ("a port that is none", "127.0.0.1:x"),
    ):
        yield whole(f"Host: {name}", 400, headers=(f"Host: {host}", KEY))
    yield whole("Host: two", 400, headers=(HOST, "Host: evil.example", KEY))
    yield whole("Host: two, the good one last", 400, headers=("Host: evil.example", HOST, KEY))
    yield whole("Host: none", 400, headers=(KEY,))
    yield whole("Host: a space before the colon", 400, headers=("Host : {host}", KEY))
    yield whole("Host: folded", 400, headers=("Host: evil.example,", " {host}", KEY))
    yield whole("Host: by another header", 400, headers=("X-Forwarded-Host: {host}", KEY))


def headers() -> Iterator[Raw]:
    for code in CONTROLS:
        yield get(f"0x{code:02x} in a header's name", 400, more=(f"X{chr(code)}Y: a",))
        yield get(f"0x{code:02x} in a header", 400, more=(f"X: a{chr(code)}b",))
        yield get(f"0x{code:02x} in a header that gets through", 400, more=(f"User-Agent: a{chr(code)}b",))
    for name, line in (
        ("without a name", ": x"),
        ("without a colon", "x"),
        ("with a space in its name", "X Y: a"),
        ("with a space before the colon", "X : a"),
        ("with a tab before the colon", "X\t: a"),
        ("with brackets in its name", "X(Y): a"),
        ("with a quote in its name", 'X"Y: a'),
        ("with bytes beyond ASCII in its name", "X\xe9: a"),
        ("with a slash in its name", "X/Y: a"),
        ("with a carriage return in it", "X: a\rb"),
        ("with a carriage return in its name", "X\rY: a"),
    ):
        yield get(f"a header {name}", 400, more=(line,))
    yield whole("a space before the first header", 400, headers=(f" {HOST}", KEY))
    yield get("100 KB in a header", 431, more=("X: " + "a" * 100_000,))
    yield get("17 KB in headers", 431, more=("X: " + "a" * 9_000, "Y: " + "a" * 8_000))
    yield get("17 KB in a header's name", 400, 431, more=("X" * 17_000 + ": a",))
    yield get("500 headers", 400, more=("X: a",) * 500)
    yield get("10000 empty headers", 400, more=("X:",) * 10_000)
    for name, line in (
        ("none", "X: a"),
        ("another", "Authorization: Bearer " + "x" * 32),
        ("another scheme", "Authorization: Basic {key}"),
        ("two", f"{KEY}\r\nAuthorization: Bearer x"),
        ("in another header", "X-API-Key: {key}"),
        ("a tab before it", "Authorization: Bearer\t{key}"),
    ):
        yield whole(f"key: {name}", 401, headers=(HOST, line))
    yield whole("key: NUL behind it", 400, headers=(HOST, KEY + "\x00"))


def lengths() -> Iterator[Raw]:
    for name, value in LENGTHS.items():
        yield post(f"length {name}", 400, 411, 413, more=("Content-Length: " + value.replace("{n}", str(len(BODY))),))
    yield post("two lengths", 400, more=(LENGTH, "Content-Length: 0"))
    yield post("two lengths, the right one last", 400, more=("Content-Length: 0", LENGTH))
    yield post("two lengths, one signed", 400, more=(LENGTH, f"Content-Length: +{len(BODY)}"))
    yield post("length, a space before the colon", 400, more=(f"Content-Length : {len(BODY)}",))
    yield post("length, a tab before the colon", 400, more=(f"Content-Length\t: {len(BODY)}",))
    yield post("length with NUL in its name", 400, more=(f"Content-Length\x00: {len(BODY)}",))
    yield post("length with an underscore in its name", 411, more=(f"Content_Length: {len(BODY)}",))
    yield post("length folded, another", 400, more=(LENGTH + ",", " 0"))
    yield post("length of another header by a line feed", 400, more=(LENGTH, "X: a\nContent-Length: 0"))
    yield post("length of another header by a carriage return", 400, more=(LENGTH, "X: a\rContent-Length: 0"))
    yield post("no length and a body", 411, more=())
    yield post("no length and no body", 411, more=(), body="")
    yield post("no length, asked first", 411, more=("Expect: 100-continue",), body="")
    yield post("30 MB announced", 413, more=("Content-Length: 30000000",), body="")
    yield post("30 MB announced, asked first", 413, more=("Content-Length: 30000000", "Expect: 100-continue"), body="")
    yield post("a body that ends early", 400, CLOSED, more=("Content-Length: 1000",), cut=True)
    yield post("a body that never begins", 400, CLOSED, more=(LENGTH,), body="", cut=True)
    yield get("a GET with a body", 400, more=(f"Content-Length: {len(BODY)}",))
    yield get("a GET with chunks", 400, 411, more=(CHUNKED,))
    yield Raw("headers that end early", f"GET {MODELS} HTTP/1.1\r\n{HOST}\r\n", frozenset({400, CLOSED}), cut=True)
    yield Raw("half a request line", f"GET {MODELS[:5]}", frozenset({400, CLOSED}), cut=True)


def encodings() -> Iterator[Raw]:
    for encoding in ENCODINGS:
        line = f"Transfer-Encoding:{encoding if encoding[:1] == chr(9) else ' ' + encoding}"
        yield post(f"encoding {encoding!r}", 400, 411, 422, more=(line,), body=CHUNKS)
        yield post(f"encoding {encoding!r} and a length", 400, 411, 422, more=(LENGTH, line))
    for name, lines in (
        ("before the length", (CHUNKED, LENGTH)),
        ("and a length of nothing", ("Content-Length: 0", CHUNKED)),
        ("and a wrong length", ("Content-Length: x", CHUNKED)),
        ("twice", (CHUNKED, CHUNKED)),
        ("and another", (CHUNKED, "Transfer-Encoding: identity")),
        ("behind another", ("Transfer-Encoding: identity", CHUNKED)),
        ("with a space before the colon", ("Transfer-Encoding : chunked",)),
        ("with a tab before the colon", ("Transfer-Encoding\t: chunked",)),
        ("with a vertical tab before the colon", ("Transfer-Encoding\x0b: chunked",)),
        ("with NUL in its name", ("Transfer-\x00Encoding: chunked",)),
        ("with an underscore in its name and no length", ("Transfer_Encoding: chunked",)),
        ("folded", ("Transfer-Encoding:", " chunked")),
        ("folded, with a length", (LENGTH, "Transfer-Encoding:", "\tchunked")),
        ("of another header by a line feed", (LENGTH, "X: a\nTransfer-Encoding: chunked")),
        ("of another header by a carriage return", (LENGTH, "X: a\rTransfer-Encoding: chunked")),
        ("named by Connection", (LENGTH, CHUNKED, "Connection: transfer-encoding")),
        ("asked first", (CHUNKED, "Expect: 100-continue")),
    ):
        yield post(f"chunked {name}", 400, 411, 422, more=lines, body=CHUNKS)
    for name, body in CHUNKINGS.items():
        yield post(f"chunks: {name}", 400, 411, more=(CHUNKED,), body=body)


RAW = [*paths(), *methods(), *versions(), *hosts(), *headers(), *lengths(), *encodings()]
#: Served, for HTTP allows it or HAProxy's parser does: what the engine gets is one request, written anew.
REWRITTEN = [
    Raw("line feeds alone", get("", 200).text.replace("\r\n", "\n"), frozenset({200})),
    get(
        "an upgrade to HTTP/2", 200, more=("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA")
    ),
    get(
        "an upgrade to a web socket",
        200,
        more=("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
    ),
    get("a tab behind the method", 200, method="GET\t"),
    whole("the same Host twice", 200, headers=(HOST, HOST, KEY)),
    get("an expectation that nobody knows", 200, more=("Expect: 200-maybe",)),
    get("a folded header", 200, more=("X: a,", " b")),
    get("bytes beyond ASCII in a header", 200, more=("User-Agent: \xe9\xff",)),
    post("the same length twice", 200, more=(LENGTH, LENGTH)),
    post("the same length in a list", 200, more=(f"{LENGTH}, {len(BODY)}",)),
    post("a length with zeros before it", 200, more=(f"Content-Length: 000{len(BODY)}",)),
    post("a folded length", 200, more=("Content-Length:", f" {len(BODY)}")),
]


@dataclass(frozen=True)
class Told:
    """``answers`` are the statuses in order, ``CLOSED`` when there is none; ``closed`` is whether it was closed."""

    answers: tuple[int, ...]
    body: bytes
    closed: bool
    seconds: float


def tell(
    address: tuple[str, int], request: bytes, cut: bool = False, seconds: float = 5.0, until_closed: bool = True
) -> Told:
    """What comes back until the connection is closed, or for so long; or, where that is enough, the first of it."""
    started = time.monotonic()
    received, closed = b"", False
    try:
        with socket.create_connection(address, timeout=seconds) as connection:
            # One that refuses early may not read it all, and has answered.
            with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
                connection.sendall(request)
                if cut:
                    connection.shutdown(socket.SHUT_WR)
            while (left := started + seconds - time.monotonic()) > 0 and select.select([connection], [], [], left)[0]:
                part = connection.recv(65536)
                received += part
                if not part:
                    closed = True
                    break
                if not until_closed and b"\r\n" in received:
                    break
    except ConnectionResetError:
        closed = True
    lines = [part.split(b" ", 2) for part in received.split(b"HTTP/1.")[1:]]
    answers = tuple(int(words[1]) for words in lines if len(words) > 2 and words[1].isdigit())
    return Told(answers or (CLOSED,), received, closed, time.monotonic() - started)
