"""What becomes of the service when it is given something bad, rebooted, removed, or moved to another engine."""

from __future__ import annotations

import time

import pytest
from testinfra.host import Host

from lab import STATE, WEIGHTS, Play, Played, chat, container_start, listener, release

#: Overwrites a safetensors file's tensors in place with bf16 numbers of magnitude 2^-6 to 2^-5 and random sign.
#: Little-endian bf16: the low byte is the exponent's last bit and the mantissa, the high byte sign and exponent.
RANDOMISE = """
import os, sys
with open(sys.argv[1], "r+b") as file:
    start = 8 + int.from_bytes(file.read(8), "little")
    count = (os.path.getsize(sys.argv[1]) - start) // 2
    data = bytearray(2 * count)
    data[0::2] = os.urandom(count).translate(bytes(byte & 0x7F | 0x80 for byte in range(256)))
    data[1::2] = os.urandom(count).translate(bytes(byte & 0x80 | 0x3C for byte in range(256)))
    file.seek(start)
    file.write(data)
"""


def booted(node: Host) -> str:
    """Waits until the node has booted, with all its services; returns what tells this boot from another."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            node.run("systemctl is-system-running --wait")
            return str(node.check_output("systemctl show --property=UserspaceTimestampMonotonic"))
        except RuntimeError:  # testinfra's word for a connection that failed
            continue
    pytest.fail("the node does not answer over SSH")


def test_a_start_that_fails_shows_why_and_puts_the_last_good_release_back(
    broken_image: str, node: Host, play: Play, url: str
) -> None:
    good = release(node)
    failed = play("deploy.yml", glm_ocr_image=broken_image)
    assert failed.rc != 0
    assert "this release is broken" in failed.failures
    assert f"Release {good} was put back; it answers and reads its known image." in failed.failures
    assert release(node) == good
    assert chat(url, "OK", max_tokens=1).status_code == 200
    assert play("deploy.yml").changed == 0


def test_random_weights_fail_at_the_image_and_the_last_good_release_comes_back(
    deployed: Played, node: Host, play: Play
) -> None:
    good = release(node)
    copy = "/opt/atomgit/weights/random"
    node.check_output(f"cp -r {WEIGHTS} {copy} && python3 -c '{RANDOMISE}' {copy}/model.safetensors")
    try:
        # Whoever signs random weights gets them past the manifest, and no further than the image.
        failed = play("deploy.yml", glm_ocr_weights_path=copy, vllm_weights_manifest="")
    finally:
        node.check_output(f"rm -r {copy}")
    assert failed.rc != 0
    words = [line.split() for line in failed.failures.splitlines() if line.startswith(("PASS ", "FAIL "))]
    verdicts = {check: verdict for verdict, check, *_ in words}
    assert verdicts == {"health": "PASS", "models": "PASS", "text": "PASS", "image": "FAIL"}
    assert f"Release {good} was put back; it answers and reads its known image." in failed.failures
    assert release(node) == good


def test_a_reboot_brings_the_service_back(deployed: Played, node: Host, url: str) -> None:
    before = container_start(node)
    before_boot = booted(node)
    with pytest.raises(RuntimeError):  # the connection ends with the node
        node.run("systemctl reboot && exec sleep infinity")
    assert booted(node) != before_boot
    assert node.service("glm-ocr").is_running
    assert container_start(node) not in ("", before)
    assert chat(url, "OK", max_tokens=1).status_code == 200


@pytest.mark.usefixtures("restored")
def test_removed_checked_on_a_fresh_host_and_deployed_with_podman(
    broken_image: str, node: Host, play: Play, url: str
) -> None:
    removed = play("playbooks/remove.yml")
    assert removed.rc == 0, removed.failures
    assert container_start(node) == ""
    assert not node.file("/etc/systemd/system/glm-ocr.service").exists
    assert node.file(f"{WEIGHTS}/config.json").exists
    assert node.run("ls /var/lib/glm-ocr/reports").stdout
    assert play("playbooks/remove.yml").changed == 0

    # With SO_REUSEPORT, as vLLM 0.18.0 binds: both would listen and share the clients.
    with listener(node, "AF_INET", "SOL_SOCKET", "SO_REUSEPORT", "0.0.0.0") as pid:
        refused = play("deploy.yml")
    assert refused.rc != 0
    assert f"pid {pid}: python3 -c" in refused.failures

    before = node.check_output(STATE)
    checked = play("deploy.yml", check=True)
    assert checked.rc == 0, checked.failures
    assert checked.changed > 0
    assert node.check_output(STATE) == before

    first_and_bad = play("deploy.yml", glm_ocr_image=broken_image)
    assert first_and_bad.rc != 0
    assert "no earlier good release" in first_and_bad.failures
    assert not node.service("glm-ocr").is_running
    assert not node.service("glm-ocr").is_enabled

    with_podman = play("deploy.yml", glm_ocr_container_engine="podman")
    assert with_podman.rc == 0, with_podman.failures
    assert container_start(node, "podman")
    assert chat(url, "OK", max_tokens=1).status_code == 200
    again = play("deploy.yml", glm_ocr_container_engine="podman")
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert play("playbooks/remove.yml", glm_ocr_container_engine="podman").rc == 0
