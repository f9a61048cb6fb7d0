"""Merge the findings of all hosts into one table, one report and one verdict.

Runs in the controller's own process: it writes only there, and a wrong ``ansible_python_interpreter`` in the
inventory cannot keep the report from being written.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

#: The facts roles publish: the first by every host that was checked, the others by those they were checked on.
PUBLISHED = ("ascend_host_findings", "vllm_weights_findings", "vllm_image_findings")
COLUMNS = {"host": 12, "severity": 8, "id": 19, "expected": 32, "found": 32, "fix": 40}
ORDER = ("error", "warning")

#: Where every id is explained, in this project.
RUNBOOK, RUNBOOK_ZH = "docs/runbooks/findings.md", "docs/runbooks/zh/findings.md"

UNREACHABLE = {
    "id": "HOST_UNREACHABLE",
    "severity": "error",
    "expected": "the host answers over SSH and all its checks run",
    "found": "it does not answer, or a task of this play failed on it: its own message stands above",
    "fix": "mend what the message says (`ansible HOST -m ping`), then run the play again; the others are not held up",
    "fix_zh": "按上方消息修复（`ansible HOST -m ping`）后重新运行；其他主机不受影响",
}
UNCHECKED = {
    "id": "HOST_UNREACHABLE",
    "severity": "error",
    "expected": "findings of the role ascend_host, or that it has none",
    "found": "the role did not run on this host",
    "fix": "run playbooks/preflight.yml as a whole, without --tags, --skip-tags or --start-at-task",
    "fix_zh": "完整运行 playbooks/preflight.yml，不要使用 --tags、--skip-tags 或 --start-at-task",
}


def merge(
    run: str, active: Collection[str], published: Mapping[str, Sequence[Mapping[str, Any]] | None]
) -> dict[str, Any]:
    """The report, following ``files/schemas/preflight.schema.json``.

    ``published`` holds the findings of every host of the play, None for a host that was not checked; ``active``
    names those that are still in the play.
    """
    findings: list[dict[str, Any]] = []
    checked = [host for host, found in published.items() if host in active and found is not None]
    for host, found in published.items():
        findings += [{"host": host, **finding} for finding in found or []]
        if host not in checked:
            findings.append({"host": host, **(UNCHECKED if host in active else UNREACHABLE)})
    hosts = list(published)
    findings.sort(key=lambda finding: (hosts.index(finding["host"]), ORDER.index(finding["severity"])))
    errors = [finding for finding in findings if finding["severity"] == "error"]
    return {
        "schema_version": "1.0",
        "run": run,
        "started_at": started_at(run),
        "verdict": "ERROR" if len(checked) < len(hosts) else "FAIL" if errors else "PASS",
        "hosts": [
            {
                "host": host,
                "checked": host in checked,
                "errors": count(findings, host, "error"),
                "warnings": count(findings, host, "warning"),
            }
            for host in hosts
        ],
        "findings": findings,
        "runbook": RUNBOOK,
    }


def findings_of(facts: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What the roles published for a host, None when it was not checked."""
    if PUBLISHED[0] not in facts:
        return None
    return [dict(finding) for name in PUBLISHED if name in facts for finding in facts[name]]


def started_at(run: str) -> str | None:
    """The time in the run's id, None for an id of another form."""
    try:
        return datetime.strptime(run, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).isoformat()
    except ValueError:
        return None


def count(findings: Sequence[Mapping[str, Any]], host: str, severity: str) -> int:
    return sum(finding["host"] == host and finding["severity"] == severity for finding in findings)


def table(report: Mapping[str, Any]) -> str:
    """The findings in columns, long cells on several lines."""
    if not report["findings"]:
        return f"no findings on {len(report['hosts'])} host(s)"
    rule = "-+-".join("-" * width for width in COLUMNS.values())
    rows = [row({name: name.upper() for name in COLUMNS})]
    rows += [row(finding) for finding in report["findings"]]
    return f"\n{rule}\n".join([*rows, f"Each id is explained in {RUNBOOK}, in Chinese in {RUNBOOK_ZH}."])


def row(cells: Mapping[str, Any]) -> str:
    # Not broken at hyphens: a command or a path would change its meaning.
    columns = [textwrap.wrap(cells[name], width, break_on_hyphens=False) for name, width in COLUMNS.items()]
    lines = zip_longest(*columns, fillvalue="")
    padded = [[cell.ljust(width) for cell, width in zip(line, COLUMNS.values(), strict=True)] for line in lines]
    return "\n".join(" | ".join(line).rstrip() for line in padded)


def errors_of(report: Mapping[str, Any], active: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The errors of every host that is still in the play and has some."""
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    by_host = {host: [finding for finding in errors if finding["host"] == host] for host in active}
    return {host: found for host, found in by_host.items() if found}


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write all of the report or nothing.  Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible ships no types
    """Returns ``table``, ``errors`` by host, ``problem`` of the report itself, ``verdict``, ``path``; never changed."""

    _requires_connection = False

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        _, arguments = self.validate_argument_spec(
            {
                "run": {"type": "str", "required": True},
                "dest": {"type": "path", "required": True},
            }
        )
        variables = task_vars or {}
        active = variables["ansible_play_hosts"]
        published = {host: findings_of(variables["hostvars"][host]) for host in variables["ansible_play_hosts_all"]}
        report = merge(arguments["run"], active, published)
        path, problem = arguments["dest"], ""
        if self._task.check_mode:
            path = "not written in check mode"
        else:
            try:
                write(Path(path), report)
            except OSError as error:
                problem = f"The report cannot be written: {error}. Fix: correct preflight_report_dir."
                path = "not written"
        return {
            "changed": False,
            "verdict": report["verdict"],
            "path": path,
            "table": table(report),
            "errors": errors_of(report, active),
            "problem": problem,
        }
