"""The files of a model and what they must be, and the hashes of those that were read before.

A manifest is text that `sha256sum --check` reads: one line a file.  Comments of the form ``# size BYTES NAME``, which
`sha256sum` passes over, add the sizes, so that a wrong file is told without reading it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import Dict, List, Mapping, Optional, Tuple

from ansible.module_utils.disk import free_bytes

#: What may not be unlisted, because the engine or its libraries could load it.
LOADABLE = (".safetensors", ".json", ".jinja", ".py", ".txt", ".model", ".tiktoken")
#: Formats that run code when they are loaded (docs.python.org/3/library/pickle.html).
PICKLE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
SIZE = re.compile(r"# size (\d+) (.+)")
#: Names that `sha256sum` would escape, or that are no UTF-8.
AWKWARD = re.compile(r"[\x00-\x1f\\\ud800-\udfff]")
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Entry:
    """What a manifest says about a file; sizes in bytes, None where it says none."""

    sha256: str
    size: Optional[int] = None


@dataclass(frozen=True)
class Identity:
    """What tells that a file is still the one that was read.

    Every write moves the ctime and no program can set it back, unlike the mtime.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def is_hidden(name: str) -> bool:
    """Whether a file belongs to the bookkeeping of git or of a download client."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def is_loadable(name: str) -> bool:
    return name.endswith(LOADABLE + PICKLE) and not is_hidden(name)


# --- the manifest's text ----------------------------------------------------------------------------------


def parse(text: str) -> Dict[str, Entry]:
    """Name to entry.  Raises ``ValueError`` that names every line that is none."""
    hashes: Dict[str, str] = {}
    sizes: Dict[str, int] = {}
    problems: List[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        size, entry = SIZE.fullmatch(line), LINE.fullmatch(line)
        if size:
            sizes[size[2]] = int(size[1])
        elif entry and not PurePosixPath(entry[2]).is_absolute() and ".." not in PurePosixPath(entry[2]).parts:
            if hashes.setdefault(entry[2], entry[1].lower()) != entry[1].lower():
                problems.append(f"line {number}: another SHA-256 for {entry[2]}")
        elif line.strip() and not line.startswith("#"):
            problems.append(f"line {number}: {line[:100]}")
    if problems or not hashes:
        raise ValueError("; ".join(problems) or "no line at all")
    return {name: Entry(sha256, sizes.get(name)) for name, sha256 in hashes.items()}


def render(entries: Mapping[str, Entry]) -> str:
    """The manifest as text, in the order of the names."""
    listed = sorted(entries.items())
    lines = ["# Check by hand, in the model's folder: sha256sum --check --strict MANIFEST"]
    lines += [f"# size {entry.size} {name}" for name, entry in listed if entry.size is not None]
    lines += [f"{entry.sha256}  {name}" for name, entry in listed]
    return "\n".join(lines) + "\n"


# --- the files --------------------------------------------------------------------------------------------


def identity(file: Path) -> Identity:
    """Raises ``OSError`` for what is not a readable regular file, such as a broken link."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def list_files(folder: Path) -> Tuple[Dict[str, Identity], Dict[str, str]]:
    """The files below ``folder``, hidden ones too: name to identity; and name to complaint."""
    files: Dict[str, Identity] = {}
    problems: Dict[str, str] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for file in (Path(parent, name) for name in names):
            name = str(file.relative_to(folder))
            try:
                if AWKWARD.search(name):
                    raise OSError("a name that no manifest can hold")
                files[name] = identity(file)
            except OSError as error:
                problems[AWKWARD.sub("?", name)] = error.strerror or str(error)
    return files, problems


def fingerprint(files: Mapping[str, Identity]) -> str:
    """SHA-256 over name, size and modification time of every file."""
    rows = sorted((name, file.size, file.mtime_ns) for name, file in files.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --- space ------------------------------------------------------------------------------------------------


def bytes_on_disk(folder: Path) -> int:
    """Hidden files too, where download clients keep what is not complete; sparse parts do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = (Path(parent) / name).lstat()
            except OSError:  # renamed meanwhile
                continue
            total += min(status.st_size, status.st_blocks * 512)
    return total


def room_bytes(partial: Path) -> int:
    """Bytes that a model in ``partial`` may have: what is free where it is or will be, and what it has already."""
    free: int = free_bytes(str(partial))
    return free + bytes_on_disk(partial)


# --- hashes -----------------------------------------------------------------------------------------------


def sha256_of(file: Path, expected: Identity) -> str:
    """Raises ``OSError`` when the file cannot be read, or is not the expected one before and after."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(BLOCK_BYTES, expected.size + 1)))
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while True:
            size = stream.readinto(block)
            if not size:
                break
            digest.update(block[:size])
    if identity(file) != expected:
        raise OSError("it changed while it was read")
    return digest.hexdigest()


def hash_files(folder: Path, files: Mapping[str, Identity]) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Read files on all cores (hashlib releases the interpreter's lock): name to SHA-256, and name to complaint."""

    def read(name: str) -> Tuple[str, str, str]:
        try:
            return name, sha256_of(folder / name, files[name]), ""
        except OSError as error:
            return name, "", error.strerror or str(error)

    # The longest first, so that no core is left alone with it at the end.
    ordered = sorted(files, key=lambda name: -files[name].size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(read, ordered))
    hashes = {name: sha256 for name, sha256, problem in done if not problem}
    return hashes, {name: problem for name, _, problem in done if problem}


# --- what was read before ---------------------------------------------------------------------------------


def recall(memory: Path, files: Mapping[str, Identity]) -> Dict[str, str]:
    """Name to SHA-256 of those files that are still the ones that were read.

    A memory that is absent or damaged costs a read, nothing else.
    """
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        known = {name: (list(row["identity"]), str(row["sha256"])) for name, row in remembered.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {
        name: known[name][1] for name, file in files.items() if name in known and known[name][0] == list(astuple(file))
    }


def remember(memory: Path, files: Mapping[str, Identity], hashes: Mapping[str, str]) -> None:
    """Replace the memory, readable for its owner alone.  Raises ``OSError`` when it cannot be written."""
    rows = {name: {"identity": astuple(files[name]), "sha256": sha256} for name, sha256 in sorted(hashes.items())}
    memory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    partial = memory.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    partial.replace(memory)
