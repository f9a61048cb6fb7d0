"""What measure.py serves, each in a process of its own: an engine's stand-in, bare or guarded, and a proxy.

    python apps.py engine|guarded|proxy [--socket PATH] [--engine PORT]

It listens on a port of its own choice, which it prints, or on a Unix socket, as the engine does behind the front.

The stand-in takes the request as an API server must, body and JSON.  The User-Agent, which the front passes on, tells
it the rest as JSON: ``hold`` are seconds to wait, as for an engine that generates; with ``decode`` it decodes the
images too, one after the other, as one API process does.  A request that does not tell is answered 500.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import time
from typing import Any

import aiohttp
import uvicorn
from PIL import Image

import guard_inputs
from request_guard.middleware import App, Guard, Receive, Scope, Send

REPLY = json.dumps({"choices": [{"message": {"content": "a" * 200}, "finish_reason": "stop"}]}).encode()
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(REPLY))]


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    told = json.loads(dict(scope["headers"])[b"user-agent"])
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message["body"])
        more = message.get("more_body", False)
    request = json.loads(b"".join(chunks))
    if told["decode"]:
        decode(request)
    end = time.perf_counter() + told["hold"]
    # uvloop's timers count whole milliseconds, and may ring one early.
    while (left := end - time.perf_counter()) > 0:
        await asyncio.sleep(left)
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": REPLY})


def decode(request: dict[str, Any]) -> None:
    """The least that an API server does with an image: base64, and the pixels as RGB."""
    for part in request["messages"][0]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            with Image.open(io.BytesIO(data)) as image:
                image.convert("RGB")


class Proxy:
    """The alternative: the same checks in a process of their own, which sends the request on over loopback."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self.session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.session is None:
            self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        body = (await receive())["body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"] if name != b"host"}
        async with self.session.post(self.url, data=body, headers=headers) as reply:
            length = reply.headers["Content-Length"].encode()
            head = [(b"content-type", b"application/json"), (b"content-length", length)]
            await send({"type": "http.response.start", "status": reply.status, "headers": head})
            async for data in reply.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def application(kind: str, port: int) -> App:
    if kind == "engine":
        return engine
    return Guard(engine if kind == "guarded" else Proxy(port), guard_inputs.checker())


def main() -> None:
    parser = argparse.ArgumentParser(description="An engine's stand-in, or the proxy before it.")
    parser.add_argument("kind", choices=("engine", "guarded", "proxy"))
    parser.add_argument("--socket", default="", help="Unix socket to listen on instead of a port")
    parser.add_argument("--engine", type=int, default=0, help="port that the proxy sends to")
    arguments = parser.parse_args()
    with socket.socket(socket.AF_UNIX if arguments.socket else socket.AF_INET) as listening:
        listening.bind(arguments.socket or ("127.0.0.1", 0))
        listening.listen(1024)
        print(0 if arguments.socket else listening.getsockname()[1], flush=True)
        config = uvicorn.Config(
            application(arguments.kind, arguments.engine),
            loop="uvloop",
            http="httptools",
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=600,  # a proxy that meets a connection closed under it would fail a request
        )
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
