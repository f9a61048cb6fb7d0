"""The request guard: its modules and a site's limits as one folder, named by what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError


def guard_release(limits: Mapping[str, Any], source: str, library_dir: str) -> dict[str, Any]:
    """``path`` on the host, ``modules`` of the controller, and the text of ``limits.json``.

    The path has the SHA-256 of modules and limits in it, so a release that names it moves with both.  Raises
    ``AnsibleFilterError`` for a source without modules.
    """
    modules = sorted(Path(source).glob("request_guard/*.py"))
    if not modules:
        raise AnsibleFilterError(f"expected the request guard's modules in {source}/request_guard; found none")
    text = json.dumps({name: _number(value) for name, value in limits.items()}, indent=2, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode())
    for module in modules:
        digest.update(module.name.encode() + b"\0" + hashlib.sha256(module.read_bytes()).digest())
    path = f"{library_dir}/guard/{digest.hexdigest()}"
    return {"path": path, "modules": [str(module) for module in modules], "limits": text}


def _number(value: Any) -> Any:
    # A number given with -e is text.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"guard_release": guard_release}
