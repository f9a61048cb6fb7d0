"""A site without a network: made of a bundle, which is refused when a byte of it is another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from lab import ENGINE, WEIGHTS, Controller, Play, Played, latest_report, node_named
from model_files import NANO, flip

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

IMAGE = ENGINE["glm_ocr_image"]


@pytest.fixture(scope="module")
def bundled(deployed: Played, play: Play, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables of a bundle that was cut off in the middle of the image and made to its end by a second run."""
    folder = tmp_path_factory.mktemp("site") / "bundle"
    given = {"site_bundle_dir": str(folder), "site_bundle_weights_dir": str(NANO)}
    blobs = folder / "image" / "blobs" / "sha256"
    controller = Controller("-e", json.dumps(given), playbook="playbooks/bundle.yml")
    try:
        controller.reaches("Fetch it, part by part")
        # One part of the image is there, the next one begun.
        while {bool(path.suffix) for path in blobs.glob("*") if path.stat().st_size > 2**20} != {True, False}:
            assert controller.process.poll() is None
    finally:
        controller.kill()
    whole = {path: path.stat().st_mtime_ns for path in blobs.iterdir() if not path.suffix}
    assert not (folder / "SHA256SUMS").exists()
    made = play("playbooks/bundle.yml", **given)
    assert made.rc == 0, made.failures
    assert {path: path.stat().st_mtime_ns for path in whole} == whole, "what was complete was fetched again"
    again = play("playbooks/bundle.yml", **given)
    assert (again.rc, again.changed) == (0, 0), again.failures
    return {"site_bundle_dir": str(folder)}


@pytest.fixture
def isolated(deployed: Played, play: Play, node: Host) -> Iterator[Host]:
    """The node without service, image and weights, which reaches nothing but who asks it over SSH."""
    assert play("playbooks/remove.yml").rc == 0
    registry = node_named("registry").backend.hostname
    node.check_output(f"docker rmi --force $(docker images --quiet --no-trunc {IMAGE}) && mv {WEIGHTS} {WEIGHTS}.kept")
    default = node.run("ip route show default").stdout.strip()
    node.check_output(f"ip route add unreachable {registry}/32; ip route del default 2>/dev/null; true")
    try:
        yield node
    finally:
        node.check_output(f"rm --recursive --force {WEIGHTS} && mv {WEIGHTS}.kept {WEIGHTS}")
        node.check_output(f"ip route del unreachable {registry}/32")
        if default:
            node.check_output(f"ip route replace {default}")


def test_one_altered_byte_is_refused_by_name_before_a_host_is_asked(
    bundled: dict[str, Any], service: Host, play: Play
) -> None:
    weights = Path(bundled["site_bundle_dir"]) / "weights" / "model.safetensors"
    flip(weights)
    try:
        refused = play("playbooks/unbundle.yml", **bundled)
    finally:
        flip(weights)
    assert refused.rc != 0
    assert "[BUNDLE_ALTERED]" in refused.failures
    assert "found 1 difference(s)" in refused.failures
    assert "weights/model.safetensors: altered" in refused.failures


def test_a_node_without_a_network_is_made_of_the_bundle(bundled: dict[str, Any], isolated: Host, play: Play) -> None:
    assert isolated.run(f"docker pull {IMAGE}").rc != 0
    unpacked = play("playbooks/unbundle.yml", **bundled)
    assert unpacked.rc == 0, unpacked.failures
    once_more = play("playbooks/unbundle.yml", **bundled)
    assert (once_more.rc, once_more.changed) == (0, 0), once_more.failures
    deployed = play("deploy.yml")
    assert deployed.rc == 0, deployed.failures
    assert json.loads((latest_report() / "report.json").read_text())["verdict"] == "PASS"
    assert isolated.run(f"docker pull {IMAGE}").rc != 0
