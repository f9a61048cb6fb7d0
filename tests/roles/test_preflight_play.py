"""The preflight as an operator runs it: what the inventory says wrong is told before anything is asked of a host."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from playing import HERE, play
from rendering import PROJECT, ROLES


@pytest.mark.parametrize("playbook", ["playbooks/preflight.yml", "deploy.yml"])
def test_variables_that_contradict_each_other_are_told_first(playbook: str, tmp_path: Path) -> None:
    host = {**HERE, "vllm_service_extra_flags": {"port": 8001}}
    played = play(tmp_path, playbook, {"npu-01": host}, "--tags", "preflight")
    assert played.rc != 0
    assert "expected port: 8000, as glm_ocr_port says; found 8001" in played.output
    assert "Host | Look at the machine" not in played.output


#: What may be wrong with one host: the variable, and what the play says of it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "npu-02": ({"glm_ocr_port": 0}, "glm_ocr_port must be 1 to 65535, found 0"),
    "npu-03": ({"glm_ocr_devices": "{{ nowhere }}"}, "'nowhere' is undefined"),
    "npu-04": ({"vllm_service_extra_environment": {"1st": "x"}}, "not a variable name: 1st"),
    "npu-05": ({"vllm_image_pull_tries": "many"}, "vllm_image_pull_tries"),
    "npu-06": ({"ocr_bench_sweep": {"one": 1}}, "ocr_bench_sweep"),
    "npu-07": ({"vllm_service_extra_flags": {"seed": "{{ nowhere_else }}"}}, "'nowhere_else' is undefined"),
    "npu-08": ({"vllm_service_restart_delay_seconds": 5, "vllm_service_shm_size": "{{ 1 / 0 }}"}, "division by zero"),
}


def test_one_hosts_wrong_inventory_is_told_with_all_others_and_no_host_is_touched(tmp_path: Path) -> None:
    hosts = {"npu-01": HERE} | {host: {**HERE, **variables} for host, (variables, _) in WRONG.items()}
    played = play(tmp_path, "deploy.yml", hosts)
    assert played.rc != 0
    failures = re.findall(r"^fatal: \[([^]]+)\]: FAILED! => \n((?: .*\n)+)", played.output, re.MULTILINE)
    said = {host: re.sub(r"\s+", " ", text).replace("''", "'") for host, text in failures}
    assert {host: told for host, (_, told) in WRONG.items() if told not in said[host]} == {}
    assert f"that of {', '.join(WRONG)} does not" in said["npu-01"]
    assert "Python | Ask for its version" not in played.output
    assert "PLAY [Deploy GLM-OCR]" not in played.output
    assert {played.recap(host)["changed"] for host in hosts} == {0}


def test_a_host_that_does_not_answer_does_not_stop_the_others(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, so that nobody else takes it, and not listened on
        bound.bind(("127.0.0.1", 0))
        lost = {"ansible_host": "127.0.0.1", "ansible_port": bound.getsockname()[1]}
        played = play(tmp_path, "playbooks/preflight.yml", {"npu-01": HERE, "npu-02": lost})
    assert "HOST_UNREACHABLE" in played.output
    assert "Host | Look at the machine" in played.output
    assert played.recap("npu-01")["ok"] > 10


def test_every_role_that_deploys_is_checked_before_any_host_is_asked() -> None:
    plays = [PROJECT / "playbooks" / f"{name}.yml" for name in ("preflight", "deploy", "validate")]
    used = {name for path in plays for name in re.findall(r"^ +name: ([a-z_]+)$", path.read_text(), re.MULTILINE)}
    variables = yaml.safe_load((ROLES / "glm_ocr" / "vars" / "main.yml").read_text())
    assert set(variables["__glm_ocr_deploying_roles"]) == used


@pytest.mark.parametrize("tags", ["validate", "ocr_bench"])
def test_the_validation_alone_needs_no_preflight(tags: str, tmp_path: Path) -> None:
    """The checks of the roles' arguments have the tag always, and what they ask for was not looked at."""
    played = play(tmp_path, "deploy.yml", {"npu-01": HERE}, "--tags", tags, "--check")
    assert played.rc == 0, played.output
    assert played.recap("npu-01")["rescued"] == 0
