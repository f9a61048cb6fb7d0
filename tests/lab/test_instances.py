"""Two instances on one host: one comes and goes, and the other serves on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from lab import FILES, INVENTORY, NODE, Play, Played, chat
from rendering import PROJECT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

SITE = (INVENTORY, PROJECT / "tests" / "lab" / "two_instances.yml")
SECOND = f"{NODE}-1"
BOTH = f"{NODE},{SECOND}"
SERVICES = {NODE: "glm-ocr", SECOND: "glm-ocr-1"}


def container(node: Host, line: str) -> dict[str, object]:
    """What the engine says of the line's container."""
    return dict(json.loads(node.check_output(f"docker container inspect {SERVICES[line]}"))[0])


def started(node: Host, line: str) -> object:
    return container(node, line)["State"]["StartedAt"]  # type: ignore[index]


def cards(node: Host, line: str) -> list[str]:
    devices = container(node, line)["HostConfig"]["Devices"]  # type: ignore[index]
    return [device["PathOnHost"] for device in devices if device["PathOnHost"][-1].isdigit()]


def answers(node: Host, port: int) -> bool:
    """From outside the node."""
    reply = chat(f"http://{node.backend.hostname}:{port}", "GLM-OCR", max_tokens=4)
    return bool(reply.status_code == 200)


@pytest.fixture
def alone(deployed: Played, play: Play, node: Host) -> Iterator[str]:
    """The first instance with its one card, before there is a second; its files.  None stays behind."""
    first = play("deploy.yml", inventories=SITE, limit=NODE)
    assert first.rc == 0, first.failures
    yield node.check_output(FILES)
    gone = play("playbooks/remove.yml", inventories=SITE, limit=SECOND)
    assert gone.rc == 0, gone.failures


def test_a_second_instance_comes_and_goes_while_the_first_serves_on(alone: str, play: Play, node: Host) -> None:
    before = started(node, NODE)
    came = play("deploy.yml", inventories=SITE, limit=SECOND)
    assert came.rc == 0, came.failures
    assert [answers(node, port) for port in (8000, 8001)] == [True, True]
    assert (cards(node, NODE), cards(node, SECOND)) == (["/dev/davinci0"], ["/dev/davinci1"])

    # In one batch, as a larger fleet's rollout may have them.
    again = play("deploy.yml", inventories=SITE, limit=BOTH, glm_ocr_rollout_batches=[2])
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert started(node, NODE) == before

    removed = play("playbooks/remove.yml", inventories=SITE, limit=SECOND)
    assert removed.rc == 0, removed.failures
    assert answers(node, 8000)
    assert started(node, NODE) == before
    assert node.check_output(FILES) == alone
    assert not node.run("docker container inspect glm-ocr-1").succeeded
    assert not node.socket("tcp://0.0.0.0:8001").is_listening


def test_both_come_up_in_one_batch(alone: str, play: Play, node: Host) -> None:
    gone = play("playbooks/remove.yml", inventories=SITE, limit=NODE)
    assert gone.rc == 0, gone.failures
    came = play("deploy.yml", inventories=SITE, limit=BOTH, glm_ocr_rollout_batches=[2])
    assert came.rc == 0, came.failures
    assert [answers(node, port) for port in (8000, 8001)] == [True, True]


def test_a_line_without_its_number_does_not_take_the_first_one_over(alone: str, play: Play, node: Host) -> None:
    before = started(node, NODE)
    refused = play("deploy.yml", inventories=SITE, limit=SECOND, glm_ocr_instance=0)
    assert refused.rc != 0
    assert f"{NODE} and {SECOND} are one host" in " ".join(refused.stdout.split())
    assert started(node, NODE) == before
