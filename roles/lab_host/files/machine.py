#!/usr/bin/python3
"""Print what the lab needs to know of this machine, as JSON. Reads only."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path


def free_gb(folder: Path) -> float:
    """Free space where `folder` is, or where it would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def memory_mb() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":", 1)
        if name == "MemTotal":
            return int(value.split()[0]) // 1024
    raise ValueError("/proc/meminfo has no MemTotal")


def system() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return f"{release.get('NAME', '?').split()[0]} {release.get('VERSION_ID', '')}".strip()


def main(folders: list[str]) -> int:
    report = {
        "uid": os.geteuid(),
        "system": system(),
        "architecture": platform.machine(),
        "memory_mb": memory_mb(),
        "disk_free_gb": round(min(free_gb(Path(folder)) for folder in folders), 1),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
