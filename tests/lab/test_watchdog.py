"""An engine that hangs is restarted, one that is busy is not; a restart too many and a stop are left to people."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from testinfra.host import Host

from lab import (
    BACK_SECONDS,
    ENGINE_PROCESS,
    Play,
    Played,
    chat,
    container_start,
    deploy_guarded,
    engine_pid,
    extra_flags,
)
from ledger import Ledger, ledger

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

STATE, TEXTFILE = "/var/lib/glm-ocr/watchdog.json", "/var/lib/glm-ocr/watchdog.prom"
#: Quicker than the defaults, and one restart: the lab's time is dear.  Two requests at a time, so that a third waits.
CHOICES: dict[str, Any] = {
    "vllm_watchdog_enabled": True,
    "vllm_watchdog_interval_seconds": 3,
    "vllm_watchdog_canary_timeout_seconds": 4,
    "vllm_watchdog_metrics_timeout_seconds": 3,
    "vllm_watchdog_rounds": 3,
    "vllm_watchdog_restarts": 1,
    "vllm_watchdog_textfile": TEXTFILE,
    "vllm_service_extra_flags": extra_flags(max_num_seqs=2),
}


@dataclass(frozen=True)
class Watched:
    """``budget`` is what the deployment says: seconds within which a hang is found."""

    key: str
    choices: dict[str, Any]
    budget: float


@dataclass(frozen=True)
class Hang:
    found_seconds: float
    book: Ledger


@pytest.fixture(scope="module")
def watched(deployed: Played, play: Play) -> Watched:
    key = deploy_guarded(play, **CHOICES)
    site = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": key}, "vllm_service_guard": True}
    shown = play("playbooks/watchdog.yml", **CHOICES)
    assert shown.rc == 0, shown.failures
    (budget,) = re.findall(r"A hang is found within (\d+) s", shown.stdout)
    return Watched(key, site | CHOICES, float(budget))


@pytest.fixture
def serving(watched: Watched, node: Host) -> Watched:
    """Whatever the test before left: it serves, and the watchdog knows that."""
    node.check_output("systemctl start glm-ocr")
    until(lambda: state(node).get("name") == "healthy", watched.budget)
    return watched


@pytest.fixture(scope="module")
def hang(watched: Watched, node: Host, url: str) -> Hang:
    """The engine core is stopped under load, and comes back."""
    node.check_output("systemctl start glm-ocr")
    before = container_start(node)
    with ledger(url, watched.key) as book:
        until(lambda: book.complete > 0, 60)
        signal(node, "STOP")
        started = time.monotonic()
        until(lambda: container_start(node) != before, watched.budget + 10)
        found = time.monotonic() - started
        served = book.complete
        until(lambda: book.complete > served + 5, BACK_SECONDS)
    return Hang(found, book)


def signal(node: Host, name: str) -> None:
    node.check_output(f"kill -{name} {engine_pid(node, ENGINE_PROCESS)}")


def state(node: Host) -> dict[str, Any]:
    """What the last round left; empty before the first."""
    return dict(json.loads(node.run(f"cat {STATE}").stdout or "{}"))


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Returns once it holds; nothing announces what is looked at."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def rounds_later(node: Host, number: int, budget: float) -> None:
    """Returns when so many more rounds have been."""
    for _ in range(number):
        last = state(node)["at"]
        until(lambda last=last: state(node)["at"] != last, budget)  # type: ignore[misc]


def test_a_hung_engine_is_back_within_the_budget_and_nothing_is_lost(
    watched: Watched, hang: Hang, node: Host, play: Play
) -> None:
    print(f"found after {hang.found_seconds:.0f} s, {hang.book.longest_gap:.0f} s without an answer")
    assert hang.found_seconds <= watched.budget
    assert hang.book.longest_gap <= watched.budget + BACK_SECONDS
    assert hang.book.lost == []
    told = play("playbooks/status.yml", **watched.choices)
    assert told.rc == 0, told.failures
    assert re.search(r"watchdog +\S+ since .*, restarts: [1-9]", told.stdout)
    assert re.search(r"restart  [0-9a-f]{16}  it hung  by watchdog", told.stdout)
    exported = node.check_output(f"cat {TEXTFILE}")
    assert re.search(r'^glm_ocr_watchdog_restarts_total\{service="glm-ocr"\} [1-9]', exported, re.MULTILINE)
    assert "glm-ocr is hung" in node.check_output("journalctl --unit=glm-ocr-watchdog --no-pager --output=cat")


def test_what_hangs_again_is_left_to_an_operator(hang: Hang, serving: Watched, node: Host, play: Play) -> None:
    """One restart is allowed; ``hang`` was it, unless a test since then had the watchdog forget that."""
    if not state(node)["restarts"]:
        first = container_start(node)
        signal(node, "STOP")
        until(lambda: container_start(node) != first, serving.budget + 10)
        until(lambda: state(node)["name"] == "healthy", BACK_SECONDS)
    before = container_start(node)
    signal(node, "STOP")
    try:
        until(lambda: state(node)["name"] == "gave-up", serving.budget + 10)
        rounds_later(node, 4, serving.budget)
        assert container_start(node) == before
        assert "glm-ocr-watchdog.service" in node.check_output("systemctl --failed --plain --no-legend")
        told = play("playbooks/status.yml", **serving.choices)
        assert "[WATCHDOG_GAVE_UP]" in told.stdout
    finally:
        signal(node, "CONT")
    until(lambda: state(node)["name"] == "healthy", serving.budget)
    assert "glm-ocr-watchdog" not in node.check_output("systemctl --failed --plain --no-legend")
    reset = play("playbooks/watchdog.yml", vllm_watchdog_reset_enabled=True, **serving.choices)
    assert (reset.rc, reset.changed) == (0, 1), reset.failures
    until(lambda: state(node).get("name") == "healthy", serving.budget)
    assert (state(node)["restarts"], state(node)["restarts_total"]) == ([], 0)


@contextmanager
def occupied(url: str, key: str) -> Iterator[None]:
    """More long generations than the engine takes at a time, one after the other."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            try:
                chat(url, "OK", 4000, key, ignore_eos=True)
            except requests.RequestException:
                # Longer than this client waits: the next one takes its place.
                continue

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(send)
        try:
            yield
        finally:
            ended.set()


def test_a_busy_engine_is_left_alone(serving: Watched, node: Host, url: str) -> None:
    """For longer than a hang would take to be found."""
    before, restarts = container_start(node), state(node)["restarts_total"]
    with occupied(url, serving.key):
        until(lambda: state(node)["name"] == "busy", 60)
        deadline, seen = time.monotonic() + 1.5 * serving.budget, set()
        while time.monotonic() < deadline:
            seen.add(state(node)["name"])
            time.sleep(1)
    print(f"states while it was busy: {seen}")
    assert "busy" in seen
    assert seen <= {"busy", "suspect", "healthy"}
    assert (container_start(node), state(node)["restarts_total"]) == (before, restarts)


def test_a_stop_is_not_undone(serving: Watched, node: Host, play: Play) -> None:
    stopped = play("playbooks/stop.yml", **serving.choices)
    assert stopped.rc == 0, stopped.failures
    until(lambda: state(node)["name"] == "resting", serving.budget)
    rounds_later(node, CHOICES["vllm_watchdog_rounds"] + 2, serving.budget)
    assert (state(node)["name"], container_start(node)) == ("resting", "")
    assert node.check_output("systemctl show --property=ActiveState --value glm-ocr") == "inactive"


def test_turned_off_it_is_gone_and_a_second_run_changes_nothing(serving: Watched, node: Host, play: Play) -> None:
    before = container_start(node)
    off = play("deploy.yml", **serving.choices | {"vllm_watchdog_enabled": False})
    assert off.rc == 0, off.failures
    assert node.run("systemctl cat glm-ocr-watchdog.timer").rc != 0
    assert node.check_output("find /etc /usr/local /var/lib/glm-ocr -name '*watchdog*'") == ""
    on = play("deploy.yml", **serving.choices)
    assert (on.rc, on.changed) == (0, 1), on.failures
    again = play("deploy.yml", **serving.choices)
    assert (again.rc, again.changed) == (0, 0), again.failures
    checked = play("deploy.yml", check=True, **serving.choices)
    assert (checked.rc, checked.changed) == (0, 0), checked.failures
    assert container_start(node) == before
    assert node.check_output("systemctl is-active glm-ocr-watchdog.timer") == "active"
