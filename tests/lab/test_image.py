"""The image: pulled though the registry goes away, waited for when slow, refused when it is not the one meant
or not signed by whom it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from testinfra.host import Host

import signing
from archives import image_archive, load, tar
from lab import LAB_STATE, Controller, Play, Played, container_start, node_named
from signing import Repository, Signer

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


# --- signed -------------------------------------------------------------------------------------------------

SIGNED = "registry.lab:5000/glm-ocr-lab/signed:1"


def repository(image: str) -> Repository:
    """The image's, as the controller reaches it."""
    host, _, name = image.rpartition(":")[0].partition("/")
    port = host.partition(":")[2]
    return Repository(
        f"https://{node_named('registry').backend.hostname}:{port}", name, str(LAB_STATE / "ca" / "ca.crt")
    )


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, str]:
    """A key pair, made for this run, and its public half's file."""
    signer = Signer()
    return signer, signer.write(tmp_path_factory.mktemp("keys") / "cosign.pub")


@pytest.fixture
def pushed(deployed: Played, node: Host) -> Iterator[str]:
    """Digest of the engine's image in a repository of its own, unsigned; the node does not have it by that name."""
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    node.check_output(f"docker tag {image} {SIGNED} && docker push --quiet {SIGNED} && docker rmi {SIGNED}")
    registry = repository(SIGNED)
    digest = signing.sha256(registry.manifest("1"))
    unsign(registry, digest)
    yield digest
    unsign(registry, digest)


def unsign(registry: Repository, digest: str) -> None:
    """Its tag stays in Debian's registry when the manifest goes; what it stood for is not served any more."""
    name = digest.replace(":", "-") + ".sig"
    if name in (registry.ask("GET", "tags/list").json()["tags"] or []):
        try:
            manifest = registry.manifest(name)
        except requests.HTTPError:
            return
        registry.ask("DELETE", f"manifests/{signing.sha256(manifest)}")


@pytest.mark.parametrize("case", ["no signature", "another key", "another image", "altered payload", "no registry"])
def test_an_image_that_is_not_signed_as_it_must_be_is_refused(
    case: str, pushed: str, key: tuple[Signer, str], service: Host, play: Play
) -> None:
    signer, public = key
    registry, other, machine = repository(SIGNED), "sha256:" + "0" * 64, node_named("registry")
    told = {
        "no signature": f"for {pushed} no signature",
        "another key": "one that this key did not make",
        "another image": f"one of another image, {other}",
        "altered payload": "one that this key did not make, or of an altered payload",
        "no registry": "refused",
    }[case]
    if case == "another key":
        registry.sign(pushed, Signer())
    elif case == "another image":
        content = signing.payload(other)
        registry.push_signature(pushed, content, signer.sign(content))
    elif case == "altered payload":
        content = signing.payload(pushed)
        registry.push_signature(pushed, content.replace(b"null", b"{}"), signer.sign(content))
    elif case == "no registry":
        registry.sign(pushed, signer)
        machine.check_output("systemctl stop docker-registry")
    before = service.check_output("docker images --no-trunc --quiet | sort")
    try:
        refused = play("deploy.yml", glm_ocr_image=SIGNED, vllm_image_signature_key=public)
    finally:
        machine.check_output("systemctl start docker-registry && until ss -ltn | grep -q :5000; do :; done")
    assert refused.rc != 0
    assert "[IMAGE_SIGNATURE]" in refused.failures
    assert told in refused.failures
    assert service.check_output("docker images --no-trunc --quiet | sort") == before
    assert service.run(f"docker image inspect {SIGNED}").rc != 0


def test_a_signed_archive_is_known_without_a_registry_and_an_altered_one_refused(
    pushed: str, key: tuple[Signer, str], service: Host, play: Play, tmp_path: Path
) -> None:
    archived = "registry.lab:5000/glm-ocr-lab/signed-archive:1"
    signer, public = key
    good, altered = (
        image_archive(archived, tar({"opt/model.py": code})) for code in (b"answer = 42\n", b"answer = 43\n")
    )
    assert load(service, good)[0] == 0
    try:
        service.check_output(f"docker push --quiet {archived} && docker rmi {archived}")
        manifest = repository(archived).manifest("1")
        content = signing.payload(signing.sha256(manifest))
        (tmp_path / "manifest.json").write_bytes(manifest)
        (tmp_path / "signature.json").write_text(signing.downloaded(content, signer.sign(content)))
        given = {
            "glm_ocr_image": archived,
            "vllm_image_signature_key": public,
            "vllm_image_signature_dir": str(tmp_path),
            "vllm_image_registry_url": "https://nowhere.invalid",
        }
        assert load(service, altered)[0] == 0
        refused = play("deploy.yml", **given)
        assert refused.rc != 0
        assert "[IMAGE_DIGEST]" in refused.failures
        # The one that is meant passes here; it has no engine, which the probe sees.
        assert load(service, good)[0] == 0
        passed = play("deploy.yml", **given)
        assert passed.rc != 0
        assert "[IMAGE_" not in passed.failures
        assert "[PROBE_" in passed.failures
    finally:
        service.run(f"docker rmi --force {archived}")


# Last: it changes what runs, and `restored` brings the inventory's image back.
def test_a_signed_image_is_deployed_by_its_digest_once(
    pushed: str, key: tuple[Signer, str], node: Host, play: Play
) -> None:
    signer, public = key
    repository(SIGNED).sign(pushed, signer)
    given = {"glm_ocr_image": SIGNED, "vllm_image_signature_key": public}
    first = play("deploy.yml", **given)
    assert first.rc == 0, first.failures
    assert pushed in node.check_output(f"docker image inspect --format '{{{{.RepoDigests}}}}' {SIGNED}")
    started = container_start(node)
    second = play("deploy.yml", **given)
    assert (second.rc, second.changed) == (0, 0), second.failures
    assert container_start(node) == started
    # With the pin alone the registry is asked for nothing.
    pinned = play("deploy.yml", glm_ocr_image=SIGNED, vllm_image_expected_digest=pushed)
    assert (pinned.rc, pinned.changed) == (0, 0), pinned.failures
