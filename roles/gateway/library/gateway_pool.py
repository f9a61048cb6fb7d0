#!/usr/bin/python
"""Take an instance out of a gateway's pool and put it back: by HAProxy's admin socket and its server-state file."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import socket as sockets
import subprocess
import tempfile
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ansible.module_utils.alone import alone
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: gateway_pool
short_description: An instance in the pool of a gateway
description:
  - Runs on the gateway. What an operator decided is kept in HAProxy's server-state file, so that it outlives a reload
    and a boot; who is up is not, because that is what HAProxy's own checks find.
  - One that starts or reloads is waited for. One that does not run has nothing in flight, and does what the file says
    from its start on.
  - Look, order and memory of one call are one step for all that call this on a gateway.
options:
  socket: {type: path, required: true, description: HAProxy's admin socket.}
  states: {type: path, required: true, description: HAProxy's server-state file.}
  configuration: {type: path, required: true, description: "HAProxy's configuration, which names the instances."}
  service: {type: str, required: true, description: HAProxy's unit.}
  backend: {type: str, required: true, description: The pool.}
  instance: {type: str, default: "", description: The instance's name in the pool.}
  state:
    type: str
    default: described
    choices: [described, kept, drained, removed, ready]
    description:
      - C(described) changes nothing.
      - C(kept) has the server-state file fit the configuration, for a reload to read; it is of no instance.
      - C(drained) sends it no new request, and returns when none is in flight, or after I(timeout).
      - C(removed) does the same, and does not ask for its health any more.
      - C(ready) lets it have requests, and returns when it is up, or after I(timeout).
  min_others: {type: int, default: 0, description: An instance that serves is taken out only while so many others do.}
  timeout: {type: float, default: 0, description: Seconds to wait at most.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
runs: {type: bool, returned: always, description: Whether the gateway runs.}
member: {type: bool, returned: always, description: Whether the gateway knows the instance.}
found: {type: str, returned: always, description: "What was decided before: C(ready), C(drained) or C(removed)."}
serves: {type: bool, returned: always, description: Whether it gets requests.}
others: {type: list, elements: str, returned: always, description: The other instances that get requests.}
bare: {type: bool, returned: always, description: "Whether it serves, and fewer than I(min_others) others do."}
in_flight: {type: int, returned: always, description: Requests that this gateway has at the instance.}
status: {type: str, returned: always, description: What HAProxy says of it, with its last check.}
seconds: {type: float, returned: always, description: How long it was waited.}
"""

EXAMPLES = r"""
- gateway_pool:
    socket: /run/glm-ocr-gateway/admin.sock
    states: /var/lib/glm-ocr-gateway/servers
    configuration: /etc/glm-ocr-gateway/haproxy.cfg
    service: glm-ocr-gateway
    backend: engine
    instance: npu-01
    state: drained
    min_others: 1
    timeout: 120
"""

#: Of srv_admin_state in `show servers state`: set through the admin socket (HAProxy's management guide).
FORCED_MAINTENANCE, FORCED_DRAIN = 0x01, 0x08
#: Of srv_op_state: up, or on its way up.
UP = (1, 2)
COMMANDS = {"drained": "drain", "removed": "maint", "ready": "ready"}
WANTED = {"drained": FORCED_DRAIN, "removed": FORCED_MAINTENANCE, "ready": 0}
#: What a line of HAProxy's server-state file must have (version 1), each with what says nothing: no address, a weight
#: that is not the configured one and so not taken over, a first check that is still to come. The columns of TLS and of
#: the checks' own addresses may be left out, and are: the configuration has them.
COLUMNS = {
    name: value
    for name, _, value in (
        column.partition("=")
        for column in (
            "be_id=0 be_name=- srv_id=0 srv_name=- srv_addr=- srv_op_state=2 srv_admin_state=0 srv_uweight=1"
            " srv_iweight=1 srv_time_since_last_change=0 srv_check_status=1 srv_check_result=0 srv_check_health=0"
            " srv_check_state=0 srv_agent_state=0 bk_f_forced_id=0 srv_f_forced_id=0 srv_fqdn=- srv_port=0 srvrecord=-"
        ).split()
    )
}
#: Of a unit: a socket that is not there yet comes.
COMING = ("active", "activating", "reloading")
#: What a start or a reload may take, with names that the resolver does not know.
START_SECONDS = 20.0
PAUSE_SECONDS = 0.2


class Problem(Exception):
    """HAProxy said something else than what it was asked for."""


class Passing(Exception):
    """An answer of a HAProxy that is being replaced: the next one is whole."""


class Server(NamedTuple):
    """An instance, as HAProxy has it."""

    name: str
    op_state: int
    admin_state: int
    in_flight: int
    status: str

    @property
    def decided(self) -> str:
        if self.admin_state & FORCED_MAINTENANCE:
            return "removed"
        return "drained" if self.admin_state & FORCED_DRAIN else "ready"

    @property
    def serves(self) -> bool:
        return self.op_state in UP and self.admin_state == 0


class Pool(NamedTuple):
    """``ports`` has those of the configuration, which is what the next reload or start reads."""

    runs: bool
    servers: Dict[str, Server]
    ports: Dict[str, int]

    def others(self, name: str) -> List[str]:
        return sorted(server.name for server in self.servers.values() if server.serves and server.name != name)

    def bare(self, name: str, least: int) -> bool:
        return name in self.servers and self.servers[name].serves and len(self.others(name)) < least


# --- pure -------------------------------------------------------------------------------------------------


def rows(states: str, backend: str) -> List[Dict[str, str]]:
    """Of `show servers state`, or of the server-state file."""
    # The first line is the format's version.
    table = [line.lstrip("# ") for line in states.splitlines()[1:] if line.strip()]
    return [row for row in csv.DictReader(table, delimiter=" ") if row.get("be_name") == backend]


def servers(states: str, statistics: str, backend: str) -> Dict[str, Server]:
    """The pool, from `show servers state` and `show stat`."""
    counted = {}
    for row in csv.DictReader(statistics.lstrip("# ").splitlines()):
        if row["pxname"] == backend:
            status = " ".join(word for word in (row["status"], row["check_status"], row["check_code"]) if word)
            counted[row["svname"]] = (int(row["scur"] or 0), status)
    found = {}
    for row in rows(states, backend):
        name = row["srv_name"]
        if name not in counted:
            raise Passing(f"{name} in `show servers state`, and not in `show stat`")
        found[name] = Server(name, int(row["srv_op_state"]), int(row["srv_admin_state"]), *counted[name])
    return found


def ports(configuration: str, backend: str) -> Dict[str, int]:
    """The instances that the configuration names, with their ports."""
    section = re.search(rf"^backend {re.escape(backend)}$(.*?)(?=^[a-z]|\Z)", configuration, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\s+server (\S+) \S+:(\d+)(?=\s)", section.group(1) if section else "", re.MULTILINE)
    return {name: int(port) for name, port in lines}


def kept(decided: Dict[str, str], known: Dict[str, int], backend: str) -> str:
    """The server-state file: what an operator decided for instances that the configuration names, and nothing else.

    Each is as if it were up, for its checks to find out.  The format cannot do without a port: the configuration's.
    """
    out = {name: WANTED[decided.get(name, "ready")] for name in known}
    lines = [
        {"be_name": backend, "srv_name": name, "srv_admin_state": str(forced), "srv_port": str(known[name])}
        for name, forced in out.items()
        if forced
    ]
    table = [" ".join({**COLUMNS, **line}.values()) for line in lines]
    return "\n".join(["1", "# " + " ".join(COLUMNS), *table, ""])


def settled(pool: Pool, name: str, state: str) -> bool:
    """Whether there is nothing to wait for: one that does not run does it from its start on."""
    server = pool.servers.get(name)
    if server is None or not pool.runs:
        return True
    return server.decided == state and (server.serves if state == "ready" else server.in_flight == 0)


# --- edges ------------------------------------------------------------------------------------------------


def read(path: str) -> str:
    """Nothing for what is not there."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def unit_state(service: str) -> str:
    """systemd's ActiveState, empty where it does not tell."""
    command = ["systemctl", "show", "--property=ActiveState", service]
    said = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True, check=False
    )
    found = re.search(r"^ActiveState=(\w+)$", said.stdout, re.MULTILINE)
    return found.group(1) if found else ""


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


def table(path: str, command: str) -> str:
    """Its whole answer, which ends with an empty line."""
    answer = say(path, command)
    if not answer.endswith("\n\n"):
        raise Passing(f"`{command}`: an answer without an end")
    return answer


def order(path: str, command: str) -> None:
    """A command that says nothing when it was obeyed.  One that nobody heard is seen by its effect, as any other."""
    try:
        answer = say(path, command).strip()
    except (FileNotFoundError, ConnectionError):
        return
    if answer:
        raise Problem(f"`{command}`: {answer}")


def ask(path: str, backend: str, service: str) -> Optional[Dict[str, Server]]:
    """The pool; None when no gateway runs."""
    end = time.monotonic() + START_SECONDS
    while True:
        # Before the questions: what answers after a reload has read the file as it was before them.
        unit = unit_state(service)
        try:
            if unit != "reloading":
                return servers(table(path, "show servers state"), table(path, "show stat"), backend)
            trouble = "no end of its reload"
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if unit not in COMING:
                return None
            trouble = str(error)
        except (Passing, ConnectionError) as error:
            trouble = str(error)
        if time.monotonic() >= end:
            if unit == "activating":
                # It starts again and again, and reads the file each time.
                return None
            raise Problem(f"expected an answer within {START_SECONDS:g} s, found {trouble}; {service} is {unit}")
        time.sleep(PAUSE_SECONDS)


def look(options: Dict[str, Any]) -> Pool:
    backend = options["backend"]
    known = ports(read(options["configuration"]), backend)
    running = ask(options["socket"], backend, options["service"])
    if running is not None:
        return Pool(True, running, known)
    decided = {row["srv_name"]: int(row["srv_admin_state"]) for row in rows(read(options["states"]), backend)}
    return Pool(False, {name: Server(name, 0, decided.get(name, 0), 0, "does not run") for name in known}, known)


def keep(path: str, text: str, check_mode: bool) -> bool:
    """Writes what is not there yet, for HAProxy's user to read."""
    if read(path) == text:
        return False
    if not check_mode:
        descriptor, name = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    return True


def step(options: Dict[str, Any], check_mode: bool) -> Tuple[Pool, Pool, bool]:
    """The pool before and after what is to be done now, and whether anything was."""
    name, state, backend = options["instance"], options["state"], options["backend"]
    before = look(options)
    server = before.servers.get(name)
    if state == "described" or (server is None and state != "kept"):
        return before, before, False
    if state in ("drained", "removed") and before.bare(name, options["min_others"]):
        return before, before, False
    decided = {other.name: other.decided for other in before.servers.values()}
    if server:
        decided[name] = state
    # Before the order: a HAProxy that is started or reloaded between the two has it from the file.
    changed = keep(options["states"], kept(decided, before.ports, backend), check_mode)
    if server and server.decided != state:
        changed = True
        if before.runs and not check_mode:
            order(options["socket"], f"set server {backend}/{name} state {COMMANDS[state]}")
    return before, look(options) if changed and not check_mode else before, changed


def run(options: Dict[str, Any], check_mode: bool) -> Dict[str, Any]:
    started = time.monotonic()
    name, state, folder = options["instance"], options["state"], os.path.dirname(options["states"])
    acts = state != "described" and not check_mode
    found, changed = "", False
    while True:
        # Where there is no folder the role has not been yet.
        with alone(folder) if acts and os.path.isdir(folder) else contextlib.nullcontext():
            before, pool, now = step(options, check_mode)
        changed = changed or now
        found = found or (before.servers[name].decided if name in before.servers else "ready")
        bare = pool.bare(name, options["min_others"])
        if not acts or (bare and state != "ready") or settled(pool, name, state):
            break
        if time.monotonic() - started >= options["timeout"]:
            if pool.servers[name].decided != state:
                raise Problem(f"expected {name} {state}, found it {pool.servers[name].decided} after it was ordered")
            break
        # What was ordered is looked at each time, and ordered again if something undid it.
        time.sleep(PAUSE_SECONDS)
    server = pool.servers.get(name)
    return {
        "changed": changed,
        "runs": pool.runs,
        "member": server is not None,
        "found": found,
        "serves": bool(server and server.serves),
        "others": pool.others(name),
        "bare": bare,
        "in_flight": server.in_flight if server else 0,
        "status": server.status if server else "",
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "required": True},
            "states": {"type": "path", "required": True},
            "configuration": {"type": "path", "required": True},
            "service": {"type": "str", "required": True},
            "backend": {"type": "str", "required": True},
            "instance": {"type": "str", "default": ""},
            "state": {"type": "str", "default": "described", "choices": ["described", "kept", *COMMANDS]},
            "min_others": {"type": "int", "default": 0},
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
