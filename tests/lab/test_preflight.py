"""What the preflight finds on a real host, with the service untouched: rows of docs/failure-modes.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from testinfra.host import Host

from lab import WEIGHTS, Play, preflight_report

NPU_SMI = "/usr/local/bin/npu-smi"
ABSENT_IMAGE = "registry.lab:5000/glm-ocr-lab/absent:1"


@contextmanager
def changed(node: Host, do: str, undo: str) -> Iterator[None]:
    node.check_output(do)
    try:
        yield
    finally:
        node.check_output(undo)


def edited(path: str, expression: str) -> tuple[str, str]:
    """Commands that edit a file with sed, and put it back."""
    return f"cp -p {path} /run/original && sed -i {expression} {path}", f"cp -p /run/original {path}"


@pytest.mark.parametrize(
    ("do", "undo", "finding", "found"),
    [
        pytest.param(
            *edited(NPU_SMI, "'s/No running processes found in NPU 0 .*/0       0   | 1 | systemd | 51200  |/'"),
            "NPU_OCCUPIED",
            "systemd",
            id="held by a process",
        ),
        pytest.param(*edited(NPU_SMI, "'0,/| OK /s//| Alarm /'"), "NPU_HEALTH", "Alarm", id="unhealthy"),
        pytest.param(*edited(NPU_SMI, "'/C2:00.0/d'"), "NPU_SMI", "npu-smi", id="truncated output"),
        pytest.param(
            "rm /dev/davinci0 /dev/davinci1",
            "mknod --mode=666 /dev/davinci0 c 1 3 && mknod --mode=666 /dev/davinci1 c 1 3",
            "HOST_DEVICES",
            "/dev/davinci0, /dev/davinci1",
            id="device nodes absent",
        ),
        pytest.param(
            "mv /usr/local/Ascend/driver/lib64 /usr/local/Ascend/driver/lib65",
            "mv /usr/local/Ascend/driver/lib65 /usr/local/Ascend/driver/lib64",
            "HOST_DRIVER",
            "/usr/local/Ascend/driver/lib64",
            id="driver libraries absent",
        ),
        pytest.param(
            *edited("/usr/local/Ascend/driver/version.info", "'s/25[.]/23./g'"),
            "HOST_DRIVER_VERSION",
            "23.",
            id="old driver",
        ),
    ],
)
def test_a_fault_of_the_host_is_named(do: str, undo: str, finding: str, found: str, service: Host, play: Play) -> None:
    with changed(service, do, undo):
        refused = play("playbooks/preflight.yml")
    assert refused.rc != 0
    assert f"[{finding}]" in refused.failures
    assert found in refused.failures
    reported = {(entry["id"], entry["host"]) for entry in json.loads(preflight_report().read_text())["findings"]}
    assert (finding, "node1") in reported


@pytest.mark.parametrize(
    ("variables", "finding"),
    [
        ({"glm_ocr_image": "quay.io/ascend/vllm-ascend:v0.18.0rc1-a3"}, "IMAGE_VARIANT"),
        ({"glm_ocr_image": ABSENT_IMAGE, "ascend_host_image_space_gib": 1_000_000}, "HOST_DISK"),
        ({"vllm_service_extra_environment": {"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}}, "NPU_VISIBLE"),
    ],
)
def test_a_choice_that_does_not_fit_the_host_is_refused(
    variables: dict[str, object], finding: str, service: Host, play: Play
) -> None:
    refused = play("deploy.yml", **variables)
    assert refused.rc != 0
    assert f"[{finding}]" in refused.failures


def test_a_healthy_host_has_no_errors_and_the_idle_card_is_a_warning(service: Host, play: Play) -> None:
    passed = play("playbooks/preflight.yml")
    assert (passed.rc, passed.changed) == (0, 0), passed.failures
    report = json.loads(preflight_report().read_text())
    assert {entry["severity"] for entry in report["findings"]} <= {"warning"}
    assert "NPU_IDLE" in {entry["id"] for entry in report["findings"]}
    assert all(entry["fix"] and entry["fix_zh"] for entry in report["findings"])


@contextmanager
def small_disk(node: Host, folder: str, megabytes: int) -> Iterator[None]:
    """A file system of its own; what lay there comes back."""
    node.check_output(f"mkdir -p {folder} && mount -t tmpfs -o size={megabytes}M,mode=755 small {folder}")
    try:
        yield
    finally:
        node.check_output(f"umount --recursive {folder}")  # podman mounts its own on top


def test_a_disk_that_filled_up_is_told_and_one_with_room_is_not(service: Host, play: Play) -> None:
    """The folder of releases needs 1 GiB, and podman's of images 6 (in the lab): a bit more than that, then less."""
    small, images = "/run/small", "/var/lib/containers/storage"
    given = {"glm_ocr_state_dir": f"{small}/state", "glm_ocr_container_engine": "podman"}
    with small_disk(service, small, 1100), small_disk(service, images, 6300):
        # Our own service holds the port: to podman it is a stranger's.
        assert "HOST_DISK" not in play("playbooks/preflight.yml", **given).failures
        service.check_output(f"fallocate --length 200M {small}/ballast && fallocate --length 300M {images}/ballast")
        refused = play("playbooks/preflight.yml", **given)
    assert refused.failures.count("[HOST_DISK]") == 2
    assert re.search(rf"1 GiB free under {small}/state for .*; found 0\.9 GiB", refused.failures)
    assert re.search(rf"6 GiB free under {images} for .*; found 5\.9 GiB", refused.failures)


def test_a_full_disk_stops_a_fetch_and_a_deployment_and_leaves_nothing_half(service: Host, play: Play) -> None:
    small = "/run/small"
    with small_disk(service, small, 16):
        service.run(f"dd if=/dev/zero of={small}/ballast bs=1M")
        fetched = play(
            "playbooks/weights_fetch.yml",
            glm_ocr_weights_path=f"{small}/weights",
            vllm_weights_source=f"folder:{WEIGHTS}",
        )
        # As if the disk had filled up after the preflight looked.
        deployed = play("deploy.yml", glm_ocr_state_dir=f"{small}/state", ascend_host_state_space_gib=0)
        left = service.check_output(f"find {small} -type f -size +0")
    assert fetched.rc != 0
    assert "free for the model" in fetched.failures
    assert deployed.rc != 0
    assert "No space left on device" in deployed.failures
    assert "Traceback" not in deployed.failures
    assert left == f"{small}/ballast"
