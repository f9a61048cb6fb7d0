"""What vLLM loads: ``--middleware request_guard.engine.RequestGuard``.

The environment names two files: ``REQUEST_GUARD_LIMITS``, the site's limits, and ``REQUEST_GUARD_TOKENIZER``, the
model's tokenizer.json.  They are read when this module is imported, so that a wrong one ends the start of the engine:
an error while uvicorn sets the application up would only be logged, and every request answered with 500.
"""

from __future__ import annotations

import os
from pathlib import Path

from request_guard.check import Checker
from request_guard.limits import LimitsError, load_limits, load_special_tokens
from request_guard.middleware import App, Guard


def _file(variable: str) -> Path:
    if not (name := os.environ.get(variable)):
        raise LimitsError(f"{variable}: expected the path of a file in the environment; found none")
    return Path(name)


CHECKER = Checker(load_limits(_file("REQUEST_GUARD_LIMITS")), load_special_tokens(_file("REQUEST_GUARD_TOKENIZER")))


class RequestGuard(Guard):
    """The guard with the limits of the environment."""

    def __init__(self, app: App) -> None:
        super().__init__(app, CHECKER)
