"""The watchdog's units: against goldens, and what may not be rendered."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

import vllm_release
import watchdog
from lab import HANG_SECONDS
from rendering import HostVariables

GOLDEN = Path(__file__).parent / "golden"


def rendered(tmp_path: Path, suffix: str, **overrides: object) -> str:
    return HostVariables(tmp_path, **overrides).template_file(f"glm-ocr-watchdog.{suffix}.j2")


@pytest.mark.parametrize("suffix", ["service", "timer"])
def test_golden(suffix: str, tmp_path: Path) -> None:
    golden, unit = GOLDEN / f"watchdog.{suffix}", rendered(tmp_path, suffix)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(unit)
    assert unit == golden.read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_the_script_takes_what_the_unit_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = rendered(tmp_path, "service", vllm_watchdog_textfile="/var/lib/x/glm.prom", glm_ocr_state_dir=str(tmp_path))
    (line,) = [line for line in unit.replace("\\\n", " ").splitlines() if line.startswith("ExecStart=")]
    seen = {}

    def look(options: object) -> tuple[watchdog.Seen, str]:
        seen.update(vars(options))
        return watchdog.Seen(), ""

    monkeypatch.setattr(watchdog, "look", look)
    assert watchdog.main(shlex.split(line)[3:]) == 0
    assert (seen["rounds"], seen["restarts"], seen["textfile"]) == (4, 3, "/var/lib/x/glm.prom")
    assert seen["releases"] == f"{tmp_path}/releases"


def test_systemd_accepts_the_service(tmp_path: Path) -> None:
    """For its verification the program must be there."""
    unit = rendered(tmp_path, "service").replace("ExecStart=", "ExecStart=/bin/true ")
    assert vllm_release.verify(unit, "glm-ocr-watchdog.service") == []


def test_the_budget_is_computed_from_the_variables_and_a_round_ends_within_its_own(tmp_path: Path) -> None:
    assert f"A hang is found within {HANG_SECONDS} s" in rendered(tmp_path, "service")
    (tmp_path / "slow").mkdir()
    slow = HostVariables(tmp_path / "slow", vllm_watchdog_interval_seconds="60", vllm_watchdog_rounds="9")
    # (9 + 1) rounds of 60 + 1 + 10 + 5 s.
    assert slow.template("{{ __vllm_watchdog_detection_seconds | int }}") == 760
    commands = int(slow.template("{{ __vllm_watchdog_command_seconds }}"))
    assert commands >= 4 * watchdog.COMMAND_SECONDS
    assert f"TimeoutStartSec={10 + 5 + commands}\n" in slow.template_file("glm-ocr-watchdog.service.j2")


def test_restarts_of_the_watchdog_do_not_meet_the_units_start_limit(tmp_path: Path) -> None:
    """Giving up is the watchdog's to say: the unit would only say `failed`."""
    host = HostVariables(tmp_path)
    unit = host.template_file("glm-ocr.service.j2")
    burst = int(unit.split("StartLimitBurst=")[1].split()[0])
    assert 1 + int(host.template("{{ vllm_watchdog_restarts }}")) < burst


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"vllm_watchdog_rounds": 0}, "vllm_watchdog_rounds must be 1 to 999999"),
        ({"vllm_watchdog_interval_seconds": 301}, "vllm_watchdog_interval_seconds must be at most 300, found 301"),
        ({"vllm_watchdog_textfile": "glm.prom"}, "must be an absolute path that ends in .prom, found glm.prom"),
        ({"vllm_watchdog_textfile": "/etc/passwd"}, "must be an absolute path that ends in .prom, found /etc/passwd"),
    ],
)
def test_what_cannot_be_rendered_is_named(overrides: dict[str, object], complaint: str, tmp_path: Path) -> None:
    problems = HostVariables(tmp_path, **overrides).template("{{ __vllm_watchdog_problems }}")
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize(("group", "expected"), [("ascend910", False), ("ascend910_front", True)])
def test_new_sites_have_it_and_the_verified_deployment_does_not(group: str, expected: bool, tmp_path: Path) -> None:
    assert HostVariables(tmp_path, group).template("{{ vllm_watchdog_enabled }}") is expected
