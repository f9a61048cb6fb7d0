"""The plays about weights, run as an operator would, on this machine as the host.  The hub's client is a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_files import NANO, NANO_MANIFEST, flip, sha256, sha256sum
from rendering import PROJECT

#: Plays docker with the client in it: notes how it was called and fills the folder; the first call is cut off.
CLIENT = """#!{python}
import json, os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
if sys.argv[1:3] == ["image", "inspect"]:
    sys.exit(print("sha256:" + "0" * 64))
with (here / "calls").open("a") as calls:
    print(json.dumps([sys.argv, os.environ.get("SECRET")]), file=calls)
arguments = dict(zip(sys.argv, sys.argv[1:]))
target = pathlib.Path(arguments["--local_dir"])
shutil.copytree("{model}", target, dirs_exist_ok=True)
(target / ".bookkeeping").touch()
if len((here / "calls").read_text().splitlines()) == 1:
    (target / "config.json").unlink()
    sys.exit("10 %\\r20 %\\rthe network went away")
"""

Play = Callable[..., tuple[int, str]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """``play("weights_fetch.yml", "--check", some_variable=1)``: exit status and output."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(CLIENT.format(python=sys.executable, model=NANO))
    (tmp_path / "bin" / "docker").chmod(0o755)
    (tmp_path / "inventory").mkdir()
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "glm_ocr_weights_path": str(tmp_path / "model"),
        "glm_ocr_state_dir": str(tmp_path / "state"),
    }
    hosts = {"ascend910": {"hosts": {"npu-01": {}}, "vars": variables}}
    (tmp_path / "inventory" / "hosts.yml").write_text(yaml.safe_dump(hosts))
    environment = {
        "HOME": str(tmp_path),
        "ANSIBLE_ASYNC_DIR": str(tmp_path / "jobs"),
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }

    def run(playbook: str, *options: str, **variables: Any) -> tuple[int, str]:
        command = ["ansible-playbook", "-i", str(tmp_path / "inventory" / "hosts.yml"), *options]
        path = Path(playbook) if Path(playbook).is_absolute() else PROJECT / "playbooks" / playbook
        done = subprocess.run(
            [*command, "-e", json.dumps(variables), str(path)],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout)
        assert "WARNING" not in done.stdout
        return done.returncode, done.stdout

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where the host has its model; not there yet."""
    return tmp_path / "model"


def calls(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "bin" / "calls").read_text().splitlines()]


def test_a_manifest_is_made_kept_and_never_lost(play: Play, model: Path, tmp_path: Path) -> None:
    shutil.copytree(NANO, model)
    made = tmp_path / "inventory" / "manifests" / "model.sha256"
    rc, output = play("weights_manifest.yml", "--check")
    assert (rc, "changed=0" in output) == (0, False)
    assert not made.parent.exists()
    rc, output = play("weights_manifest.yml")
    assert (rc, made.read_text()) == (0, NANO_MANIFEST.read_text()), output
    assert "changed=0" in play("weights_manifest.yml")[1]

    flip(model / "model.safetensors")
    rc, output = play("weights_manifest.yml")
    assert rc != 0
    assert "[WEIGHTS_ALTERED] error: expected model.safetensors with SHA-256" in output
    assert made.read_text() == NANO_MANIFEST.read_text()
    rc, output = play("weights_manifest.yml", vllm_weights_manifest_replace=True)
    assert rc == 0
    assert sha256sum(model, "--check", "--strict", text=made.read_text()).returncode == 0

    (model / "pytorch_model.bin").touch()
    rc, output = play("weights_manifest.yml", vllm_weights_manifest_replace=True)
    assert rc != 0
    assert "[WEIGHTS_PICKLE]" in output


def test_a_manifest_is_made_from_one_host(play: Play, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory" / "hosts.yml"
    inventory.write_text(inventory.read_text().replace("npu-01: {}", "npu-01: {}\n    npu-02: {}"))
    rc, output = play("weights_manifest.yml")
    assert rc != 0
    assert "found npu-01, npu-02" in output


def test_verification_before_the_swap(play: Play, model: Path, tmp_path: Path) -> None:
    swap = tmp_path / "swap.yml"
    tasks = [
        {"name": "Verify", "ansible.builtin.import_role": {"name": "vllm_weights", "tasks_from": "verify"}},
        {"name": "Swap", "ansible.builtin.debug": {"msg": "swapped {{ vllm_weights_fingerprint }}"}},
    ]
    roles = ["glm_ocr", "vllm_weights"]
    swap.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "roles": roles, "tasks": tasks}]))
    shutil.copytree(NANO, model)
    rc, output = play(str(swap), vllm_weights_manifest=str(NANO_MANIFEST))
    assert rc == 0
    assert f"swapped {sha256(NANO_MANIFEST)}" in output
    assert "changed=0" in output
    assert (tmp_path / "state" / "weights-hashes.json").exists()

    flip(model / "model.safetensors")
    rc, output = play(str(swap), vllm_weights_manifest=str(NANO_MANIFEST))
    assert rc != 0
    assert "[WEIGHTS_ALTERED]" in output
    assert "swapped" not in output
    rc, output = play(str(swap), vllm_weights_manifest=str(tmp_path / "absent.sha256"))
    assert rc != 0
    assert "[WEIGHTS_MANIFEST]" in output
    rc, output = play(str(swap))
    assert rc == 0, "no manifest is a warning"


def test_a_folder_is_fetched_verified_and_then_left_alone(play: Play, model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    shutil.copytree(NANO, disk)
    (disk / ".git").mkdir()
    fetch = {"vllm_weights_source": f"folder:{disk}", "vllm_weights_manifest": str(NANO_MANIFEST)}
    rc, output = play("weights_fetch.yml", "--check", **fetch)
    assert (rc, "would be fetched" in output) == (0, True)
    assert not model.exists()

    # An earlier run was cut off, and what it left is not what the source has.
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"x" + (NANO / "model.safetensors").read_bytes()[1:1000])
    rc, output = play("weights_fetch.yml", **fetch)
    assert rc != 0
    assert "[WEIGHTS_ALTERED]" in output
    assert not model.exists()
    (partial / "model.safetensors").unlink()
    rc, output = play("weights_fetch.yml", **fetch)
    assert rc == 0
    assert " of 2.66 MB)" in output
    assert not partial.exists()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {
        path.name: path.read_bytes() for path in NANO.iterdir()
    }
    assert "changed=0" in play("weights_fetch.yml", **fetch)[1]

    flip(model / "model.safetensors")
    differing = (model / "model.safetensors").read_bytes()
    rc, output = play("weights_fetch.yml", **fetch)
    assert rc != 0
    assert f"mv {model} {model}.old" in output
    assert (model / "model.safetensors").read_bytes() == differing


def test_an_absent_folder_is_told(play: Play, model: Path, tmp_path: Path) -> None:
    rc, output = play("weights_fetch.yml", vllm_weights_source=f"folder:{tmp_path / 'absent'}")
    assert rc != 0
    assert "found no such folder" in output
    assert not model.exists()


def test_modelscope_is_resumed_in_the_serving_image(play: Play, model: Path, tmp_path: Path) -> None:
    fetch = {
        "vllm_weights_source": "modelscope:ZhipuAI/GLM-OCR",
        "vllm_weights_manifest": str(NANO_MANIFEST),
        "vllm_weights_fetch_environment": {"SECRET": "s3cret"},
    }
    rc, output = play("weights_fetch.yml", **fetch)
    assert rc != 0
    assert "docker ended with status 1" in output
    assert "the network went away" in output
    assert f"it goes on from what is in {model}.partial" in output
    assert not model.exists()
    rc, output = play("weights_fetch.yml", **fetch)
    assert rc == 0
    assert (model / "config.json").exists()
    (first, secret), (second, _) = calls(tmp_path)
    assert first == second
    client = ["modelscope", "download", "--model", "ZhipuAI/GLM-OCR", "--local_dir", f"{model}.partial"]
    assert first[first.index("modelscope") :] == client
    assert first[1:4] == ["run", "--rm", "--name"]
    assert "--pull" not in first, "Docker 18.09, which the preflight accepts, has no such option"
    assert f"{model}.partial:{model}.partial" in first
    assert "--env=SECRET" in first
    assert secret == "s3cret"
    assert "s3cret" not in output
