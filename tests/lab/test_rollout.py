"""A rollout over three nodes: a bad release stops at the first, a lost node harms no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from lab import STATE, THREE_NODES, Controller, Play, Played, chat, extra_flags, lab_node, node_named, release

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]


@pytest.fixture(scope="module")
def others(deployed: Played, play: Play) -> Iterator[list[Host]]:
    """Two more nodes, which have weights and no service."""
    up = play("playbooks/lab.yml", inventories=THREE_NODES, limit="all")
    assert up.rc == 0, up.failures
    yield [node_named("node2"), node_named("node3")]
    for name in ("node2", "node3"):
        lab_node("remove", name)


def test_a_bad_image_stops_at_the_first_host(
    others: list[Host], broken_image: str, node: Host, play: Play, url: str
) -> None:
    good = release(node)
    before = [other.check_output(STATE) for other in others]
    failed = play("deploy.yml", inventories=THREE_NODES, glm_ocr_image=broken_image)
    assert failed.rc != 0
    assert "this release is broken" in failed.failures
    assert f"Release {good} was put back; it answers and reads its known image." in failed.failures
    assert failed.seconds < 180
    assert release(node) == good
    assert chat(url, "OK", max_tokens=1).status_code == 200
    assert [other.check_output(STATE) for other in others] == before


def test_a_host_lost_halfway_harms_no_other_and_a_rerun_resumes(others: list[Host], node: Host, play: Play) -> None:
    lost = others[-1]
    before = release(node)
    # Both have something to do: the first another release, the one that is lost its first.
    wanted = {"glm_ocr_rollout_batches": [2], "vllm_service_extra_flags": extra_flags(max_num_seqs=12)}
    two: dict[str, Any] = {"inventories": THREE_NODES, "limit": "node1:node3"}
    controller = Controller("-e", json.dumps(wanted), **two)
    controller.reaches("vllm_image : Pull")
    lab_node("cut", "node3")
    try:
        output = controller.ends()
    finally:
        lab_node("join", "node3")
    assert controller.process.returncode != 0
    assert "node3" in output.split("PLAY RECAP")[-1]
    assert release(node) != before
    assert node.service("glm-ocr").is_running
    assert not lost.service("glm-ocr").is_running
    rerun = play("deploy.yml", **two, **wanted)
    assert rerun.rc == 0, rerun.failures
    assert lost.service("glm-ocr").is_running
    again = play("deploy.yml", **two, **wanted | {"glm_ocr_rollout_batches": [1]})
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert again.stdout.count("PLAY [Deploy GLM-OCR]") == 1, "engines that go on as they are need no batches"
