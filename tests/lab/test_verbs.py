"""The verbs that look at a service, take it out and bring it back.

Restart under load and rollback are in test_resilience.py, remove in test_lifecycle.py.
"""

from __future__ import annotations

import json
import re
import tarfile
from typing import Any

import pytest
from testinfra.host import Host

from lab import NODE, Play, Played, chat, container_start, release
from ledger import ledger
from rendering import PROJECT


def status(play: Play) -> dict[str, Any]:
    """What status says of the node."""
    told = play("playbooks/status.yml")
    assert (told.rc, told.changed) == (0, 0), told.failures
    newest = max((PROJECT / "reports" / "status").glob("*/status.json"))
    (host,) = [host for host in json.loads(newest.read_text())["hosts"] if host["host"] == NODE]
    return dict(host)


def test_status_tells_what_runs_and_what_should(service: Host, play: Play) -> None:
    told = status(play)
    assert told["running"] == told["wanted"] == told["last_good"] == release(service)
    assert told["runs_wanted"]
    assert (told["service"]["active_state"], told["service"]["unit_file_state"]) == ("active", "enabled")


def test_logs_bring_a_bundle_and_leave_nothing(service: Host, play: Play) -> None:
    before = service.check_output("ls /tmp")
    collected = play("playbooks/logs.yml")
    assert (collected.rc, collected.changed) == (0, 0), collected.failures
    (path,) = re.findall(r"Bundle: (\S+\.tar\.gz)", collected.stdout)
    with tarfile.open(path) as bundle:
        texts = {name.rpartition("/")[2]: bundle.extractfile(name) for name in bundle.getnames()}
        journal, state = (texts[name] for name in ("journal.txt", "systemctl-show.txt"))
        assert journal is not None
        assert state is not None
        assert b"vllm" in journal.read()
        assert b"ActiveState=active" in state.read()
    assert {"MANIFEST.txt", "container-inspect.json", "npu-smi-info.txt"} <= set(texts)
    assert service.check_output("ls /tmp") == before


@pytest.mark.parametrize("verb", ["drain", "stop"])
def test_a_verb_that_takes_it_out_loses_nothing_and_restart_brings_it_back(
    verb: str, deployed: Played, node: Host, play: Play, url: str
) -> None:
    before = release(node)
    with ledger(url) as book:
        taken = play(f"playbooks/{verb}.yml")
        left = container_start(node)
        told = status(play)
        again = play(f"playbooks/{verb}.yml")
        back = play("playbooks/restart.yml")
    assert left == ""
    assert taken.rc == 0, taken.failures
    assert (told["running"], told["service"]["active_state"]) == ("", "inactive")
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert back.rc == 0, back.failures
    assert release(node) == before
    assert book.lost == []
    assert book.complete > 0
    assert chat(url, "OK", max_tokens=1).status_code == 200
