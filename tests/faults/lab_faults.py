"""A fault between the engine and its clients: mounted into the engine's image, named by ``vllm serve --middleware``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

EVERY = 20
BODY = b'{"error": {"message": "injected fault", "type": "InternalServerError", "param": null, "code": 500}}'


class EveryTwentiethFails:
    """Answers every twentieth chat request with 500, in the engine's place."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.requests = 0

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/chat/completions":
            self.requests += 1
            if self.requests % EVERY == 0:
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
                await send({"type": "http.response.start", "status": 500, "headers": headers})
                await send({"type": "http.response.body", "body": BODY})
                return
        await self.app(scope, receive, send)
