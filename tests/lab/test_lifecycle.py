"""What becomes of the service when it is given something bad, rebooted, removed, or moved to another engine."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from lab import STATE, WEIGHTS, Play, Played, booted, chat, container_start, listener, release
from ledger import ledger

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
    with ledger(url) as book:
        with pytest.raises(RuntimeError):  # the connection ends with the node
            node.run("systemctl reboot && exec sleep infinity")
        assert booted(node) != before_boot
        served = book.complete
        assert node.service("glm-ocr").is_running
        assert chat(url, "OK", max_tokens=1).status_code == 200
    assert container_start(node) not in ("", before)
    assert book.lost == []
    assert book.complete >= served > 0


@pytest.fixture
def mounted_weights(deployed: Played, node: Host) -> Iterator[str]:
    """The weights on a mount of their own, as /etc/fstab has it; yields where they really are."""
    real, entry = f"{WEIGHTS}.disk", f"{WEIGHTS}.disk {WEIGHTS} none bind,ro,nofail 0 0"
    node.check_output(
        f"systemctl stop glm-ocr && mv {WEIGHTS} {real} && mkdir {WEIGHTS} && echo '{entry}' >> /etc/fstab"
        " && systemctl daemon-reload && systemctl start glm-ocr"
    )
    yield real
    node.run("systemctl stop glm-ocr")
    node.run(f"umount {WEIGHTS}")
    node.check_output(
        f"sed -i '\\|^{real} |d' /etc/fstab && systemctl daemon-reload && rmdir {WEIGHTS} && mv {real} {WEIGHTS}"
        " && systemctl reset-failed && systemctl start glm-ocr"
    )


@pytest.mark.long
def test_weights_whose_mount_is_lost_under_load(mounted_weights: str, node: Host, play: Play, url: str) -> None:
    # RequiresMountsFor alone mounted them: nobody else was asked to.
    assert node.run(f"mountpoint {WEIGHTS}").rc == 0
    started = container_start(node)
    with ledger(url) as book:
        node.check_output(f"umount --lazy {WEIGHTS}")
        refused = play("playbooks/preflight.yml")
        kept = container_start(node)
    # What is loaded goes on; a deployment would be told.
    assert (kept, book.lost, book.refused) == (started, [], 0)
    assert book.complete > 0
    assert refused.rc != 0
    assert "[HOST_WEIGHTS]" in refused.failures
    assert WEIGHTS in refused.failures

    # When they cannot be mounted a start is refused and not served from an empty folder; systemd says why.
    node.check_output("systemctl stop glm-ocr")
    node.check_output(f"sed -i '\\|^{mounted_weights} |s/ none bind,/ nofs /' /etc/fstab && systemctl daemon-reload")
    try:
        failed = node.run("systemctl start glm-ocr")
    finally:
        node.check_output(
            f"sed -i '\\|^{mounted_weights} |s/ nofs / none bind,/' /etc/fstab && systemctl daemon-reload"
            " && systemctl reset-failed"
        )
    assert failed.rc != 0
    assert "dependency" in failed.stderr.lower()
    assert container_start(node) == ""

    # It comes back: so does the mount, with the service's start alone.
    node.check_output("systemctl start glm-ocr")
    assert node.run(f"mountpoint {WEIGHTS}").rc == 0
    assert chat(url, "OK", max_tokens=1).status_code == 200


#: Starts at once, writes more into its log than an engine does, and answers what readiness asks.
QUICK = """#!/usr/bin/python3
import http.server, json
class Quick(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.dumps({"usage": {"completion_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer.allow_reuse_address = True
print("\\n".join(f"line {number} " + 100 * "x" for number in range(100)), flush=True)
http.server.HTTPServer(("0.0.0.0", 8000), Quick).serve_forever()
"""
RESTARTS = 50
#: Whatever a container leaves behind that is not removed: name to the command that counts it.
LEFT = {
    "containers": "docker ps --all --quiet | wc -l",
    "layers": "ls /var/lib/docker/overlay2 | wc -l",
    "folders of containers": "ls /var/lib/docker/containers | wc -l",
    "mounts": "wc -l < /proc/self/mountinfo",
    "cgroups": "find /sys/fs/cgroup -name '*docker*' -type d | wc -l",
    "processes": "ps -eo args | grep -c '[c]ontainerd-shim'",
    "shared memory": "ls /dev/shm | wc -l",
    "volumes": "docker volume ls --quiet | wc -l",
    "files of the state": "find /var/lib/glm-ocr -type f | wc -l",
}


@pytest.mark.long
def test_fifty_restarts_leave_nothing_behind(deployed: Played, node: Host) -> None:
    """The unit as it is, with an engine that starts at once in place of vLLM: the real one would take half an hour."""
    folder = "/run/systemd/system/glm-ocr.service.d"
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    unit = node.file("/etc/systemd/system/glm-ocr.service").content_string
    start = re.search(r"^ExecStart=(?:.*\\\n)*.*", unit, re.MULTILINE)
    assert start
    encoded = base64.b64encode(QUICK.encode()).decode()
    node.check_output(
        f"mkdir -p /tmp/quick && cd /tmp/quick && echo {encoded} | base64 --decode > vllm && chmod +x vllm"
        f" && printf 'FROM {image}\\nCOPY vllm /usr/local/bin/vllm\\n' > Dockerfile"
        " && docker build --quiet --tag localhost/quick:1 . && rm -r /tmp/quick"
    )
    dropin = f"[Service]\nExecStart=\n{start[0].replace(image, 'localhost/quick:1')}\n"
    encoded = base64.b64encode(dropin.encode()).decode()
    node.check_output(
        f"mkdir -p {folder} && echo {encoded} | base64 --decode > {folder}/quick.conf && systemctl daemon-reload"
        " && systemctl restart glm-ocr"
    )
    try:
        before = {name: node.check_output(command) for name, command in LEFT.items()}
        node.check_output(
            f"for number in $(seq {RESTARTS}); do"
            " systemctl reset-failed glm-ocr && systemctl restart glm-ocr || exit 1; done"
        )
        after = {name: node.check_output(command) for name, command in LEFT.items()}
        lines = int(node.check_output("journalctl --unit glm-ocr --no-pager --output cat --grep 'line 99 ' | wc -l"))
        kept = node.run("ls /var/lib/docker/containers/*/*.log").stdout
    finally:
        node.check_output(
            f"rm -r {folder} && systemctl daemon-reload && systemctl reset-failed && systemctl restart glm-ocr"
            " && docker rmi localhost/quick:1"
        )
    assert after == before
    assert kept == ""
    # It did write, and into the journal alone, whose size journald bounds.
    assert lines >= RESTARTS


@pytest.mark.long
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

    podman = {"glm_ocr_container_engine": "podman", "vllm_service_sandbox": True}
    # A node of the lab has no controllers for these.
    podman |= {"vllm_service_sandbox_memory": "", "vllm_service_sandbox_pids": 0}
    with_podman = play("deploy.yml", **podman)
    assert with_podman.rc == 0, with_podman.failures
    assert container_start(node, "podman")
    assert chat(url, "OK", max_tokens=1).status_code == 200
    # With podman the container is the unit's, and so is its sandbox.
    security = node.check_output("systemd-analyze security --no-pager glm-ocr")
    (exposure,) = re.findall(r"Overall exposure level for glm-ocr.service: ([0-9.]+)", security)
    assert float(exposure) <= 4.5, security
    again = play("deploy.yml", **podman)
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert play("playbooks/remove.yml", **podman).rc == 0
