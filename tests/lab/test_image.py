"""The image: pulled though the registry goes away, waited for when slow, refused when it is not the one meant."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from testinfra.host import Host

from lab import Controller, Play, Played, container_start, node_named

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

SLOW = "registry.lab:5000/glm-ocr-lab/slow:1"
#: Longer than systemd's own default for a start (90 s).
DELAY_SECONDS = 95
#: Serves after a while; the layer of random bytes takes the registry a moment to send.
DOCKERFILE = """FROM {image}
COPY entrypoint /slow-entrypoint
COPY ballast /ballast
ENTRYPOINT ["/slow-entrypoint"]
"""
#: Meanwhile the port is bound, and what listens there answers everything with 404 or 501: no model is loaded.
ENTRYPOINT = """#!/bin/sh
[ "$1" != vllm ] || timeout {seconds} python3 -m http.server 8000
exec /usr/local/bin/entrypoint.sh "$@"
"""


@dataclass(frozen=True)
class Slow:
    """A deployment of the slow image, with the registry gone for a while in the middle of the pull."""

    rc: int
    output: str
    journal: str


def build_slow(node: Host) -> None:
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    dockerfile, entrypoint = DOCKERFILE.format(image=image), ENTRYPOINT.format(seconds=DELAY_SECONDS)
    node.check_output(
        "mkdir -p /tmp/slow && cd /tmp/slow && head -c 300M /dev/urandom > ballast"
        f" && cat > Dockerfile <<'EOF'\n{dockerfile}EOF\n"
        f"cat > entrypoint <<'EOF'\n{entrypoint}EOF\n"
        f"chmod +x entrypoint && docker build --quiet --tag {SLOW} . && docker push --quiet {SLOW}"
        f" && docker rmi {SLOW} && rm -r /tmp/slow"
    )


@pytest.fixture(scope="module")
def slow(deployed: Played, node: Host) -> Slow:
    build_slow(node)
    registry = node_named("registry")
    controller = Controller("-e", f"glm_ocr_image={SLOW}")
    controller.reaches("vllm_image : Pull | Pull")
    registry.check_output("systemctl kill --signal=KILL docker-registry && systemctl stop docker-registry")
    try:
        node.run("until docker pull --quiet registry.lab:5000/glm-ocr-lab/slow:1 2>&1 | grep refused; do :; done")
    finally:
        registry.check_output("systemctl start docker-registry")
    output = controller.ends()
    return Slow(
        controller.process.returncode,
        output,
        node.check_output("journalctl --unit glm-ocr --lines 1000 --no-pager --output=cat"),
    )


def test_a_registry_that_is_down_for_a_while_is_waited_for(slow: Slow) -> None:
    assert "FAILED - RETRYING" in slow.output
    assert slow.rc == 0, slow.output


def test_a_slow_engine_is_waited_for(slow: Slow, node: Host) -> None:
    assert slow.rc == 0, slow.output
    properties = "--property=ExecMainStartTimestampMonotonic --property=ActiveEnterTimestampMonotonic"
    shown = node.check_output(f"systemctl show glm-ocr {properties}").splitlines()
    times = dict(line.split("=") for line in shown)
    started = int(times["ActiveEnterTimestampMonotonic"]) - int(times["ExecMainStartTimestampMonotonic"])
    assert started / 1e6 > DELAY_SECONDS
    # In the meantime the port answered, which nobody took for the service.
    assert '"POST /v1/chat/completions HTTP/1.1" 501' in slow.journal
    assert node.check_output("systemctl show --property=DefaultTimeoutStartUSec --value") == "1min 30s"


def test_the_container_engine_keeps_no_log(deployed: Played, node: Host) -> None:
    assert container_start(node)
    (container,) = json.loads(node.check_output("docker container inspect glm-ocr"))
    assert container["HostConfig"]["LogConfig"]["Type"] == "none"
    assert node.run("ls /var/lib/docker/containers/*/*.log").rc != 0


def test_an_image_of_another_id_than_the_pinned_one_is_refused(service: Host, play: Play) -> None:
    refused = play("deploy.yml", vllm_image_expected_id="sha256:" + "0" * 64)
    assert refused.rc != 0
    assert "[IMAGE_ID]" in refused.failures
