"""The lab itself: comes up after being killed half-way, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lab import LAB_STATE, THREE_NODES, Controller, Play, lab_node, node_named

pytestmark = pytest.mark.long


def traces(name: str) -> list[str]:
    """Whatever of a node is on this machine: link, network namespace, mounts, processes, folder."""
    links = json.loads(subprocess.check_output(["ip", "-json", "link"]))
    found = [f"link {link['ifname']}" for link in links if link["ifname"] == f"glm-{name}"]
    namespaces = json.loads(subprocess.check_output(["ip", "-json", "netns"]) or "[]")
    found += [f"namespace {space['name']}" for space in namespaces if space["name"] == f"glmlab-{name}"]
    folder = LAB_STATE / "nodes" / name
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line.split()[4]}" for line in mounts if line.split()[4].startswith(f"{folder}/")]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"glmlab-{name}\0" in command or f"{folder}\0" in command:
            found.append(f"process {process.parent.name}")
    return found + ([f"folder {folder}"] if folder.exists() else [])


def test_a_node_comes_up_after_being_killed_halfway_and_leaves_nothing(play: Play) -> None:
    for point in ("lab_node : Start", "lab_nano_model : "):
        controller = Controller(playbook="playbooks/lab.yml", inventories=THREE_NODES, limit="all")
        controller.reaches(point)
        controller.kill()
    up = play("playbooks/lab.yml", inventories=THREE_NODES, limit="all")
    assert up.rc == 0, up.failures
    assert node_named("node2").check_output("systemctl is-system-running") == "running"
    assert traces("node2")
    for name in ("node2", "node3"):
        lab_node("remove", name)
        assert traces(name) == []


@pytest.mark.parametrize("name", ["node1", "registry"])
def test_what_is_up_leaves_traces(name: str) -> None:
    """The other side of the test above: its eyes see what is there."""
    assert {trace.split()[0] for trace in traces(name)} == {"link", "namespace", "mount", "process", "folder"}
