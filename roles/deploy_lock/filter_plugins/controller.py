"""Who this play is, and whether another play of this machine is still there."""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def started(pid: int, proc: Path = PROC) -> str:
    """The process's start in clock ticks since boot (proc(5), stat, field 22); empty when it is gone."""
    try:
        # The command in parentheses may hold spaces: fields count from behind the last one.
        return (proc / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def machine() -> str:
    """This boot of this machine, and the PID namespace: where a pid has a meaning."""
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {(PROC / 'self/ns/pid').readlink()}"


def play_pid() -> int:
    """The play's own process: templating happens in its workers too."""
    pid = os.getpid()
    command = (PROC / str(pid) / "cmdline").read_bytes()
    while (parent := parent_of(pid)) > 1 and (PROC / str(parent) / "cmdline").read_bytes() == command:
        pid = parent
    return pid


def parent_of(pid: int) -> int:
    return int((PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])


def this_controller(_: object) -> dict[str, Any]:
    pid = play_pid()
    return {
        "who": f"{getpass.getuser()}@{platform.node()}",
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "pid": pid,
        "started": started(pid),
    }


def is_gone(holder: Mapping[str, Any]) -> bool:
    """True when ``holder`` was a play of this machine and its process has ended; never for another machine's."""
    here = holder["machine"] == machine()
    return here and bool(started(int(holder["pid"])) != holder["started"])


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"this_controller": this_controller, "is_gone": is_gone}
