"""What a rendered unit has systemd run."""

from __future__ import annotations

import shlex


def exec_start(unit: str) -> list[str]:
    """The arguments systemd passes on: continued lines joined, quotes removed, %% and $$ undoubled."""
    joined = unit.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart="))
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def serve_command(unit: str) -> list[str]:
    words = exec_start(unit)
    return words[words.index("vllm") :]
