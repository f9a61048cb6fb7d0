"""The request guard: its modules and a site's limits as one folder, named by what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError


def guard_release(limits: Mapping[str, Any], source: str, library_dir: str) -> dict[str, Any]:
    """``path`` of the folder on the host, and ``files`` in it, path to text: the modules and ``limits.json``.

    It has the SHA-256 of modules and limits in its name, so a release that names it moves with both.  Raises
    ``AnsibleFilterError`` for a source without modules.
    """
    modules = {path.name: path.read_text() for path in sorted(Path(source).glob("request_guard/*.py"))}
    if not modules:
        raise AnsibleFilterError(f"expected the request guard's modules in {source}/request_guard; found none")
    text = json.dumps({name: _number(value) for name, value in limits.items()}, indent=2, sort_keys=True) + "\n"
    files = {f"request_guard/{name}": module for name, module in modules.items()} | {"limits.json": text}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    path = f"{library_dir}/guard/{digest}"
    return {"path": path, "files": {f"{path}/{name}": content for name, content in files.items()}}


def _number(value: Any) -> Any:
    # A number given with -e is text.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"guard_release": guard_release}
