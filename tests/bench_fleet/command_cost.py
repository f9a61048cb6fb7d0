"""What a command costs: wall time, CPU and memory of it and of all that it starts.

    python command_cost.py RESULT COMMAND [ARGUMENT]...

What it leaves behind, such as the connections that ssh keeps open, is ended and counted too.  Memory is sampled: the
largest process, and all together, where pages that processes share count once for each.  RESULT is JSON; the exit
status is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLE_SECONDS = 0.25
#: For what is left behind to end after SIGTERM.
END_SECONDS = 5.0
#: prctl(2): who loses its parent becomes a child of this process.
PR_SET_CHILD_SUBREAPER = 36
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB
    except (OSError, IndexError):
        return 0.0


class Cost:
    def __init__(self) -> None:
        self.wall = self.cpu = self.largest_mb = self.together_mb = 0.0

    def sample(self) -> None:
        sizes = [resident_mb(pid) for pid in descendants(os.getpid())]
        self.largest_mb = max([self.largest_mb, *sizes])
        self.together_mb = max(self.together_mb, sum(sizes))

    def reap(self) -> dict[int, int]:
        """Exit statuses of the children that have ended, whose CPU is that of all they have waited for."""
        ended = {}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                self.cpu += usage.ru_utime + usage.ru_stime
                ended[pid] = os.waitstatus_to_exitcode(status)
        return ended

    def end_what_is_left(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + END_SECONDS
            for pid in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while any(descendants(os.getpid())) and time.monotonic() < deadline:
                signal.sigtimedwait([signal.SIGCHLD], SAMPLE_SECONDS)
                self.reap()


def run(command: list[str]) -> tuple[int, Cost]:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # sigtimedwait takes it
    cost = Cost()
    began = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ, setsigmask=[])
    while pid not in (ended := cost.reap()):
        cost.sample()
        signal.sigtimedwait([signal.SIGCHLD], SAMPLE_SECONDS)
    cost.wall = time.perf_counter() - began
    cost.end_what_is_left()
    return ended[pid], cost


def main() -> int:
    result, *command = sys.argv[1:]
    status, cost = run(command)
    Path(result).write_text(json.dumps(vars(cost)))
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
