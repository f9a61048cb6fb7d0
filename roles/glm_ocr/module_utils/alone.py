"""One process at a time.  Python 3.8, standard library only: it runs on the host."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Iterator


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """No other process that asks for the same is in here meanwhile; one that dies holds nobody up."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
