#!/usr/bin/python
"""Fill a folder with a model: by a client that resumes, or by copying from a folder of the host."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import List

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.weights_manifest import is_hidden, room_bytes

DOCUMENTATION = r"""
module: vllm_weights_fetch
short_description: Fill a folder with a model, going on where an earlier run was cut off
description:
  - Meant to run as an asynchronous job. A second run on the same folder waits until the first has ended.
options:
  partial: {type: path, required: true, description: Folder to fill; created when absent.}
  command: {type: list, elements: str, description: Client that fills it and resumes by itself.}
  folder: {type: path, description: Folder of the host to copy from; hidden files are left out.}
  bytes: {type: int, default: 0, description: "Size of the model where it is known; a folder's own is measured."}
author: [glm-ocr-ascend]
"""

RETURN = r"""
output: {type: str, returned: always, description: The client's last lines.}
"""

EXAMPLES = r"""
- vllm_weights_fetch:
    partial: /opt/atomgit/weights/GLM-OCR-bf16.partial
    folder: /mnt/disk/GLM-OCR-bf16
  async: 43200
  poll: 0
"""

OUTPUT_LINES = 20
BLOCK_BYTES = 4 * 2**20


class FetchError(Exception):
    """The folder is not complete."""


def copy_file(source: Path, target: Path) -> None:
    """Copy one file; what is there of it already is kept, unless the source is newer."""
    wanted = source.stat()
    with source.open("rb") as reading, target.open("ab") as writing:
        there = os.fstat(writing.fileno())
        if (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return
        if there.st_size >= wanted.st_size or there.st_mtime_ns < wanted.st_mtime_ns:
            writing.truncate(0)
        reading.seek(os.fstat(writing.fileno()).st_size)
        shutil.copyfileobj(reading, writing, BLOCK_BYTES)
        os.fsync(writing.fileno())
    os.utime(str(target), ns=(wanted.st_mtime_ns, wanted.st_mtime_ns))


def files_of(source: Path) -> List[Path]:
    """The files to copy, relative to ``source``.  Raises ``FetchError`` when it is no folder."""
    if not source.is_dir():
        raise FetchError(f"expected the model in {source} on this host, found no such folder; is the disk mounted?")
    walked = os.walk(source, followlinks=True)
    found = [(Path(parent) / name).relative_to(source) for parent, _, names in walked for name in names]
    return [relative for relative in found if not is_hidden(str(relative))]


def size_of(source: Path) -> int:
    """Bytes to copy.  Raises ``FetchError`` when they cannot be told."""
    try:
        return sum((source / relative).stat().st_size for relative in files_of(source))
    except OSError as error:
        raise FetchError(str(error)) from error


def expect_room(partial: Path, needed: int) -> None:
    """Raises ``FetchError`` when the disk cannot hold ``needed`` bytes, nothing fetched yet."""
    room = room_bytes(partial)
    if needed > room:
        raise FetchError(
            f"[WEIGHTS_DISK] expected {needed / 1e9:.1f} GB free for the model at {partial}; found {room / 1e9:.1f} GB"
            f" (`df -h {partial.parent}`)"
        )


def copy_folder(source: Path, target: Path) -> None:
    """Raises ``FetchError`` when a file cannot be read or written."""
    try:
        for relative in files_of(source):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / relative, target / relative)
    except OSError as error:
        raise FetchError(str(error)) from error


def run(command: List[str]) -> str:
    """The last lines of what the command said.  Raises ``FetchError`` when it did not end well."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise FetchError(f"{command[0]} cannot be run on this host: {error.strerror}") from error
    # Progress bars begin their line again with a carriage return.
    lines = [line for line in re.split(r"[\r\n]+", done.stdout.decode(errors="replace")) if line.strip()]
    output = "\n".join(lines[-OUTPUT_LINES:])
    if done.returncode != 0:
        raise FetchError(f"{command[0]} ended with status {done.returncode}:\n{output}")
    return output


def fetch(partial: Path, command: List[str], folder: str, known_bytes: int = 0) -> str:
    expect_room(partial, max(known_bytes, 0 if command else size_of(Path(folder))))
    partial.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(str(partial), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not partial.is_dir() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise FetchError(f"another run completed {partial} meanwhile")
        if command:
            return run(command)
        copy_folder(Path(folder), partial)
        return ""
    finally:
        os.close(handle)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "partial": {"type": "path", "required": True},
            "command": {"type": "list", "elements": "str"},
            "folder": {"type": "path"},
            "bytes": {"type": "int", "default": 0},
        },
        mutually_exclusive=[("command", "folder")],
        required_one_of=[("command", "folder")],
    )
    partial, command, folder, size = (module.params[name] for name in ("partial", "command", "folder", "bytes"))
    try:
        output = fetch(Path(partial), command or [], folder or "", size)
    except FetchError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=True, output=output)


if __name__ == "__main__":
    main()
