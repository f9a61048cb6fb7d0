"""One controller at a time: who holds the lock, when it may be taken over, when never."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import controller
import deploy_lock
from local_play import LocalPlay, role
from rendering import PROJECT


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


OTHER = {**HOLDER, "pid": 3}


def test_the_lock_is_taken_once_and_given_back_by_its_holder(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert deploy_lock.take(path, HOLDER, check_mode=True) == (True, {})
    assert deploy_lock.take(path, HOLDER) == (True, {})
    assert deploy_lock.take(path, OTHER) == (False, HOLDER)
    assert deploy_lock.take(path, HOLDER) == (True, HOLDER)
    assert deploy_lock.give_back(path, OTHER) == HOLDER
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    deploy_lock.give_back(path, HOLDER)
    assert list(tmp_path.iterdir()) == []


def test_of_two_reruns_that_saw_a_dead_holder_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "lock")
    deploy_lock.write(path, HOLDER)
    first = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    lock = fcntl.flock

    def waits(handle: int, operation: int) -> None:
        with pytest.raises(BlockingIOError):
            lock(handle, operation | fcntl.LOCK_NB)
        # Meanwhile the first takes over.
        deploy_lock.write(path, OTHER)
        os.close(first)
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", waits)
    assert deploy_lock.take(path, {**HOLDER, "pid": 4}, replaced=HOLDER) == (False, OTHER)
    assert deploy_lock.holder_of(path) == OTHER


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[1]", b"[[1, 2]]", b'{"who": "a', b'{"pid": 1}'])
def test_a_file_that_does_not_tell_is_held_by_someone_and_can_be_broken(content: bytes, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_bytes(content)
    held, found = deploy_lock.take(str(lock), HOLDER)
    assert not held
    assert str(lock) in found["who"]
    assert not controller.is_gone(found)
    assert deploy_lock.take(str(lock), HOLDER, replaced=found) == (True, found)


@pytest.mark.parametrize("option", ["", "-e deploy_lock_break_enabled=false", "-e deploy_lock_break_enabled=true"])
def test_another_machines_lock_is_broken_when_it_is_said_on_the_command_line(option: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(HOLDER))
    play = LocalPlay(tmp_path)
    played = play.run(role("deploy_lock"), options=option.split(), __deploy_lock_path=str(lock))
    broken = option.endswith("=true")
    assert "Conditionals must have a boolean result" not in played.stdout
    assert ("[HOST_LOCKED]" in played.stdout, played.rc) == ((False, 0) if broken else (True, 2))
    assert (json.loads(lock.read_text()) == HOLDER) is not broken


CHANGES = ["deploy", "drain", "remove", "restart", "rollback", "stop"]


@pytest.mark.parametrize("verb", CHANGES)
def test_a_verb_that_changes_the_service_keeps_other_controllers_out(verb: str) -> None:
    tasks = yaml.safe_load((PROJECT / "playbooks" / f"{verb}.yml").read_text())[-1]["tasks"]
    assert [task.get("ansible.builtin.import_role", {}).get("name") for task in tasks] == [
        "glm_ocr",
        "deploy_lock",
        None,
    ]
    # First of all: what comes behind it may fail.
    release, *_ = tasks[-1]["always"]
    assert release["ansible.builtin.import_role"] == {"name": "deploy_lock", "tasks_from": "release"}


#: What the others may ask of the role: neither entry point touches a host.
LOOKS = {"status": ["status"], "preflight": ["validate"]}


def test_every_other_verb_leaves_the_service_alone() -> None:
    for path in PROJECT.glob("playbooks/*.yml"):
        if path.stem not in CHANGES:
            asked = re.findall(r"name: vllm_service(?:\n +tasks_from: (\w+))?", path.read_text())
            assert asked == LOOKS.get(path.stem, []), path.name


@pytest.mark.parametrize(
    ("other", "expected"),
    [(HOLDER, True), ({**HOLDER, "since": "later"}, True), ({**HOLDER, "pid": 3}, False), (None, False)],
)
def test_a_holder_is_told_by_machine_process_and_start(other: dict[str, Any] | None, expected: bool) -> None:
    assert deploy_lock.same(HOLDER, other) is expected
