#!/usr/bin/env python3
"""Collect what tells why the service does not do what it should into one archive, without secrets.

    support_bundle.py --service glm-ocr --engine docker --state-dir /var/lib/glm-ocr --output bundle.tar.gz

MANIFEST.txt, the archive's first file, lists the others and says of what could not be had why not: a command that is
missing, fails or hangs never keeps the rest from being collected.  Secrets are found where they are configured (unit,
environment files, container) and hidden wherever they occur; see ``redaction.py``, which is shipped beside this file.

Exit 0 written, 2 not.  Python 3.8, standard library only: it runs on the host.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import redaction

#: Of a longer text, the end: it is the newest part of a journal.
LARGEST_BYTES = 20 * 2**20
#: Runs whose results are taken, the newest ones.
VALIDATION_RUNS = 3
KERNEL_LINES = 2000

#: A word of a unit's line: quoted and plain pieces without a space between them (systemd.syntax(7)).
WORD = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\s'"])+""")
PIECE = re.compile(r"""'((?:\\.|[^'\\])*)'|"((?:\\.|[^"\\])*)"|([^'"]+)""")


@dataclass(frozen=True)
class Config:
    """The command line; ``unit`` is the unit's file, ``timeout`` seconds for each command."""

    service: str
    engine: str
    state_dir: Path
    unit: Path
    output: Path
    journal_lines: int
    timeout: float


@dataclass(frozen=True)
class Part:
    """One file of the bundle; ``note`` says what is wrong with it, empty when nothing is."""

    name: str
    source: str
    text: str
    note: str

    @property
    def was_had(self) -> bool:
        return bool(self.text) or not self.note


# --- pure -------------------------------------------------------------------------------------------------


def commands(config: Config) -> dict[str, list[str]]:
    """What is asked, by the name of the file that takes the answer."""
    service, engine = config.service, config.engine
    journal = ["journalctl", "--no-pager", "--all", "--output=short-iso"]
    return {
        "journal.txt": [*journal, f"--unit={service}", f"--lines={config.journal_lines}"],
        "systemctl-status.txt": ["systemctl", "status", "--no-pager", "--full", "--lines=0", service],
        "systemctl-show.txt": ["systemctl", "show", "--no-pager", service],
        "systemctl-cat.txt": ["systemctl", "cat", "--no-pager", service],
        # Of exposure front; its log has who asked for what, and which request was refused why.
        "front-journal.txt": [*journal, f"--unit={service}-front", f"--lines={config.journal_lines}"],
        "front-status.txt": ["systemctl", "status", "--no-pager", "--full", "--lines=0", f"{service}-front"],
        "watchdog-journal.txt": [*journal, f"--unit={service}-watchdog", f"--lines={config.journal_lines}"],
        "container-inspect.json": [engine, "container", "inspect", service],
        "container-engine-version.txt": [engine, "version"],
        "container-engine-info.txt": [engine, "info"],
        "npu-smi-info.txt": ["npu-smi", "info"],
        "npu-smi-info-m.txt": ["npu-smi", "info", "-m"],
        "kernel.txt": [*journal, "--dmesg", f"--lines={KERNEL_LINES}"],
        "df.txt": ["df", "--human-readable", "--print-type"],
        "df-inodes.txt": ["df", "--inodes"],
        "free.txt": ["free", "-m"],
        "ss.txt": ["ss", "-lntp"],
        "uname.txt": ["uname", "-a"],
    }


def secrets(part: Part) -> set[str]:
    """The secrets that a configuration names: in a unit, an environment file or a container's description."""
    if part.name.endswith(".json"):
        lines = json_lists(part.text)
    elif part.name.endswith(".env"):
        lines = ([line] for line in part.text.splitlines())
    else:
        lines = unit_lines(part.text)
    return {secret for words in lines for secret in redaction.secrets(words)}


def is_configuration(name: str) -> bool:
    return name in ("systemctl-show.txt", "systemctl-cat.txt", "container-inspect.json") or name.endswith(
        (".service", ".env")
    )


def unit_lines(text: str) -> Iterator[list[str]]:
    """The words of every line of a unit, or of `systemctl show`, as systemd passes them on."""
    for line in text.replace("\\\n", " ").splitlines():
        # `show` ends a command with a semicolon and goes on with its state.
        for command in line.split(" ; "):
            yield [unquoted(word) for word in WORD.findall(command)]


def unquoted(word: str) -> str:
    pieces = (single or double or plain for single, double, plain in PIECE.findall(word))
    return re.sub(r"\\(.)", r"\1", "".join(pieces)).replace("%%", "%").replace("$$", "$")


def json_lists(text: str) -> Iterator[list[str]]:
    """Every list of texts in a JSON document, such as a container's command and environment."""
    try:
        waiting: list[Any] = [json.loads(text)]
    except ValueError:
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            yield [item for item in value if isinstance(item, str)]
            waiting += value


def manifest(config: Config, host: str, at: str, parts: Sequence[Part]) -> str:
    """What is in the bundle, and what is not."""
    noted, had = [part for part in parts if part.note], [part for part in parts if part.was_had]
    lines = [
        f"Support bundle of {config.service} on {host}, {at}",
        f"Secrets are replaced by {redaction.MASK}: the values of variables and flags whose names end in KEY, TOKEN,",
        "SECRET or PASSWORD, wherever they occur. Read it before you pass it on all the same.",
        "",
        f"Missing or not complete ({len(noted)}):",
        *(f"  {part.name}: {part.note}  [{part.source}]" for part in noted),
        "",
        f"Files ({len(had)}):",
        *(f"  {len(part.text.encode()):>9} bytes  {part.name}  [{part.source}]" for part in had),
    ]
    return "\n".join(lines) + "\n"


# --- edges ------------------------------------------------------------------------------------------------


def end_of(file: BinaryIO) -> tuple[str, str]:
    """The text of a file, and a note when it is only the end of it, which begins with a whole line."""
    start = max(file.seek(0, os.SEEK_END) - LARGEST_BYTES, 0)
    file.seek(start)
    content = file.read(LARGEST_BYTES)
    note = f"only its last {LARGEST_BYTES >> 20} MiB" if start else ""
    return (content.partition(b"\n")[2] if start else content).decode(errors="replace"), note


def asked(name: str, command: Sequence[str], timeout: float) -> Part:
    source = " ".join(map(shlex.quote, command))
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "SYSTEMD_COLORS": "0",
        "PATH": os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    # Into a file rather than a pipe: what a command said before it hung is there, and memory stays bounded.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return Part(name, source, "", f"not run: {error.strerror}")
        try:
            status = process.wait(timeout)
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            problem = f"stopped after {timeout:g} s"
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                problem += "; it hangs in the kernel and cannot be ended"
        text, cut = end_of(output)
    return Part(name, source, text, ", ".join(filter(None, (problem, cut))))


def read(name: str, path: Path) -> Part:
    try:
        with path.open("rb") as file:
            return Part(name, str(path), *end_of(file))
    except OSError as error:
        return Part(name, str(path), "", f"not read: {error.strerror}")


def files(config: Config) -> dict[str, Path]:
    """The files to read, by their name in the bundle."""
    found = {
        f"{config.service}.service": config.unit,
        "os-release.txt": Path("/etc/os-release"),
        "driver-version.info": Path("/usr/local/Ascend/driver/version.info"),
        "ascend_install.info": Path("/etc/ascend_install.info"),
        "releases/history.jsonl": config.state_dir / "releases" / "history.jsonl",
    }
    if (watchdog := config.state_dir / "watchdog.json").exists():
        found[watchdog.name] = watchdog
    for release in sorted(config.state_dir.glob("releases/*/release.json")):
        folder, name = release.parent, f"releases/{release.parent.name}"
        found[f"{name}/release.json"] = release
        found[f"{name}/unit.service"] = folder / "unit"
        found[f"{name}/environment.env"] = folder / "environment"
    # Runs are named by their time.
    results = sorted(config.state_dir.glob("reports/*/*.json"))
    newest = sorted({result.parent.name for result in results})[-VALIDATION_RUNS:]
    found.update({f"reports/{r.parent.name}/{r.name}": r for r in results if r.parent.name in newest})
    return found


def environment_files(unit: str) -> dict[str, Path]:
    """The environment files that the unit hands to the container."""
    paths = [Path(path) for path in re.findall(r"--env-file[ =](\S+)", unit)]
    return {path.with_suffix(".env").name: path for path in paths}


def collect(config: Config) -> list[Part]:
    """Every part, as it is: with its secrets."""
    parts = [read(name, path) for name, path in files(config).items()]
    unit = next(part.text for part in parts if part.name == f"{config.service}.service")
    parts += [read(name, path) for name, path in environment_files(unit).items()]
    # All at once: one that hangs costs its timeout, several cost no more.
    with ThreadPoolExecutor(max_workers=len(commands(config))) as pool:
        asking = [pool.submit(asked, name, command, config.timeout) for name, command in commands(config).items()]
        return [*(answer.result() for answer in asking), *parts]


def write(path: Path, folder: str, parts: Sequence[Part], at: float) -> None:
    """The archive, whole or not at all.  Raises ``OSError``."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        os.fchmod(file.fileno(), 0o600)
        for part in parts:
            content = part.text.encode()
            entry = tarfile.TarInfo(f"{folder}/{part.name}")
            entry.size, entry.mtime, entry.mode = len(content), int(at), 0o600
            archive.addfile(entry, io.BytesIO(content))
    temporary.replace(path)


def run(config: Config) -> list[Part]:
    """The files of the bundle without their secrets, MANIFEST.txt first."""
    parts = collect(config)
    values = {secret for part in parts if is_configuration(part.name) for secret in secrets(part)}
    parts = [Part(part.name, part.source, redaction.redacted(part.text, values), part.note) for part in parts]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    listed = Part("MANIFEST.txt", "", manifest(config, platform.node(), at, parts), "")
    return [listed, *(part for part in parts if part.was_had)]


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Collect a support bundle without secrets.")
    parser.add_argument("--service", required=True, help="name of the unit and of the container")
    parser.add_argument("--engine", required=True, help="docker or podman")
    parser.add_argument("--state-dir", type=Path, required=True, help="folder with releases/ and reports/")
    parser.add_argument("--unit", type=Path, help="the unit's file; in /etc/systemd/system by default")
    parser.add_argument("--output", type=Path, required=True, help="the archive, *.tar.gz")
    parser.add_argument("--journal-lines", type=int, default=20000, help="lines of the unit's journal, the last ones")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for each command")
    arguments = parser.parse_args(argv)
    arguments.unit = arguments.unit or Path(f"/etc/systemd/system/{arguments.service}.service")
    return Config(**vars(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_args(argv)
    parts = run(config)
    try:
        write(config.output, config.output.name.replace(".tar.gz", ""), parts, time.time())
    except OSError as error:
        print(f"support_bundle.py: expected to write {config.output}, found: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
