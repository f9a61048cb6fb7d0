"""A minimal client of vLLM's OpenAI-compatible HTTP API, shared by smoke.py and inference.py.

The key of a guarded service is taken from the environment, see ``api_key.py``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import requests
from urllib3.exceptions import MaxRetryError

from api_key import api_key

CONNECT_TIMEOUT_SECONDS = 10.0


class ApiError(Exception):
    """Base of this module's errors; the text says what was found."""


class UnreachableError(ApiError):
    """No connection: nothing can be said about the service."""


class NoReplyError(ApiError):
    """The service took the request, and no complete reply came back."""


class MalformedReplyError(ApiError):
    """A reply that is not what the chat API promises."""


@dataclass(frozen=True)
class Response:
    """One HTTP reply. ``latency_ms`` runs from before the connection to the last byte of the body."""

    status: int
    body: str
    latency_ms: float


@dataclass(frozen=True)
class Reply:
    """The first choice of a chat completion; ``text`` is empty when the model said nothing."""

    text: str
    finish_reason: str | None


def send(url: str, payload: dict[str, Any] | None = None, *, timeout_seconds: float) -> Response:
    """GET ``url``, or POST ``payload`` to it as JSON; any HTTP status is returned.

    Raises ``UnreachableError`` without a connection (or for an invalid URL) and ``NoReplyError`` when the
    connection ends, or ``timeout_seconds`` pass, before the reply is complete.
    """
    headers = {"Authorization": f"Bearer {key}"} if (key := api_key()) else {}
    timeout = (min(CONNECT_TIMEOUT_SECONDS, timeout_seconds), timeout_seconds)
    with requests.Session() as session:
        session.trust_env = False  # A proxy of the environment must not answer in place of the service.
        start = time.perf_counter()
        try:
            reply = session.request("POST" if payload else "GET", url, json=payload, headers=headers, timeout=timeout)
        except requests.RequestException as error:
            raise _explained(error, url, timeout_seconds) from error
        latency_ms = round((time.perf_counter() - start) * 1000, 1)
    # JSON is UTF-8; requests would guess another charset from a text/* content type.
    return Response(reply.status_code, reply.content.decode("utf-8", "replace"), latency_ms)


def _explained(error: requests.RequestException, url: str, timeout_seconds: float) -> ApiError:
    # requests wraps a refused connection and a connection lost halfway in one class; only urllib3's cause
    # tells them apart.  The ValueErrors are unusable URLs.
    refused = isinstance(error, requests.ConnectionError) and isinstance(next(iter(error.args), None), MaxRetryError)
    if refused or isinstance(error, (requests.ConnectTimeout, ValueError)):
        return UnreachableError(f"no connection to {url} ({_root_cause(error)})")
    if isinstance(error, requests.Timeout):
        return NoReplyError(f"no reply from {url} within {timeout_seconds:g} s")
    return NoReplyError(f"the connection to {url} ended before the reply was complete ({_root_cause(error)})")


def _root_cause(error: BaseException) -> str:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return str(error) or type(error).__name__


def chat_request(model: str, prompt: str, image_url: str | None = None, *, max_tokens: int) -> dict[str, Any]:
    """The body of a greedy chat completion; ``max_tokens`` counts generated tokens.

    The image comes before the text, the order GLM-OCR was trained with.
    """
    content: str | list[dict[str, Any]] = prompt
    if image_url:
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}


def parse_reply(body: str) -> Reply:
    """The first choice in the body of a chat completion.  Raises ``MalformedReplyError`` for anything else."""
    try:
        choice = json.loads(body)["choices"][0]
        text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise MalformedReplyError(f"not a chat completion ({type(error).__name__}: {error})") from error
    for name, value in (("content", text), ("finish_reason", finish_reason)):
        if not isinstance(value, str | None):
            raise MalformedReplyError(f"not a chat completion ({name} is {type(value).__name__}, not text)")
    # JSON can hold half a surrogate pair, and UTF-8, in which it is printed and written, cannot.
    return Reply((text or "").encode("utf-8", "replace").decode(), finish_reason)


def server_message(body: str) -> str:
    """The server's own words in an error body: vLLM's ``{"error": {"message"}}``, a 401's ``{"error": "..."}``,
    FastAPI's ``{"detail"}``, or the first 300 characters."""
    try:
        reply = json.loads(body)
        error = reply.get("error") or reply.get("detail") or reply.get("message")
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return " ".join(str(message or body[:300] or "empty body").split())
