"""What the module observes: commands that are missing, fail or hang, processes, containers, and all of it at once."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.npu_checks import PciDevice
from ansible.module_utils.npu_smi import NpuSmiError, Process

import ascend_host_check as module
from rendering import ROLES

NPU_SMI = ROLES / "lab_node" / "files" / "npu" / "npu-smi"
IDENTIFIER = "4f8ac0f1" * 8
OURS = {"Config": {"Labels": {"glm-ocr.release": "abc"}}, "State": {"Pid": os.getpid()}}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """``script("docker", "echo 1")``: a command of that name, first in the search path."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(name: str, body: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make


# --- commands ---------------------------------------------------------------------------------------------


def test_a_command_that_answers() -> None:
    assert module.run(["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, "out", "err")


def test_a_command_that_is_missing_or_no_program(tmp_path: Path) -> None:
    assert module.run(["/opt/absent"]) == (127, "", "/opt/absent is not installed")
    assert module.run([str(tmp_path)]) == (127, "", f"{tmp_path}: Permission denied")


def test_a_command_that_hangs_is_left_behind_with_its_children() -> None:
    started = time.monotonic()
    rc, _, error = module.run(["sh", "-c", "sleep 300 & wait"], timeout=0.05)
    assert rc == 124
    assert "did not answer within" in error
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("echo 'dcmi module initialize failed. ret is -8005'; exit 1", "exit status 1: dcmi module initialize failed"),
        ("echo some table; echo 'no driver' >&2; exit 255", "exit status 255: no driver"),
        ("exec sleep 300", "did not answer within"),
    ],
)
def test_an_npu_smi_that_fails_or_hangs_is_told(
    body: str, found: str, script: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run", functools.partial(module.run, timeout=0.5))
    with pytest.raises(NpuSmiError, match=re.escape(found)):
        module.ask_npu_smi([str(script("npu-smi", body))])


def test_a_missing_npu_smi_is_told() -> None:
    with pytest.raises(NpuSmiError, match="exit status 127: /opt/absent/npu-smi is not installed"):
        module.ask_npu_smi(["/opt/absent/npu-smi", "/usr/local/dcmi"])


def test_npu_smi_is_found_where_the_inventory_or_the_driver_puts_it(script: Callable[[str, str], Path]) -> None:
    path = script("npu-smi", 'echo "$0 $*"')
    assert module.ask_npu_smi([]) == f"{path} info"
    assert module.ask_npu_smi(["/usr/local/dcmi", str(path)], "-m") == f"{path} info -m"


# --- processes --------------------------------------------------------------------------------------------


def test_the_listener_on_a_real_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (holder,) = module.port_holders(port)
        assert holder.pid == os.getpid()
        assert os.getppid() in holder.ancestors
        assert holder.command.split()[0] in Path("/proc/self/cmdline").read_text()
    assert module.port_holders(port) == []


def test_an_ipv6_listener_is_found_too() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        assert len(module.port_holders(listener.getsockname()[1])) == 1


@pytest.fixture
def child() -> Iterator[int]:
    """A process of ours with a key on its command line."""
    command = [sys.executable, "-c", "print(flush=True); input()", "--api-key=hunter2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs, and has its own name
        yield process.pid
        process.communicate(b"\n")


def test_a_process_on_an_npu_is_named_by_its_program_alone(child: int) -> None:
    (holder,) = module.npu_holders([Process(0, 0, child, "", 1)], "docker").values()
    assert os.getpid() in holder.ancestors
    assert holder.command.startswith("python")
    assert "hunter2" not in str(holder)


def test_a_process_that_is_gone_is_still_a_holder() -> None:
    holders = module.npu_holders(
        [Process(0, 0, 2**22 + 1, "VLLMWorker_TP", 1), Process(0, 0, 2**22 + 2, "", 1)], "docker"
    )
    assert [str(holder) for holder in holders.values()] == [
        f"pid {2**22 + 1}: VLLMWorker_TP",
        f"pid {2**22 + 2}: a process that is not seen here",
    ]


@pytest.mark.parametrize(
    ("body", "container"), [("echo /trainer", "trainer"), ("exit 1", f"{IDENTIFIER[:12]}, unknown to docker")]
)
def test_the_container_of_a_process_is_asked_for_by_name(
    body: str, container: str, script: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script("docker", f'echo "$*" >> "$0.calls"; {body}')
    monkeypatch.setattr(module, "read", lambda path: f"0::/docker-{IDENTIFIER}.scope" if "cgroup" in path else "")
    holders = module.npu_holders([Process(0, 0, 41, "a", 1), Process(1, 0, 42, "b", 1)], "docker")
    assert [holder.container for holder in holders.values()] == [container] * 2
    calls = Path(shutil.which("docker") or "").with_suffix(".calls").read_text().splitlines()
    assert calls == [f"container inspect --format {{{{.Name}}}} {IDENTIFIER}"], "asked once for both"


# --- all of it --------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path, script: Callable[[str, str], Path]) -> dict[str, Any]:
    """The module's arguments on a machine on which nothing is wrong but what this machine lacks."""
    for name in ("npu-smi", "version.info"):
        shutil.copy(NPU_SMI.with_name(name), tmp_path / name)
    (tmp_path / "npu-smi").chmod(0o755)
    docker(script)
    return {
        "container_engine": "docker",
        "container_engine_path": str(tmp_path / "docker"),
        "container_name": "glm-ocr",
        "neighbours": [],
        "image": "quay.io/ascend/vllm-ascend:v0.18.0rc1",
        "image_space_gib": 0,
        "memory_gib": 0,
        "shm_size": "1g",
        "state_path": str(tmp_path / "not" / "made" / "yet"),
        "state_space_gib": 0,
        "port": 1,
        "front_unit": "glm-ocr-front.service",
        "devices": ["/dev/davinci0", "/dev/davinci1"],
        "driver_paths": [str(tmp_path / "npu-smi"), str(tmp_path / "version.info")],
        "driver_versions": ["25.2"],
        "visible_devices": "0,1",
        "npus_needed": 2,
        "memory_utilization": 0.85,
        "controller_epoch": time.time(),
        "clock_skew_seconds": 30,
    }


def docker(
    script: Callable[[str, str], Path], info: str = "20.10.24 /", container: Any = None, architecture: str = ""
) -> None:
    inspect = f"echo '{json.dumps([container])}'" if container else "exit 1"
    image = f"echo {architecture}" if architecture else "exit 1"
    script(
        "docker",
        f'case "$1 $2" in "info --format") echo {info} ;; "image "*) {image} ;; "container "*) {inspect} ;; esac',
    )


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The findings by id, without those of this machine itself: no systemd, perhaps, and no NPU on its PCI bus."""
    monkeypatch.setattr(module, "is_device", lambda path: path in ("/dev/davinci0", "/dev/davinci1"))
    monkeypatch.setattr(module, "pci_npus", lambda: [])

    def run(arguments: dict[str, Any]) -> dict[str, Any]:
        findings = {finding.id: finding for finding in module.look(arguments)}
        findings.pop("HOST_SYSTEMD", None)
        assert "HOST_PCI" not in findings or findings.pop("HOST_PCI").severity == "warning"
        return findings

    return run


Look = Callable[[dict[str, Any]], dict[str, Any]]


def test_a_machine_on_which_nothing_is_wrong(look: Look, arguments: dict[str, Any]) -> None:
    assert look(arguments) == {}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"controller_epoch": 0.0}, {"HOST_CLOCK"}),
        ({"memory_gib": 2**20}, {"HOST_MEMORY"}),
        ({"image_space_gib": 2**40}, {"HOST_DISK"}),
        ({"shm_size": "1m"}, {"HOST_SHM"}),
        ({"state_space_gib": 2**40}, {"HOST_DISK"}),
        ({"devices": ["/dev/davinci0", "/dev/davinci1", "/dev/davinci6"]}, {"HOST_DEVICES", "NPU_IDLE"}),
        ({"driver_versions": ["25.5"]}, {"HOST_DRIVER_VERSION"}),
        ({"driver_paths": ["/opt/absent/version.info", str(NPU_SMI)]}, {"HOST_DRIVER", "NPU_SMI"}),
        ({"visible_devices": "1,0"}, {"NPU_VISIBLE"}),
        ({"visible_devices": None}, set()),
        ({"npus_needed": 1}, {"NPU_IDLE"}),
        ({"memory_utilization": 0.99}, {"NPU_MEMORY"}),
        ({"image": "quay.io/ascend/vllm-ascend:v0.18.0rc1-a3"}, {"IMAGE_VARIANT"}),
    ],
)
def test_one_thing_is_wrong(change: dict[str, Any], found: set[str], look: Look, arguments: dict[str, Any]) -> None:
    if "devices" in change:
        change = {**change, "visible_devices": None}
    assert set(look({**arguments, **change})) == found


def test_a_listener_on_the_port_is_told(look: Look, arguments: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = look({**arguments, "port": listener.getsockname()[1]})
    assert set(found) == {"HOST_PORT"}
    assert f"pid {os.getpid()}: " in found["HOST_PORT"].found


def test_what_our_own_container_holds_is_no_conflict(
    look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    """This process plays the container's first one: its listener, and the memory it uses, are ours."""
    docker(script, container=OURS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert look({**arguments, "memory_gib": 2**20, "port": listener.getsockname()[1]}) == {}


@pytest.mark.parametrize(("second", "needed"), [("false", 3), ("true", 2), ("absent", 3)])
def test_what_the_hosts_other_instances_need_is_not_free(
    second: str, needed: int, look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    """The third is not there at all, the second as ``second`` says; those that run have what they need."""
    found = "exit 1" if second == "absent" else f"echo {second}"
    script(
        "docker",
        f'case "$1 $NF" in "info "*) echo 20.10.24 / ;; esac\n'
        f'case "$5" in glm-ocr-1) {found} ;; *) [ "$1" = info ] ;; esac',
    )
    told = look({**arguments, "neighbours": ["glm-ocr-1", "glm-ocr-2"], "memory_gib": 2**20})
    assert told["HOST_MEMORY"].expected == f"{needed * 2**20} GiB of available memory for {needed} instances"


def test_the_hosts_other_instances_need_space_too(look: Look, arguments: dict[str, Any]) -> None:
    told = look({**arguments, "neighbours": ["glm-ocr-1"], "state_space_gib": 2**40})
    assert told["HOST_DISK"].expected.startswith(f"{2**41} GiB free under ")
    assert told["HOST_DISK"].expected.endswith("of 2 instances")


@pytest.mark.parametrize(("devices", "found"), [(["/dev/davinci0"], {"NPU_OCCUPIED"}), (["/dev/davinci1"], set())])
def test_the_engine_of_another_instance_is_a_finding_on_the_same_card_alone(
    devices: list[str], found: set[str], look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    """Each instance maps one card, which is 0 inside its container."""
    table = NPU_SMI.read_text().replace(
        f"| {'No running processes found in NPU 0':<95}|",
        f"| 0       0                 | {os.getpid():<13} | VLLMWorker               | 3000                    |",
    )
    assert "VLLMWorker" in table
    script("npu-smi", table.partition("\n")[2])
    alone = {**arguments, "devices": devices, "visible_devices": "0", "npus_needed": 1, "container_name": "glm-ocr-1"}
    assert set(look(alone)) == found


def test_what_our_front_holds_is_no_conflict(
    look: Look, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process plays the front: its unit is the one that its cgroup names."""
    read = module.read
    cgroup = f"/proc/{os.getpid()}/cgroup"
    unit = "0::/system.slice/glm-ocr-front.service\n"
    monkeypatch.setattr(module, "read", lambda path: unit if path == cgroup else read(path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert look({**arguments, "port": listener.getsockname()[1]}) == {}
        assert set(look({**arguments, "port": listener.getsockname()[1], "front_unit": "x.service"})) == {"HOST_PORT"}


@pytest.mark.parametrize("labels", [None, {"maintainer": "x"}])
def test_a_foreign_container_of_our_name_is_refused_and_not_ours(
    labels: dict[str, str] | None, look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    docker(script, container={**OURS, "Config": {"Labels": labels}})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = look({**arguments, "port": listener.getsockname()[1]})
    assert set(found) == {"HOST_CONTAINER", "HOST_PORT"}


def test_our_own_container_that_does_not_run_is_fine(
    look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    docker(script, container={**OURS, "State": {"Pid": 0}})
    assert look(arguments) == {}


def test_an_image_on_the_host_is_judged_by_its_architecture_and_needs_no_space(
    look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    docker(script, architecture="s390x")
    assert set(look({**arguments, "image_space_gib": 2**40})) == {"IMAGE_ARCHITECTURE"}


def test_an_engine_that_is_not_where_the_unit_calls_it_is_told(
    look: Look, arguments: dict[str, Any], tmp_path: Path
) -> None:
    found = look({**arguments, "container_engine_path": "/opt/absent/docker"})
    assert set(found) == {"HOST_ENGINE"}
    assert found["HOST_ENGINE"].expected == "docker at /opt/absent/docker, which the unit calls"
    assert found["HOST_ENGINE"].found == f"docker at {tmp_path}/docker"


@pytest.mark.parametrize("body", ["echo 'Cannot connect to the Docker daemon' >&2; exit 1", "echo ' '"])
def test_an_engine_that_does_not_answer_does_not_hide_the_rest(
    body: str, look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    script("docker", body)
    assert set(look({**arguments, "shm_size": "1m"})) == {"HOST_ENGINE", "HOST_SHM"}


def test_a_process_on_our_card_is_told_by_name(
    look: Look, arguments: dict[str, Any], script: Callable[[str, str], Path]
) -> None:
    table = NPU_SMI.read_text().replace(
        f"| No running processes found in NPU 0{' ' * 60}|", f"| 0 0 | {os.getpid()} | | 37709 |"
    )
    Path(arguments["driver_paths"][0]).write_text(table)
    found = look(arguments)
    assert set(found) == {"NPU_OCCUPIED"}
    assert re.fullmatch(rf"pid {os.getpid()}: \S+, 37709 MB", found["NPU_OCCUPIED"].found)
    docker(script, container=OURS)
    assert look(arguments) == {}


def test_a_truncated_table_is_told_and_the_rest_is_still_checked(look: Look, arguments: dict[str, Any]) -> None:
    path = Path(arguments["driver_paths"][0])
    path.write_text(path.read_text().replace("| 0                         | 0000:C2:00.0", "| 0      "))
    found = look({**arguments, "shm_size": "1m"})
    assert set(found) == {"NPU_SMI", "HOST_SHM"}


def test_the_pci_bus_tells_the_chip_when_npu_smi_does_not(
    look: Look, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pci_npus", lambda: [PciDevice("0000:c1:00.0", "910")])
    found = look({**arguments, "driver_paths": ["/opt/absent/npu-smi", arguments["driver_paths"][1]]})
    assert set(found) == {"HOST_DRIVER", "NPU_SMI", "NPU_UNSUPPORTED"}


def test_everything_wrong_is_told_at_once(look: Look, arguments: dict[str, Any]) -> None:
    found = look(
        {
            **arguments,
            "shm_size": "1m",
            "devices": ["/dev/davinci0", "/dev/davinci6", "/dev/davinci7"],
            "driver_paths": ["/usr/local/absent", *arguments["driver_paths"]],
        }
    )
    errors = {identifier for identifier, finding in found.items() if finding.severity == "error"}
    assert errors == {"HOST_SHM", "HOST_DEVICES", "HOST_DRIVER"}
    assert "/dev/davinci6, /dev/davinci7" in found["HOST_DEVICES"].found


def test_the_pci_bus_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus_id, vendor, device in [
        ("0000:c1:00.0", "0x19e5", "0xd802"),
        ("0000:c2:00.0", "0x19e5", "0x0222"),  # a network card of the same vendor
        ("0000:c3:00.0", "0x8086", "0xd802"),
    ]:
        (tmp_path / bus_id).mkdir()
        (tmp_path / bus_id / "vendor").write_text(f"{vendor}\n")
        (tmp_path / bus_id / "device").write_text(f"{device}\n")
    monkeypatch.setattr(module, "PCI_DEVICES", str(tmp_path))
    assert [(device.bus_id, device.line) for device in module.pci_npus()] == [("0000:c1:00.0", "A2")]
    monkeypatch.setattr(module, "PCI_DEVICES", str(tmp_path / "absent"))
    assert module.pci_npus() == []
