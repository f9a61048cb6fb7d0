"""Three nodes behind two gateways with one address: upgrades under load, and what is killed or cut off.

The engines are the lab's own, vLLM on the CPU; nothing of them is a stand-in. `make fleet` makes a page of it.
"""

from __future__ import annotations

import datetime
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
import yaml
from testinfra.host import Host

from lab import FLEET, GATEWAYS, Play, Played, booted, extra_flags, lab_node, node_named, release, until
from ledger import Load, clients
from rendering import PROJECT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

NODES, PAIR = ("node1", "node2", "node3"), ("gw1", "gw2")
ADDRESS = yaml.safe_load(GATEWAYS.read_text())["lab"]["children"]["gateway"]["vars"]["gateway_virtual_address"]
#: Clients that send all the while, one request after the other.
CLIENTS = 4
#: Seconds within which every client must be served again: by those that are left, not by one that starts.
BUDGET = 90.0


@dataclass
class Measured:
    """What an event cost: the clients' ledgers, the fewest instances that a gateway had up, seconds to notice it."""

    load: Load
    fewest: int
    noticed: float | None


@dataclass
class Fleet:
    url: str
    key: str
    gateways: dict[str, Host]
    nodes: dict[str, Host]
    choices: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)

    def gateway(self) -> str:
        """Which gateway has the address."""
        return next((name for name, host in self.gateways.items() if has_address(host)), "none")

    def serving(self, gateway: str = "") -> set[str] | None:
        """The instances that a gateway, by default the one with the address, has up and sends requests to.

        None if there is no such gateway, or its HAProxy does not say.
        """
        code = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/glm-ocr-gateway/admin.sock');"
            " s.sendall(b'show servers state\\n'); print(s.makefile().read())"
        )
        if (name := gateway or self.gateway()) not in self.gateways:
            return None
        with suppress(RuntimeError):  # testinfra's word for a connection that failed
            asked = self.gateways[name].run(f'python3 -c "{code}"')
            return self._up(asked.stdout) if asked.rc == 0 else None
        return None

    @staticmethod
    def _up(state: str) -> set[str]:
        rows = [line.split() for line in state.splitlines() if " engine " in line and not line.startswith("#")]
        # 1 is up and in its slow start, 2 is up (management.txt of HAProxy, "show servers state").
        return {row[3] for row in rows if row[5] in ("1", "2") and row[6] == "0"}

    def until_serving(self, instances: set[str]) -> None:
        until(lambda: self.serving() == instances, BUDGET)

    @contextmanager
    def under_load(self, event: str) -> Iterator[Measured]:
        """Clients at the address throughout, all of whom are served at the end."""
        with clients(CLIENTS, self.url, self.key) as load:
            found = Measured(load, len(NODES), None)
            with watching(self, found):
                yield found
            load.all_served(BUDGET)
        self.measured[event] = found
        print(f"{event}: {load.longest_gap:.1f} s not served, {load.complete} complete, {load.refused} refused")
        assert load.lost == []


def has_address(gateway: Host) -> bool:
    try:
        return ADDRESS in gateway.run("ip -brief address show dev host0").stdout
    except RuntimeError:  # testinfra's word for a connection that failed
        return False


@contextmanager
def watching(fleet: Fleet, found: Measured) -> Iterator[None]:
    """Keeps the fewest instances that were up."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if (up := fleet.serving()) is not None:
                found.fewest = min(found.fewest, len(up))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def fleet(deployed: Played, play: Play) -> Iterator[Fleet]:
    """Three nodes with front and keys, and two gateways before them."""
    internal, key = secrets.token_hex(24), secrets.token_hex(24)
    choices = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": key, "gateway": internal}}
    for playbook in ("playbooks/lab.yml", "tests/lab/gateway_node.yml"):
        up = play(playbook, inventories=FLEET, limit="all")
        assert up.rc == 0, up.failures
    try:
        # There are no gateways yet that run.
        first = play("deploy.yml", inventories=FLEET, **choices, gateway_min_others=0)
        assert first.rc == 0, first.failures
        pool = play("playbooks/gateway.yml", inventories=FLEET, limit="gateway", **choices)
        assert pool.rc == 0, pool.failures
        again = play("playbooks/gateway.yml", inventories=FLEET, limit="gateway", **choices)
        assert (again.rc, again.changed) == (0, 0), again.failures
        gateways, nodes = ({name: node_named(name) for name in names} for names in (PAIR, NODES))
        built = Fleet(f"http://{ADDRESS.split('/')[0]}:8000", key, gateways, nodes, choices)
        until(lambda: built.gateway() != "none", BUDGET)
        built.until_serving(set(NODES))
        yield built
        if (target := os.environ.get("FLEET_PAGE")) and len(built.measured) == len(EVENTS):
            (PROJECT / target).write_text(page(built.measured))
    finally:
        for name in (*PAIR, "node2", "node3"):
            lab_node("remove", name)


#: In the order of the page.
EVENTS = UPGRADE, BAD, KILLED, CUT, FAILOVER, GATEWAY_KILLED = (
    "rolling upgrade of all three",
    "rolling upgrade to a release that does not start",
    "a node loses its power",
    "a node is cut off",
    "HAProxy of the gateway with the address ends and does not come back",
    "the gateway with the address loses its power",
)


def test_an_upgrade_of_the_fleet_loses_and_refuses_no_request(fleet: Fleet, play: Play) -> None:
    before = {name: release(node) for name, node in fleet.nodes.items()}
    with fleet.under_load(UPGRADE) as found:
        wanted = {"vllm_service_extra_flags": extra_flags(max_num_seqs=12)}
        upgraded = play("deploy.yml", inventories=FLEET, **fleet.choices, **wanted)
    assert upgraded.rc == 0, upgraded.failures
    assert all(release(node) != before[name] for name, node in fleet.nodes.items())
    assert (found.load.refused, found.fewest) == (0, len(NODES) - 1)
    assert fleet.serving() == set(NODES)


def test_a_bad_release_stops_at_the_first_host_which_serves_again(fleet: Fleet, play: Play, broken_image: str) -> None:
    before = {name: release(node) for name, node in fleet.nodes.items()}
    with fleet.under_load(BAD) as found:
        failed = play("deploy.yml", inventories=FLEET, **fleet.choices, glm_ocr_image=broken_image)
    assert failed.rc != 0
    assert "was put back; it answers and reads its known image" in failed.failures
    assert {name: release(node) for name, node in fleet.nodes.items()} == before
    assert (found.load.refused, found.fewest) == (0, len(NODES) - 1)
    assert fleet.serving() == set(NODES)


def test_a_node_that_loses_its_power_leaves_the_pool_and_comes_back(fleet: Fleet) -> None:
    with fleet.under_load(KILLED) as found:
        began = time.monotonic()
        lab_node("stop", "node2", "--cut")
        fleet.until_serving({"node1", "node3"})
        found.noticed = time.monotonic() - began
        found.load.all_served(BUDGET)
    # Those that were at the node when it went.
    assert found.load.refused <= CLIENTS
    lab_node("start", "node2")
    booted(fleet.nodes["node2"])
    until(lambda: fleet.serving() == set(NODES), 300)


def test_a_node_that_is_cut_off_leaves_the_pool_and_comes_back(fleet: Fleet) -> None:
    with fleet.under_load(CUT) as found:
        began = time.monotonic()
        lab_node("cut", "node3")
        try:
            fleet.until_serving({"node1", "node2"})
            found.noticed = time.monotonic() - began
            found.load.all_served(BUDGET)
        finally:
            lab_node("join", "node3")
        fleet.until_serving(set(NODES))
    assert found.load.refused <= CLIENTS


def test_the_address_goes_to_the_other_gateway_when_haproxy_is_gone(fleet: Fleet) -> None:
    first = fleet.gateway()
    with fleet.under_load(FAILOVER) as found:
        moved(fleet, first, found, lambda: fleet.gateways[first].check_output("systemctl stop glm-ocr-gateway"))
        fleet.gateways[first].check_output("systemctl start glm-ocr-gateway")
        # Who has it keeps it.
        until(lambda: fleet.serving(first) == set(NODES), BUDGET)
        assert fleet.gateway() != first
    assert found.fewest == len(NODES)


def test_the_address_goes_to_the_other_gateway_when_the_host_is_gone(fleet: Fleet) -> None:
    first = fleet.gateway()
    with fleet.under_load(GATEWAY_KILLED) as found:
        moved(fleet, first, found, lambda: lab_node("stop", first, "--cut"))
    lab_node("start", first)
    booted(fleet.gateways[first])
    until(lambda: fleet.serving(first) == set(NODES), BUDGET)
    assert fleet.gateway() != first


def moved(fleet: Fleet, first: str, found: Measured, fault: Any) -> None:
    """Provokes it, and waits until another gateway answers at the address."""
    (other,) = set(PAIR) - {first}
    began = time.monotonic()
    fault()
    until(lambda: has_address(fleet.gateways[other]) and answers(fleet), BUDGET)
    found.noticed = time.monotonic() - began
    found.load.all_served(BUDGET)


def answers(fleet: Fleet) -> bool:
    try:
        return requests.get(f"{fleet.url}/health", timeout=1).status_code == 401
    except requests.RequestException:
        return False


def page(measured: dict[str, Measured]) -> str:
    """docs/fleet.md: what the last run measured."""
    lines = [
        "# The fleet under load",
        "",
        "Written by `make fleet`; do not edit. Three nodes of the lab with real vLLM on the CPU, front and keys,",
        f"behind two gateways that share an address. {CLIENTS} clients send requests to the address all the while,",
        "each one until it is complete. Not served: the longest time that one of them was without a complete",
        "reply. Refused: an explicit error, or a connection that ended; each was sent again. Lost: 200 without a",
        "complete reply. Noticed: seconds until the pool was without the node, or the other gateway answered at",
        "the address. Fewest up: the fewest instances that the gateway had up, asked twice a second. All of it",
        "runs on one machine, and replies wait for each other: on other hosts the times are others.",
        "",
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores.",
        "",
        "| event | not served, s | noticed, s | fewest up | complete | refused | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for event in EVENTS:
        found = measured[event]
        noticed = "" if found.noticed is None else f"{found.noticed:.1f}"
        load = found.load
        counts = f"{found.fewest} of {len(NODES)} | {load.complete} | {load.refused} | {len(load.lost)}"
        lines.append(f"| {event} | {load.longest_gap:.1f} | {noticed} | {counts} |")
    return "\n".join([*lines, ""])
