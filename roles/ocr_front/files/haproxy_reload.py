#!/usr/bin/env python3
"""Reload HAProxy, and tell whether it happened.

    haproxy_reload.py 1234    the main process of the service

The main process tells nothing to whoever sends it the signal: when it cannot do what it read, for instance because a
port is taken, it goes on with the workers that it has. A worker that was not there before is what a reload makes.
Exit 0 a new worker runs, 1 the old ones go on.  Standard library only: it runs on the host.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Set

#: How often it is sent, and the seconds that each has: one that comes just after a start is lost.
SIGNALS, SECONDS = 3, 5.0


def workers(main: int) -> Set[str]:
    with open(f"/proc/{main}/task/{main}/children", encoding="ascii") as children:
        return set(children.read().split())


def reload(main: int) -> bool:
    before = workers(main)
    for _ in range(SIGNALS):
        os.kill(main, signal.SIGUSR2)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if workers(main) - before:
                return True
            # Nothing announces a worker to another process than the service manager.
            time.sleep(0.05)
    return False


if __name__ == "__main__":
    if not reload(int(sys.argv[1])):
        sys.exit(
            f"expected a new worker of HAProxy in {SIGNALS * SECONDS:.0f} s, found none: it goes on with what it had"
            " read.\nIts lines above say why; fix that, and reload again"
        )
