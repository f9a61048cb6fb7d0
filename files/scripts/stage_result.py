"""What the stage scripts share: exit statuses, the engine's versions, an atomic JSON writer, argument types.

Standard library only, and quick to import: a benchmark's start-up is part of what it costs.
"""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-ascend", "torch", "torch-npu", "transformers")
EXIT_STATUS = {"PASS": 0, "FAIL": 1, "ERROR": 2}  # in order of severity


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def engine_versions() -> dict[str, str | None]:
    """Versions of the engine's packages installed for this Python; None for an absent one."""
    return {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str | None:
    """The version of a distribution installed for this Python; None when it is absent."""
    module = package.replace("-", "_")
    if module not in sys.modules and find_spec(module) is None:
        return None
    from importlib.metadata import PackageNotFoundError, version  # slow to load, and only the engine's Python needs it

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing, so that no reader meets half a report.  Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def link(path: Path, target: Path) -> None:
    """Makes ``path`` a relative link to ``target``, in one step.  Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.symlink_to(os.path.relpath(target, path.parent))
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """As ``write_text``; raises ``ValueError`` for NaN and infinity, which are no JSON."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def finite(text: str) -> float:
    """An argparse type: a number from 0 up.  Infinity and NaN would let any reading pass."""
    if not 0 <= (number := float(text)) < math.inf:
        raise ValueError(text)
    return number
