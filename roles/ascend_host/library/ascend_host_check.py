#!/usr/bin/python
"""Look at an Ascend host and say everything that stands in the way of a deployment, in one round trip."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ansible.module_utils import host_checks as host
from ansible.module_utils import npu_checks as npu
from ansible.module_utils import npu_smi
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.disk import free_bytes
from ansible.module_utils.findings import Finding, as_data

DOCUMENTATION = r"""
module: ascend_host_check
short_description: Read-only checks of a host before a deployment
description:
  - Changes nothing and never fails on a finding, so that all of them can be shown together.
options:
  container_engine: {type: str, required: true, description: C(docker) or C(podman).}
  container_engine_path: {type: str, required: true, description: Where the unit will call it.}
  container_name: {type: str, required: true, description: Our own container; what it holds is no conflict.}
  neighbours: {type: list, elements: str, required: true, description: Containers that this play runs on this host too.}
  image: {type: str, required: true, description: Image name; disk is asked for only while it is absent.}
  image_space_gib: {type: int, required: true, description: Free space the image needs, in GiB.}
  memory_gib: {type: int, required: true, description: "Memory in GiB; asked for while the engine does not run."}
  shm_size: {type: str, required: true, description: Size of /dev/shm in the container.}
  state_path: {type: str, required: true, description: Folder of releases, caches and builds.}
  state_space_gib: {type: int, required: true, description: "Free space that folder needs, in GiB."}
  port: {type: int, required: true, description: TCP port that must be free or ours.}
  front_unit: {type: str, required: true, description: Unit of our front, which may hold the port as well.}
  devices: {type: list, elements: str, required: true, description: Device nodes that must exist.}
  driver_paths: {type: list, elements: str, required: true, description: Driver files that must exist.}
  driver_versions: {type: list, elements: str, required: true, description: Releases of Ascend HDK the image supports.}
  visible_devices: {type: str, description: ASCEND_RT_VISIBLE_DEVICES; unset when it is not given.}
  npus_needed: {type: int, required: true, description: NPUs the engine starts on.}
  memory_utilization: {type: float, required: true, description: Share of an NPU's memory the engine reserves.}
  controller_epoch: {type: float, required: true, description: "The controller's clock, in seconds since 1970."}
  clock_skew_seconds: {type: int, required: true, description: "Skew that is tolerated, the way to the host included."}
author: [glm-ocr-ascend]
"""

RETURN = r"""
findings: {type: list, elements: dict, returned: always, description: "id, severity, expected, found, fix, fix_zh"}
"""

EXAMPLES = r"""
- ascend_host_check:
    container_engine: docker
    container_engine_path: /usr/bin/docker
    container_name: glm-ocr
    neighbours: [glm-ocr-1]
    image: quay.io/ascend/vllm-ascend:v0.18.0rc1
    image_space_gib: 40
    memory_gib: 16
    shm_size: 1g
    state_path: /var/lib/glm-ocr
    state_space_gib: 1
    port: 8000
    front_unit: glm-ocr-front.service
    devices: [/dev/davinci0]
    driver_paths: [/usr/local/bin/npu-smi]
    driver_versions: ["25.5"]
    visible_devices: "0"
    npus_needed: 1
    memory_utilization: 0.85
    controller_epoch: "{{ now().timestamp() }}"
    clock_skew_seconds: 30
"""

#: What `ENGINE info` is asked for: version and the folder of the images.
ENGINE_FORMAT = {
    "docker": "{{.ServerVersion}} {{.DockerRootDir}}",
    "podman": "{{.Version.Version}} {{.Store.GraphRoot}}",
}
VERSION_INFO = "/usr/local/Ascend/driver/version.info"
PCI_DEVICES = "/sys/bus/pci/devices"


def run(command: Sequence[str], timeout: float = 60) -> Tuple[int, str, str]:
    """Exit status, standard output and error.  127: it cannot be run, 124: it did not answer."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not installed"
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver it does not even die of SIGKILL
            process.communicate(timeout=1)
        return 124, "", f"`{' '.join(command)}` did not answer within {timeout:.0f} s"
    return process.returncode, output.decode(errors="replace").strip(), errors.decode(errors="replace").strip()


def read(path: str) -> str:
    """The text of a file, empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# --- processes --------------------------------------------------------------------------------------------


def parent(pid: int) -> int:
    # The command in parentheses may hold spaces: fields count from behind the last one.
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def ancestors(pid: int) -> Tuple[int, ...]:
    chain = []
    while pid > 0:
        chain.append(pid)
        pid = parent(pid)
    return tuple(chain)


def port_holders(port: int) -> List[host.Holder]:
    inodes = [inode for name in ("tcp", "tcp6") for inode in host.listening_inodes(read(f"/proc/net/{name}"), port)]
    targets = {f"socket:[{inode}]" for inode in inodes}
    holders = []
    for entry in os.listdir("/proc") if targets else []:
        if not entry.isdigit():
            continue
        folder = f"/proc/{entry}/fd"
        try:
            if any(os.readlink(os.path.join(folder, fd)) in targets for fd in os.listdir(folder)):
                command = read(f"/proc/{entry}/cmdline").replace("\0", " ").strip()
                holders.append(host.Holder(int(entry), command, ancestors(int(entry))))
        except OSError:  # the process ended meanwhile
            continue
    if targets and not holders:
        holders.append(host.Holder(0, "a process in another container or of the kernel", ()))
    return holders


def npu_holders(processes: Sequence[npu_smi.Process], engine: str) -> Dict[int, host.Holder]:
    """Who holds the NPUs, by pid.  Not the command line: that of a foreign service may hold its keys."""
    holders: Dict[int, host.Holder] = {}
    containers = {"": ""}
    for process in processes:
        pid = process.pid
        identifier = host.container_id(read(f"/proc/{pid}/cgroup"))
        if identifier not in containers:
            rc, name, _ = run([engine, "container", "inspect", "--format", "{{.Name}}", identifier])
            containers[identifier] = name.lstrip("/") if rc == 0 else f"{identifier[:12]}, unknown to {engine}"
        command = process.name or read(f"/proc/{pid}/comm").strip() or "a process that is not seen here"
        holders[pid] = host.Holder(pid, command, ancestors(pid), containers[identifier])
    return holders


# --- what is looked at ------------------------------------------------------------------------------------


def look_at_engine(arguments: Dict[str, Any]) -> Tuple[Optional[int], List[Finding]]:
    """The pid of our running container, None when there is none, and the findings."""
    engine, image, name = arguments["container_engine"], arguments["image"], arguments["container_name"]
    rc, output, error = run([engine, "info", "--format", ENGINE_FORMAT[engine]])
    version, _, store = output.partition(" ") if rc == 0 else ("", "", "")
    findings: List[Finding] = host.check_engine(engine, version, error)
    if not version:
        return None, findings
    path = arguments["container_engine_path"]
    findings += host.check_engine_path(engine, path, os.access(path, os.X_OK), shutil.which(engine))

    rc, architecture, _ = run([engine, "image", "inspect", "--format", "{{.Architecture}}", image])
    if rc == 0:
        findings += host.check_architecture(image, architecture, os.uname().machine)
    elif os.path.isdir(store):
        needed = arguments["image_space_gib"]
        findings += host.check_space(image, store, free_bytes(store), needed, "ascend_host_image_space_gib")

    rc, output, _ = run([engine, "container", "inspect", name])
    container = json.loads(output)[0] if rc == 0 else {}
    labels = (container["Config"]["Labels"] or {}) if container else None
    findings += host.check_container(name, labels, engine)
    pid = container["State"]["Pid"] if host.OUR_LABEL in (labels or {}) else 0
    return pid or None, findings


def runs(engine: str, name: str) -> bool:
    """Whether the container of that name runs."""
    return run([engine, "container", "inspect", "--format", "{{.State.Running}}", name])[:2] == (0, "true")


def look_at_npus(arguments: Dict[str, Any], own_pid: Optional[int]) -> List[Finding]:
    devices, needed = arguments["devices"], arguments["npus_needed"]
    mapped = host.card_numbers(devices)
    findings: List[Finding] = []
    visible, found = npu.visible_ids(arguments["visible_devices"], len(mapped), needed)
    findings += found or npu.check_idle(len(visible), needed)

    table = npu_smi.Table((), ())
    chips: Dict[int, npu_smi.Chip] = {}
    try:
        table = npu_smi.parse_info(ask_npu_smi(arguments["driver_paths"]))
        nodes = set(host.card_numbers(os.path.join("/dev", name) for name in os.listdir("/dev")))
        chips = npu_smi.by_device_number(table.chips, nodes, lambda: ask_npu_smi(arguments["driver_paths"], "-m"))
        findings += npu.check_absent(chips, host.card_numbers(filter(is_device, devices)))
    except npu_smi.NpuSmiError as error:
        findings += npu.check_npu_smi(str(error))

    cards = npu.cards_of(chips, mapped, visible, needed)
    holders = npu_holders(table.processes, arguments["container_engine"])
    findings += npu.check_health(cards)
    findings += npu.check_occupied(cards, table.processes, holders, own_pid)
    findings += npu.check_device_memory(cards, table.processes, holders, own_pid, arguments["memory_utilization"])
    on_bus = pci_npus()
    findings += npu.check_pci(on_bus, table.chips)
    # Those we map, else whatever the host has.
    lines = [npu.product_line(card.chip) for card in cards if card.mapped] or [device.line for device in on_bus]
    findings += npu.check_supported(lines)
    findings += npu.check_variant(arguments["image"], lines)
    return findings


def ask_npu_smi(driver_paths: Sequence[str], *options: str) -> str:
    """What `npu-smi info` prints.  Raises ``NpuSmiError`` when it is missing, fails or hangs."""
    name = next((path for path in driver_paths if os.path.basename(path) == "npu-smi"), "npu-smi")
    # The search path of sudo often lacks /usr/local, where the driver puts it.
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/bin", "/usr/local/sbin"])
    rc, output, error = run([shutil.which(name, path=places) or name, "info", *options])
    if rc != 0:
        raise npu_smi.NpuSmiError(f"exit status {rc}: {' '.join((error or output).split())[:300]}")
    return output


def pci_npus() -> List[npu.PciDevice]:
    found = []
    for bus_id in sorted(os.listdir(PCI_DEVICES)) if os.path.isdir(PCI_DEVICES) else []:
        if read(f"{PCI_DEVICES}/{bus_id}/vendor").strip() == npu.PCI_VENDOR:
            line = npu.PCI_LINES.get(read(f"{PCI_DEVICES}/{bus_id}/device").strip())
            found += [npu.PciDevice(bus_id, line)] if line else []
    return found


def is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def look_at_driver(arguments: Dict[str, Any]) -> List[Finding]:
    missing = [path for path in arguments["driver_paths"] if not os.path.exists(path)]
    findings: List[Finding] = host.check_driver_files(missing)
    path = next((path for path in arguments["driver_paths"] if os.path.basename(path) == "version.info"), VERSION_INFO)
    if path not in missing:
        findings += host.check_driver_version(host.driver_version(read(path)), arguments["driver_versions"])
    return findings


def look(arguments: Dict[str, Any]) -> List[Finding]:
    findings: List[Finding] = host.check_clock(
        time.time(), arguments["controller_epoch"], arguments["clock_skew_seconds"]
    )
    _, version, _ = run(["systemctl", "--version"])
    findings += host.check_systemd(os.path.isdir("/run/systemd/system"), version.partition("\n")[0])
    own_pid, found = look_at_engine(arguments)
    findings += found
    findings += host.check_devices(arguments["devices"], [path for path in arguments["devices"] if not is_device(path)])
    findings += look_at_driver(arguments)
    findings += look_at_npus(arguments, own_pid)

    meminfo = read("/proc/meminfo")
    if own_pid is None:
        # Those that are started after this one look now, too: what they need is not free for it.
        waiting = [name for name in arguments["neighbours"] if not runs(arguments["container_engine"], name)]
        available = host.memory_bytes(meminfo, "MemAvailable")
        findings += host.check_host_memory(available, arguments["memory_gib"], 1 + len(waiting))
    findings += host.check_shm(arguments["shm_size"], host.memory_bytes(meminfo, "MemTotal"))
    instances = 1 + len(arguments["neighbours"])
    state, needed = arguments["state_path"], arguments["state_space_gib"] * instances
    what = "releases, caches and builds" + (f" of {instances} instances" if instances > 1 else "")
    findings += host.check_space(what, state, free_bytes(state), needed, "ascend_host_state_space_gib")
    holders = [
        holder
        for holder in port_holders(arguments["port"])
        if not host.of_unit(read(f"/proc/{holder.pid}/cgroup"), arguments["front_unit"])
    ]
    findings += host.check_port(arguments["port"], holders, own_pid)
    return findings


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "container_engine": {"type": "str", "required": True, "choices": sorted(ENGINE_FORMAT)},
            "container_engine_path": {"type": "str", "required": True},
            "container_name": {"type": "str", "required": True},
            "neighbours": {"type": "list", "elements": "str", "required": True},
            "image": {"type": "str", "required": True},
            "image_space_gib": {"type": "int", "required": True},
            "memory_gib": {"type": "int", "required": True},
            "shm_size": {"type": "str", "required": True},
            "state_path": {"type": "str", "required": True},
            "state_space_gib": {"type": "int", "required": True},
            "port": {"type": "int", "required": True},
            "front_unit": {"type": "str", "required": True},
            "devices": {"type": "list", "elements": "str", "required": True},
            "driver_paths": {"type": "list", "elements": "str", "required": True},
            "driver_versions": {"type": "list", "elements": "str", "required": True},
            "visible_devices": {"type": "str"},
            "npus_needed": {"type": "int", "required": True},
            "memory_utilization": {"type": "float", "required": True},
            "controller_epoch": {"type": "float", "required": True},
            "clock_skew_seconds": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, findings=as_data(look(module.params)))


if __name__ == "__main__":
    main()
