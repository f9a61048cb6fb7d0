#!/usr/bin/python
"""Take or give back the lock that keeps two controllers from changing one host."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import datetime, timezone
from typing import Any, Dict, Optional, Tuple

from ansible.module_utils.alone import alone
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: deploy_lock
short_description: A host's lock against a second controller
description:
  - The lock is a file that says who holds it. It appears complete or not at all. Check mode only looks.
options:
  state: {type: str, default: present, choices: [present, absent], description: Take it or give it back.}
  path: {type: path, required: true, description: The lock file.}
  holder: {type: dict, required: true, description: "Who takes it: who, since, machine, pid, started."}
  replaced: {type: dict, description: Take it over if this is still the one who holds it.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
held: {type: bool, returned: always, description: Whether C(holder) holds it now, or could in check mode.}
found: {type: dict, returned: always, description: Who held it; empty for nobody.}
"""

EXAMPLES = r"""
- deploy_lock:
    path: /run/lock/glm-ocr.deploy
    holder: "{{ '' | this_controller }}"
"""

IDENTITY = ("machine", "pid", "started")
TOLD = (*IDENTITY, "who", "since")


def same(one: Dict[str, Any], other: Optional[Dict[str, Any]]) -> bool:
    return other is not None and all(str(one.get(name)) == str(other.get(name)) for name in IDENTITY)


def holder_of(path: str) -> Dict[str, Any]:
    """Who holds the lock, empty for nobody.  A file that does not tell is held by someone unknown, never by nobody."""
    try:
        with open(path, encoding="utf-8") as file:
            text, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        text, status = "", os.stat(path)
    try:
        holder = dict(json.loads(text))
        if all(name in holder for name in TOLD) and str(holder["pid"]).isdigit():
            return holder
    except (ValueError, TypeError):
        pass
    since = datetime.fromtimestamp(status.st_mtime, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    who = f"someone whom {path} does not name (it is no lock of this project)"
    return {"who": who, "since": since, "machine": "unknown", "pid": 0, "started": str(status.st_mtime_ns)}


def write(path: str, holder: Dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(holder, file)
    os.replace(temporary, path)


def take(
    path: str, holder: Dict[str, Any], replaced: Optional[Dict[str, Any]] = None, check_mode: bool = False
) -> Tuple[bool, Dict[str, Any]]:
    """Whether ``holder`` holds the lock now, or could in check mode; and who held it before."""
    with alone(os.path.dirname(path)):
        found = holder_of(path)
        if same(holder, found):
            return True, found
        free = not found or (same(found, replaced) and not check_mode)
        if free and not check_mode:
            write(path, holder)
        return free, found


def give_back(path: str, holder: Dict[str, Any], check_mode: bool = False) -> Dict[str, Any]:
    """Who held the lock; the lock of another stays."""
    with alone(os.path.dirname(path)):
        found = holder_of(path)
        if same(holder, found) and not check_mode:
            os.unlink(path)
        return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "present", "choices": ["present", "absent"]},
            "path": {"type": "path", "required": True},
            "holder": {"type": "dict", "required": True},
            "replaced": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    path, holder, check_mode = module.params["path"], module.params["holder"], module.check_mode
    if module.params["state"] == "absent":
        held, found = False, give_back(path, holder, check_mode)
    else:
        held, found = take(path, holder, module.params["replaced"], check_mode)
    # Who works on a host is no change of it.
    module.exit_json(changed=False, held=held, found=found)


if __name__ == "__main__":
    main()
