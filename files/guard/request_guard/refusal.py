"""Why a request is refused, in the form that OpenAI clients read."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

#: Characters of a request that a refusal may repeat.
ECHO = 100


class Refusal(Exception):
    """A request that does not go on: ``param`` is the place in it, empty for the whole.

    ``found`` names kinds, sizes and numbers; text of the request is repeated only where it is a name, and cut.
    """

    def __init__(self, status: HTTPStatus, param: str, expected: str, found: str) -> None:
        super().__init__(f"{param}: expected {expected}; found {found}")
        self.status = status
        self.param = param[:ECHO]
        self.expected = expected
        self.found = found[:ECHO]

    def body(self) -> bytes:
        """The error as vLLM itself writes it."""
        where = f"{self.param}: " if self.param else ""
        error = {
            "message": f"{where}expected {self.expected}; found {self.found}",
            "type": self.status.phrase,
            "param": self.param or None,
            "code": int(self.status),
        }
        return json.dumps({"error": error}).encode()


def unreadable(expected: str, found: str) -> Refusal:
    """400: not even JSON."""
    return Refusal(HTTPStatus.BAD_REQUEST, "", expected, found)


def too_large(param: str, expected: str, found: str) -> Refusal:
    """413: more bytes than are taken."""
    return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, param, expected, found)


def not_allowed(param: str, expected: str, found: str) -> Refusal:
    """422: read and understood, and not for the engine."""
    return Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, param, expected, found)


def shown(value: Any) -> str:
    """A JSON value for a refusal: numbers as they are, of anything else its kind and size."""
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    return "null" if value is None else str(value).lower()[:ECHO]
