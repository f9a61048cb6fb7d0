"""The checks of the host: each is broken once and must say so."""

from __future__ import annotations

import pytest
from ansible.module_utils import host_checks as host

GIB = 2**30


def test_a_host_without_faults_has_no_findings() -> None:
    assert host.check_systemd(True, "systemd 252 (252.33-1~deb12u1)") == []
    assert host.check_engine("docker", "20.10.24+dfsg1", "") == []
    assert host.check_engine("podman", "4.3.1", "") == []
    assert host.check_container("glm-ocr", None, "docker") == []
    assert host.check_space("image", "/", 50 * GIB, 40, "x") == []
    assert host.check_architecture("image", "arm64", "aarch64") == []
    assert host.check_host_memory(16 * GIB, 16, 1) == host.check_host_memory(32 * GIB, 16, 2) == []
    assert host.check_shm("1g", 16 * GIB) == []
    assert host.check_clock(100.0, 70.0, 30) == []
    assert host.check_devices(["/dev/davinci0", "/dev/hisi_hdc"], []) == []
    assert host.check_driver_files([]) == []
    assert host.check_driver_version("25.5.1", ["25.2", "25.5"]) == []
    assert host.check_port(8000, [], None) == []


@pytest.mark.parametrize(
    ("running", "version", "found"),
    [
        (False, "systemd 252 (252.33)", "another init system"),
        (True, "systemd 219", "systemd 219"),
        (True, "", "systemctl does not answer"),
    ],
)
def test_an_old_systemd_is_refused(running: bool, version: str, found: str) -> None:
    (finding,) = host.check_systemd(running, version)
    assert (finding.id, finding.found) == ("HOST_SYSTEMD", found)


@pytest.mark.parametrize(
    ("engine", "version", "error", "found"),
    [
        ("docker", "", "docker is not installed", "docker is not installed"),
        ("docker", "17.12.1-ce", "", "17.12.1-ce"),
        ("podman", "3.4.4", "", "3.4.4"),
        ("podman", "", "", "no answer"),
    ],
)
def test_a_missing_or_old_engine_is_named_with_the_command_that_shows_it(
    engine: str, version: str, error: str, found: str
) -> None:
    (finding,) = host.check_engine(engine, version, error)
    assert (finding.id, finding.found) == ("HOST_ENGINE", found)
    assert {"docker": "`systemctl enable --now docker`", "podman": "`podman info`"}[engine] in finding.fix


@pytest.mark.parametrize("version", ["18.09.0", "18.09.0.346", "28.1.1"])
def test_the_docker_of_openeuler_and_newer_ones_will_do(version: str) -> None:
    assert host.check_engine("docker", version, "") == []


@pytest.mark.parametrize(
    ("labels", "count"), [(None, 0), ({"glm-ocr.release": "0123"}, 0), ({}, 1), ({"maintainer": "x"}, 1)]
)
def test_a_container_of_our_name_is_refused_unless_it_is_ours(labels: dict[str, str] | None, count: int) -> None:
    findings = host.check_container("glm-ocr", labels, "docker")
    assert [finding.id for finding in findings] == ["HOST_CONTAINER"] * count


def test_too_little_disk_is_told_in_gib() -> None:
    (finding,) = host.check_space("image", "/var/lib/docker", 3 * GIB, 40, "ascend_host_image_space_gib")
    assert finding.id == "HOST_DISK"
    assert "40 GiB" in finding.expected
    assert finding.found == "3.0 GiB"


@pytest.mark.parametrize(("architecture", "machine"), [("amd64", "aarch64"), ("arm64", "x86_64"), ("", "x86_64")])
def test_an_image_for_another_cpu_is_refused(architecture: str, machine: str) -> None:
    (finding,) = host.check_architecture("image", architecture, machine)
    assert finding.id == "IMAGE_ARCHITECTURE"
    assert machine in finding.expected


def test_too_little_memory_is_told_in_gib() -> None:
    (finding,) = host.check_host_memory(16 * GIB - 1, 16, 1)
    assert (finding.id, finding.found) == ("HOST_MEMORY", "16.0 GiB")
    assert finding.expected == "16 GiB of available memory"
    (finding,) = host.check_host_memory(16 * GIB, 16, 2)
    assert finding.expected == "32 GiB of available memory for 2 instances"


@pytest.mark.parametrize("size", ["512m", "17g", "much", "", "-1g", "1073741823"])
def test_a_shm_that_is_too_small_too_large_or_no_size_is_refused(size: str) -> None:
    (finding,) = host.check_shm(size, 16 * GIB)
    assert finding.id == "HOST_SHM"
    assert "1g to 16g" in finding.expected


@pytest.mark.parametrize(
    ("text", "size"), [("1g", GIB), ("1GB", GIB), ("1GiB", GIB), ("1.5g", 3 * GIB // 2), ("64m", 2**26), ("123", 123)]
)
def test_sizes_are_read_as_the_engines_read_them(text: str, size: int) -> None:
    assert host.size_bytes(text) == size


@pytest.mark.parametrize(("skew", "found"), [(31.0, "31 s ahead"), (-3600.0, "3600 s behind")])
def test_a_clock_that_is_off_is_told_with_its_direction(skew: float, found: str) -> None:
    (finding,) = host.check_clock(1e9 + skew, 1e9, 30)
    assert (finding.id, finding.found) == ("HOST_CLOCK", found)


def test_all_missing_devices_are_in_one_finding() -> None:
    devices = ["/dev/davinci0", "/dev/davinci1", "/dev/hisi_hdc"]
    (finding,) = host.check_devices(devices, devices[:2])
    assert finding.id == "HOST_DEVICES"
    assert "/dev/davinci0, /dev/davinci1" in finding.found


@pytest.mark.parametrize("devices", [[], ["/dev/davinci_manager"]])
def test_an_inventory_without_an_npu_is_refused(devices: list[str]) -> None:
    (finding,) = host.check_devices(devices, [])
    assert "no /dev/davinciN" in finding.found


def test_missing_driver_files_are_named() -> None:
    (finding,) = host.check_driver_files(["/usr/local/dcmi"])
    assert (finding.id, finding.found) == ("HOST_DRIVER", "missing: /usr/local/dcmi")


@pytest.mark.parametrize("version", ["24.1.rc3", "23.0.3", "25.1.0", "26.0.rc1", "250.2", ""])
def test_a_driver_outside_the_supported_releases_is_refused(version: str) -> None:
    (finding,) = host.check_driver_version(version, ["25.0", "25.2", "25.3", "25.5"])
    assert finding.id == "HOST_DRIVER_VERSION"
    assert "HDK 25.5" in finding.fix
    assert finding.found == version or "no version" in finding.found


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version=25.3.rc1\nascendhal_version=7.35.23\npackage_version=25.3.rc1\n", "25.3.rc1"),
        ("ascendhal_version=7.35.23\npackage_version=26.0.rc1\n", "26.0.rc1"),
        ("ascendhal_version=7.35.23\n", ""),
        ("", ""),
    ],
)
def test_the_drivers_version_is_read(text: str, version: str) -> None:
    assert host.driver_version(text) == version


def test_a_foreign_listener_is_named_and_ours_is_not() -> None:
    foreign = host.Holder(41, "nc -l 8000", (41, 1))
    ours = host.Holder(99, "vllm serve", (99, 90, 1))
    (finding,) = host.check_port(8000, [foreign, ours], own_pid=90)
    assert "pid 41: nc -l 8000" in finding.found
    assert len(host.check_port(8000, [foreign, ours], own_pid=None)) == 2


IDENTIFIER = "4f8ac0f1" * 8


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/system.slice/docker-{IDENTIFIER}.scope\n",
        f"12:devices:/docker/{IDENTIFIER}\n11:memory:/docker/{IDENTIFIER}\n",
        f"0::/machine.slice/libpod-{IDENTIFIER}.scope/container\n",
        f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{IDENTIFIER}.scope\n",
        f"0::/system.slice/docker-{'a' * 64}.scope/docker/{IDENTIFIER}\n",
    ],
)
def test_a_container_is_known_by_its_cgroup(cgroup: str) -> None:
    assert host.container_id(cgroup) == IDENTIFIER


@pytest.mark.parametrize("cgroup", ["", "0::/init.scope\n", "0::/user.slice/user-0.slice/session-1.scope\n"])
def test_a_process_outside_of_containers_has_none(cgroup: str) -> None:
    assert host.container_id(cgroup) == ""


def test_memory_is_read_from_meminfo() -> None:
    meminfo = "MemTotal:       24627456 kB\nMemAvailable:   20971520 kB\n"
    assert host.memory_bytes(meminfo, "MemAvailable") == 20 * GIB
    with pytest.raises(ValueError, match="MemFree"):
        host.memory_bytes(meminfo, "MemFree")


@pytest.mark.parametrize(
    ("cgroup", "ours"),
    [
        ("0::/system.slice/glm-ocr-front.service\n", True),
        ("3:cpu:/\n1:name=systemd:/system.slice/glm-ocr-front.service\n", True),
        ("0::/system.slice/haproxy.service\n", False),
        ("0::/system.slice/x-glm-ocr-front.service\n", False),
        ("", False),
    ],
)
def test_the_fronts_processes_are_told_by_their_unit(cgroup: str, ours: bool) -> None:
    assert host.of_unit(cgroup, "glm-ocr-front.service") is ours
