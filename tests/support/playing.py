"""Run a playbook on this machine, with stand-ins for a host's commands: no root, no network, no lab."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rendering import PROJECT

#: Variables of a host that is this machine.
HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


@dataclass(frozen=True)
class Played:
    rc: int
    output: str

    def recap(self, host: str) -> dict[str, int]:
        """The counts of the host's line at the end of the output."""
        (line,) = re.findall(rf"^{host} +: (.*)$", self.output, re.MULTILINE)
        return {name: int(count) for name, count in (pair.split("=") for pair in line.split())}


def ansible_playbook(*arguments: str, folder: Path = PROJECT, **environment: str) -> Played:
    """What an operator types in ``folder``, without colours; the output is printed too."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), *arguments],
        cwd=folder,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    return Played(done.returncode, done.stdout)


def stub(folder: Path, name: str, script: str) -> str:
    """A command that runs ``script``."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def installed_scripts(folder: Path) -> str:
    """A ``glm_ocr_library_dir`` whose scripts are the project's already: copying them there as root's needs root."""
    library = folder / "lib"
    shutil.copytree(PROJECT / "files" / "scripts", library / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return str(library)


def play(
    folder: Path,
    playbook: str,
    hosts: dict[str, dict[str, Any]],
    *more: str,
    gateways: dict[str, dict[str, Any]] | None = None,
) -> Played:
    """Plays on ``hosts``, with the commands in ``folder/bin``; reports land in ``folder/reports``."""
    groups = {"ascend910": {"hosts": hosts}} | ({"gateway": {"hosts": gateways}} if gateways else {})
    (folder / "hosts.yml").write_text(yaml.safe_dump(groups))
    if not (folder / "group_vars").exists():
        (folder / "group_vars").symlink_to(PROJECT / "inventory" / "group_vars")
    (folder / "tmp").mkdir(exist_ok=True)
    variables = f"glm_ocr_reports_dir={folder}/reports glm_ocr_state_dir={folder}/state"
    return ansible_playbook(
        playbook,
        *("-i", str(folder / "hosts.yml"), "-e", variables),
        *more,
        PATH=f"{folder}/bin:{os.environ['PATH']}",
        TMPDIR=str(folder / "tmp"),
        ANSIBLE_HOME=str(folder / "ansible"),
        ANSIBLE_REMOTE_TEMP=str(folder / "remote"),
    )
