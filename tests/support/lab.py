"""What the lab tests share: what a play did, requests from outside the node, the container's start time."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import testinfra
import yaml
from testinfra.host import Host

from monitored import PROGRAMS, requirement
from rendering import PROJECT, ROLES

NODE = "node1"
INVENTORY = PROJECT / "inventory" / "lab"
THREE_NODES = (INVENTORY, PROJECT / "tests" / "lab" / "three_nodes.yml")
GATEWAYS = PROJECT / "tests" / "lab" / "gateway.yml"
FLEET = (*THREE_NODES, GATEWAYS)
LAB_HOST = yaml.safe_load((ROLES / "lab_host" / "defaults" / "main.yml").read_text())
LAB_STATE, LAB_CACHE = Path(LAB_HOST["lab_host_state_dir"]), Path(LAB_HOST["lab_host_cache_dir"])
ENGINE = yaml.safe_load((PROJECT / "inventory" / "group_vars" / "lab_nodes" / "engine.yml").read_text())
WEIGHTS = "/opt/atomgit/weights/GLM-OCR-bf16"
#: Hash over what a deployment installs on the host and the releases it keeps.
FILES = (
    "find /etc/glm-ocr /etc/systemd/system /usr/local/lib/glm-ocr /var/lib/glm-ocr/releases -type f"
    " -exec sha256sum {} + 2>/dev/null | sort | sha256sum"
)
#: The same, and the images the host has.
STATE = f"{FILES}; docker images --no-trunc --quiet | sort"


#: How the processes in the container are named.
API_PROCESS, ENGINE_PROCESS = "/usr/bin/python3 /usr/local/bin/vllm serve", "VLLM::EngineCore"
#: Seconds within which a service whose processes were killed answers again; the lab's engine starts on 2 CPU cores.
BACK_SECONDS = 240
#: Seconds within which the watchdog, as its defaults have it, finds a hang.
HANG_SECONDS = 130
#: Debian's packages, in the order in which they can go.
PROMETHEUS = ("prometheus", "prometheus-blackbox-exporter", "prometheus-node-exporter")


@dataclass(frozen=True)
class Played:
    """What a play did."""

    rc: int
    stdout: str
    changed: int
    failures: str
    seconds: float


Play = Callable[..., Played]


def node_named(name: str) -> Host:
    """A node of the lab, over SSH."""
    groups = [yaml.safe_load(path.read_text())["lab"]["children"] for path in FLEET]
    hosts = {name: host for group in groups for part in group.values() for name, host in part["hosts"].items()}
    keys = LAB_STATE / "ssh"
    return testinfra.get_host(
        f"ssh://root@{hosts[name]['ansible_host']}",
        ssh_identity_file=str(keys / "id_ed25519"),
        ssh_extra_args=f"-o UserKnownHostsFile={keys / 'known_hosts'} -o IdentitiesOnly=yes",
    )


def lab_node(verb: str, name: str, *options: str) -> None:
    """What lab_node.py does from outside the node: remove it, cut its cable, join it again, cut its power."""
    folder = LAB_STATE / "nodes" / name
    subprocess.run([sys.executable, ROLES / "lab_node" / "files" / "lab_node.py", verb, folder, *options], check=True)


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Returns once it holds; for what nothing announces, such as what a ledger has counted."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def prometheus(node: Host) -> Iterator[None]:
    """Prometheus and its exporters in a node, from the machine's packages: a node reaches no mirror.

    What Prometheus' own page needs is left out; whatever a play made of them goes too.
    """
    requirement()
    options = ("-i", LAB_STATE / "ssh" / "id_ed25519", "-o", f"UserKnownHostsFile={LAB_STATE}/ssh/known_hosts")
    packages = PROGRAMS.parents[1].glob("*.deb")
    subprocess.run(["scp", "-q", *options, *packages, f"root@{node.backend.hostname}:/tmp"], check=True)
    node.check_output("dpkg --force-depends --install /tmp/prometheus*.deb")
    try:
        yield
    finally:
        node.check_output(f"dpkg --purge {' '.join(PROMETHEUS)} && rm --force /tmp/prometheus*.deb")
        node.check_output(
            "rm --recursive --force /etc/glm-ocr-monitoring /etc/systemd/system/prometheus*.service.d"
            " && systemctl daemon-reload"
        )


def extra_flags(**flags: Any) -> dict[str, Any]:
    """The lab's `vllm_service_extra_flags` and more, for a play that overrides them; max_num_seqs is --max-num-seqs."""
    return dict(ENGINE["vllm_service_extra_flags"]) | {name.replace("_", "-"): value for name, value in flags.items()}


def container_start(node: Host, engine: str = "docker") -> str:
    """When the engine's container started; empty when there is none."""
    return str(node.run(f"{engine} container inspect --format '{{{{.State.StartedAt}}}}' glm-ocr").stdout.strip())


def engine_pid(node: Host, pattern: str) -> int:
    """The pid, in the node, of the container's process whose command line begins so."""
    top = node.check_output("docker top glm-ocr -eo pid,args").splitlines()[1:]
    (pid,) = [int(line.split(None, 1)[0]) for line in top if line.split(None, 1)[1].startswith(pattern)]
    return pid


def booted(node: Host) -> str:
    """Waits until the node has booted, with all its services; returns what tells this boot from another."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            node.run("systemctl is-system-running --wait")
            return str(node.check_output("systemctl show --property=UserspaceTimestampMonotonic"))
        except RuntimeError:  # testinfra's word for a connection that failed
            continue
    pytest.fail("the node does not answer over SSH")


def release(node: Host) -> str:
    """The id of the release whose container runs."""
    label = '{{index .Config.Labels "glm-ocr.release"}}'
    return str(node.check_output(f"docker container inspect --format '{label}' glm-ocr"))


def container_memory(node: Host) -> int:
    """Bytes of anonymous memory that the container's processes hold.

    Not its cgroup's: a node of the lab may have no memory controller.
    """
    pids = node.check_output("docker top glm-ocr -eo pid").split()[1:]
    told = anonymous_memory(node, pids)
    assert told, pids
    return sum(told.values())


def anonymous_memory(node: Host, pids: Sequence[str]) -> dict[str, int]:
    """Bytes of anonymous memory (RssAnon in proc(5)) of each of the processes, in the node, that are there."""
    told = node.run(f"grep ^RssAnon: /dev/null {' '.join(f'/proc/{pid}/status' for pid in pids)}").stdout
    return {line.split("/")[2]: 1024 * int(line.split()[1]) for line in told.splitlines()}


def deploy_guarded(play: Play, **more: Any) -> str:
    """Front and guard before the service; returns the validation's key, whose rate is not limited."""
    key = secrets.token_hex(24)
    choices = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": key}, "vllm_service_guard": True}
    result = play("deploy.yml", **choices | more)
    assert result.rc == 0, result.failures
    return key


def chat(url: str, content: Any, max_tokens: int = 128, key: str = "", **more: Any) -> requests.Response:
    """``more`` are fields of the request, such as ``ignore_eos``."""
    body = {
        "model": "glm-ocr",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **more,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A node that is down answers nothing at all: whoever asks it must not wait for that as long as for a reply.
    return requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=(5, 60))


def latest_report(name: str = NODE) -> Path:
    return PROJECT / "reports" / name / "latest"


def preflight_report() -> Path:
    """The newest preflight's findings."""
    return max((PROJECT / "reports" / "preflight").iterdir()) / "preflight.json"


@contextmanager
def listener(node: Host, family: str, level: str, option: str, address: str) -> Iterator[str]:
    """A foreign process that listens on the service's port with one socket option set; yields its pid."""
    code = (
        # SO_REUSEADDR, as every server sets it: connections of the service before may still be in TIME_WAIT.
        f"import socket,signal; s=socket.socket(socket.{family}); s.setsockopt(socket.SOL_SOCKET,"
        f" socket.SO_REUSEADDR, 1); s.setsockopt(socket.{level}, socket.{option}, 1);"
        f" s.bind(('{address}', 8000)); s.listen(); print(1, flush=True); signal.pause()"
    )
    node.check_output("rm -f /run/listener.ready")
    pid = node.check_output(
        f'nohup python3 -c "{code}" > /run/listener.ready 2>&1 & echo $!; until [ -s /run/listener.ready ]; do :; done'
    )
    try:
        yield pid
    finally:
        node.check_output(f"kill {pid}")


class Controller:
    """A play in a process of its own, to be killed at a point."""

    def __init__(
        self,
        *arguments: str,
        playbook: str = "deploy.yml",
        inventories: Sequence[Path] = (INVENTORY,),
        limit: str = "ascend910",
    ) -> None:
        sources = [word for inventory in inventories for word in ("-i", str(inventory))]
        self.process = subprocess.Popen(
            ["ansible-playbook", *sources, playbook, "-l", limit, *arguments],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def reaches(self, point: str) -> None:
        """Returns when the play's output names the point."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if point in line:
                return
        pytest.fail(f"the play ended before {point}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def ends(self) -> str:
        """Waits for the play; returns the rest of its output."""
        return self.process.communicate()[0]
