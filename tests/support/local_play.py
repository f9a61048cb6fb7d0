"""Run roles of the project on this machine, with a stand-in for the container engine and without root."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from playing import ansible_playbook
from rendering import PROJECT, ROLES


@dataclass(frozen=True)
class Played:
    rc: int
    stdout: str
    changed: int


def role(name: str) -> dict[str, Any]:
    """The task that runs a role, as the playbooks have it."""
    return {"ansible.builtin.import_role": {"name": name}}


class LocalPlay:
    """``run(role("vllm_image"))`` in a folder that holds the engine, its images and what the play leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = folder / "engine"
        shutil.copyfile(PROJECT / "tests" / "support" / "fake_engine.py", self.engine)
        self.engine.chmod(0o755)
        # Present for their variables, as in the deployment's play; none of their tasks runs.
        self.silent = [role(name) | {"when": False} for name in ("glm_ocr", "vllm_image", "vllm_service")]
        self.variables: dict[str, Any] = {
            "glm_ocr_container_engine": str(self.engine),
            "glm_ocr_state_dir": str(folder / "state"),
            "glm_ocr_library_dir": str(folder / "lib"),
            "__vllm_image_build_lock": str(folder / "build.lock"),
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
        }

    def run(self, *tasks: dict[str, Any], check: bool = False, options: Sequence[str] = (), **variables: Any) -> Played:
        play = {"hosts": "localhost", "gather_facts": False, "tasks": [*tasks, *self.silent]}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        played = ansible_playbook(
            "--inventory=localhost,",
            f"--extra-vars={json.dumps(self.variables | variables)}",
            *(["--check"] if check else []),
            *options,
            str(self.folder / "play.yml"),
            folder=self.folder,
            ANSIBLE_ROLES_PATH=str(ROLES),
        )
        changed = played.recap("localhost")["changed"] if "PLAY RECAP" in played.output else -1
        # The default callback prints messages as JSON: undo what it escapes.
        return Played(played.rc, played.output.replace('\\"', '"'), changed)

    def calls(self, verb: str) -> list[dict[str, Any]]:
        """What the engine was asked so far, of one verb: ``arguments`` and ``stdin`` of each."""
        log = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line["arguments"][0] == verb]
