"""What is put on a host: complete files or none, folders, their modes, and what a diff tells of them.

Python 3.8, standard library only: it runs on the host.
"""

from __future__ import annotations

import difflib
import os
import stat
import tempfile
from typing import Dict, List, Optional

TOOL_MODE, FOLDER_MODE = 0o755, 0o755


def write_atomically(path: str, content: str, mode: int) -> None:
    """Replaces ``path`` by a complete file or not at all."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix="." + os.path.basename(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def difference(name: str, before: Optional[str], after: str) -> Dict[str, str]:
    lines = difflib.unified_diff((before or "").splitlines(True), after.splitlines(True), name, name)
    return {"prepared": "".join(lines)}


def mode_of(path: str) -> Optional[int]:
    """The permission bits of what is there; None where nothing is."""
    return stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else None


def provide(tools: Dict[str, str], folders: List[str], write: bool, mode: int = TOOL_MODE) -> List[Dict[str, str]]:
    """Puts in place what a unit needs beside itself; tells the difference of each part that was not as it must be."""
    diff = []
    for folder in folders:
        if mode_of(folder) != FOLDER_MODE:
            diff.append({"prepared": f"folder {folder}: mode {FOLDER_MODE:04o}\n"})
            if write:
                os.makedirs(folder, exist_ok=True)
                os.chmod(folder, FOLDER_MODE)
    for path, text in tools.items():
        if (read(path), mode_of(path)) != (text, mode):
            diff.append(difference(path, read(path), text))
            if write:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_atomically(path, text, mode)
    return diff
