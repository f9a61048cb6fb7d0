#!/usr/bin/python3
"""A lab node: disk, network, and the systemd-nspawn that boots it.

    lab_node.py start   NODE_DIR     boot it, from its own disk
    lab_node.py stop    NODE_DIR     shut it down in order (--cut: as a power cut)
    lab_node.py remove  NODE_DIR     stop it and delete its disk
    lab_node.py cut     NODE_DIR     pull its network cable
    lab_node.py join    NODE_DIR     put the cable back
    lab_node.py run     NODE_DIR     supervise in the foreground (start does this in the background)

NODE_DIR holds node.json (see Node) and everything else of the node. Every verb may be repeated, and
may follow one that was killed at any point. The last line printed is "changed" or "unchanged".
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# systemd-nspawn --keep-unit ends with this when the node asked for a reboot.
REBOOT = 133
# docker stop inside may take its time before the node's systemd is done.
SHUTDOWN_SECONDS = 90.0


class LabError(Exception):
    """Something the user must know; the message says what."""


@dataclasses.dataclass(frozen=True)
class Node:
    """What node.json holds."""

    name: str
    address: str  # with prefix length
    bridge: str
    base: str  # lower layer of the disk, shared by all nodes
    host_key: str
    authorized_key: str  # the public half
    binds: dict[str, str]  # path in the node: folder of this machine

    @property
    def namespace(self) -> str:
        return f"glmlab-{self.name}"

    @property
    def link(self) -> str:
        return f"glm-{self.name}"


@dataclasses.dataclass(frozen=True)
class Paths:
    """The node's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "node.json"

    @property
    def booted_config(self) -> Path:
        return self.folder / "booted.json"

    @property
    def base_id(self) -> Path:
        return self.folder / "base-id"

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    @property
    def supervisor_pid(self) -> Path:
        return self.folder / "supervisor.pid"

    @property
    def nspawn_pid(self) -> Path:
        return self.folder / "nspawn.pid"


def call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode != 0:
        raise LabError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
    return result


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def locked(paths: Paths) -> Iterator[None]:
    """One verb at a time for a node. The lock goes with the process that holds it."""
    with (paths.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Processes ---------------------------------------------------------------------------------------


def recorded(pid_file: Path, *words: str) -> int | None:
    """The PID in the file, if that process still is what was recorded: a PID may have been reused."""
    try:
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if all(any(word in part for part in command) for word in words) else None


def supervisor(paths: Paths) -> int | None:
    return recorded(paths.supervisor_pid, "lab_node.py", "run", str(paths.folder))


def nspawn(paths: Paths) -> int | None:
    return recorded(paths.nspawn_pid, "systemd-nspawn", str(paths.root))


def members(node: Node) -> list[int]:
    """Processes in the node's network namespace: all of the node's, and nobody else's."""
    result = call("ip", "netns", "pids", node.namespace, check=False)
    return [int(pid) for pid in result.stdout.split()] if result.returncode == 0 else []


def kill(pids: list[int]) -> int:
    """How many there were to kill."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


# Network -----------------------------------------------------------------------------------------


def link_state(node: Node) -> str:
    """'up', 'down', or 'absent' for anything that is not a cable from the bridge to the node."""
    result = call("ip", "-json", "link", "show", "dev", node.link, check=False)
    if result.returncode != 0:
        return "absent"
    link = json.loads(result.stdout)[0]
    if link.get("master") != node.bridge:
        return "absent"
    return "up" if "UP" in link["flags"] else "down"


def lay_network(node: Node) -> None:
    remove_network(node)
    call("ip", "netns", "add", node.namespace)
    inside = ["ip", "-netns", node.namespace]
    call("ip", "link", "add", node.link, "type", "veth",
         "peer", "name", "host0", "netns", node.namespace)  # fmt: skip
    call("ip", "link", "set", node.link, "master", node.bridge, "up")
    call(*inside, "address", "add", node.address, "dev", "host0")
    call(*inside, "link", "set", "lo", "up")
    call(*inside, "link", "set", "host0", "up")


def remove_network(node: Node) -> bool:
    link = call("ip", "link", "delete", node.link, check=False).returncode == 0
    # Also removes the empty file that a restart of the machine leaves of a namespace.
    namespace = call("ip", "netns", "delete", node.namespace, check=False).returncode == 0
    return link or namespace


# Disk --------------------------------------------------------------------------------------------


def mounts_below(folder: Path) -> list[Path]:
    """Mount points at or below the folder, innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].replace("\\040", " ")) for line in lines]
    return sorted((p for p in points if p == folder or folder in p.parents), reverse=True)


def base_identity(node: Node) -> str:
    """Which build of which base: an overlay must not change its lower layer."""
    base = Path(node.base).resolve()
    return f"{base.name} {(base / 'etc/glm-ocr-lab-base').read_text()}"


def has_base(node: Node, paths: Paths) -> bool:
    return paths.base_id.exists() and paths.base_id.read_text() == base_identity(node)


def mount_root(node: Node, paths: Paths) -> None:
    unmount(paths.folder)
    if paths.disk.exists() and not has_base(node, paths):
        print("The base has changed: the node gets a new disk")
        delete_disk(paths)
    upper, work = paths.disk / "upper", paths.disk / "work"
    for folder in (upper, work, paths.root):
        folder.mkdir(parents=True, exist_ok=True)
    paths.base_id.write_text(base_identity(node))
    call("mount", "-t", "overlay", "overlay",
         "-o", f"lowerdir={Path(node.base).resolve()},upperdir={upper},workdir={work}", str(paths.root))  # fmt: skip
    provision(node, paths)


def unmount(folder: Path) -> bool:
    def unmounted(point: Path) -> Callable[[], bool]:
        return lambda: call("umount", str(point), check=False).returncode == 0

    points = mounts_below(folder)
    for point in points:
        if not wait_until(unmounted(point), 10):
            raise LabError(f"{point} cannot be unmounted: something still uses it")
    return bool(points)


def delete_disk(paths: Paths) -> None:
    still = mounts_below(paths.folder)
    if still:
        raise LabError(f"not deleting {paths.folder}: {still[0]} is mounted")
    paths.base_id.unlink(missing_ok=True)
    for folder in (paths.disk, paths.root, paths.folder / "volumes"):
        if folder.exists():
            shutil.rmtree(folder)


def provision(node: Node, paths: Paths) -> None:
    """What a node must have before its first boot: a name, SSH host key, and who may come in."""
    root = paths.root

    def write(path: str, content: str, mode: int) -> None:
        target = root / path
        if not target.exists() or target.read_text() != content:
            target.write_text(content)
        target.chmod(mode)

    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    write("etc/hostname", node.name + "\n", 0o644)
    write("root/.ssh/authorized_keys", Path(node.authorized_key).read_text(), 0o600)
    write("etc/ssh/ssh_host_ed25519_key", Path(node.host_key).read_text(), 0o600)
    write("etc/ssh/ssh_host_ed25519_key.pub", Path(node.host_key + ".pub").read_text(), 0o644)


# Verbs -------------------------------------------------------------------------------------------


def nspawn_command(node: Node, paths: Paths) -> list[str]:
    return [
        "systemd-nspawn",
        "--quiet",
        f"--directory={paths.root}",
        "--boot",
        f"--machine={node.namespace}",
        f"--hostname={node.name}",
        # This machine's own init may not be systemd.
        "--register=no",
        "--keep-unit",
        "--settings=no",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        f"--network-namespace-path=/run/netns/{node.namespace}",
        # Docker inside: mounts, namespaces, device nodes, the session keyring, device filters.
        "--capability=all",
        "--system-call-filter=@keyring bpf",
        *(f"--bind={source}:{target}" for target, source in sorted(node.binds.items())),
    ]


def run(node: Node, paths: Paths) -> int:
    """Boot the node until it is powered off; boot it again when it reboots."""
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop_child(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.send_signal(signal.SIGTERM)  # nspawn hands it on as an orderly shutdown

    signal.signal(signal.SIGTERM, stop_child)
    paths.supervisor_pid.write_text(f"{os.getpid()}\n")
    environment = {
        **os.environ,
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        # Docker's bridge needs /proc/sys/net; the namespace is the node's own.
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
    }
    while not stopping:
        child = subprocess.Popen(nspawn_command(node, paths), env=environment)
        paths.nspawn_pid.write_text(f"{child.pid}\n")
        if child.wait() != REBOOT:
            break
        print(f"{node.name} reboots", flush=True)
    paths.nspawn_pid.unlink(missing_ok=True)
    paths.supervisor_pid.unlink(missing_ok=True)
    return 0


def start(node: Node, paths: Paths) -> bool:
    config = paths.config.read_text()
    as_booted = paths.booted_config.exists() and paths.booted_config.read_text() == config
    runs = supervisor(paths) is not None and nspawn(paths) is not None
    if runs and as_booted and has_base(node, paths) and link_state(node) != "absent":
        return join(node, paths)

    stop(node, paths)
    mount_root(node, paths)
    for folder in node.binds.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    lay_network(node)
    paths.booted_config.write_text(config)
    with paths.console.open("ab") as console:
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "run", str(paths.folder)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
            cwd="/",
        )
    if not wait_until(lambda: bool(members(node)) or process.poll() is not None, 20):
        raise LabError(f"{node.name} does not boot; see {paths.console}")
    if process.poll() is not None:
        tail = paths.console.read_text(errors="replace").splitlines()[-10:]
        raise LabError("\n".join([f"{node.name} does not boot; {paths.console} ends with:", *tail]))
    return True


def stop(node: Node, paths: Paths, cut_power: bool = False) -> bool:
    changed = False
    pid = supervisor(paths)
    if pid is not None and not cut_power:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: supervisor(paths) is None, SHUTDOWN_SECONDS)
        changed = True

    def left() -> list[int]:
        found = [supervisor(paths), nspawn(paths), *members(node)]
        return [process for process in found if process is not None]

    # The supervisor is first in the list, so nothing is booted again.
    if left():
        changed = True
        if not wait_until(lambda: not kill(left()), 20):
            raise LabError(f"{node.name}: processes {left()} do not end")
    for pid_file in (paths.supervisor_pid, paths.nspawn_pid):
        pid_file.unlink(missing_ok=True)
    changed = remove_network(node) or changed
    return unmount(paths.folder) or changed


def remove(node: Node, paths: Paths) -> bool:
    stop(node, paths)
    delete_disk(paths)
    shutil.rmtree(paths.folder)
    return True


def cut(node: Node, _paths: Paths) -> bool:
    return set_link(node, "down")


def join(node: Node, _paths: Paths) -> bool:
    return set_link(node, "up")


def set_link(node: Node, wanted: str) -> bool:
    state = link_state(node)
    if state == "absent":
        raise LabError(f"{node.name} has no cable: it is not started")
    if state == wanted:
        return False
    call("ip", "link", "set", node.link, wanted)
    return True


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", choices=["start", "stop", "remove", "cut", "join", "run"])
    parser.add_argument("folder", type=Path, metavar="NODE_DIR")
    parser.add_argument("--cut", action="store_true", help="stop: end it without any shutdown")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    paths = Paths(args.folder.resolve())
    if not paths.config.exists():
        print(f"{paths.folder} is no node: it has no node.json", file=sys.stderr)
        return 2
    node = Node(**json.loads(paths.config.read_text()))
    if args.verb == "run":
        return run(node, paths)
    verbs: dict[str, Callable[[], bool]] = {
        "start": lambda: start(node, paths),
        "stop": lambda: stop(node, paths, cut_power=args.cut),
        "remove": lambda: remove(node, paths),
        "cut": lambda: cut(node, paths),
        "join": lambda: join(node, paths),
    }
    try:
        with locked(paths):
            changed = verbs[args.verb]()
    except (LabError, OSError) as error:
        print(f"{node.name}: {error}", file=sys.stderr)
        return 1
    print("changed" if changed else "unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
