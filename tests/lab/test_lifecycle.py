"""What becomes of the service when it is given something bad, rebooted, removed, or moved to another engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from lab import STATE, WEIGHTS, Play, Played, chat, container_start, latest_report, listener

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


@pytest.fixture
def restored(deployed: Played, play: Play) -> Iterator[None]:
    """Whatever the test does to the service, the next test finds the inventory's."""
    yield
    again = play("deploy.yml")
    assert again.rc == 0, again.failures


def eventually_active(node: Host, seconds: float) -> bool:
    """Whether the service becomes active; a node that does not answer over SSH yet is asked again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if node.run("systemctl is-active glm-ocr").stdout.strip() == "active":
                return True
        except RuntimeError:  # testinfra's word for a connection that failed
            continue
    return False


@pytest.mark.usefixtures("restored")
def test_a_start_that_fails_shows_the_engines_own_words(play: Play) -> None:
    failed = play("deploy.yml", vllm_service_extra_flags={"max-num-seqz": 32})
    assert failed.rc != 0
    assert "unrecognized arguments: --max-num-seqz" in failed.failures


@pytest.mark.usefixtures("restored")
def test_random_weights_fail_at_the_image(node: Host, play: Play) -> None:
    copy = "/opt/atomgit/weights/random"
    node.check_output(f"cp -r {WEIGHTS} {copy} && python3 -c '{RANDOMISE}' {copy}/model.safetensors")
    try:
        failed = play("deploy.yml", glm_ocr_weights_path=copy)
    finally:
        node.check_output(f"rm -r {copy}")
    assert failed.rc != 0
    report = json.loads((latest_report() / "report.json").read_text())
    verdicts = {check["id"]: check["verdict"] for check in report["stages"]["ocr_smoke"]["checks"]}
    assert report["verdict"] == "FAIL"
    assert verdicts == {"health": "PASS", "models": "PASS", "text": "PASS", "image": "FAIL"}


def test_a_reboot_brings_the_service_back(deployed: Played, node: Host, url: str) -> None:
    before = container_start(node)
    boot = "systemctl show --property=UserspaceTimestampMonotonic"
    booted = node.check_output(boot)
    with pytest.raises(RuntimeError):  # the connection ends with the node
        node.run("systemctl reboot; sleep 60")
    assert eventually_active(node, 300)
    assert node.check_output(boot) != booted
    assert container_start(node) not in ("", before)
    assert chat(url, "OK", max_tokens=1).status_code == 200


@pytest.mark.usefixtures("restored")
def test_removed_checked_on_a_fresh_host_and_deployed_with_podman(node: Host, play: Play, url: str) -> None:
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

    with_podman = play("deploy.yml", glm_ocr_container_engine="podman")
    assert with_podman.rc == 0, with_podman.failures
    assert container_start(node, "podman")
    assert chat(url, "OK", max_tokens=1).status_code == 200
    again = play("deploy.yml", glm_ocr_container_engine="podman")
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert play("playbooks/remove.yml", glm_ocr_container_engine="podman").rc == 0
