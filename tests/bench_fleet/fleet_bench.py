"""What a deployment that changes nothing costs, by the number of hosts: `make bench-fleet` writes docs/bench-fleet.md.

Needs the lab, and adds as many nodes to it as the largest number of hosts; they are removed at the end, whatever
happens.  The page is written anew after each round.
"""

from __future__ import annotations

import argparse
import base64
import configparser
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import yaml

from fleet_page import ARMS, BY_HAND, DEPLOY, Run, Setting, executions, page, unwanted
from lab import ENGINE, INVENTORY, LAB_STATE, NODE, lab_node, node_named
from rendering import PROJECT, ROLES

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 8, 16)
#: Each node has one instance, the first, whose port the inventory computes from that.
PORT = 8000
#: Of the lab's network; bench01 is the first one after it.
NETWORK, BEFORE_FIRST = "198.18.91", 100
#: Hosts that are booted and deployed at a time, and engines that are started at a time: two cores do not carry more.
BATCH, STARTS = 4, 2
#: What a node needs: its copy of the image, unpacked, with what is fetched and asked for on the way, and a dockerd.
NODE_DISK_GB, NODE_MEMORY_MB = 3.3, 350
#: What a node's systemd, dbus, agetty and containerd watch files with: 9 of them, and room. A kernel allows root 128.
NODE_WATCHES = 16
WATCHES = Path("/proc/sys/fs/inotify/max_user_instances")
#: In which a measured run must end.
RUN_SECONDS = 1800
IMAGE = "registry.lab:5000/glm-ocr-lab/forwarding"
DOCKERFILE = """FROM {image}
RUN mv /usr/local/bin/vllm /usr/local/bin/vllm.engine
COPY vllm /usr/local/bin/vllm
ENV FORWARD_TO={engine}
"""
#: In the place of ssh, scp and sftp: notes the host, and becomes the program.
COUNTING = """#!/bin/sh
for word; do
  word=${{word#[}} && word=${{word%]}}
  case $word in {network}.*) echo "$word" >> "$SSH_EXECUTIONS" && break ;; esac
done
exec {program} "$@"
"""
#: What a deployment installs, as the operator writes its checksums down.
INSTALLED = "/etc/glm-ocr /etc/systemd/system/glm-ocr.service /usr/local/lib/glm-ocr"


class BenchError(Exception):
    """Something the user must know; the message says what."""


def progress(message: str) -> None:
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {message}", flush=True)


def tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])


def names_of(count: int) -> list[str]:
    return [f"bench{number:02}" for number in range(1, count + 1)]


def address_of(name: str) -> str:
    return f"{NETWORK}.{BEFORE_FIRST + int(name.removeprefix('bench'))}"


def missing(nodes: int, disk_gb: float, memory_mb: float) -> list[str]:
    """What the machine lacks for so many nodes."""
    needed = {"GB of disk": (nodes * NODE_DISK_GB, disk_gb), "MB of memory": (nodes * NODE_MEMORY_MB, memory_mb)}
    return [
        f"expected {wanted:.0f} {what} for {nodes} nodes, found {found:.0f}. Fix: free some, or `--nodes` with fewer."
        for what, (wanted, found) in needed.items()
        if found < wanted
    ]


def room() -> tuple[float, float]:
    """GB of disk and MB of memory that are there."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return shutil.disk_usage(LAB_STATE).free / 1e9, int(meminfo["MemAvailable"].split()[0]) / 1024


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a command in a session of its own, which ends with this process."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(RUN_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return 124, f"{log.read_text()}\nno end within {RUN_SECONDS} s"
            raise
    return status, log.read_text()


class Bench:
    """The nodes, and the folder with all that is made for them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names
        self.image = ""
        self.runs = 0

    # --- the nodes ---

    def write_inventory(self) -> None:
        choices = {"glm_ocr_image": self.image, "glm_ocr_reports_dir": str(self.folder / "reports")}
        # The hosts' own: files of group_vars win over a group's variables here.
        hosts = {name: {"ansible_host": address_of(name), **choices} for name in self.names}
        (self.folder / "bench.yml").write_text(yaml.safe_dump({"lab": {"children": {"lab_nodes": {"hosts": hosts}}}}))

    def ssh_config(self, folder: Path) -> Path:
        """As an operator has it in ~/.ssh/config: one connection a host, kept open."""
        keys, path = LAB_STATE / "ssh", folder / "ssh_config"
        lines = ["User root", f"IdentityFile {keys}/id_ed25519", "IdentitiesOnly yes"]
        lines += [f"UserKnownHostsFile {keys}/known_hosts", "LogLevel ERROR"]
        lines += ["ControlMaster auto", f"ControlPath {folder}/%C", "ControlPersist 60s"]
        path.write_text("\n".join([*lines, ""]))
        return path

    def play(self, playbook: str, limit: str, *more: str) -> list[str]:
        inventories = ["-i", str(INVENTORY), "-i", str(self.folder / "bench.yml")]
        return ["ansible-playbook", *inventories, playbook, "-l", limit, *more]

    def prepare(self, command: Sequence[str | Path]) -> str:
        """What is not measured, and must succeed."""
        status, output = run(command, self.folder / "prepare.log")
        if status != 0:
            raise BenchError(f"`{' '.join(map(str, command))}` ended with {status}:\n{tail(output)}")
        return output

    def ask(self, name: str, command: str) -> str:
        return self.prepare(["ssh", "-F", self.ssh_config(self.folder), address_of(name), command])

    def bring_up(self) -> None:
        for first in range(0, len(self.names), BATCH):
            batch = ":".join(self.names[first : first + BATCH])
            progress(f"booting {batch}")
            self.prepare(self.play("playbooks/lab.yml", f"lab_machine:{batch}"))
            progress(f"deploying {batch}")
            starts = json.dumps({"glm_ocr_rollout_batches": [STARTS]})
            self.prepare(self.play("deploy.yml", batch, "-e", starts))
            progress("{:.0f} GB of disk and {:.0f} MB of memory left".format(*room()))

    def write_down(self) -> None:
        """What the operator who checks by hand knows of the deployment, from the first node."""
        first, expected = self.names[0], self.folder / "expected"
        expected.mkdir()
        container = (
            "docker container inspect --format '{{.Image}} {{index .Config.Labels \"glm-ocr.release\"}}' glm-ocr"
        )
        image_id, release = self.ask(first, container).split()
        architecture = self.ask(first, f"docker image inspect --format '{{{{.Architecture}}}}' {image_id}").strip()
        (expected / "values").write_text(values(self.image, image_id, architecture, release))
        (expected / "files.sha256").write_text(self.ask(first, f"find {INSTALLED} -type f -exec sha256sum {{}} +"))
        shutil.copy(PROJECT / "inventory/manifests/GLM-OCR-nano.sha256", expected / "weights.sha256")

    # --- the runs ---

    def write_counting(self) -> None:
        folder = self.folder / "bin"
        folder.mkdir()
        for name in ("ssh", "scp", "sftp"):
            if program := shutil.which(name):
                (folder / name).write_text(COUNTING.format(network=NETWORK, program=program))
                (folder / name).chmod(0o755)

    def measure(self, arm: str, count: int) -> Run:
        """Raises ``BenchError`` for a run that did not find the hosts as they should be."""
        names = self.names[:count]
        addresses = [address_of(name) for name in names]
        self.runs += 1
        folder = self.folder / f"r{self.runs}"
        (folder / "results").mkdir(parents=True)
        commands: dict[str, Sequence[str | Path]] = {
            # Reports of its own: those of before would be in the page that a run makes of the fleet.
            DEPLOY: self.play("deploy.yml", ":".join(names), "-e", f"glm_ocr_reports_dir={folder / 'reports'}"),
            BY_HAND: [HERE / "by_hand.sh", self.folder / "expected", folder / "results", *addresses],
        }
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SSH_EXECUTIONS": str(folder / "executions"),
            # A run begins without a connection.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder),
            "SSH_CONFIG": str(self.ssh_config(folder)),
            "JOBS": str(forks()),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
        }
        (folder / "executions").touch()
        cost = folder / "cost.json"
        status, output = run(
            [sys.executable, HERE / "command_cost.py", cost, *commands[arm]], folder / "log", environment
        )
        problems = [] if arm == BY_HAND else unwanted(output, names)
        if status != 0 or problems:
            found = ", ".join([*([f"exit status {status}"] if status else []), *problems])
            raise BenchError(f"{arm} over {count}: {found}\n{tail(output)}")
        counted = executions((folder / "executions").read_text(), addresses)
        return Run(arm, count, **measured(cost), executions=counted)


def measured(cost: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(cost.read_text())
    return found


def forks() -> int:
    settings = configparser.ConfigParser()
    settings.read(PROJECT / "ansible.cfg")
    return settings.getint("defaults", "forks")


def values(image: str, image_id: str, architecture: str, release: str) -> str:
    """The variables of by_hand.sh, as the inventory has them."""
    choices = yaml.safe_load((PROJECT / "inventory/group_vars/ascend910/glm_ocr.yml").read_text())
    smoke = yaml.safe_load((ROLES / "ocr_smoke/defaults/main.yml").read_text()) | ENGINE
    devices, paths = choices["glm_ocr_devices"], choices["glm_ocr_driver_paths"]
    model, length = choices["glm_ocr_served_model_name"], choices["glm_ocr_max_model_len"]
    options = [f"--model={model}", f"--max-model-len={length}", f"--lines={smoke['ocr_smoke_image_lines']}"]
    options += [f"--scale={smoke['ocr_smoke_image_scale']}", f"--max-cer={smoke['ocr_smoke_max_cer']}"]
    options += [f"--timeout={smoke['ocr_smoke_request_timeout_seconds']}"]
    known: dict[str, str | list[str]] = {
        "image": image,
        "image_id": image_id,
        "architecture": architecture,
        "release": release,
        "service": "glm-ocr",
        "unit_file": "/etc/systemd/system/glm-ocr.service",
        "environment_file": "/etc/glm-ocr/glm-ocr.env",
        "scripts_dir": "/usr/local/lib/glm-ocr/scripts",
        "state_dir": "/var/lib/glm-ocr",
        "weights_dir": choices["glm_ocr_weights_path"],
        "memory": "/var/tmp/by-hand.seen",
        "lock": "/run/lock/by-hand",
        "python": "/usr/bin/python3",
        "systemd_dir": "/run/systemd/system",
        "devices": devices,
        "driver_paths": paths,
        "version_info": next(path for path in paths if path.endswith("version.info")),
        "npus_wanted": str(sum(path.removeprefix("/dev/davinci").isdigit() for path in devices)),
        "port": str(PORT),
        "url": f"http://127.0.0.1:{PORT}",
        "model": model,
        "smoke_options": options,
    }
    return "".join(
        f"{name}=({shlex.join(value)})\n" if isinstance(value, list) else f"{name}={shlex.quote(value)}\n"
        for name, value in known.items()
    )


def build_image() -> str:
    """The forwarding image, from the one that serves on the lab's node, in the lab's registry.  Returns its name."""
    node = node_named(NODE)
    engine = f"{node.backend.hostname}:8000"
    script = (HERE / "forwarding_vllm.py").read_text()
    base = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    dockerfile = DOCKERFILE.format(image=base, engine=engine)
    image = f"{IMAGE}:{hashlib.sha256((dockerfile + script).encode()).hexdigest()[:12]}"
    files = " && ".join(
        f"echo {base64.b64encode(text.encode()).decode()} | base64 --decode > {name}"
        for name, text in {"vllm": script, "Dockerfile": dockerfile}.items()
    )
    node.check_output(
        f"mkdir -p /tmp/forwarding && cd /tmp/forwarding && {files} && chmod +x vllm"
        f" && docker build --quiet --network none --tag {image} . && docker push --quiet {image} && docker rmi {image}"
        " && rm -r /tmp/forwarding"
    )
    return image


def remove_nodes() -> None:
    """Those of this benchmark, also what an earlier run left."""
    there = sorted(path.parent.name for path in (LAB_STATE / "nodes").glob("bench[0-9][0-9]/node.json"))
    if there:
        progress(f"removing {', '.join(there)}")
    with ThreadPoolExecutor(BATCH) as pool:
        removals = {name: pool.submit(lab_node, "remove", name) for name in there}
    for name, removal in removals.items():
        if error := removal.exception():
            progress(f"{name} was not removed: {error}. Fix: `make clean` takes the whole lab down.")


@contextmanager
def watches(count: int) -> Iterator[None]:
    """As many inotify instances as so many nodes more need; as before afterwards."""
    before = WATCHES.read_text()
    WATCHES.write_text(str(int(before) + count * NODE_WATCHES))
    try:
        yield
    finally:
        WATCHES.write_text(before)


@contextmanager
def nodes(folder: Path, count: int) -> Iterator[Bench]:
    """So many nodes that serve, and are gone afterwards."""
    remove_nodes()
    if problems := missing(count, *room()):
        raise BenchError("\n".join(problems))
    bench = Bench(folder, names_of(count))
    try:
        progress(f"deploying {NODE}, whose engine answers for all")
        bench.prepare(["ansible-playbook", "-i", INVENTORY, "deploy.yml", "-l", NODE])
        progress("building the forwarding image")
        bench.image = build_image()
        bench.write_inventory()
        bench.bring_up()
        bench.write_down()
        bench.write_counting()
        yield bench
    finally:
        remove_nodes()


def compare(bench: Bench, setting: Setting, output: Path) -> bool:
    """Round after round, each of which is written to the page.  Returns whether every run gave a result."""
    for arm in ARMS:
        progress(f"warming up: {arm} over {len(bench.names)}")
        bench.measure(arm, len(bench.names))
    runs: list[Run] = []
    failures: list[str] = []
    for number in range(setting.rounds):
        for count in setting.counts:
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                try:
                    run = bench.measure(arm, count)
                except BenchError as error:
                    progress(str(error))
                    failures.append(str(error).splitlines()[0])
                    continue
                runs.append(run)
                progress(
                    f"round {number + 1} of {setting.rounds}, {arm} over {count}: {run.wall:.1f} s, CPU {run.cpu:.1f} s"
                )
        now = replace(setting, load=(setting.load[0], os.getloadavg()[0]), failures=tuple(failures))
        output.write_text(page(now, runs))
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", default=",".join(map(str, COUNTS)), help="numbers of hosts, such as 1,2")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--output", type=Path, default=PROJECT / "docs/bench-fleet.md", help="Markdown to write")
    arguments = parser.parse_args()
    counts = tuple(sorted({int(word) for word in arguments.nodes.split(",")}))
    if not 1 <= counts[0] <= counts[-1] <= 99:
        parser.error(f"expected 1 to 99 hosts, found {arguments.nodes}")
    signal.signal(signal.SIGTERM, ended)
    core = version("ansible-core")
    machine = f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, ansible-core {core}"
    when = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    setting = Setting(when, machine, (os.getloadavg()[0], 0.0), forks(), arguments.rounds, counts)
    # A short name: the sockets of connections are in it.
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            with watches(counts[-1]), nodes(Path(folder), counts[-1]) as bench:
                complete = compare(bench, setting, arguments.output)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
    print(arguments.output)
    return 0 if complete else 1


def ended(number: int, _: FrameType | None) -> None:
    """What is in a finally happens."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
