"""The guard as ASGI middleware: reads a request's body, has it checked, and passes it on untouched or refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from request_guard.check import Checker
from request_guard.refusal import Refusal, too_large

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Methods without a body that means anything: these go on unread.
READING = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Pure ASGI: what the application sends goes out as it comes, and a disconnect reaches the application."""

    def __init__(self, app: App, checker: Checker) -> None:
        self.app = app
        self.checker = checker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})
            return
        if scope["type"] != "http" or scope["method"] in READING:
            await self.app(scope, receive, send)
            return
        try:
            self._route(scope)
            body = await self._read(scope, receive)
            if body is None:  # the client has gone
                return
            self.checker.check(scope["path"], body)
        except Refusal as refusal:
            await self._refuse(refusal, send)
            return
        await self.app(scope, _replayed(body, receive), send)

    def _route(self, scope: Scope) -> None:
        """Only requests that can be checked go on: an unknown path is not passed, it is refused."""
        if scope["method"] != "POST" or scope["path"] not in self.checker.routes:
            known = ", ".join(self.checker.routes)
            raise Refusal(
                HTTPStatus.NOT_FOUND, "", f"GET, or POST to {known}", f"{scope['method'][:16]} to another path"
            )
        media = [value.split(b";")[0].strip().lower() for name, value in scope["headers"] if name == b"content-type"]
        coded = any(name == b"content-encoding" for name, _ in scope["headers"])
        if media != [b"application/json"] or coded:
            found = "an encoded body" if coded else b", ".join(media).decode("latin-1") or "none"
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type", "application/json, not encoded", found)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client went away.  Stops reading at the limit, whatever Content-Length says."""
        limits = self.checker.limits
        expected = f"at most {limits.body_bytes} bytes"
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and len(value) < 20 and int(value) > limits.body_bytes:
                raise too_large("", expected, f"{int(value)}")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    chunk = message.get("body", b"")
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > limits.body_bytes:
                        raise too_large("", expected, "more")
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            seconds = f"{limits.body_seconds} s"
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "", f"the body within {seconds}", f"{size} bytes") from error

    async def _refuse(self, refusal: Refusal, send: Send) -> None:
        """What was not read of the body is not read here either: the server throws it away as it comes."""
        body = refusal.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if refusal.status == HTTPStatus.REQUEST_TIMEOUT:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": int(refusal.status), "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the server has: the client's disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
