"""Three nodes behind a gateway: an upgrade under load, a release that is bad, a node that is cut off.

The engines are the lab's own, vLLM on the CPU; nothing of them is a stand-in.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from testinfra.host import Host

from lab import FLEET, Play, Played, chat, extra_flags, lab_node, node_named, release
from ledger import ledger

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

NODES = ("node1", "node2", "node3")


@dataclass(frozen=True)
class Fleet:
    url: str
    key: str
    gateway: Host
    nodes: dict[str, Host]
    choices: dict[str, Any]

    def serving(self) -> set[str]:
        """The instances that the gateway has up and sends requests to."""
        code = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/glm-ocr-gateway/admin.sock');"
            " s.sendall(b'show servers state\\n'); print(s.makefile().read())"
        )
        asked = self.gateway.check_output(f'python3 -c "{code}"')
        rows = [line.split() for line in asked.splitlines() if " engine " in line and not line.startswith("#")]
        return {row[3] for row in rows if row[5] == "2" and row[6] == "0"}

    def until(self, instances: set[str]) -> None:
        deadline = time.monotonic() + 60
        while (serving := self.serving()) != instances:
            assert time.monotonic() < deadline, serving
            time.sleep(0.5)


@pytest.fixture(scope="module")
def fleet(deployed: Played, play: Play) -> Iterator[Fleet]:
    """Three nodes with front and keys, and a gateway before them."""
    internal, key = secrets.token_hex(24), secrets.token_hex(24)
    choices = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": key, "gateway": internal}}
    for playbook in ("playbooks/lab.yml", "tests/lab/gateway_node.yml"):
        up = play(playbook, inventories=FLEET, limit="all")
        assert up.rc == 0, up.failures
    try:
        first = play("deploy.yml", inventories=FLEET, **choices, gateway_min_others=0)
        assert first.rc == 0, first.failures
        pool = play("playbooks/gateway.yml", inventories=FLEET, limit="gateway", **choices)
        assert pool.rc == 0, pool.failures
        again = play("playbooks/gateway.yml", inventories=FLEET, limit="gateway", **choices)
        assert (again.rc, again.changed) == (0, 0), again.failures
        gateway = node_named("gw1")
        nodes = {name: node_named(name) for name in NODES}
        yield Fleet(f"http://{gateway.backend.hostname}:8000", key, gateway, nodes, choices)
    finally:
        for name in ("gw1", "node2", "node3"):
            lab_node("remove", name)


def test_an_upgrade_of_the_fleet_loses_and_refuses_no_request(fleet: Fleet, play: Play) -> None:
    before = {name: release(node) for name, node in fleet.nodes.items()}
    with ledger(fleet.url, fleet.key) as book:
        wanted = {"vllm_service_extra_flags": extra_flags(max_num_seqs=12)}
        upgraded = play("deploy.yml", inventories=FLEET, **fleet.choices, **wanted)
    assert upgraded.rc == 0, upgraded.failures
    assert all(release(node) != before[name] for name, node in fleet.nodes.items())
    assert (book.lost, book.refused) == ([], 0)
    assert book.complete > 10
    assert fleet.serving() == set(NODES)


def test_a_bad_release_stops_at_the_first_host_which_serves_again(fleet: Fleet, play: Play, broken_image: str) -> None:
    before = {name: release(node) for name, node in fleet.nodes.items()}
    with ledger(fleet.url, fleet.key) as book:
        failed = play("deploy.yml", inventories=FLEET, **fleet.choices, glm_ocr_image=broken_image)
    assert failed.rc != 0
    assert "was put back; it answers and reads its known image" in failed.failures
    assert {name: release(node) for name, node in fleet.nodes.items()} == before
    assert (book.lost, book.refused) == ([], 0)
    assert fleet.serving() == set(NODES)


def test_a_node_that_is_cut_off_leaves_the_pool_and_comes_back(fleet: Fleet) -> None:
    with ledger(fleet.url, fleet.key) as book:
        lab_node("cut", "node3")
        try:
            fleet.until({"node1", "node2"})
            assert chat(fleet.url, "OK", max_tokens=1, key=fleet.key).status_code == 200
        finally:
            lab_node("join", "node3")
        fleet.until(set(NODES))
    assert book.lost == []
    # The one that was at the node when it went.
    assert book.refused <= 1
