"""What a check found: what was expected, what is there, what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, Sequence


@dataclass(frozen=True)
class Finding:
    id: str
    expected: str
    found: str
    fix: str
    fix_zh: str = ""
    #: "error" stands in the way, "warning" does not.
    severity: str = "error"


def as_result(findings: Sequence[Finding], subject: str) -> Dict[str, Any]:
    """The part of a module's result that tells its findings, as data and as text."""
    lines = [f"{len(findings)} finding(s) about {subject}; nothing was changed on this host."]
    for finding in findings:
        line = f"[{finding.id}] expected {finding.expected}; found {finding.found}. Fix: {finding.fix}"
        lines.append(line + (f" 处理：{finding.fix_zh}" if finding.fix_zh else ""))
    return {"findings": [asdict(finding) for finding in findings], "message": "\n".join(lines)}
