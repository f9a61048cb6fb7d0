"""The catalogue of findings is complete and both languages say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import findings, host_checks, npu_checks, npu_smi

import finding_text
import preflight_report
from rendering import ROLES

MADE = re.compile(r'Finding\(\s*"([A-Z_]+)"|"?id"?: "?([A-Z][A-Z_]+)|\("(PROBE_[A-Z_]+)"')
#: What runs on a host: modules, and what they import.
ON_HOSTS = [path for pattern in ("*/library/*.py", "*/module_utils/*.py") for path in ROLES.glob(pattern)]


def made_in(role: str) -> set[str]:
    """The ids that the sources of a role (a glob) make findings of."""
    sources = [path for suffix in ("py", "yml") for path in ROLES.glob(f"{role}/**/*.{suffix}")]
    return {name for path in sources for pair in MADE.findall(path.read_text()) for name in pair if name}


def test_every_id_that_is_made_is_in_the_catalogue_and_the_other_way_round() -> None:
    assert made_in("*") == set(findings.CATALOGUE)


def test_every_id_of_the_host_is_in_its_readme() -> None:
    readme = (ROLES / "ascend_host" / "README.md").read_text()
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", readme, re.MULTILINE))
    assert told == made_in("ascend_host")


@pytest.mark.parametrize(("identifier", "severity"), [("HOST_TYPO", "error"), ("HOST_PORT", "fatal")])
def test_a_finding_that_is_in_no_catalogue_cannot_be_made(identifier: str, severity: str) -> None:
    with pytest.raises(ValueError, match="not a finding"):
        findings.Finding(identifier, "a", "b", "c", "d", severity)


def test_findings_are_told_as_data_and_in_one_form_as_text() -> None:
    finding = findings.Finding("HOST_PORT", "a free port", "pid 1: nc", "stop it", "停止", findings.WARNING)
    (told,) = findings.as_data([finding])
    assert told == {
        "id": "HOST_PORT",
        "severity": "warning",
        "expected": "a free port",
        "found": "pid 1: nc",
        "fix": "stop it",
        "fix_zh": "停止",
    }
    text = "[HOST_PORT] warning: expected a free port; found pid 1: nc.\n  Fix: stop it\n  处理：停止"
    assert finding_text.finding_text([told]) == text
    assert finding_text.finding_text([told, told]) == f"{text}\n{text}"
    assert finding_text.finding_text([]) == ""


def every_finding() -> list[dict[str, Any]]:
    """One of each id, as the checks and the task of ascend_host, and preflight_report, make them."""
    chip = npu_smi.Chip(0, 0, None, "910B2", "Alarm", "0000:c1:00.0", 65536, 65536)
    cards = npu_checks.cards_of({0: chip}, [0], [0], 1)
    holder = host_checks.Holder(41, "python", (41,))
    made = [
        *host_checks.check_systemd(False, ""),
        *host_checks.check_engine("docker", "", ""),
        *host_checks.check_engine("podman", "", ""),
        *host_checks.check_container("glm-ocr", {}, "docker"),
        *host_checks.check_port(8000, [holder], None),
        *host_checks.check_space("image", "/", 0, 1, "ascend_host_image_space_gib"),
        *host_checks.check_host_memory(0, 1, 1),
        *host_checks.check_shm("0", 1),
        *host_checks.check_clock(0, 99, 1),
        *host_checks.check_devices([], []),
        *host_checks.check_driver_files(["/a", "/b"]),
        *host_checks.check_driver_version("", ["25.5"]),
        *host_checks.check_architecture("image", "amd64", "aarch64"),
        *npu_checks.check_npu_smi("silence"),
        *npu_checks.check_absent({}, [0]),
        *npu_checks.check_supported(["910"]),
        *npu_checks.check_health(cards),
        *npu_checks.check_occupied(cards, [npu_smi.Process(0, 0, 41, "", 1)], {41: holder}, None),
        *npu_checks.check_device_memory(cards, [], {}, None, 0.85),
        *npu_checks.visible_ids("x", 1, 1)[1],
        *npu_checks.check_idle(2, 1),
        *npu_checks.check_pci([], [chip]),
        *npu_checks.check_variant("vllm-ascend:1-a3", ["A2"]),
    ]
    tasks = yaml.safe_load((ROLES / "ascend_host" / "tasks" / "python.yml").read_text())
    (python,) = tasks[-1]["ansible.builtin.set_fact"]["ascend_host_findings"]
    told = [vars(finding) for finding in made]
    return [*told, {**python, "host": "h"}, preflight_report.UNREACHABLE, preflight_report.UNCHECKED]


def test_every_id_of_both_roles_is_tried_here() -> None:
    assert {finding["id"] for finding in every_finding()} == made_in("ascend_host") | made_in("preflight_report")


@pytest.mark.parametrize("finding", every_finding(), ids=lambda finding: finding["id"])
def test_both_languages_give_the_same_commands(finding: dict[str, Any]) -> None:
    assert re.search(r"[\u4e00-\u9fff]", finding["fix_zh"]), "not Chinese"
    assert not re.search(r"[\u4e00-\u9fff]", finding["fix"])
    assert sorted(re.findall(r"`[^`]+`", finding["fix_zh"])) == sorted(re.findall(r"`[^`]+`", finding["fix"]))
    names = r"\b(?:glm_ocr|vllm_service|ascend_host|ansible)_\w+"
    assert set(re.findall(names, finding["fix_zh"], re.ASCII)) == set(re.findall(names, finding["fix"]))


@pytest.mark.parametrize("path", ON_HOSTS, ids=lambda path: path.name)
def test_what_runs_on_a_host_is_python_3_8(path: Path) -> None:
    """Its grammar, and no annotation that is evaluated."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    assert "from __future__ import annotations" in ast.unparse(tree)
