"""JUnit XML and summary from merged reports: one testcase a check, and no report that is no PASS looks like one."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from ci_report import summed_up

PASSED = {"id": "health", "verdict": "PASS", "expected": "HTTP 200", "found": "HTTP 200"}
FAILED = {"id": "image", "verdict": "FAIL", "expected": "0.1", "found": "0.9 <&\x00\ud800", "fix": "look"}


def report(*checks: dict[str, Any], verdict: str = "PASS", **more: Any) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "started_at": "2026-01-02T03:04:05Z",
        "finished_at": "2026-01-02T03:04:06.500+00:00",
        "stages": {"ocr_smoke": {"verdict": verdict, "checks": list(checks)}},
        "problems": [],
    } | more


def test_a_check_is_a_testcase_and_what_failed_says_why() -> None:
    reports = {"b": report(PASSED), "a": report(PASSED, FAILED, verdict="FAIL")}
    xml, summary = summed_up(reports, {"a": "/r/a/report.json", "b": "/r/b/report.json"})
    root = ElementTree.fromstring(xml)
    first, second = root
    assert (first.get("name"), second.get("name"), second.get("time")) == ("a", "b", "1.500")
    assert [case.get("name") for case in first] == ["health", "image", "verdict"]
    assert first[1].get("classname") == "a.ocr_smoke"
    (failure,) = first[1]
    assert failure.get("message") == "0.9 <&\ufffd\ufffd"
    assert "fix: look" in str(failure.text)
    assert {name: root.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "5",
        "failures": "2",
        "errors": "0",
    }
    assert summary["verdict"] == "FAIL"
    assert summary["hosts"]["a"] == {
        "verdict": "FAIL",
        "report": "/r/a/report.json",
        "stages": {"ocr_smoke": "FAIL"},
        "failed": ["ocr_smoke.image", "report.verdict"],
    }
    assert summary["hosts"]["b"]["failed"] == []


@pytest.mark.parametrize(
    "found",
    [
        "unreachable: no route",
        report(PASSED, verdict="ERROR"),
        report(stages={"ocr_bench": None}, problems=["ocr_bench.json: found nothing"], verdict="ERROR"),
        report(stages={}, started_at=None, finished_at=None, verdict="ERROR"),
    ],
)
def test_what_is_no_pass_has_an_error(found: dict[str, Any] | str) -> None:
    xml, summary = summed_up({"a": found, "b": report(PASSED)}, {})
    assert summary["verdict"] == "ERROR"
    assert summary["hosts"]["a"]["verdict"] == "ERROR"
    assert int(str(ElementTree.fromstring(xml).get("errors"))) >= 1


def test_no_host_is_no_pass() -> None:
    xml, summary = summed_up({}, {})
    assert summary["verdict"] == "ERROR"
    assert ElementTree.fromstring(xml).get("tests") == "0"
