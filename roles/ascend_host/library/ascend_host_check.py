#!/usr/bin/python
"""Look at an Ascend host and say everything that stands in the way of a deployment, in one round trip."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.findings import Finding, as_result

DOCUMENTATION = r"""
module: ascend_host_check
short_description: Read-only checks of a host before a deployment
description:
  - Changes nothing and never fails on a finding, so that all of them can be shown together.
options:
  container_engine: {type: str, required: true, description: C(docker) or C(podman).}
  container_name: {type: str, required: true, description: Our own container; what it holds is no conflict.}
  image: {type: str, required: true, description: Image name; disk is asked for only while it is absent.}
  image_space_gib: {type: int, required: true, description: Free space the image needs, in GiB.}
  weights_path: {type: str, required: true, description: Folder of the model.}
  port: {type: int, required: true, description: TCP port that must be free or ours.}
  devices: {type: list, elements: str, required: true, description: Device nodes that must exist.}
  driver_paths: {type: list, elements: str, required: true, description: Driver files that must exist.}
author: [glm-ocr-ascend]
"""

RETURN = r"""
findings: {type: list, elements: dict, returned: always, description: "id, expected, found, fix"}
message: {type: str, returned: always, description: The findings as text.}
"""

EXAMPLES = r"""
- ascend_host_check:
    container_engine: docker
    container_name: glm-ocr
    image: quay.io/ascend/vllm-ascend:v0.18.0rc1
    image_space_gib: 40
    weights_path: /opt/atomgit/weights/GLM-OCR-bf16
    port: 8000
    devices: [/dev/davinci0]
    driver_paths: [/usr/local/bin/npu-smi]
"""


@dataclass(frozen=True)
class Holder:
    """A process that listens on the port; ``ancestors`` are its own pid and those of its parents."""

    pid: int
    command: str
    ancestors: Tuple[int, ...]


# --- pure: what the observations mean ---------------------------------------------------------------------


def check_engine(name: str, version: Optional[str], error: str) -> List[Finding]:
    if version:
        return []
    fix = f"install {name} and start it: systemctl enable --now {name}"
    if name == "podman":
        fix = "install podman; `podman info` must work for root"
    return [Finding("HOST_ENGINE", f"a working {name}", error or "no answer", fix)]


def check_space(image: str, path: str, free_bytes: int, needed_gib: int) -> List[Finding]:
    free_gib = free_bytes / 2**30
    if free_gib >= needed_gib:
        return []
    return [
        Finding(
            "HOST_DISK",
            f"{needed_gib} GiB free under {path} for {image}",
            f"{free_gib:.1f} GiB",
            f"free space (`df -h {path}`), or set ascend_host_image_space_gib if the image is smaller",
        )
    ]


def check_paths(identifier: str, what: str, missing: Iterable[str], fix: str) -> List[Finding]:
    names = list(missing)
    return [Finding(identifier, what, "missing: " + ", ".join(names), fix)] if names else []


def check_weights(path: str, names: Optional[List[str]]) -> List[Finding]:
    """``names`` are the folder's entries, None when it is not a folder."""
    expected = f"the model in {path} (config.json and *.safetensors)"
    fix = f"put the weights there (`ls {path}`), or correct glm_ocr_weights_path"
    if names is None:
        return [Finding("HOST_WEIGHTS", expected, "no such folder", fix)]
    if not names:
        return [Finding("HOST_WEIGHTS", expected, "an empty folder: is its file system mounted?", fix)]
    missing = [] if "config.json" in names else ["config.json"]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    return check_paths("HOST_WEIGHTS", expected, missing, fix)


def check_port(port: int, holders: List[Holder], own_pid: Optional[int]) -> List[Finding]:
    """``own_pid`` is the pid of our running container's first process, None when it does not run."""
    foreign = [holder for holder in holders if own_pid is None or own_pid not in holder.ancestors]
    return [
        Finding(
            "HOST_PORT",
            f"TCP port {port} free, or held by our own service",
            f"held by pid {holder.pid}: {holder.command}",
            f"stop that process (`ss -lntp | grep ':{port} '`), or choose another glm_ocr_port",
        )
        for holder in foreign
    ]


def listening_inodes(table: str, port: int) -> List[str]:
    """Socket inodes that listen on ``port`` in the text of /proc/net/tcp or tcp6 (proc(5): state 0A)."""
    inodes = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
            inodes.append(fields[9])
    return inodes


# --- edges: what is observed ------------------------------------------------------------------------------


def run(command: List[str]) -> Tuple[int, str, str]:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, check=False)
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, "", f"`{' '.join(command)}` did not answer within 60 s"
    return done.returncode, done.stdout.decode(errors="replace").strip(), done.stderr.decode(errors="replace").strip()


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        # The command in parentheses may hold spaces: fields count from behind the last one.
        return int(file.read().rsplit(")", 1)[1].split()[1])


def ancestors(pid: int) -> Tuple[int, ...]:
    chain = []
    while pid > 0:
        chain.append(pid)
        try:
            pid = parent(pid)
        except OSError:
            break
    return tuple(chain)


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode(errors="replace").strip()


def port_holders(port: int) -> List[Holder]:
    inodes = set()
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}", encoding="ascii") as file:
                inodes.update(listening_inodes(file.read(), port))
        except FileNotFoundError:  # a kernel without IPv6
            continue
    targets = {f"socket:[{inode}]" for inode in inodes}
    holders = []
    for entry in os.listdir("/proc") if targets else []:
        if not entry.isdigit():
            continue
        folder = f"/proc/{entry}/fd"
        try:
            if any(os.readlink(os.path.join(folder, fd)) in targets for fd in os.listdir(folder)):
                holders.append(Holder(int(entry), command_of(int(entry)), ancestors(int(entry))))
        except OSError:  # the process ended meanwhile
            continue
    if targets and not holders:
        holders.append(Holder(0, "a process in another container or of the kernel", ()))
    return holders


def is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def look(arguments: Dict[str, Any]) -> List[Finding]:
    engine = arguments["container_engine"]
    findings: List[Finding] = []
    if not os.path.isdir("/run/systemd/system"):
        found = "another init system"
        findings.append(Finding("HOST_SYSTEMD", "systemd as init", found, "boot the host with systemd"))

    root_format = "{{.DockerRootDir}}" if engine == "docker" else "{{.Store.GraphRoot}}"
    rc, store, error = run([engine, "info", "--format", root_format])
    findings += check_engine(engine, store if rc == 0 else None, error)
    own_pid = None
    if rc == 0:
        if run([engine, "image", "inspect", arguments["image"]])[0] != 0 and os.path.isdir(store):
            free = shutil.disk_usage(store).free
            findings += check_space(arguments["image"], store, free, arguments["image_space_gib"])
        rc, pid, _ = run([engine, "container", "inspect", "--format", "{{.State.Pid}}", arguments["container_name"]])
        own_pid = int(pid) if rc == 0 and pid.isdigit() and int(pid) > 0 else None

    findings += check_paths(
        "HOST_DEVICES",
        "the device nodes of the inventory",
        [path for path in arguments["devices"] if not is_device(path)],
        "check the driver and the cards (`npu-smi info`, `ls -l /dev/davinci*`), or correct glm_ocr_devices",
    )
    findings += check_paths(
        "HOST_DRIVER",
        "the driver's files",
        [path for path in arguments["driver_paths"] if not os.path.exists(path)],
        "install the NPU driver and firmware, or correct glm_ocr_driver_paths",
    )
    weights = arguments["weights_path"]
    findings += check_weights(weights, sorted(os.listdir(weights)) if os.path.isdir(weights) else None)
    findings += check_port(arguments["port"], port_holders(arguments["port"]), own_pid)
    return findings


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "container_engine": {"type": "str", "required": True},
            "container_name": {"type": "str", "required": True},
            "image": {"type": "str", "required": True},
            "image_space_gib": {"type": "int", "required": True},
            "weights_path": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
            "devices": {"type": "list", "elements": "str", "required": True},
            "driver_paths": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **as_result(look(module.params), "the machine"))


if __name__ == "__main__":
    main()
