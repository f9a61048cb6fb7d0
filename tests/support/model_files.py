"""Models for tests: the nano model of the lab, and small files in the right format."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from rendering import PROJECT, ROLES

NANO = ROLES / "lab_nano_model" / "files" / "GLM-OCR-nano"
NANO_MANIFEST = PROJECT / "inventory" / "manifests" / "GLM-OCR-nano.sha256"


def safetensors(data: bytes = b"\0" * 8) -> bytes:
    header = json.dumps({"t": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sha256sum(folder: Path, *options: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """GNU sha256sum over the files of ``folder``, or with ``--check`` over ``text``."""
    files = ["-"] if text is not None else sorted(path.name for path in folder.iterdir())
    command = ["sha256sum", *options, *files]
    return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)


def flip(file: Path) -> None:
    """Change the last byte, and set size and mtime back to what they were."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
