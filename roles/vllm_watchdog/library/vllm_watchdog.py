#!/usr/bin/python
"""Ensure the watchdog of the service, its absence, or tell what it knows, each in one round trip."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any, Dict, List

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.provided import difference, provide, read

DOCUMENTATION = r"""
module: vllm_watchdog
short_description: The timer that looks whether the service hangs
options:
  state:
    type: str
    default: described
    choices: [described, present, absent, reset]
    description:
      - C(described) changes nothing and tells what the watchdog knows.
      - C(present) ensures its files, and that its timer runs, at every boot too.
      - C(absent) stops it and removes all it has.
      - C(reset) has it forget what it knows, the restarts before among that.
  name: {type: str, required: true, description: Name of its timer and of its service.}
  folder: {type: path, required: true, description: Where units are installed.}
  units: {type: dict, default: {}, description: "Suffix of a unit (C(service), C(timer)) to its text, for C(present)."}
  tools: {type: dict, default: {}, description: "Path of each other file to its text, for C(present)."}
  kept: {type: path, required: true, description: The file that is kept from round to round.}
  removed: {type: list, elements: path, default: [], description: Files of its own besides, for C(absent).}
author: [glm-ocr-ascend]
"""

RETURN = r"""
installed: {type: bool, returned: always, description: Whether its timer is on the host.}
running: {type: bool, returned: always, description: Whether its timer runs.}
known: {type: dict, returned: always, description: What its last round left; empty for none.}
age: {type: float, returned: always, description: Seconds since then; 0 for none.}
"""

EXAMPLES = r"""
- vllm_watchdog:
    name: glm-ocr-watchdog
    folder: /etc/systemd/system
    kept: /var/lib/glm-ocr/watchdog.json
  register: watched
"""

UNIT_MODE, TOOL_MODE = 0o644, 0o755


def systemctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemctl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        check=False,
    )


class Watchdog:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.options = module.params
        self.timer, self.service = (f"{module.params['name']}.{suffix}" for suffix in ("timer", "service"))
        self.write = not module.check_mode

    def path(self, unit: str) -> str:
        return os.path.join(self.options["folder"], unit)

    def asked(self, *arguments: str) -> None:
        """Has systemd do it, or ends the module with what it says."""
        done = systemctl(*arguments)
        if done.returncode != 0:
            self.module.fail_json(msg=f"`systemctl {' '.join(arguments)}`: {done.stdout.strip()}")

    def described(self) -> Dict[str, Any]:
        kept = read(self.options["kept"])
        try:
            known = dict(json.loads(kept or "{}"))
        except ValueError:
            known = {}
        return {
            "installed": os.path.exists(self.path(self.timer)),
            "running": systemctl("is-active", "--quiet", self.timer).returncode == 0,
            "known": known,
            "age": round(time.time() - os.stat(self.options["kept"]).st_mtime, 1) if known else 0.0,
        }

    def present(self) -> List[Dict[str, str]]:
        units = {self.path(f"{self.options['name']}.{suffix}"): text for suffix, text in self.options["units"].items()}
        diff = provide(units, [], self.write, UNIT_MODE)
        starts = bool(diff) or any(
            systemctl(question, "--quiet", self.timer).returncode != 0 for question in ("is-active", "is-enabled")
        )
        # The next round is another process: it takes the tools as they are.
        diff = [*provide(self.options["tools"], [], self.write, TOOL_MODE), *diff]
        if starts:
            diff.append({"prepared": f"{self.timer}: enabled and started\n"})
            if self.write:
                self.asked("daemon-reload")
                self.asked("enable", self.timer)
                self.asked("restart", self.timer)
        return diff

    def absent(self) -> List[Dict[str, str]]:
        units = [self.path(self.timer), self.path(self.service)]
        there = [path for path in [*units, self.options["kept"], *self.options["removed"]] if os.path.exists(path)]
        diff = [difference(path, read(path), "") for path in there]
        if there and self.write:
            if os.path.exists(self.path(self.timer)):
                self.asked("disable", "--now", self.timer)
                # A round that is under way.
                self.asked("stop", self.service)
            for path in there:
                os.unlink(path)
            self.asked("daemon-reload")
            # One that failed stays among the failed without its unit.  Of one that did not it is an error: not asked.
            systemctl("reset-failed", self.service)
        return diff

    def reset(self) -> List[Dict[str, str]]:
        if not os.path.exists(self.options["kept"]):
            return []
        if self.write:
            # No round that is under way may write what it read before.
            self.asked("stop", self.timer, self.service)
            os.unlink(self.options["kept"])
            systemctl("reset-failed", self.service)
            self.asked("start", self.timer)
        return [{"prepared": f"{self.options['kept']}: forgotten\n"}]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "described", "choices": ["described", "present", "absent", "reset"]},
            "name": {"type": "str", "required": True},
            "folder": {"type": "path", "required": True},
            "units": {"type": "dict", "default": {}},
            "tools": {"type": "dict", "default": {}},
            "kept": {"type": "path", "required": True},
            "removed": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    watchdog = Watchdog(module)
    change = {"present": watchdog.present, "absent": watchdog.absent, "reset": watchdog.reset}
    state = module.params["state"]
    diff = change[state]() if state in change else []
    module.exit_json(changed=bool(diff), diff=diff, **watchdog.described())


if __name__ == "__main__":
    main()
