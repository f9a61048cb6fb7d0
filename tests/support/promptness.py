"""How soon an answer comes, on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

#: What is refused is refused within so many.
REFUSAL_SECONDS = 1.0


def promptly(ask: Callable[[], Answer]) -> tuple[Answer, float]:
    """An answer and the seconds that it took.

    One that took longer than REFUSAL_SECONDS is asked for again, twice at most: a second that the machine was elsewhere
    does not come thrice, one that the server needs does.
    """
    for _ in range(3):
        started = time.monotonic()
        answer = ask()
        seconds = time.monotonic() - started
        if seconds < REFUSAL_SECONDS:
            break
    return answer, seconds
