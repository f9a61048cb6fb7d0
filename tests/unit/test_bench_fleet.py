"""The fleet's benchmark without the lab: page, cost of a command, forwarding engine, and the checks by hand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager

import fleet_bench
from fleet_page import BY_HAND, DEPLOY, Run, Setting, executions, page, recap, unwanted
from rendering import PROJECT, ROLES

BENCH = PROJECT / "tests" / "bench_fleet"
SETTING = Setting("2026-01-02 03:04 UTC", "2 cores", (0.5, 1.5), 20, 3, (1, 16))
RECAP = """
PLAY RECAP *********************************************************************
bench01                    : ok=93   changed=0    unreachable=0    failed=0    skipped=50   rescued=0    ignored=0
bench02                    : ok=90   changed={changed}    unreachable=0    failed=0    skipped=50   rescued=0
"""


def runs(deploy: float, by_hand: float) -> list[Run]:
    """Three rounds; the wall time at 16 hosts is given, that of one is 10 and 4 s."""
    walls = {(DEPLOY, 1): 10.0, (BY_HAND, 1): 4.0, (DEPLOY, 16): deploy, (BY_HAND, 16): by_hand}
    return [
        Run(arm, hosts, wall + number, wall / 2, 80.0, 90.0 * hosts, (17,) * hosts)
        for number in (-1, 0, 1)
        for (arm, hosts), wall in walls.items()
    ]


def test_the_page_says_what_was_measured_and_whether_it_is_what_is_wanted() -> None:
    text = page(SETTING, runs(30, 15))
    assert "| wall time at 16 hosts, in times of that at 1 | 3.0 | 3 | yes |" in text
    assert "| wall time a host at 16, in times of that by hand | 2.0 | 2 | yes |" in text
    assert "| 16 | deploy.yml | 3 | 30.0 (29.0 to 31.0) | 1.88 (1.81 to 1.94) | 15.0 (15.0 to 15.0) |" in text
    assert "| 80 (80 to 80) | 1440 (1440 to 1440) | 17.0 (17.0 to 17.0) |" in text
    assert "- One host more, from 1 to 16, deploy.yml: 1.33 s of wall time, 0.67 s of CPU." in text
    assert "- 16 hosts: 2.0 times the wall time by hand, 2.0 times the CPU." in text
    for words in ("2026-01-02 03:04 UTC, 2 cores", "of\n3 runs", "Both have 20 hosts at a time"):
        assert words in text
    assert "Fewer than" not in text
    assert "no result" not in text


def test_the_page_says_what_is_not_met_or_not_measured() -> None:
    text = page(SETTING, runs(30.1, 15))
    assert "| wall time at 16 hosts, in times of that at 1 | 3.0 | 3 | **no** |" in text
    assert "| wall time a host at 16, in times of that by hand | 2.0 | 2 | **no** |" in text
    few = page(replace(SETTING, counts=(1, 2), failures=("by hand over 2: exit status 1",)), runs(30, 15)[:2])
    assert few.count("| not measured |") == 3
    assert "**Fewer than 3 runs of some figures**" in few
    assert "- by hand over 2: exit status 1" in few
    assert "| 2 | by hand | 0 | - | - |" in few


def test_a_run_that_changed_something_or_missed_a_host_is_none() -> None:
    fine = RECAP.format(changed=0)
    assert recap(fine)["bench02"]["ok"] == 90
    assert unwanted(fine, ["bench01", "bench02"]) == []
    assert unwanted(RECAP.format(changed=2), ["bench01", "bench02"]) == ["bench02: changed=2"]
    assert unwanted(fine, ["bench01"]) == ["bench02: in the recap"]
    assert unwanted(fine, ["bench01", "bench02", "bench03"]) == ["bench03: in no recap"]
    assert unwanted("ERROR! no play", ["bench01"]) == ["bench01: in no recap"]
    unreachable = fine.replace("unreachable=0", "unreachable=1", 1)
    assert unwanted(unreachable, ["bench01", "bench02"]) == ["bench01: unreachable=1"]


def test_a_machine_without_room_is_told_what_it_lacks() -> None:
    assert fleet_bench.missing(16, 75, 20000) == []
    disk, memory = fleet_bench.missing(16, 40, 3000)
    assert disk.startswith("expected 53 GB of disk for 16 nodes, found 40.")
    assert memory.startswith("expected 5600 MB of memory for 16 nodes, found 3000.")


def test_the_nodes_names_and_addresses_are_the_labs() -> None:
    names = fleet_bench.names_of(16)
    assert (names[0], names[-1]) == ("bench01", "bench16")
    assert fleet_bench.address_of("bench16") == "198.18.91.116"
    assert max(len(f"glm-{name}") for name in names) <= 15


# --- what a command costs ---


def cost(tmp_path: Path, *command: str) -> tuple[int, dict[str, float]]:
    result = tmp_path / "cost.json"
    done = subprocess.run([sys.executable, BENCH / "command_cost.py", result, *command], check=False)
    return done.returncode, json.loads(result.read_text())


BURN = "import time; end = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def test_the_cpu_of_all_processes_counts_and_the_status_is_the_commands(tmp_path: Path) -> None:
    burn = shlex.join([sys.executable, "-c", BURN.format(seconds=0.3)])
    status, found = cost(tmp_path, "sh", "-c", f"{burn} & {burn}; wait; exit 7")
    assert status == 7
    assert 0.6 <= found["cpu"] < 3
    assert found["wall"] >= 0.3


def test_what_is_left_behind_is_counted_and_ended_and_costs_no_wall_time(tmp_path: Path) -> None:
    """As ssh leaves the connection that it keeps open: in a session of its own, without a parent."""
    code = (
        f"import os\n{BURN.format(seconds=0.3)}\nopen('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    )
    left = shlex.join([sys.executable, "-c", code])
    status, found = cost(tmp_path, "sh", "-c", f"setsid {left} & until [ -s {tmp_path}/pid ]; do :; done; exit 0")
    assert status == 0
    assert 0.3 <= found["cpu"]
    assert found["wall"] < 300
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_memory_is_that_of_the_largest_and_of_all(tmp_path: Path) -> None:
    hold = shlex.join([sys.executable, "-c", "import time; held = b'x' * 50_000_000; time.sleep(1.5)"])
    _, found = cost(tmp_path, "sh", "-c", f"{hold} & {hold}; wait")
    assert 50 < found["largest_mb"] < 90
    assert found["together_mb"] > 100


# --- SSH executions ---


def test_every_call_that_names_a_host_is_counted_once(tmp_path: Path) -> None:
    stand_in = tmp_path / "ssh"
    stand_in.write_text(fleet_bench.COUNTING.format(network=fleet_bench.NETWORK, program="/bin/echo"))
    environment = {"SSH_EXECUTIONS": str(tmp_path / "log")}
    calls = (
        ["-C", "-o", "ControlPersist=60s", "198.18.91.101", "/bin/sh -c 'ping 198.18.91.102'"],
        ["-b", "-", "[198.18.91.101]"],
        ["-F", "config", "198.18.91.102", "bash", "-s"],
        ["-o", "ControlPersist"],
    )
    for call in calls:
        said = subprocess.run(["sh", stand_in, *call], env=environment, text=True, capture_output=True, check=True)
        assert said.stdout.split() == " ".join(call).split()
        assert said.stderr == ""
    log = (tmp_path / "log").read_text()
    assert executions(log, ["198.18.91.101", "198.18.91.102", "198.18.91.103"]) == (2, 1, 0)


# --- the forwarding engine ---


@contextmanager
def forwarding(engine: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, str(BENCH / "forwarding_vllm.py"), "serve", "/weights", "--host", "127.0.0.1"]
    environment = {**os.environ, "FORWARD_TO": f"127.0.0.1:{engine}"}
    process = subprocess.Popen(
        [*command, "--seed", "1", "--port", "0", "--trust-remote-code"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        matched = re.match(r"port (\d+) is ", process.stdout.readline())
        assert matched
        try:
            yield int(matched[1]), process
        finally:
            process.kill()


def test_the_forwarding_engine_hands_on_both_ways_and_ends_at_sigterm() -> None:
    with socket.create_server(("127.0.0.1", 0)) as engine, forwarding(engine.getsockname()[1]) as (port, process):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            behind, _ = engine.accept()
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            with behind:
                assert behind.makefile("rb").read() == b"question"
                behind.sendall(b"x" * 1_000_000)
            assert len(client.makefile("rb").read()) == 1_000_000
        # With a connection open: it does not wait for that.
        with socket.create_connection(("127.0.0.1", port), timeout=30):
            engine.accept()[0].close()
            process.terminate()
            assert process.wait(30) == 0


def test_an_engine_that_is_gone_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = taken.getsockname()[1]
    with forwarding(gone) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        assert client.recv(1) == b""


# --- by hand ---

IMAGE_ID, RELEASE = "sha256:1", "0123456789abcdef"
STUBS = {
    # What a command says and how it ends is in a file of its name.
    "ssh": 'shift; exec env PATH="$HOST/bin:$PATH" "$@"',
    "docker": """case "$1 $2" in
        'info --format') cat "$HOST/docker" ;;
        'image inspect') cat "$HOST/image" ;;
        'container inspect') cat "$HOST/container" ;;
        run*) cp "$HOST/smoke.json" "$HOST/state/reports/by_hand/ocr_smoke.json"; exit "$(cat "$HOST/smoke_rc")" ;;
        esac""",
    "npu-smi": 'sh "$HOST/npu-smi" "$@"',
    "ss": 'echo "LISTEN 0 128 0.0.0.0:8000 0.0.0.0:* users:((\\"python3\\",pid=$(cat "$HOST/holder"),fd=6))"',
    "systemctl": """case $1 in
        --version) echo "systemd $(cat "$HOST/systemd") (252.1-1)" ;;
        show) cat "$HOST/unit_state" ;;
        esac""",
    "curl": 'cat "$HOST/generation"',
}


@dataclass(frozen=True)
class HandChecked:
    """A host of stand-ins: files of a folder, and commands that print what is in them."""

    folder: Path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def check(self) -> tuple[int, list[str]]:
        results = self.folder / "results"
        results.mkdir(exist_ok=True)
        environment = {**os.environ, "HOST": str(self.folder), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            [BENCH / "by_hand.sh", self.folder / "expected", results, "npu-01"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def host(tmp_path: Path) -> HandChecked:
    made = HandChecked(tmp_path)
    for name in ("bin", "expected", "state", "weights", "driver"):
        (tmp_path / name).mkdir()
    for name, text in STUBS.items():
        made.write(f"bin/{name}", f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    started = datetime.now(timezone.utc) + timedelta(seconds=5)
    for name, text in {
        "docker": "20.10.24",
        "image": f"{IMAGE_ID} amd64",
        "container": f"true {IMAGE_ID} {RELEASE} {os.getpid()} {started:%Y-%m-%dT%H:%M:%S}.123456789Z",
        "holder": str(os.getpid()),
        "systemd": "252",
        "unit_state": "UnitFileState=enabled\nActiveState=active\nNeedDaemonReload=no\n",
        "generation": '{"usage":{"completion_tokens":1,"prompt_tokens":7}}',
        "smoke.json": '{\n  "verdict": "PASS"\n}\n',
        "smoke_rc": "0",
        "npu-smi": (ROLES / "lab_node/files/npu/npu-smi").read_text(),
        "driver/version.info": "Version=25.2.0\n",
        "unit": "[Service]\n",
        "environment": "A=1\n",
        "weights/model": "numbers",
    }.items():
        made.write(name, text)
    (tmp_path / "environment").chmod(0o640)
    (tmp_path / "unit").chmod(0o644)
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("unit", "environment")}
    made.write("expected/files.sha256", "".join(f"{value}  {tmp_path / name}\n" for name, value in sums.items()))
    made.write("expected/weights.sha256", f"{hashlib.sha256(b'numbers').hexdigest()}  model\n")
    known = fleet_bench.values("registry/image:1", IMAGE_ID, "amd64", RELEASE)
    here = {
        "unit_file": "unit",
        "environment_file": "environment",
        "state_dir": "state",
        "weights_dir": "weights",
        "memory": "seen",
        "lock": "lock",
        "systemd_dir": "bin",
        "version_info": "driver/version.info",
    }
    moved = "".join(f"{name}={tmp_path / path}\n" for name, path in here.items())
    lists = f"devices=(/dev/null /dev/zero)\ndriver_paths=({tmp_path}/driver)\n"
    made.write("expected/values", f"{known}{moved}{lists}python={sys.executable}\n")
    return made


def test_by_hand_a_host_that_is_right_has_no_finding_and_its_result_is_fetched(host: HandChecked) -> None:
    assert host.check() == (0, [])
    assert json.loads((host.folder / "results/npu-01.json").read_text())["verdict"] == "PASS"
    assert host.check() == (0, [])


#: What is done to a host, and what is said of it.
FAULTS: dict[str, tuple[Callable[[HandChecked], None], str]] = {
    "docker": (lambda host: host.edit("bin/docker", 'cat "$HOST/docker"', "exit 1"), "docker does not answer"),
    "image": (lambda host: host.write("image", "sha256:2 amd64"), "is not sha256:1"),
    "architecture": (lambda host: host.write("image", f"{IMAGE_ID} arm64"), "is not sha256:1"),
    "container": (lambda host: host.edit("container", "true", "false"), "the container is not"),
    "release": (lambda host: host.edit("container", RELEASE, "another"), "the container is not"),
    "age": (lambda host: host.edit("container", f"{datetime.now(timezone.utc).year}-", "2001-"), "is older than"),
    "unit's state": (lambda host: host.edit("unit_state", "=active", "=failed"), "is not active"),
    "unit on disk": (lambda host: host.edit("unit_state", "=no", "=yes"), "is not active, enabled and as on disk"),
    "unit's text": (lambda host: host.write("unit", "[Unit]\n"), "files differ"),
    "environment gone": (lambda host: (host.folder / "environment").unlink(), "files differ"),
    "mode": (lambda host: (host.folder / "environment").chmod(0o644), "modes of unit and environment differ"),
    "systemd": (lambda host: host.write("systemd", "239"), "systemd is older than 243"),
    "device": (lambda host: host.edit("expected/values", "/dev/zero", "/dev/absent"), "no device /dev/absent"),
    "driver": (lambda host: (host.folder / "driver/version.info").unlink(), "another driver than 25.x"),
    "driver's version": (lambda host: host.write("driver/version.info", "Version=23.0.1\n"), "another driver than"),
    "NPU's health": (
        lambda host: host.edit("npu-smi", "| OK            | 98.6", "| Alarm         | 98.6"),
        "not 2 healthy",
    ),
    "NPU in use": (
        lambda host: host.edit("npu-smi", "| No running processes found in NPU 1", "| 1       0"),
        "is in use",
    ),
    "NPU's memory": (lambda host: host.edit("npu-smi", "3190 / 65536", "60000/ 65536"), "an NPU's memory is taken"),
    "port": (lambda host: host.write("holder", "1"), "port 8000 is held by another"),
    "weights": (lambda host: host.write("weights/model", "letters"), "the weights differ"),
    "generation": (lambda host: host.write("generation", '{"error":"dead"}'), "it does not generate"),
    "smoke": (lambda host: host.write("smoke_rc", "1"), "it does not read"),
    "verdict": (lambda host: host.edit("smoke.json", "PASS", "FAIL"), "its result does not say PASS"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_by_hand_a_fault_is_found(fault: str, host: HandChecked) -> None:
    assert host.check() == (0, [])
    damage, said = FAULTS[fault]
    damage(host)
    status, lines = host.check()
    assert status == 1
    assert any(said in line for line in lines), lines


def test_by_hand_one_at_a_time_and_every_host_is_checked(host: HandChecked) -> None:
    with subprocess.Popen(["flock", host.folder / "lock", "sleep", "600"]) as other:
        until = subprocess.run(
            ["sh", "-c", f"while flock -n {host.folder}/lock true; do :; done"], timeout=30, check=True
        )
        assert until.returncode == 0
        status, lines = host.check()
        other.terminate()
    assert status == 1
    assert any("somebody else works on it" in line for line in lines), lines


# --- the rounds ---

PLAYBOOK = """#!/bin/sh
while [ "$1" != -l ]; do shift; done
echo 'PLAY RECAP *****'
for host in $(echo "$2" | tr : ' '); do
  ssh "198.18.91.1${host#bench}" true && sftp -b - "[198.18.91.1${host#bench}]"
  echo "$host : ok=9 changed=$(cat "$HOST/changed") unreachable=0 failed=0"
done
"""
CONNECTION = """#!/bin/sh
case "$*" in *' cat '*) printf '{\\n  "verdict": "PASS"\\n}\\n' ;; esac
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fleet_bench.Bench:
    """Two nodes that are stand-ins: whoever asks them is told that all is well, and that `changed` things changed."""
    (tmp_path / "there").mkdir()
    programs = {"ansible-playbook": PLAYBOOK, "ssh": CONNECTION, "sftp": CONNECTION}
    for name, text in programs.items():
        path = tmp_path / "there" / name
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/there:{os.environ['PATH']}")
    monkeypatch.setenv("HOST", str(tmp_path))
    (tmp_path / "changed").write_text("0")
    made = fleet_bench.Bench(tmp_path, fleet_bench.names_of(2))
    made.write_inventory()
    made.write_counting()
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected" / "values").write_text(fleet_bench.values("image:1", IMAGE_ID, "amd64", RELEASE))
    for name in ("files.sha256", "weights.sha256"):
        (tmp_path / "expected" / name).write_text("")
    return made


def test_the_nodes_serve_the_forwarding_image_and_are_the_labs_in_all_else(bench: fleet_bench.Bench) -> None:
    bench.image = "registry.lab:5000/forwarding:1"
    bench.write_inventory()
    loader = DataLoader()
    inventory = InventoryManager(loader, sources=[str(PROJECT / "inventory/lab"), str(bench.folder / "bench.yml")])
    manager = VariableManager(loader, inventory)
    seen = {name: manager.get_vars(host=inventory.get_host(name)) for name in ("bench02", "node1")}
    assert seen["bench02"]["glm_ocr_image"] == bench.image
    assert seen["node1"]["glm_ocr_image"] != bench.image
    assert seen["bench02"]["ansible_host"] == "198.18.91.102"
    for name in ("ascend_host_image_space_gib", "glm_ocr_devices", "vllm_weights_manifest", "glm_ocr_exposure"):
        assert seen["bench02"][name] == seen["node1"][name]


def test_each_round_measures_all_and_is_on_the_page(bench: fleet_bench.Bench, tmp_path: Path) -> None:
    output = tmp_path / "page.md"
    assert fleet_bench.compare(bench, replace(SETTING, counts=(1, 2), rounds=2), output)
    rows = [line.split(" | ") for line in output.read_text().splitlines() if re.match(r"\| \d+ \| (deploy|by)", line)]
    assert [row[:3] for row in rows] == [
        ["| 1", "deploy.yml", "2"],
        ["| 1", "by hand", "2"],
        ["| 2", "deploy.yml", "2"],
        ["| 2", "by hand", "2"],
    ]
    assert {row[-1] for row in rows} == {"2.0 (2.0 to 2.0) |"}


def test_a_run_that_changed_something_is_no_sample_and_is_told(
    bench: fleet_bench.Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.md"
    setting = replace(SETTING, counts=(2,), rounds=1)
    (tmp_path / "changed").write_text("3")
    with pytest.raises(fleet_bench.BenchError, match="bench02: changed=3"):
        fleet_bench.compare(bench, setting, output)
    assert not output.exists(), "the warm-up found the hosts as they should not be"

    # Two runs warm up; what is measured then changes something.
    (tmp_path / "changed").unlink()
    (tmp_path / "there" / "ansible-playbook").write_text(
        PLAYBOOK.replace('$(cat "$HOST/changed")', '$(test -d "$HOST/r4"; echo $((1 - $?)))')
    )
    assert not fleet_bench.compare(bench, setting, output)
    text = output.read_text()
    assert "- deploy.yml over 2: bench01: changed=1, bench02: changed=1" in text
    assert "| 2 | deploy.yml | 0 | - |" in text
    assert "| 2 | by hand | 1 |" in text
    assert "bench02: changed=1" in capsys.readouterr().out
