"""What a site allows: one JSON file, written from the inventory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class LimitsError(ValueError):
    """Limits, or a tokenizer, that cannot be used: what was expected, what was found."""


@dataclass(frozen=True)
class Limits:
    """All counts are per request; the inventory's ``vllm_service_guard_limits`` explains and sets them."""

    body_bytes: int
    body_seconds: int
    text_bytes: int
    messages: int
    images: int
    image_pixels: int
    tokens: int
    n: int
    logprobs: int
    unchecked_fields: tuple[str, ...]

    @classmethod
    def of(cls, data: Any) -> Limits:
        """From parsed JSON.  Raises ``LimitsError`` unless every limit is there, and nothing else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping):
            raise LimitsError(f"expected an object with {', '.join(sorted(names))}; found {type(data).__name__}")
        if wrong := names ^ set(data):
            raise LimitsError(f"missing, or not known as a limit: {', '.join(sorted(map(str, wrong)))}")
        numbers = {name: data[name] for name in names - {"unchecked_fields"}}
        for name, value in sorted(numbers.items()):
            if type(value) is not int or value < 0:
                raise LimitsError(f"{name}: expected a whole number from 0 up; found {value!r}")
        unchecked = data["unchecked_fields"]
        if not isinstance(unchecked, list) or not all(isinstance(name, str) for name in unchecked):
            raise LimitsError(f"unchecked_fields: expected a list of names; found {unchecked!r}")
        return cls(**numbers, unchecked_fields=tuple(unchecked))


def load_limits(path: Path) -> Limits:
    """Raises ``LimitsError``."""
    return Limits.of(_json(path))


def load_special_tokens(path: Path) -> tuple[str, ...]:
    """The texts that a tokenizer.json (Hugging Face tokenizers) turns into single tokens whatever stands around them.

    Raises ``LimitsError``, also for a file without any: a guard that knows none would let all through.
    """
    try:
        tokens = tuple(str(token["content"]) for token in _json(path)["added_tokens"])
    except (LookupError, TypeError) as error:
        raise LimitsError(f"{path}: expected added_tokens, each with its content; found {error!r}") from error
    if not all(tokens) or not tokens:
        raise LimitsError(f"{path}: expected added_tokens with a content; found {len(tokens)} of them, or an empty one")
    return tokens


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LimitsError(f"{path}: expected a JSON file; found {error}") from error
