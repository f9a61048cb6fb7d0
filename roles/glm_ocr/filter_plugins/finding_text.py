"""The one form in which a finding is told as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def finding_text(findings: Sequence[Mapping[str, Any]]) -> str:
    """``findings`` as module_utils/findings.py makes them, the fix of each in English and Chinese."""
    return "\n".join(
        f"[{f['id']}] {f['severity']}: expected {f['expected']}; found {f['found']}.\n"
        f"  Fix: {f['fix']}\n  处理：{f['fix_zh']}"
        for f in findings
    )


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"finding_text": finding_text}
