"""Ends a play that has the role ``ci_report`` with JUnit XML and one line of JSON about its validations.

A callback, because Ansible ends a playbook when its last host has failed, and a task could not write them then.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: ci_report
type: notification
short_description: JUnit XML and a one-line JSON summary of the validations of a play
description: Loaded with the role, which says with C(set_stats) where the JUnit XML belongs (C(ci_report_junit)).
"""

SEVERITY = ("PASS", "FAIL", "ERROR")
ELEMENT = {"FAIL": "failure", "ERROR": "error"}
NO_REPORT = "no report, and no task that failed: the validation did not run on this host"
#: What XML 1.0 cannot hold, escaped or not; a model's reply may.
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Case(NamedTuple):
    """One check: where it belongs, its id, its verdict and what to say when it is no PASS."""

    stage: str
    name: str
    verdict: str
    message: str
    details: str


def cases(report: Mapping[str, Any]) -> Iterator[Case]:
    """Every check of every stage of a merged report, then the verdict, so that a report that is no PASS has a case
    that is none."""
    for stage, result in report["stages"].items():
        if result is None:
            yield Case(stage, "result", "ERROR", "no usable result", "\n".join(report["problems"]))
            continue
        for check in result.get("checks", []):
            details = f"expected: {check['expected']}\nfound: {check['found']}\nfix: {check.get('fix', '')}"
            yield Case(stage, check["id"], check["verdict"], str(check["found"]), details)
    problems = "\n".join(report["problems"])
    yield Case("report", "verdict", report["verdict"], f"verdict {report['verdict']}", problems)


def seconds(report: Mapping[str, Any]) -> float:
    """From the first stage's start to the last one's end; 0 when no stage was usable."""
    times = [report[name] for name in ("started_at", "finished_at")]
    if None in times:
        return 0.0
    started, finished = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in times)
    return (finished - started).total_seconds()


def suite(host: str, found: list[Case], duration: float) -> ElementTree.Element:
    """The testsuite of one host."""
    element = ElementTree.Element("testsuite", {"name": clean(host), "time": f"{duration:.3f}"} | counts(found))
    for case in found:
        test = ElementTree.SubElement(
            element, "testcase", classname=clean(f"{host}.{case.stage}"), name=clean(case.name)
        )
        if case.verdict in ELEMENT:
            outcome = ElementTree.SubElement(test, ELEMENT[case.verdict], message=clean(case.message))
            outcome.text = clean(case.details)
    return element


def counts(found: list[Case]) -> dict[str, str]:
    """The numbers of JUnit's head."""
    verdicts = [case.verdict for case in found]
    return {"tests": str(len(found)), "failures": str(verdicts.count("FAIL")), "errors": str(verdicts.count("ERROR"))}


def clean(text: str) -> str:
    """The text without what XML cannot hold."""
    return NO_XML.sub("\ufffd", text)


def summed_up(reports: Mapping[str, Mapping[str, Any] | str], paths: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """JUnit XML and the summary.  ``reports`` holds the merged report of every host, or the text that says why there
    is none; ``paths`` where the reports are."""
    root = ElementTree.Element("testsuites", name="GLM-OCR")
    hosts: dict[str, dict[str, Any]] = {}
    everything: list[Case] = []
    for host, report in sorted(reports.items()):
        if isinstance(report, str):
            found, duration, stages = [Case("report", "verdict", "ERROR", "no report", report)], 0.0, {}
        else:
            found, duration = list(cases(report)), seconds(report)
            stages = {name: stage["verdict"] if stage else "ERROR" for name, stage in report["stages"].items()}
        root.append(suite(host, found, duration))
        everything += found
        hosts[host] = {
            "verdict": worst(case.verdict for case in found),
            "report": paths.get(host),
            "stages": stages,
            "failed": [f"{case.stage}.{case.name}" for case in found if case.verdict != "PASS"],
        }
    root.attrib.update(counts(everything))
    ElementTree.indent(root)
    xml = ElementTree.tostring(root, encoding="unicode")
    # No host at all was not a pass.
    verdict = worst(case.verdict for case in everything) if everything else "ERROR"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{xml}\n', {"verdict": verdict, "hosts": hosts}


def worst(verdicts: Iterable[str]) -> str:
    """The most severe of them."""
    return max(verdicts, key=SEVERITY.index)


def load(path: str) -> dict[str, Any] | str:
    """The merged report, or why it cannot be used."""
    try:
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    return report


def write(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing.  Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible ships no types
    """Keeps each host's last failure, and sums up at the end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "ci_report"
    CALLBACK_NEEDS_ENABLED = False

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, str] = {}

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self.failures[result.host.get_name()] = f"{result.task_name}: {result.result.get('msg', '')}"

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.failures[result.host.get_name()] = f"unreachable: {result.result.get('msg', '')}"

    def v2_playbook_on_stats(self, stats: Any) -> None:
        told = dict(stats.custom)
        # Where no host matched, no task has told.
        junit = told.pop("_run", {}).get("ci_report_junit")
        paths = {host: facts["validation_report"] for host, facts in told.items() if "validation_report" in facts}
        reports = {
            host: load(paths[host]) if host in paths else self.failures.get(host, NO_REPORT) for host in stats.processed
        }
        xml, summary = summed_up(reports, paths)
        try:
            if junit:
                write(Path(junit), xml)
        except OSError as error:
            self._display.error(f"ci_report: cannot write {junit} ({error}); pass a writable ci_report_junit")
            junit = None
        self._display.display(
            json.dumps({"verdict": summary["verdict"], "junit": junit, "hosts": summary["hosts"]}, ensure_ascii=False)
        )
        if not (stats.failures or stats.dark) and (summary["verdict"] != "PASS" or not junit):
            # Ansible is content with a play that matched no host; a pipeline must not be.
            raise SystemExit(2)
