#!/usr/bin/python
"""Take or give back the lock that keeps two controllers from changing one host."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any, Dict, Optional

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


def same(one: Dict[str, Any], other: Optional[Dict[str, Any]]) -> bool:
    return other is not None and all(str(one.get(name)) == str(other.get(name)) for name in IDENTITY)


def holder_of(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


def take(path: str, holder: Dict[str, Any]) -> bool:
    """Whether nobody held it.  A hard link is made or refused as a whole, also between two hosts' processes."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(holder, file)
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


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
    path, holder, replaced = (module.params[name] for name in ("path", "holder", "replaced"))
    found = holder_of(path)
    ours = same(holder, found)
    if module.params["state"] == "absent":
        if ours and not module.check_mode:
            os.unlink(path)
        held = False
    elif module.check_mode:
        held = not found or ours
    else:
        if found and not ours and same(found, replaced):
            os.unlink(path)
        held = ours or take(path, holder)
    # Who works on a host is no change of it.
    module.exit_json(changed=False, held=held, found=found)


if __name__ == "__main__":
    main()
