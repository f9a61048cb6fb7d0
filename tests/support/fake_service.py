"""A stand-in for the service: what it answers, and a real HTTP server around it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ocr_lines

SEED = 7
SCALE = 1


def completion(text: str | None, finish_reason: str = "stop") -> str:
    """The body of a chat completion as vLLM writes it."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]})


class Service:
    """Knows the pictures of ``SEED``; ``override[path or "text" or "image"]`` replaces a reply.

    A replacement is ``(status, body)``, or None to close the connection without a reply.
    """

    def __init__(self, port: int) -> None:
        rng = random.Random(SEED)
        texts = [ocr_lines.readable_text(rng) for _ in range(3)]
        self.pictures = {ocr_lines.data_url(ocr_lines.render(text, scale=SCALE)): text for text in texts}
        self.url = f"http://127.0.0.1:{port}"
        self.override: dict[str, tuple[int, str] | None] = {}
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def answer(self, path: str, request: dict[str, Any]) -> tuple[int, str] | None:
        """Status and body for a request, None for no reply at all."""
        kind = path
        if path == "/v1/chat/completions":
            self.requests.append(request)
            kind = "text" if isinstance(request["messages"][0]["content"], str) else "image"
        if kind in self.override:
            return self.override[kind]
        if kind == "/health":
            return 200, ""
        if kind == "/v1/models":
            return 200, json.dumps({"object": "list", "data": [{"id": "glm-ocr", "max_model_len": 8192}]})
        if kind == "text":
            return 200, completion("GLM-OCR 是一个文字识别模型。")
        if kind == "image":
            url = request["messages"][0]["content"][0]["image_url"]["url"]
            return 200, completion(f"\n{self.pictures[url]} ")
        return 404, json.dumps({"detail": "Not Found"})


@contextmanager
def serving() -> Iterator[Service]:
    """A service on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            request = json.loads(self.rfile.read(length)) if length else {}
            fake.keys.append(self.headers.get("Authorization"))
            if (answer := fake.answer(self.path, request)) is None:
                self.close_connection = True
                return
            status, body = answer[0], answer[1].encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = Service(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
