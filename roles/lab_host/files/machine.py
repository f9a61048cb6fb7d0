#!/usr/bin/python3
"""Say everything that keeps this machine from carrying the lab.  Reads only, and needs nothing but Python 3.8.

Without options it takes the role's own defaults: `make` asks it before anything is installed, the role asks it with the
inventory's choices.  Exit status 1 when something is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULTS = Path(__file__).resolve().parents[1] / "defaults" / "main.yml"
#: What an earlier run has built: while it is there, less disk is needed.
BUILT = "registry/docker/registry/v2/repositories"
ARCHITECTURE = "x86_64"


@dataclass(frozen=True)
class Machine:
    """Sizes: memory in MB as Linux counts it (KiB / 1024), disk in GB (1000^3 bytes)."""

    uid: int
    system: str
    architecture: str
    memory_mb: int
    disk_free_gb: float


def default(name: str, text: str) -> list[str]:
    """A variable's values in the role's defaults, where they are plain words: on its line, or listed below it.

    Raises ``ValueError`` when there is none.
    """
    found = re.search(rf"^{name}:(?: (\S+)\n|\n((?:  - .+\n)+))", text, re.MULTILINE)
    if not found:
        raise ValueError(f"{DEFAULTS} has no {name}")
    return [found[1]] if found[1] else re.findall(r"  - (.+)\n", found[2])


def free_gb(folder: Path) -> float:
    """Free space where ``folder`` is, or where it would be made.

    As the roles' module_utils/disk.py, which cannot be had here: nothing is installed yet.
    """
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(str(folder)).free / 1e9


def memory_mb(meminfo: str) -> int:
    """Raises ``ValueError`` when there is no MemTotal."""
    found = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if not found:
        raise ValueError("/proc/meminfo has no MemTotal")
    return int(found[1]) // 1024


def system(os_release: str) -> str:
    """Name and version of /etc/os-release, such as Debian 12."""
    words = [word.partition("=") for word in shlex.split(os_release, comments=True)]
    release = {name: value for name, _, value in words}
    return f"{release.get('NAME', '?').split()[0]} {release.get('VERSION_ID', '')}".strip()


def look(folders: list[Path]) -> Machine:
    release = Path("/etc/os-release")
    return Machine(
        os.geteuid(),
        system(release.read_text(encoding="utf-8")) if release.exists() else platform.system(),
        platform.machine(),
        memory_mb(Path("/proc/meminfo").read_text(encoding="utf-8")),
        round(min(free_gb(folder) for folder in folders), 1),
    )


def problems(machine: Machine, systems: list[str], memory_min_mb: int, disk_min_gb: float, places: str) -> list[str]:
    found = []
    if machine.uid != 0:
        found.append(
            f"root: found user id {machine.uid}; namespaces, mounts and disks need it. Fix: run it as root (sudo -H)."
        )
    if machine.system not in systems:
        found.append(
            f"one of {', '.join(systems)}: found {machine.system}. Fix: use one of these, or add this one to"
            " lab_host_supported_systems."
        )
    if machine.architecture != ARCHITECTURE:
        found.append(
            f"{ARCHITECTURE}: found {machine.architecture}; the lab's engine exists for no other. Fix: use one."
        )
    if machine.disk_free_gb < disk_min_gb:
        found.append(
            f"{disk_min_gb} GB of free disk for {places}: found {machine.disk_free_gb}. Fix: free some, or move"
            " lab_host_cache_dir and lab_host_state_dir."
        )
    if machine.memory_mb < memory_min_mb:
        found.append(f"{memory_min_mb} MB of memory: found {machine.memory_mb}. Fix: use a larger machine.")
    return found


def main() -> int:
    text = DEFAULTS.read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cache_dir", "state_dir", "disk_free_min_gb", "disk_free_min_built_gb", "memory_min_mb"):
        (value,) = default(f"lab_host_{name}", text)
        kind = Path if name.endswith("_dir") else int
        parser.add_argument(f"--{name}", type=kind, default=kind(value), help=f"default {value}")
    systems = default("lab_host_supported_systems", text)
    parser.add_argument("--supported_systems", nargs="+", default=systems, help=f"default {', '.join(systems)}")
    given = parser.parse_args()
    built = (given.cache_dir / BUILT).exists()
    found = problems(
        look([given.cache_dir, given.state_dir]),
        given.supported_systems,
        given.memory_min_mb,
        given.disk_free_min_built_gb if built else given.disk_free_min_gb,
        f"{given.cache_dir} and {given.state_dir}",
    )
    for problem in found:
        print(f"Missing for the lab: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
