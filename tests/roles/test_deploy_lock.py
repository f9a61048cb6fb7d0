"""One controller at a time: who holds the lock, when it may be taken over, when never."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import controller
import deploy_lock


def test_this_process_is_there_and_an_ended_one_is_gone() -> None:
    ours = controller.this_controller("")
    assert ours["pid"] > 0
    assert ours["started"]
    assert not controller.is_gone(ours)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        theirs = {**ours, "pid": process.pid, "started": controller.started(process.pid)}
        assert not controller.is_gone(theirs)
        process.communicate(b"\n")
    assert controller.is_gone(theirs)


def test_a_reused_pid_is_another_process() -> None:
    assert controller.is_gone({**controller.this_controller(""), "started": "1"})


def test_another_machines_process_is_never_judged() -> None:
    assert not controller.is_gone({**controller.this_controller(""), "machine": "elsewhere", "started": "1"})


def test_a_worker_speaks_for_its_play() -> None:
    child = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import controller\n"
        "if os.fork() == 0: print(controller.play_pid()); os._exit(0)\n"
        "os.wait()"
    )
    folder = Path(controller.__file__).parent
    process = subprocess.Popen([sys.executable, "-u", "-c", child, str(folder)], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert int(output) == process.pid


HOLDER = {"who": "a@b", "since": "now", "machine": "m", "pid": 1, "started": "2"}


def test_the_lock_is_taken_once(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert deploy_lock.holder_of(path) == {}
    assert deploy_lock.take(path, HOLDER)
    assert not deploy_lock.take(path, {**HOLDER, "pid": 3})
    assert deploy_lock.holder_of(path) == HOLDER
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("other", "expected"),
    [(HOLDER, True), ({**HOLDER, "since": "later"}, True), ({**HOLDER, "pid": 3}, False), (None, False)],
)
def test_a_holder_is_told_by_machine_process_and_start(other: dict[str, Any] | None, expected: bool) -> None:
    assert deploy_lock.same(HOLDER, other) is expected
