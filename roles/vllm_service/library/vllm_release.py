#!/usr/bin/python
"""Stage, activate, accept and describe the releases of the service, each in one round trip."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from datetime import datetime, timezone
from typing import Any, Dict, List, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.provided import difference, provide, read, write_atomically
from ansible.module_utils.releases import Release, Store

DOCUMENTATION = r"""
module: vllm_release
short_description: Releases of the vLLM service on a host
description:
  - A release is a unit and an environment file under an id that is a hash of everything the engine runs.
options:
  state:
    type: str
    default: described
    choices: [described, staged, active, good]
    description:
      - C(described) changes nothing and tells what runs, what is installed and what is kept.
      - C(staged) keeps the release on the host, once systemd accepts its unit. Nothing that runs is touched.
      - C(active) installs a kept release, restarts the service only if it runs something else or I(restart) says so,
        and returns once a generation succeeded. It fails with the service's journal.
      - C(good) remembers that the release answered its known-answer request, and forgets all but the last few.
  service:
    type: dict
    required: true
    description: The service on the host.
    options:
      name: {type: str, required: true, description: Name of the unit and of the container.}
      label: {type: str, required: true, description: The container's label that has the release's id.}
      container_engine: {type: str, required: true, description: C(docker) or C(podman).}
      store: {type: path, required: true, description: Folder of the kept releases.}
      unit_file: {type: path, required: true, description: Where the unit is installed.}
      environment_file: {type: path, required: true, description: Where the environment file is installed.}
      watchdog_timer: {type: path, default: "", description: Where the timer of a watchdog is, if there is one.}
      watchdog_state: {type: path, default: "", description: What a watchdog knows.}
  release: {type: str, description: Id of the release; needed but for C(described).}
  unit: {type: str, description: Text of the unit, for C(staged).}
  environment: {type: str, description: Text of the environment file, for C(staged).}
  tools:
    type: dict
    default: {}
    description: What the unit calls and mounts, for C(staged); path of each file to its text.
  folders:
    type: list
    elements: path
    default: []
    description: Folders that the unit mounts and that must be there, for C(staged).
  record:
    type: dict
    default: {}
    description: What the release consists of, for C(staged); C(wait_ready) is the command that sees a generation.
  restart: {type: bool, default: false, description: Whether C(active) restarts what it finds as it should be.}
  journal_lines: {type: int, default: 50, description: Lines of the journal shown when a start fails.}
  keep: {type: int, default: 5, description: How many releases C(good) keeps.}
  trial: {type: bool, default: false, description: Whether C(good) marks one that is measured alone.}
  by: {type: str, default: "", description: Who does it, for the history.}
  action: {type: str, default: deploy, description: What it is part of, for the history.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
installed: {type: str, returned: always, description: Id of the release whose unit is installed, or empty.}
installed_socket: {type: str, returned: always, description: The socket of that release behind the front, or empty.}
running: {type: str, returned: always, description: Id of the release whose container runs, or empty.}
image_id: {type: str, returned: always, description: Image of the container that runs, or empty.}
release: {type: str, returned: when staged, description: "C(release), so that it need not be computed again"}
last_good: {type: str, returned: always, description: Id of the release that was found good last, or empty.}
good: {type: bool, returned: always, description: Whether C(release) is the one that was found good last.}
restarted: {type: bool, returned: "when active, and when that failed", description: Whether the service was restarted.}
watched: {type: bool, returned: always, description: Whether a watchdog is on the host.}
watchdog: {type: dict, returned: when described, description: What it knows, and its C(age); empty for none.}
releases: {type: list, elements: dict, returned: when described, description: "Kept ones: id, good_at, trial, record"}
history: {type: list, elements: dict, returned: when described, description: The last twenty actions.}
service: {type: dict, returned: when described, description: What systemd says of the unit.}
engine_problem: {type: str, returned: when described, description: Why it cannot be told what runs; empty when it can.}
"""

EXAMPLES = r"""
- vllm_release:
    service:
      name: glm-ocr
      label: glm-ocr.release
      container_engine: docker
      store: /var/lib/glm-ocr/releases
      unit_file: /etc/systemd/system/glm-ocr.service
      environment_file: /etc/glm-ocr/glm-ocr.env
  register: described
"""

#: What a folder says that takes no more.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
#: Modes of what is installed: the environment may hold secrets.
UNIT_MODE, ENVIRONMENT_MODE = 0o644, 0o640
SHOWN = ("LoadState", "ActiveState", "SubState", "UnitFileState", "StateChangeTimestamp", "NRestarts")


# --- pure -------------------------------------------------------------------------------------------------


def release_of_unit(unit: Optional[str], label: str) -> str:
    """The id in the unit's ``--label LABEL=ID``; empty when there is none."""
    found = re.search(r"--label %s=(\S+)" % re.escape(label), unit or "")
    return found.group(1) if found else ""


def seconds_since_epoch(started_at: str) -> float:
    """Of a container engine's RFC 3339 time: 2026-01-02T03:04:05.123456789Z or ...+08:00."""
    matched = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)$", started_at)
    if not matched:
        raise ValueError(f"not a time of a container engine: {started_at!r}")
    whole, fraction, zone = matched.groups()
    moment = datetime.fromisoformat(whole + ("+00:00" if zone == "Z" else zone))
    return moment.timestamp() + float(fraction or 0)


#: Lines of the sandbox that systemd before 244, 245 and 247 does not know: it leaves them out, which is no fault.
UNKNOWN_TO_OLDER = re.compile(
    r"Unknown (?:lvalue|key name) '(?:ProtectKernelLogs|ProtectClock|ProtectProc)' in section"
)


# --- edges ------------------------------------------------------------------------------------------------


def run(command: List[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, check=False
    )


def verify(unit: str, file_name: str) -> List[str]:
    """What `systemd-analyze verify` says of the unit.  It wants a proper file name, and speaks of other units too."""
    folder = tempfile.mkdtemp()
    try:
        path = os.path.join(folder, file_name)
        write_atomically(path, unit, 0o644)
        output = run(["systemd-analyze", "verify", "--man=no", path]).stdout
    finally:
        shutil.rmtree(folder)
    return [line for line in output.splitlines() if file_name in line and not UNKNOWN_TO_OLDER.search(line)]


class Service:
    """The unit, the container behind it and the kept releases of one service."""

    def __init__(self, options: Dict[str, str]) -> None:
        """``options`` are those of the module's option ``service``."""
        self.options = options
        self.name = options["name"]
        self.unit_path = options["unit_file"]
        self.environment_path = options["environment_file"]
        self.store = Store(options["store"])
        #: Why the container engine cannot tell what runs; empty when it can.
        self.engine_problem = ""

    def container(self) -> Dict[str, Any]:
        """The container engine's description of the running container; empty when none runs."""
        try:
            done = subprocess.run(
                [self.options["container_engine"], "container", "inspect", self.name],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
                check=False,
            )
        except OSError as error:
            self.engine_problem = str(error)
            return {}
        absent = "no such container" in done.stderr.lower()
        self.engine_problem = "" if done.returncode == 0 or absent else done.stderr.strip()
        found = json.loads(done.stdout) if done.returncode == 0 else []
        return found[0] if found and found[0]["State"].get("Running") else {}

    def identity(self, container: Dict[str, Any], release: Optional[str]) -> Dict[str, Any]:
        """What is true of the service whose running container is ``container``, and of the release of that id."""
        last_good = self.store.last_good()
        installed = release_of_unit(read(self.unit_path), self.options["label"])
        kept = self.store.get(installed) if installed else None
        return {
            "installed": installed,
            "installed_socket": kept.record.get("socket", "") if kept else "",
            "running": ((container.get("Config") or {}).get("Labels") or {}).get(self.options["label"], ""),
            "image_id": container.get("Image", ""),
            "last_good": last_good.id if last_good else "",
            # A play that died between the swap and the proof leaves another one as the last good: not proven yet.
            # One that was only tried is proven anew, and then wanted.
            "good": bool(last_good and last_good.id == release and not last_good.trial),
            "watched": os.path.exists(self.options.get("watchdog_timer") or ""),
        }

    def older_than_its_files(self, container: Dict[str, Any]) -> bool:
        """Whether the container started before its unit or environment was last written: a restart is owed."""
        started = seconds_since_epoch(container["State"]["StartedAt"])
        return any(os.stat(path).st_mtime > started for path in (self.unit_path, self.environment_path))

    def differs(self, release: Release) -> bool:
        return (read(self.unit_path), read(self.environment_path)) != (release.unit, release.environment)

    def opened(self) -> Dict[str, int]:
        """The installed files that have another mode than they were installed with: path to that mode."""
        modes = {self.unit_path: UNIT_MODE, self.environment_path: ENVIRONMENT_MODE}
        return {path: mode for path, mode in modes.items() if stat.S_IMODE(os.stat(path).st_mode) != mode}

    def install(self, release: Release) -> None:
        os.makedirs(os.path.dirname(self.environment_path), mode=0o750, exist_ok=True)
        write_atomically(self.environment_path, release.environment, ENVIRONMENT_MODE)
        write_atomically(self.unit_path, release.unit, UNIT_MODE)

    def systemd(self) -> Dict[str, str]:
        shown = [f"--property={name}" for name in SHOWN]
        # Times without a question about the host's time zone.
        output = run(["env", "TZ=UTC", "systemctl", "show", self.name, *shown]).stdout
        return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)

    def start(self, release: Release, restart: bool) -> str:
        """Brings the installed release up.  Empty when a generation succeeded, else what was said instead."""
        if restart:
            # A crash loop of the release before must not keep this one from starting.
            run(["systemctl", "reset-failed", self.name])
        # systemd returns when ExecStartPost has seen a generation, also of a start that was under way.
        for command in (
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", self.name],
            ["systemctl", "restart" if restart else "start", self.name],
            release.record["wait_ready"],
        ):
            done = run(command)
            if done.returncode != 0:
                return f"`{' '.join(command)}`: {done.stdout.strip()}"
        return ""

    def watchdog(self) -> Dict[str, Any]:
        """What the watchdog's last round left, with its age in seconds; empty without a watchdog or a round."""
        path = self.options.get("watchdog_state") or ""
        if not os.path.exists(self.options.get("watchdog_timer") or ""):
            return {}
        try:
            return {**json.loads(read(path) or ""), "age": round(time.time() - os.stat(path).st_mtime, 1)}
        except (OSError, ValueError, TypeError):
            return {"name": "unknown", "found": f"{path} cannot be read", "age": 0.0}

    def journal(self, lines: int) -> str:
        return run(["journalctl", f"--unit={self.name}", f"--lines={lines}", "--no-pager", "--output=cat"]).stdout


def staged(module: AnsibleModule, service: Service) -> Dict[str, Any]:
    options = module.params
    kept = service.store.get(options["release"])
    # A kept release was accepted by systemd when it was staged.
    complaints = verify(options["unit"], f"{service.name}.service") if kept is None else []
    if complaints:
        module.fail_json(msg="\n".join(["systemd refuses the unit; nothing was changed:", *complaints]))
    provided = provide(options["tools"], options["folders"], write=not module.check_mode)
    if kept is None and not module.check_mode:
        record = {"staged_at": now(), "staged_by": options["by"], **options["record"]}
        service.store.stage(options["release"], options["unit"], options["environment"], record)
    diff = [
        *provided,
        difference(service.unit_path, read(service.unit_path), options["unit"]),
        difference(service.environment_path, read(service.environment_path), options["environment"]),
    ]
    changed = kept is None or bool(provided)
    return {"changed": changed, "diff": diff, "release": options["release"], **identity(module, service)}


def active(module: AnsibleModule, service: Service) -> Dict[str, Any]:
    options = module.params
    container = service.container()
    before = service.identity(container, options["release"])
    release = service.store.get(options["release"])
    if release is None:
        if module.check_mode:
            return {"changed": True, "restarted": True, **before}
        kept = ", ".join(kept.id for kept in service.store.all()) or "none"
        module.fail_json(msg=f"expected a kept release {options['release']}, found: {kept}")
    assert release is not None
    systemd = service.systemd()
    differs = service.differs(release)
    opened = {} if differs else service.opened()
    restart = (
        options["restart"] or differs or before["running"] != release.id or service.older_than_its_files(container)
    )
    state = (systemd.get("ActiveState"), systemd.get("UnitFileState"))
    changed = restart or bool(opened) or state != ("active", "enabled")
    if module.check_mode:
        return {"changed": changed, "restarted": restart, **before}
    if differs:
        service.install(release)
    for path, mode in opened.items():
        os.chmod(path, mode)
    problem = service.start(release, restart)
    if changed:
        entry = {"at": now(), "by": options["by"], "action": options["action"], "release": release.id}
        service.store.note({**entry, "result": "failed to start" if problem else "started"})
    if problem:
        module.fail_json(
            msg=f"{service.name} did not reach its first generation: {problem}\n"
            f"Last {options['journal_lines']} lines of its journal:\n{service.journal(options['journal_lines'])}",
            restarted=restart,
        )
    return {"changed": changed, "restarted": restart, **identity(module, service)}


def good(module: AnsibleModule, service: Service) -> Dict[str, Any]:
    options = module.params
    release = service.store.get(options["release"])
    # A release that is good, and was the last one found so, is not marked again.
    latest = service.store.last_good()
    changed = release is None or latest is None or latest.id != release.id or latest.trial
    if changed and not module.check_mode:
        service.store.mark_good(options["release"], options["trial"])
        entry = {"at": now(), "by": options["by"], "action": options["action"], "release": options["release"]}
        service.store.note({**entry, "result": "good"})
        service.store.prune(options["keep"], protect=options["release"])
    return {"changed": changed, **identity(module, service)}


def described(module: AnsibleModule, service: Service) -> Dict[str, Any]:
    releases = [
        {"id": kept.id, "good_at": kept.good_at, "trial": kept.trial, "record": kept.record}
        for kept in service.store.all()
    ]
    told = {"releases": releases, "history": service.store.history(20), "service": service.systemd()}
    identified = identity(module, service)
    return {
        "changed": False,
        **told,
        **identified,
        "engine_problem": service.engine_problem,
        "watchdog": service.watchdog(),
    }


def identity(module: AnsibleModule, service: Service) -> Dict[str, Any]:
    return service.identity(service.container(), module.params["release"])


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "described", "choices": ["described", "staged", "active", "good"]},
            "service": {
                "type": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "label": {"type": "str", "required": True},
                    "container_engine": {"type": "str", "required": True},
                    "store": {"type": "path", "required": True},
                    "unit_file": {"type": "path", "required": True},
                    "environment_file": {"type": "path", "required": True},
                    "watchdog_timer": {"type": "path", "default": ""},
                    "watchdog_state": {"type": "path", "default": ""},
                },
            },
            "release": {"type": "str"},
            "unit": {"type": "str"},
            "environment": {"type": "str"},
            "tools": {"type": "dict", "default": {}},
            "folders": {"type": "list", "elements": "path", "default": []},
            "record": {"type": "dict", "default": {}},
            "restart": {"type": "bool", "default": False},
            "journal_lines": {"type": "int", "default": 50},
            "keep": {"type": "int", "default": 5},
            "trial": {"type": "bool", "default": False},
            "by": {"type": "str", "default": ""},
            "action": {"type": "str", "default": "deploy"},
        },
        required_if=[
            ("state", "staged", ("release", "unit", "environment")),
            ("state", "active", ("release",)),
            ("state", "good", ("release",)),
        ],
        supports_check_mode=True,
    )
    states = {"described": described, "staged": staged, "active": active, "good": good}
    service = Service(module.params["service"])
    try:
        result = states[module.params["state"]](module, service)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        folder = os.path.dirname(error.filename or service.store.folder)
        module.fail_json(
            msg=f"Expected to write what a release needs; found {error}.\n"
            f"Fix: make room or the folder writable (`df -h {folder}`), then run the play again."
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
