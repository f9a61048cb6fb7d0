"""A stand-in for a registry: a real HTTP server on a free loopback port that keeps what is pushed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "given-to-everyone"


@dataclass
class FakeRegistry:
    """``content`` maps a path below /v2/ to bytes, for a test to alter; with ``guarded`` it wants its token.

    ``cut`` ends every answer after that many bytes; ``ranges`` answers requests for a part with the part.
    """

    url: str = ""
    guarded: bool = False
    cut: int | None = None
    ranges: bool = True
    content: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def registry() -> Iterator[FakeRegistry]:
    fake = FakeRegistry()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send(self, body: bytes) -> None:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if fake.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:][: fake.cut])

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            fake.asked.append(path + self.headers.get("Range", "").replace("bytes=", "#"))
            if path == "/token":
                self.answer(200, json.dumps({"token": TOKEN}).encode())
            elif fake.guarded and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, WWW_Authenticate=f'Bearer realm="{fake.url}/token",service="fake",scope="pull"')
            elif path.removeprefix("/v2/") in fake.content:
                self.send(fake.content[path.removeprefix("/v2/")])
            else:
                self.answer(404)

        def do_POST(self) -> None:
            self.answer(202, Location=f"{self.path}1")

        def do_PUT(self) -> None:
            place = urlsplit(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            repository, kind, reference = place.path.removeprefix("/v2/").partition("/manifests/")
            if kind:
                fake.content |= {f"{repository}/manifests/{name}": body for name in (reference, digest)}
            else:
                repository = place.path.removeprefix("/v2/").partition("/blobs/")[0]
                fake.content[f"{repository}/blobs/{parse_qs(place.query)['digest'][0]}"] = body
            self.answer(201)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
