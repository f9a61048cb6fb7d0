"""What ends under load, and for how long nobody is served; `make recovery` makes a page of it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from testinfra.host import Host

from lab import (
    API_PROCESS,
    BACK_SECONDS,
    ENGINE_PROCESS,
    HANG_SECONDS,
    Play,
    Played,
    booted,
    container_start,
    deploy_guarded,
    engine_pid,
    until,
)
from ledger import Load, clients
from rendering import PROJECT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

CACHE = "/var/lib/glm-ocr/cache"
#: Clients that send all the while, one request after the other.
CLIENTS = 4


def signal_to(signal: str, process: str) -> Callable[[Host], None]:
    return lambda node: node.check_output(f"kill -{signal} {engine_pid(node, process)}")


def kill_front(node: Host) -> None:
    node.check_output("kill -KILL $(systemctl show --property=MainPID --value glm-ocr-front)")


def fill_disk(node: Host) -> None:
    """What the engine writes to is full, and it has to start like that."""
    node.check_output(f"mount -t tmpfs -o size=1m tmpfs {CACHE}")
    assert node.run(f"dd if=/dev/zero of={CACHE}/ballast bs=4k").rc != 0
    signal_to("KILL", ENGINE_PROCESS)(node)


def free_disk(node: Host) -> None:
    node.run(f"umount --lazy {CACHE}")


def reboot(node: Host) -> None:
    before = booted(node)
    with pytest.raises(RuntimeError):  # the connection ends with the node
        node.run("systemctl reboot && exec sleep infinity")
    assert booted(node) != before


def nothing(_: Host) -> None:
    """There is nothing to undo."""


@dataclass(frozen=True)
class Fault:
    """``budget`` are the seconds within which every client must have a complete reply again."""

    name: str
    provoke: Callable[[Host], None]
    budget: float
    undo: Callable[[Host], None] = nothing
    restarts_engine: bool = True


FAULTS = [
    Fault("API process killed", signal_to("KILL", API_PROCESS), BACK_SECONDS),
    Fault("engine process killed", signal_to("KILL", ENGINE_PROCESS), BACK_SECONDS),
    Fault("engine process hung", signal_to("STOP", ENGINE_PROCESS), HANG_SECONDS + BACK_SECONDS),
    Fault("front killed", kill_front, 10, restarts_engine=False),
    Fault("disk of the compile cache full, engine process killed", fill_disk, BACK_SECONDS, free_disk),
    Fault("node rebooted", reboot, BACK_SECONDS + 60),
]


@pytest.fixture(scope="module")
def key(deployed: Played, play: Play) -> str:
    return deploy_guarded(play, vllm_watchdog_enabled=True)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Load]]:
    """What each fault cost; a page of it, where one is wanted and all were provoked."""
    loads: dict[str, Load] = {}
    yield loads
    if (target := os.environ.get("RECOVERY_PAGE")) and len(loads) == len(FAULTS):
        (PROJECT / target).write_text(page(loads))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_it_serves_again_within_its_budget(
    fault: Fault, key: str, measured: dict[str, Load], node: Host, url: str
) -> None:
    before = container_start(node)
    # The starts that the faults before cost must not add up to the unit's limit.
    node.check_output("systemctl reset-failed glm-ocr")
    with clients(CLIENTS, url, key) as load:
        refused, gap = load.refused, load.longest_gap
        try:
            fault.provoke(node)
            # Somebody met the fault, and then all are served.
            until(lambda: load.refused > refused or load.longest_gap > gap + 1, fault.budget)
            load.all_served(fault.budget)
        finally:
            fault.undo(node)
    measured[fault.name] = load
    print(f"{fault.name}: {load.longest_gap:.1f} s not served, {load.complete} complete, {load.refused} refused")
    # The fault was one.
    assert (container_start(node) != before) is fault.restarts_engine
    assert load.lost == []
    assert load.longest_gap <= fault.budget


def page(loads: dict[str, Load]) -> str:
    """docs/recovery.md: what the last run measured."""
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    lines = [
        "# Recovery",
        "",
        f"Written by `make recovery`; do not edit. {CLIENTS} clients send requests all the while, each one until it is",
        "complete. Not served: the longest time that one of them was without a complete reply. Refused: an explicit",
        "error, or a connection that ended; each was sent again. Lost: 200 without a complete reply. Most of the time",
        "is the engine's start, on the lab's CPU; on an NPU it is another.",
        "",
        f"{today}, {os.cpu_count()} cores, with front, guard and watchdog.",
        "",
        "| fault | not served, s | budget, s | complete | refused | lost |",
        "|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        load = loads[fault.name]
        counts = f"{load.complete} | {load.refused} | {len(load.lost)}"
        lines.append(f"| {fault.name} | {load.longest_gap:.1f} | {fault.budget:.0f} | {counts} |")
    return "\n".join([*lines, ""])
