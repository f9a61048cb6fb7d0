#!/usr/bin/env python3
"""A stand-in for docker whose ``run`` really runs the command, on this machine instead of in a container.

    running_engine.py FOLDER ARGUMENT...

``FOLDER/serving`` is there while a service "runs"; ``calls.jsonl`` gets the arguments of every call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

IMAGE_ID = "sha256:" + "5" * 64
CONTAINER = {
    "Image": IMAGE_ID,
    "State": {"StartedAt": "2026-01-02T03:04:05Z"},
    "Config": {"Cmd": ["vllm", "serve"], "Env": [], "Labels": {}},
    "HostConfig": {"Devices": [{"PathOnHost": "/dev/davinci0"}]},
}


def run(arguments: list[str]) -> int:
    """``docker run OPTION... IMAGE COMMAND...``; folders of the container become those mounted there."""
    image = arguments.index(IMAGE_ID)
    options, command = arguments[1:image], arguments[image + 1 :]
    values = [option.partition("=") for option in options]
    command = [value for name, _, value in values if name == "--entrypoint"] + command
    for source, target in [value.split(":")[:2] for name, _, value in values if name == "--volume"]:
        command = [word.replace(f"{target}/", f"{source}/") for word in command]
    environment = dict(value.split("=", 1) for name, _, value in values if name == "--env")
    assert command[0] == "python3", command
    return subprocess.run([sys.executable, *command[1:]], env=os.environ | environment, check=False).returncode


def main() -> int:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    with (folder / "calls.jsonl").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    if arguments[:2] == ["container", "inspect"]:
        if not (folder / "serving").exists():
            print("Error: No such container", file=sys.stderr)
            return 1
        print(IMAGE_ID if "--format" in arguments else json.dumps([CONTAINER]))
        return 0
    if arguments[:2] == ["image", "inspect"]:
        print(IMAGE_ID)
        return 0
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
