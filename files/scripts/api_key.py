"""The key of a guarded service: never an argument, never in a report."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path


def api_key() -> str:
    """The key: ``VLLM_API_KEY``, the variable vLLM itself reads, else the content of the file ``VLLM_API_KEY_FILE``.

    ``-`` is standard input: so a key reaches a container without standing in its description.  Empty without either.
    Raises ``SystemExit`` with a message for a file that cannot be read.
    """
    if key := os.environ.get("VLLM_API_KEY"):
        return key
    source = os.environ.get("VLLM_API_KEY_FILE", "")
    return _read(source) if source else ""


@cache
def _read(source: str) -> str:
    # Once: standard input is gone afterwards.
    try:
        return (sys.stdin.readline() if source == "-" else Path(source).read_text(encoding="utf-8")).strip()
    except OSError as error:
        raise SystemExit(
            f"VLLM_API_KEY_FILE: expected a file with the key at {source}; found {error.strerror}"
        ) from error
