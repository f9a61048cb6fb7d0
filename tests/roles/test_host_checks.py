"""The checks of the host: each is broken once and must say so."""

from __future__ import annotations

import os
import socket

import pytest

import ascend_host_check as host


def test_a_host_without_faults_has_no_findings() -> None:
    assert host.check_engine("docker", "/var/lib/docker", "") == []
    assert host.check_space("image", "/", 50 * 2**30, 40) == []
    assert host.check_paths("X", "paths", [], "fix") == []
    assert host.check_weights("/w", ["config.json", "model.safetensors"]) == []
    assert host.check_port(8000, [], None) == []


def test_a_missing_engine_is_named_with_the_command_that_starts_it() -> None:
    (finding,) = host.check_engine("docker", None, "docker is not installed")
    assert (finding.id, finding.found) == ("HOST_ENGINE", "docker is not installed")
    assert "systemctl enable --now docker" in finding.fix


def test_too_little_disk_is_told_in_gib() -> None:
    (finding,) = host.check_space("image", "/var/lib/docker", 3 * 2**30, 40)
    assert finding.id == "HOST_DISK"
    assert "40 GiB" in finding.expected
    assert finding.found == "3.0 GiB"


def test_all_missing_devices_are_in_one_finding() -> None:
    (finding,) = host.check_paths("HOST_DEVICES", "devices", ["/dev/davinci0", "/dev/davinci1"], "fix")
    assert "/dev/davinci0, /dev/davinci1" in finding.found


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (None, "no such folder"),
        ([], "an empty folder"),
        (["model.safetensors"], "missing: config.json"),
        (["config.json", "model.bin"], "missing: *.safetensors"),
    ],
)
def test_absent_weights_are_refused_with_their_path(names: list[str] | None, found: str) -> None:
    (finding,) = host.check_weights("/opt/w", names)
    assert finding.id == "HOST_WEIGHTS"
    assert "/opt/w" in finding.expected
    assert found in finding.found


def test_a_foreign_listener_is_named_and_ours_is_not() -> None:
    foreign = host.Holder(41, "nc -l 8000", (41, 1))
    ours = host.Holder(99, "vllm serve", (99, 90, 1))
    (finding,) = host.check_port(8000, [foreign, ours], own_pid=90)
    assert "pid 41: nc -l 8000" in finding.found
    assert len(host.check_port(8000, [foreign, ours], own_pid=None)) == 2


def test_the_listener_on_a_real_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (holder,) = host.port_holders(port)
        assert holder.pid == os.getpid()
        assert os.getppid() in holder.ancestors
        assert "pytest" in holder.command
    assert host.port_holders(port) == []


def test_an_ipv6_listener_is_found_too() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        assert len(host.port_holders(listener.getsockname()[1])) == 1
