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


def as_result(findings: Sequence[Finding], subject: str) -> Dict[str, Any]:
    """The part of a module's result that tells its findings, as data and as text."""
    lines = [f"{len(findings)} finding(s) about {subject}; nothing was changed on this host."]
    lines += [f"[{f.id}] expected {f.expected}; found {f.found}. Fix: {f.fix}" for f in findings]
    return {"findings": [asdict(finding) for finding in findings], "message": "\n".join(lines)}
