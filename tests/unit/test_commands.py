"""`make` and the bootstrap: what is missing is said before anything is done, and a failure is the command's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import machine
from rendering import PROJECT, ROLES

GOOD = machine.Machine(0, "Debian 12", "x86_64", 8000, 30.0)
LIMITS = (["Debian 12", "Ubuntu 24.04"], 7600, 25, "/cache")
TOOLS = ("ansible-lint", "ansible-playbook", "mypy", "pytest", "ruff", "yamllint")


def test_the_defaults_are_read_as_yaml_reads_them() -> None:
    path = ROLES / "lab_host" / "defaults" / "main.yml"
    defaults, text = yaml.safe_load(path.read_text()), path.read_text()
    assert machine.default("lab_host_supported_systems", text) == defaults["lab_host_supported_systems"]
    for name in ("cache_dir", "state_dir", "disk_free_min_gb", "disk_free_min_built_gb", "memory_min_mb"):
        assert machine.default(f"lab_host_{name}", text) == [str(defaults[f"lab_host_{name}"])]
    with pytest.raises(ValueError, match="has no lab_host_absent"):
        machine.default("lab_host_absent", text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"uid": 1000}, "root: found user id 1000"),
        ({"system": "Fedora Linux 41"}, "one of Debian 12, Ubuntu 24.04: found Fedora Linux 41"),
        ({"architecture": "aarch64"}, "x86_64: found aarch64"),
        ({"memory_mb": 4000}, "7600 MB of memory: found 4000"),
        ({"disk_free_gb": 3.2}, "25 GB of free disk for /cache: found 3.2"),
    ],
)
def test_what_a_machine_lacks_is_told_with_its_fix(change: dict[str, object], told: str) -> None:
    assert machine.problems(GOOD, *LIMITS) == []
    (problem,) = machine.problems(machine.Machine(**{**vars(GOOD), **change}), *LIMITS)
    assert problem.startswith(told)
    assert "Fix: " in problem


def test_everything_that_is_missing_is_told_at_once() -> None:
    assert len(machine.problems(machine.Machine(1, "Plan 9", "arm64", 1, 1.0), *LIMITS)) == 5


def test_a_system_is_named_by_its_release_file() -> None:
    assert machine.system('PRETTY_NAME="x y"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\n') == "Debian 12"
    assert machine.system("# none\nNAME=Arch\n") == "Arch"
    assert machine.memory_mb("MemTotal:       8048576 kB\n") == 7859


def test_less_disk_is_needed_once_the_lab_was_built(tmp_path: Path) -> None:
    command = [sys.executable, machine.__file__, "--cache_dir", str(tmp_path), "--state_dir", str(tmp_path)]
    command += ["--disk_free_min_gb", str(10**9), "--disk_free_min_built_gb", "0"]
    assert "1000000000 GB of free disk" in subprocess.run(command, capture_output=True, text=True, check=False).stderr
    (tmp_path / machine.BUILT).mkdir(parents=True)
    assert "free disk" not in subprocess.run(command, capture_output=True, text=True, check=False).stderr


# --- make, with stand-ins for the tools -------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone in which the tools, and the Python that would install them, only note that they were called."""
    for name in ("Makefile", ".ci/bootstrap", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / "python").write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        '  "-m venv") echo venv >> calls; mkdir -p .venv/bin; cp stub .venv/bin/pip; cp stub .venv/bin/python\n'
        f"    for tool in {' '.join(TOOLS)}; do cp stub .venv/bin/$tool; done ;;\n"
        '  *machine.py*) [ ! -f poor ] || { echo "Missing for the lab: root" >&2; exit 1; } ;;\n'
        "esac\n"
    )
    (tmp_path / "stub").write_text(
        '#!/bin/sh\nname=$(basename "$0")\necho "$name $*" >> calls\n'
        '[ "$name $1 $2" != "$(cat failing 2>/dev/null)" ] || { echo "$name does not pass"; exit 1; }\n'
    )
    for name in ("python", "stub"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(clone: Path, target: str) -> tuple[int, str, list[str]]:
    """Exit status, output and what was called."""
    command = ["make", "--no-print-directory", target, f"PYTHON={clone / 'python'}"]
    done = subprocess.run(
        command,
        cwd=clone,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(clone / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    calls = clone / "calls"
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("target", ["demo", "test", "test-lab", "lab"])
def test_a_machine_that_cannot_carry_the_lab_is_told_before_anything_is_installed(target: str, clone: Path) -> None:
    (clone / "poor").touch()
    rc, output, called = make(clone, target)
    assert (rc, called) == (2, [])
    assert "Missing for the lab: root" in output


@pytest.mark.parametrize("target", ["lint", "test-fast"])
def test_lint_and_fast_tests_ask_nothing_of_the_machine(target: str, clone: Path) -> None:
    (clone / "poor").touch()
    rc, output, called = make(clone, target)
    assert rc == 0, output
    assert called[0] == "venv"


def test_all_tests_install_once_and_bring_the_lab_up_once(clone: Path) -> None:
    rc, output, called = make(clone, "test")
    assert rc == 0, output
    assert called[0] == "venv"
    assert [call.split()[0] for call in called].count("pip") == 1
    assert called.count("ansible-playbook -i inventory/lab playbooks/lab.yml") == 1
    assert {call.split()[0] for call in called} == {"venv", "pip", *TOOLS}
    assert called[-1] == "pytest -q -m not long tests/lab"
    assert sum(call.startswith("pytest -q -n auto tests/unit") for call in called) == 1
    make(clone, "test")
    assert (clone / "calls").read_text().count("pip ") == 1, "what is installed is not installed again"


@pytest.mark.parametrize("failing", ["mypy  ", "pytest -q -n", "ansible-playbook -i inventory/lab"])
def test_a_failure_of_one_half_is_the_commands_and_told(failing: str, clone: Path) -> None:
    (clone / "failing").write_text(failing)
    rc, output, called = make(clone, "test")
    assert rc != 0
    assert f"{failing.split()[0]} does not pass" in output
    assert "pytest -q tests/lab" not in called
    if not failing.startswith("ansible"):
        assert f"{failing.split()[0]} does not pass" in "".join(output.splitlines(keepends=True)[-5:])


@pytest.mark.parametrize(
    ("script", "modules"),
    [
        ("bench_guard/measure.py", "bench_workload, front, guard_inputs, request_guard.middleware"),
        ("bench_fleet/fleet_bench.py", "fleet_bench"),
    ],
)
def test_a_bench_finds_its_modules(script: str, modules: str) -> None:
    """It runs without pytest's path, and nobody runs it often."""
    (path,) = re.findall(rf"PYTHONPATH=(\S+) python tests/{script}", (PROJECT / "Makefile").read_text())
    subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=PROJECT, env={"PYTHONPATH": path}, check=True)
