"""The watchdog's role and verb through Ansible, on a host whose systemd is a stand-in."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from playing import HERE, Played, play, stub

#: ``active`` and ``enabled`` are files that are there while the timer is.
SYSTEMCTL = """
echo "$@" >> {folder}/calls
case $1 in
  is-active) [ -e {folder}/active ] ;;
  is-enabled) [ -e {folder}/enabled ] ;;
  enable) touch {folder}/enabled ;;
  restart | start) touch {folder}/active ;;
  disable) rm -f {folder}/active {folder}/enabled ;;
  stop) [ "$2" != glm-ocr-watchdog.timer ] || rm -f {folder}/active ;;
  reset-failed) exit 1 ;;
esac
"""
KNOWN = {
    "name": "gave-up",
    "found": "restarted 3 times in 3600 s already; 4 rounds without an answer or a token: timed out",
    "since": "2026-01-02T03:04:05Z",
    "restarts": [1.0, 2.0, 3.0],
    "restarts_total": 7,
}


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stub(folder / "bin", "systemctl", SYSTEMCTL.format(folder=folder))
        for name in ("units", "state", "lib"):
            (folder / name).mkdir()
        self.kept = folder / "state" / "watchdog.json"

    def play(self, *options: str, playbook: str = "", **variables: Any) -> Played:
        given = {
            "__vllm_watchdog_units": str(self.folder / "units"),
            "glm_ocr_library_dir": str(self.folder / "lib"),
            **variables,
        }
        return play(self.folder, playbook or self.playbook(), {"npu-01": HERE}, "-e", json.dumps(given), *options)

    def playbook(self) -> str:
        """As the deployment has it; the service's role is there for what it filters with."""
        tasks = [
            {"ansible.builtin.import_role": {"name": role}} | more
            for role, more in (("glm_ocr", {}), ("vllm_service", {"when": False}), ("vllm_watchdog", {}))
        ]
        path = self.folder / "play.yml"
        path.write_text(yaml.safe_dump([{"hosts": "ascend910", "gather_facts": False, "tasks": tasks}]))
        return str(path)

    def files(self) -> dict[str, int]:
        """What is installed, with its mode."""
        found = [path for name in ("units", "lib", "state") for path in (self.folder / name).rglob("*")]
        return {path.name: stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()}

    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        told = calls.read_text().splitlines() if calls.exists() else []
        return [call for call in told if not call.startswith("is-")]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_it_is_installed_once_and_followed(host: Host) -> None:
    checked = host.play("--check", "--diff", vllm_watchdog_enabled=True)
    assert (checked.rc, checked.recap("npu-01")["changed"], host.files(), host.calls()) == (0, 1, {}, [])
    assert "OnUnitInactiveSec=10" in checked.output

    first = host.play(vllm_watchdog_enabled=True)
    assert (first.rc, first.recap("npu-01")["changed"]) == (0, 1)
    assert host.files() == {
        "glm-ocr-watchdog.service": 0o644,
        "glm-ocr-watchdog.timer": 0o644,
        "watchdog.py": 0o755,
    }
    assert host.calls() == ["daemon-reload", "enable glm-ocr-watchdog.timer", "restart glm-ocr-watchdog.timer"]

    for options in ((), ("--check", "--diff")):
        again = host.play(*options, vllm_watchdog_enabled="true")
        assert (again.rc, again.recap("npu-01")["changed"], len(host.calls())) == (0, 0, 3)

    # Stopped by hand, it is started; another interval is read.
    (host.folder / "active").unlink()
    assert host.play(vllm_watchdog_enabled=True).recap("npu-01")["changed"] == 1
    assert (host.folder / "active").exists()
    other = host.play("--diff", vllm_watchdog_enabled=True, vllm_watchdog_interval_seconds=20)
    assert "+OnUnitInactiveSec=20" in other.output
    assert host.calls()[-3:] == host.calls()[:3]


def test_turned_off_it_is_gone_and_nothing_is_done_twice(host: Host) -> None:
    textfile = host.folder / "state" / "glm.prom"
    on = {"vllm_watchdog_textfile": str(textfile)}
    assert host.play(vllm_watchdog_enabled=True, **on).rc == 0
    host.kept.write_text(json.dumps(KNOWN))
    textfile.write_text("")
    checked = host.play("--check", "--diff", vllm_watchdog_enabled=False, **on)
    assert (checked.rc, checked.recap("npu-01")["changed"], len(host.files())) == (0, 1, 5)
    off = host.play(vllm_watchdog_enabled=False, **on)
    assert (off.rc, off.recap("npu-01")["changed"], host.files()) == (0, 1, {})
    assert host.calls()[3:] == [
        "disable --now glm-ocr-watchdog.timer",
        "stop glm-ocr-watchdog.service",
        "daemon-reload",
        "reset-failed glm-ocr-watchdog.service",
    ]
    again = host.play(vllm_watchdog_enabled=False, **on)
    assert (again.rc, again.recap("npu-01")["changed"]) == (0, 0)


def test_a_timer_that_does_not_start_is_told(host: Host) -> None:
    systemctl = SYSTEMCTL.replace("  enable)", "  restart) echo no such unit; exit 5 ;;\n  enable)")
    stub(host.folder / "bin", "systemctl", systemctl.format(folder=host.folder))
    played = host.play(vllm_watchdog_enabled=True)
    assert played.rc != 0
    assert "`systemctl restart glm-ocr-watchdog.timer`: no such unit" in played.output


def test_the_verb_shows_what_it_knows_and_a_reset_has_it_forget(host: Host) -> None:
    verb = "playbooks/watchdog.yml"
    none = host.play(playbook=verb)
    assert none.rc != 0
    assert "expected a watchdog on npu-01, found none" in none.output
    host.play(vllm_watchdog_enabled=True)
    assert "It knows nothing yet: the next round comes within 26 s." in host.play(playbook=verb).output

    host.kept.write_text(json.dumps(KNOWN))
    shown = host.play(playbook=verb)
    assert (shown.rc, shown.recap("npu-01")["changed"]) == (0, 0)
    assert "glm-ocr is gave-up since 2026-01-02T03:04:05Z" in shown.output
    assert "restarts in the last 3600 s: 3 of 3, 7 in all" in " ".join(shown.output.split())
    assert "A hang is found within 130 s." in shown.output

    before = len(host.calls())
    checked = host.play("--check", playbook=verb, vllm_watchdog_reset_enabled=True)
    assert (checked.rc, checked.recap("npu-01")["changed"], len(host.calls())) == (0, 1, before)
    reset = host.play(playbook=verb, vllm_watchdog_reset_enabled="true")
    assert (reset.rc, reset.recap("npu-01")["changed"], host.kept.exists()) == (0, 1, False)
    assert host.calls()[before:] == [
        "stop glm-ocr-watchdog.timer glm-ocr-watchdog.service",
        "reset-failed glm-ocr-watchdog.service",
        "start glm-ocr-watchdog.timer",
    ]
    assert (host.folder / "active").exists()


def test_the_unit_runs_the_script_that_is_installed_with_the_hosts_python(host: Host) -> None:
    host.play(vllm_watchdog_enabled=True)
    unit = (host.folder / "units" / "glm-ocr-watchdog.service").read_text()
    assert f"ExecStart={sys.executable} -B {host.folder}/lib/watchdog.py " in unit
