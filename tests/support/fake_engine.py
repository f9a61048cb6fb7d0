#!/usr/bin/env python3
"""A stand-in for docker in plays that run on this machine: answers from a folder, and writes down what it was asked.

The folder is the one this file was copied into: ``images.json`` maps names to what an inspection says,
``registry.json`` those that can be pulled, ``answer`` and ``status`` are what a container prints and ends with (its
inspection succeeds), ``calls.jsonl`` gets one line per call, ``context/`` the last build's files.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def images(name: str = "images.json") -> dict[str, str]:
    path = FOLDER / name
    return dict(json.loads(path.read_text())) if path.exists() else {}


def remember(name: str, told: str) -> None:
    (FOLDER / "images.json").write_text(json.dumps(images() | {name: told}))


def load() -> None:
    """An archive of `docker save` from the standard input; the image's id is the digest of its configuration."""
    with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
        content = {entry.name.removeprefix("./"): archive.extractfile(entry) for entry in archive}
        (image,) = json.load(content["manifest.json"])  # type: ignore[arg-type]
        for name in [image["Config"], *image["Layers"]]:
            assert hashlib.sha256(content[name].read()).hexdigest() == Path(name).name  # type: ignore[union-attr]
    remember(image["RepoTags"][0], "sha256:" + Path(image["Config"]).name + " []")


def main() -> int:
    arguments = sys.argv[1:]
    stdin = sys.stdin.read() if "--interactive" in arguments else ""
    with (FOLDER / "calls.jsonl").open("a") as log:
        log.write(json.dumps({"arguments": arguments, "stdin": stdin}) + "\n")
    if arguments[:2] == ["image", "inspect"]:
        name = arguments[-1]
        print(images().get(name, ""))
        return 0 if name in images() else 1
    if arguments[0] == "build":
        shutil.copytree(arguments[-1], FOLDER / "context", dirs_exist_ok=True)
        (tag,) = [word.partition("=")[2] for word in arguments if word.startswith("--tag=")]
        remember(tag, "sha256:" + "d" * 64)
    if arguments[0] == "pull":
        if arguments[1] not in images("registry.json"):
            return 1
        remember(arguments[1], images("registry.json")[arguments[1]])
    if arguments[0] == "load":
        load()
    if arguments[0] == "tag":
        remember(arguments[2], images()[arguments[1]])
    answer, status = FOLDER / "answer", FOLDER / "status"
    if arguments[0] != "image" and answer.exists():
        print(answer.read_text())
    return int(status.read_text()) if arguments[0] != "container" and status.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
