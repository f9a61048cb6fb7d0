#!/usr/bin/python
"""Take an instance out of a gateway's pool and put it back, through HAProxy's admin socket."""

from __future__ import annotations

import csv
import errno
import os
import socket as sockets
import tempfile
import time
from typing import Any, Dict, List, NamedTuple, Optional

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_pool
short_description: An instance in the pool of a gateway
description:
  - Runs on the gateway. What an operator decided is kept in HAProxy's server-state file, so that it outlives a reload
    and a boot; who is up is not, because that is what HAProxy's own checks find.
  - An instance that the gateway does not know, or a gateway that does not run, has nothing in flight.
options:
  socket: {type: path, required: true, description: HAProxy's admin socket.}
  states: {type: path, required: true, description: HAProxy's server-state file.}
  backend: {type: str, required: true, description: The pool.}
  instance: {type: str, required: true, description: The instance's name in the pool.}
  state:
    type: str
    default: described
    choices: [described, drained, removed, ready]
    description:
      - C(described) changes nothing.
      - C(drained) sends it no new request, and returns when none is in flight, or after I(timeout).
      - C(removed) does the same, and does not ask for its health any more.
      - C(ready) lets it have requests, and returns when it is up, or after I(timeout).
  timeout: {type: float, default: 0, description: Seconds to wait at most.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
runs: {type: bool, returned: always, description: Whether the gateway runs.}
member: {type: bool, returned: always, description: Whether the gateway knows the instance.}
serves: {type: bool, returned: always, description: Whether it gets requests.}
others: {type: list, elements: str, returned: always, description: The other instances that get requests.}
in_flight: {type: int, returned: always, description: Requests that this gateway has at the instance.}
status: {type: str, returned: always, description: What HAProxy says of it, with its last check.}
seconds: {type: float, returned: always, description: How long it was waited.}
"""

EXAMPLES = r"""
- gateway_pool:
    socket: /run/glm-ocr-gateway/admin.sock
    states: /var/lib/glm-ocr-gateway/servers
    backend: engine
    instance: npu-01
    state: drained
    timeout: 120
"""

#: Of srv_admin_state in `show servers state`: set through the admin socket (HAProxy's management guide).
FORCED_MAINTENANCE, FORCED_DRAIN = 0x01, 0x08
#: Of srv_op_state: up, or on its way up.
UP = ("1", "2")
COMMANDS = {"drained": "drain", "removed": "maint", "ready": "ready"}
WANTED = {"drained": FORCED_DRAIN, "removed": FORCED_MAINTENANCE, "ready": 0}
PAUSE_SECONDS = 0.2


class Problem(Exception):
    """HAProxy said something else than what it was asked for."""


class Server(NamedTuple):
    """One line of `show servers state`, by its columns, and what `show stat` adds."""

    columns: Dict[str, str]
    in_flight: int = 0
    status: str = ""

    @property
    def name(self) -> str:
        return self.columns["srv_name"]

    @property
    def forced(self) -> int:
        return int(self.columns["srv_admin_state"]) & (FORCED_MAINTENANCE | FORCED_DRAIN)

    @property
    def serves(self) -> bool:
        return self.columns["srv_op_state"] in UP and int(self.columns["srv_admin_state"]) == 0


# --- pure -------------------------------------------------------------------------------------------------


def servers(states: str, statistics: str, backend: str) -> Dict[str, Server]:
    """The pool, from `show servers state` and `show stat`."""
    counted = {}
    for row in csv.DictReader(statistics.lstrip("# ").splitlines()):
        if row["pxname"] == backend:
            status = " ".join(word for word in (row["status"], row["check_status"], row["check_code"]) if word)
            counted[row["svname"]] = (int(row["scur"] or 0), status)
    # The first line is the format's version.
    table = [line.lstrip("# ") for line in states.splitlines()[1:] if line.strip()]
    rows = list(csv.DictReader(table, delimiter=" "))
    return {row["srv_name"]: Server(row, *counted[row["srv_name"]]) for row in rows if row["be_name"] == backend}


def kept(pool: Dict[str, Server]) -> str:
    """The server-state file: those that an operator took out, each as if it were up, for its checks to find out."""
    out = [server.columns for server in pool.values() if server.forced]
    names = list(next(iter(pool.values())).columns)
    lines = [" ".join({**columns, "srv_op_state": "2"}[name] for name in names) for columns in out]
    return "\n".join(["1", "# " + " ".join(names), *lines, ""])


# --- edges ------------------------------------------------------------------------------------------------


def say(path: str, command: str) -> str:
    with sockets.socket(sockets.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(command.encode() + b"\n")
        parts: List[bytes] = []
        while True:
            part = connection.recv(65536)
            if not part:
                return b"".join(parts).decode(errors="replace")
            parts.append(part)


def order(path: str, command: str) -> None:
    """A command that says nothing when it was obeyed."""
    answer = say(path, command).strip()
    if answer:
        raise Problem(f"`{command}`: {answer}")


def ask(path: str, backend: str) -> Optional[Dict[str, Server]]:
    """The pool; None when no gateway runs."""
    for last in (False, False, False, True):
        try:
            return servers(say(path, "show servers state"), say(path, "show stat"), backend)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                return None
            # One that is being stopped or replaced.
            if last or error.errno not in (errno.ECONNRESET, errno.EPIPE):
                raise
            time.sleep(1)
    return None


def keep(path: str, text: str) -> bool:
    """Writes what is not there yet, for HAProxy's user to read."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if file.read() == text:
                return False
    descriptor, name = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)
    return True


def reached(server: Server, state: str) -> bool:
    return server.serves if state == "ready" else server.in_flight == 0


def run(options: Dict[str, Any], check_mode: bool) -> Dict[str, Any]:
    path, backend, name, state = options["socket"], options["backend"], options["instance"], options["state"]
    started = time.monotonic()
    pool, changed = ask(path, backend), False
    if state != "described" and pool and name in pool:
        changed = pool[name].forced != WANTED[state]
        if changed and not check_mode:
            order(path, f"set server {backend}/{name} state {COMMANDS[state]}")
            pool = ask(path, backend)
        if pool and not check_mode:
            # Also when nothing changed: a play may have ended between the two.
            changed = keep(options["states"], kept(pool)) or changed
        while pool and name in pool and not check_mode and not reached(pool[name], state):
            if time.monotonic() - started >= options["timeout"]:
                break
            time.sleep(PAUSE_SECONDS)
            pool = ask(path, backend)
    others: List[str] = sorted(other.name for other in (pool or {}).values() if other.serves and other.name != name)
    server = (pool or {}).get(name)
    return {
        "changed": changed,
        "runs": pool is not None,
        "member": server is not None,
        "serves": bool(server and server.serves),
        "others": others,
        "in_flight": server.in_flight if server else 0,
        "status": server.status if server else "",
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "required": True},
            "states": {"type": "path", "required": True},
            "backend": {"type": "str", "required": True},
            "instance": {"type": "str", "required": True},
            "state": {"type": "str", "default": "described", "choices": ["described", *COMMANDS]},
            "timeout": {"type": "float", "default": 0},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module.params, module.check_mode)
    except (Problem, OSError) as error:
        module.fail_json(msg=f"the gateway's admin socket {module.params['socket']}: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
