"""The sandbox of engine and unit: against goldens, and that the probe of a deployment runs in the same one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rendering import HostVariables, deploy_task
from unit_file import exec_start

GOLDEN = Path(__file__).parent / "golden"
SANDBOX: dict[str, Any] = {
    "vllm_service_sandbox": True,
    "vllm_service_sandbox_user": "1000:1000",
    "vllm_service_sandbox_groups": [1001],
    "vllm_service_sandbox_capabilities": ["IPC_LOCK"],
}
FRONT = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": "v" * 32}}


@pytest.mark.parametrize(("engine", "exposure"), [("docker", FRONT), ("podman", {})])
def test_golden(engine: str, exposure: dict[str, Any], tmp_path: Path) -> None:
    host = HostVariables(tmp_path, glm_ocr_container_engine=engine, **SANDBOX | exposure)
    rendered, golden = host.template_file("glm-ocr.service.j2"), GOLDEN / f"{engine}.sandbox.service"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_the_probe_asks_in_the_sandbox_that_the_engine_gets(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, **SANDBOX)
    options = host.template(deploy_task("vllm_probe")["vars"]["vllm_probe_container_options"])
    assert {"--cap-drop=ALL", "--read-only", "--user=1000:1000", "--group-add=1001", "--cap-add=IPC_LOCK"} < set(
        options
    )
    assert set(options) < set(exec_start(host.template_file("glm-ocr.service.j2")))


def test_limits_are_left_out_where_the_kernel_has_none(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, **SANDBOX, vllm_service_sandbox_memory="", vllm_service_sandbox_pids=0)
    unit = host.template_file("glm-ocr.service.j2")
    assert "--cap-drop=ALL" in unit
    assert "--memory" not in unit
    assert "--pids-limit" not in unit
    assert host.template("{{ __vllm_service_problems }}") == []


def test_without_it_nothing_is_taken_away(tmp_path: Path) -> None:
    units = []
    for name, variables in (("plain", {}), ("off", SANDBOX | {"vllm_service_sandbox": False})):
        (tmp_path / name).mkdir()
        units.append(HostVariables(tmp_path / name, **variables).template_file("glm-ocr.service.j2"))
    assert units[0] == units[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm_service_sandbox_user", "glm-ocr"),
        ("vllm_service_sandbox_user", "1000"),
        ("vllm_service_sandbox_memory", "0"),
        ("vllm_service_sandbox_capabilities", ["CAP_IPC_LOCK"]),
        ("vllm_service_sandbox_capabilities", ["ALL"]),
        ("vllm_service_sandbox_tmp_size", "4 GiB"),
    ],
)
def test_what_the_engine_would_not_take_is_a_problem(name: str, value: str | list[str], tmp_path: Path) -> None:
    (problem,) = HostVariables(tmp_path, **{name: value}).template("{{ __vllm_service_problems }}")
    assert name.removeprefix("vllm_service_sandbox") in problem
    assert (value if isinstance(value, str) else value[0]) in problem
