"""The findings of all hosts become one table, one report after the schema, and one verdict."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import preflight_report
from rendering import PROJECT

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = json.loads((PROJECT / "files" / "schemas" / "preflight.schema.json").read_text())
RUN = "20260102T030405Z"


def finding(identifier: str, severity: str = "error", **texts: str) -> dict[str, str]:
    told = {"expected": "one thing", "found": "another", "fix": "mend it: `true`", "fix_zh": "执行 `true`"}
    return {"id": identifier, "severity": severity, **told, **texts}


PORT = finding(
    "HOST_PORT", found="held by pid 41: python3 -c import socket", fix="stop it (`ss -lntp | grep ':8000 '`)"
)
IDLE = finding("NPU_IDLE", "warning", expected="as many visible NPUs as the engine starts on: 1")
PYTHON = finding("HOST_PYTHON", found="3.7")
FLEET: dict[str, list[dict[str, str]] | None] = {
    "npu-01": [IDLE, PORT],
    "npu-02": [],
    "npu-03.a-rather-long.example": [PYTHON],
    "npu-04": None,
}
ACTIVE = ["npu-01", "npu-02", "npu-03.a-rather-long.example"]


def merged(active: list[str], published: dict[str, list[dict[str, str]] | None]) -> dict[str, Any]:
    report = preflight_report.merge(RUN, active, published)
    jsonschema.validate(report, SCHEMA)
    return report


@pytest.mark.parametrize("name", ["table.txt", "preflight.json"])
def test_golden(name: str) -> None:
    report = merged(ACTIVE, FLEET)
    rendered = {
        "table.txt": preflight_report.table(report) + "\n",
        "preflight.json": json.dumps(report, ensure_ascii=False, indent=2) + "\n",
    }[name]
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(rendered)
    assert rendered == (GOLDEN / name).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_no_findings_is_a_pass_that_says_so() -> None:
    report = merged(["a", "b"], {"a": [], "b": []})
    assert report["verdict"] == "PASS"
    assert preflight_report.table(report) == "no findings on 2 host(s)"
    assert preflight_report.errors_of(report, ["a", "b"]) == {}


def test_warnings_are_shown_and_stop_nothing() -> None:
    report = merged(["a"], {"a": [IDLE]})
    assert report["verdict"] == "PASS"
    assert report["hosts"] == [{"host": "a", "checked": True, "errors": 0, "warnings": 1}]
    assert "NPU_IDLE" in preflight_report.table(report)
    assert preflight_report.errors_of(report, ["a"]) == {}


def test_one_error_fails_once_and_is_told_whole() -> None:
    report = merged(["a", "b"], {"a": [], "b": [IDLE, PORT]})
    assert report["verdict"] == "FAIL"
    assert [told["id"] for told in report["findings"]] == ["HOST_PORT", "NPU_IDLE"], "errors first"
    assert preflight_report.errors_of(report, ["a", "b"]) == {"b": [{**PORT, "host": "b"}]}


def test_an_unreachable_host_is_told_and_does_not_stop_the_others() -> None:
    report = merged(["a"], {"a": [], "gone": None})
    assert report["verdict"] == "ERROR"
    assert [(told["id"], told["host"]) for told in report["findings"]] == [("HOST_UNREACHABLE", "gone")]
    assert preflight_report.errors_of(report, ["a"]) == {}


def test_what_a_host_published_before_it_was_lost_is_not_lost() -> None:
    report = merged([], {"a": [PORT]})
    assert report["verdict"] == "ERROR"
    assert {told["id"] for told in report["findings"]} == {"HOST_PORT", "HOST_UNREACHABLE"}


def test_a_host_that_was_not_checked_cannot_pass() -> None:
    report = merged(["a"], {"a": None})
    assert report["verdict"] == "ERROR"
    (told,) = preflight_report.errors_of(report, ["a"])["a"]
    assert told["found"] == "the role did not run on this host"


def test_the_facts_of_all_roles_are_read() -> None:
    facts = {"ascend_host_findings": [PORT], "vllm_weights_findings": [finding("WEIGHTS_DAMAGED")]}
    facts["vllm_image_findings"] = [finding("IMAGE_SIGNATURE")]
    told = [told["id"] for told in preflight_report.findings_of(facts) or []]
    assert told == ["HOST_PORT", "WEIGHTS_DAMAGED", "IMAGE_SIGNATURE"]
    assert preflight_report.findings_of({"ascend_host_findings": []}) == []
    assert preflight_report.findings_of({"vllm_weights_findings": []}) is None


@pytest.mark.parametrize(("run", "time"), [(RUN, "2026-01-02T03:04:05+00:00"), ("before-the-move", None)])
def test_the_time_is_that_of_the_run(run: str, time: str | None) -> None:
    assert preflight_report.merge(run, ["a"], {"a": []})["started_at"] == time


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "PASS", "findings": [{**PORT, "host": "a"}]},
        {"verdict": "PASS", "hosts": [{"host": "a", "checked": False, "errors": 0, "warnings": 0}]},
        {"findings": [{**finding("HOST_PORT", fix_zh=""), "host": "a"}]},
        {"findings": [PORT]},
        {"started_at": "yesterday"},
        {"hosts": []},
    ],
)
def test_the_schema_refuses_a_report_that_flatters_or_lacks_something(change: dict[str, Any]) -> None:
    report = {**merged(["a"], {"a": []}), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, SCHEMA)


def test_the_report_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "preflight.json"
    preflight_report.write(path, {"修复": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"修复": 1}
    with pytest.raises(TypeError):
        preflight_report.write(path, {"unfit": object()})
    assert [entry.name for entry in path.parent.iterdir()] == ["preflight.json"]


# --- through Ansible --------------------------------------------------------------------------------------

PLAY = """
- hosts: ascend910
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: glm_ocr}
      when: false
    - ansible.builtin.fail: {msg: lost on the way}
      when: lost | default(false)
    - ansible.builtin.include_role: {name: preflight_report}
    - ansible.builtin.debug: {msg: the play goes on}
- hosts: ascend910
  gather_facts: false
  tasks:
    - ansible.builtin.debug: {msg: "deployed {{ inventory_hostname }}"}
"""


def play(tmp_path: Path, hosts: dict[str, Any], *options: str, reports: str = "") -> tuple[int, str, list[Path]]:
    """Exit status, output and reports of a play with this role on hosts that published what ``hosts`` says.

    No host is connected to, and the interpreter set for all of them is absent: the report is the controller's own.
    """
    (tmp_path / "hosts.json").write_text(json.dumps({"ascend910": {"hosts": hosts}}))
    (tmp_path / "play.yml").write_text(PLAY)
    folder = reports or str(tmp_path / "reports")
    variables = {"glm_ocr_reports_dir": folder, "glm_ocr_run": RUN, "ansible_python_interpreter": "/opt/absent"}
    done = subprocess.run(
        [
            "ansible-playbook",
            "-i",
            tmp_path / "hosts.json",
            tmp_path / "play.yml",
            "-e",
            json.dumps(variables),
            *options,
        ],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(PROJECT / "roles"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, sorted(tmp_path.glob("reports/**/*.json"))


def test_a_play_shows_writes_and_fails_once(tmp_path: Path) -> None:
    hosts = {"a": {"ascend_host_findings": []}, "b": {"ascend_host_findings": [PORT]}, "c": {"lost": True}}
    rc, output, (path,) = play(tmp_path, hosts)
    assert rc == 2
    report = json.loads(path.read_text())
    jsonschema.validate(report, SCHEMA)
    assert path.parts[-3:] == ("preflight", RUN, "preflight.json")
    assert [told["id"] for told in report["findings"]] == ["HOST_PORT", "HOST_UNREACHABLE"]
    assert f"Report:  {path}" in output
    assert "docs/runbooks/findings.md" in output
    message = output.partition("b: 1 finding(s) stand in the way; nothing was changed.")[2]
    for text in ("[HOST_PORT] error: expected", PORT["found"], PORT["fix"], f"处理：{PORT['fix_zh']}"):
        assert text in message
    assert "the play goes on" not in output
    assert "deployed" not in output, "not even the host without findings"
    assert "changed=1" not in output


def test_a_play_with_a_lost_host_goes_on_for_the_others(tmp_path: Path) -> None:
    rc, output, _ = play(tmp_path, {"a": {"ascend_host_findings": [IDLE]}, "c": {"lost": True}})
    assert rc == 2, "of the lost host"
    assert "Verdict: ERROR" in output
    assert "the play goes on" in output
    assert "deployed a" in output
    assert "deployed c" not in output


def test_check_mode_judges_and_writes_nothing(tmp_path: Path) -> None:
    rc, output, reports = play(tmp_path, {"a": {"ascend_host_findings": [PORT]}}, "--check")
    assert rc == 2
    assert "[HOST_PORT]" in output
    assert "Report:  not written in check mode" in output
    assert reports == []


def test_findings_are_told_even_when_the_report_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rc, output, _ = play(tmp_path, {"a": {"ascend_host_findings": [PORT]}}, reports=str(tmp_path / "file"))
    assert rc == 2
    assert "[HOST_PORT]" in output
    assert "The report cannot be written" in output
    assert "Traceback" not in output
