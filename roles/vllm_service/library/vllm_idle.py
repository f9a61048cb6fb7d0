#!/usr/bin/python
"""Wait until the service has no request in flight, as its own metrics tell it."""

from __future__ import annotations

import re
import time
import urllib.error
from typing import Dict, Optional, Tuple

from ansible.module_utils import unix_http
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: vllm_idle
short_description: Wait until vLLM runs no request and none waits
description:
  - Asks /metrics of the service. Changes nothing and never fails for a service that stays busy or does not answer.
  - A service that does not listen has nothing in flight.
options:
  url: {type: str, required: true, description: Base URL of the service.}
  socket: {type: str, default: "", description: The engine's Unix socket behind the front, which is asked instead.}
  timeout: {type: float, required: true, description: Seconds to wait at most; in check mode it asks once.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
idle: {type: bool, returned: always, description: Whether nothing is in flight.}
found: {type: str, returned: always, description: What the service said last.}
seconds: {type: float, returned: always, description: How long it was waited.}
"""

EXAMPLES = r"""
- vllm_idle:
    url: http://127.0.0.1:8000
    timeout: 60
"""

#: One line of each per engine (vLLM's metrics reference): vllm:num_requests_running{engine="0",model_name="x"} 2.0
REQUESTS = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{.*\})? (\S+)$", re.MULTILINE)
#: A single question takes no longer: a service that hangs must not keep the deadline from being looked at.
QUESTION_SECONDS = 5.0


def in_flight(metrics: str) -> Tuple[Optional[int], str]:
    """The requests that run and wait over all engines, None when the metrics do not tell; and both as text."""
    counts: Dict[str, int] = {}
    for name, value in REQUESTS.findall(metrics):
        counts[name] = counts.get(name, 0) + int(float(value))
    if set(counts) != {"running", "waiting"}:
        return None, "its metrics do not tell the requests that run and wait"
    return sum(counts.values()), "{running} running, {waiting} waiting".format(**counts)


def ask(url: str, timeout: float, socket: str = "") -> Tuple[Optional[int], str]:
    try:
        with unix_http.ask(url, "/metrics", timeout, socket) as response:
            return in_flight(response.read().decode(errors="replace"))
    except urllib.error.URLError as error:
        if isinstance(error.reason, (ConnectionRefusedError, FileNotFoundError)):
            return 0, "nothing listens"
        return None, str(error)
    except (OSError, ValueError) as error:
        return None, str(error)


def wait(url: str, timeout: float, socket: str = "") -> Tuple[bool, str]:
    """Whether nothing was in flight within ``timeout`` seconds, and what was found last."""
    end = time.monotonic() + timeout
    while True:
        remaining = end - time.monotonic()
        requests, found = ask(url, min(max(remaining, 1.0), QUESTION_SECONDS), socket)
        if requests == 0 or remaining <= 0:
            return requests == 0, found
        time.sleep(min(0.5, remaining))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "socket": {"type": "str", "default": ""},
            "timeout": {"type": "float", "required": True},
        },
        supports_check_mode=True,
    )
    started = time.monotonic()
    timeout = 0.0 if module.check_mode else module.params["timeout"]
    idle, found = wait(module.params["url"], timeout, module.params["socket"])
    module.exit_json(changed=False, idle=idle, found=found, seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
