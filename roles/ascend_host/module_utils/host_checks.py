"""What the observations of a machine mean: pure checks, each gives the findings it leads to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

from ansible.module_utils.findings import Finding

#: systemd knows every line of our unit from here on, but for three of its sandbox.  docker: what openEuler still ships;
#: every option used is in it.
#: podman: the oldest line that was tried, in the lab.
SYSTEMD_MINIMUM = "243"
ENGINE_MINIMUM = {"docker": "18.09", "podman": "4.0"}

#: The label vllm_service gives to its container: a container of our name without it is somebody else's.
OUR_LABEL = "glm-ocr.release"

#: What vLLM-Ascend's documentation asks for (`docker run --shm-size=1g`).
SHM_MINIMUM_BYTES = 2**30

#: `uname -m` to the architecture in an image's description (GOARCH).
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgt]?)(?:i?b)?", re.IGNORECASE)
UNITS = "bkmgt"


@dataclass(frozen=True)
class Holder:
    """A process that holds something of ours; ``ancestors`` are its own pid and those of its parents.

    ``container`` is the name of the container it runs in, empty when it runs in none.
    """

    pid: int
    command: str
    ancestors: Tuple[int, ...]
    container: str = ""

    def __str__(self) -> str:
        return f"pid {self.pid}: {self.command}" + (f" (container {self.container})" if self.container else "")


def foreign(holders: Iterable[Holder], own_pid: Optional[int]) -> List[Holder]:
    """Without those of our running container; ``own_pid`` is its first process, None when it does not run."""
    return [holder for holder in holders if own_pid is None or own_pid not in holder.ancestors]


def version_of(text: str) -> Tuple[int, ...]:
    """The first number with dots in ``text``, empty when there is none."""
    match = re.search(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_systemd(running: bool, version: str) -> List[Finding]:
    """``version`` is the first line of `systemctl --version`."""
    found = version or "systemctl does not answer" if running else "another init system"
    if running and version_of(version) >= version_of(SYSTEMD_MINIMUM):
        return []
    return [
        Finding(
            "HOST_SYSTEMD",
            f"systemd {SYSTEMD_MINIMUM} or newer as init",
            found,
            "use an operating system with a newer systemd, booted with it (`systemctl --version`)",
            "使用带有较新 systemd 的操作系统，并以其启动（`systemctl --version`）",
        )
    ]


def check_engine(name: str, version: str, error: str) -> List[Finding]:
    """``version`` is what the engine says of itself, empty when it did not answer."""
    minimum = ENGINE_MINIMUM[name]
    if version_of(version) >= version_of(minimum):
        return []
    start = f"systemctl enable --now {name}" if name == "docker" else "podman info"
    found = version or error or "no answer"
    return [
        Finding(
            "HOST_ENGINE",
            f"a working {name}, version {minimum} or newer",
            found,
            f"install {name} {minimum} or newer and see that it works for root: `{start}`",
            f"安装 {name} {minimum} 或更高版本，并确认 root 可用：`{start}`",
        )
    ]


def check_engine_path(name: str, path: str, executable: bool, elsewhere: Optional[str]) -> List[Finding]:
    """``path`` is what the unit calls, ``elsewhere`` what the search path has."""
    if executable:
        return []
    return [
        Finding(
            "HOST_ENGINE",
            f"{name} at {path}, which the unit calls",
            f"{name} at {elsewhere}",
            f"set glm_ocr_container_engine_path to where it is (`command -v {name}`)",
            f"将 glm_ocr_container_engine_path 设为其所在路径（`command -v {name}`）",
        )
    ]


def check_container(name: str, labels: Optional[Mapping[str, Any]], engine: str) -> List[Finding]:
    """``labels`` of the container of that name, None when there is none."""
    if labels is None or OUR_LABEL in labels:
        return []
    return [
        Finding(
            "HOST_CONTAINER",
            f"no container {name}, or one of this project (label {OUR_LABEL})",
            f"a container {name} without that label",
            f"see whose it is (`{engine} container inspect {name}`) and rename it"
            f" (`{engine} rename {name} NEW_NAME`), or choose another glm_ocr_service_name",
            f"确认其归属（`{engine} container inspect {name}`）并改名（`{engine} rename {name} NEW_NAME`），"
            "或更换 glm_ocr_service_name",
        )
    ]


def check_space(what: str, path: str, free_bytes: int, needed_gib: int, variable: str) -> List[Finding]:
    """``variable`` of the inventory says how much ``what`` needs."""
    free_gib = free_bytes / 2**30
    if free_gib >= needed_gib:
        return []
    return [
        Finding(
            "HOST_DISK",
            f"{needed_gib} GiB free under {path} for {what}",
            f"{free_gib:.1f} GiB",
            f"free space (`df -h {path}`), or set {variable} if it needs less",
            f"清理磁盘空间（`df -h {path}`）；若实际需要更少，调整 {variable}",
        )
    ]


def check_architecture(image: str, architecture: str, machine: str) -> List[Finding]:
    """``architecture`` of the image on the host, ``machine`` as `uname -m` says it."""
    expected = ARCHITECTURES.get(machine, machine)
    if architecture == expected:
        return []
    return [
        Finding(
            "IMAGE_ARCHITECTURE",
            f"{image} for {expected}, the host's architecture ({machine})",
            f"an image for {architecture}",
            f"remove the image and load the one for {expected} (`uname -m`)",
            f"删除该镜像，重新加载 {expected} 架构的镜像（`uname -m`）",
        )
    ]


def check_host_memory(available_bytes: int, needed_gib: int, instances: int) -> List[Finding]:
    """MemAvailable while our service, and as many as make ``instances``, do not run; each needs ``needed_gib``."""
    if available_bytes >= needed_gib * instances * 2**30:
        return []
    return [
        Finding(
            "HOST_MEMORY",
            f"{needed_gib * instances} GiB of available memory"
            + (f" for {instances} instances" if instances > 1 else ""),
            f"{available_bytes / 2**30:.1f} GiB",
            "stop what else uses memory (`ps aux --sort=-rss | head`), or lower ascend_host_memory_gib",
            "停止占用内存的其他进程（`ps aux --sort=-rss | head`），或调低 ascend_host_memory_gib",
        )
    ]


def size_bytes(text: str) -> Optional[int]:
    """Bytes of a size as the engines read it (1g, 512m, 1073741824), None when it is none."""
    match = SIZE.fullmatch(text.strip())
    return int(float(match[1]) * 1024 ** UNITS.index(match[2].lower() or "b")) if match else None


def check_shm(size: str, memory_bytes: int) -> List[Finding]:
    """``size`` is the container's --shm-size, ``memory_bytes`` all memory of the host."""
    found = size_bytes(size)
    if found is not None and SHM_MINIMUM_BYTES <= found <= memory_bytes:
        return []
    return [
        Finding(
            "HOST_SHM",
            f"a /dev/shm for the container of 1g to {memory_bytes / 2**30:.0f}g, the host's memory",
            f"--shm-size {size}",
            "correct vllm_service_shm_size (`free -g` shows the host's memory)",
            "修正 vllm_service_shm_size（`free -g` 查看主机内存）",
        )
    ]


def check_clock(host_epoch: float, controller_epoch: float, tolerance_seconds: int) -> List[Finding]:
    """The way to the host counts as skew: the tolerance is wider than it."""
    skew = host_epoch - controller_epoch
    if abs(skew) <= tolerance_seconds:
        return []
    return [
        Finding(
            "HOST_CLOCK",
            f"a clock within {tolerance_seconds} s of the controller's",
            f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
            "set the clock and keep it (`timedatectl set-ntp true`, `chronyc tracking`), here or on the controller",
            "校准时钟并保持同步（`timedatectl set-ntp true`、`chronyc tracking`），必要时检查控制端时钟",
        )
    ]


def check_port(port: int, holders: List[Holder], own_pid: Optional[int]) -> List[Finding]:
    return [
        Finding(
            "HOST_PORT",
            f"TCP port {port} free, or held by our own service",
            f"held by {holder}",
            f"stop that process (`ss -lntp | grep ':{port} '`), or choose another glm_ocr_port",
            f"停止该进程（`ss -lntp | grep ':{port} '`），或更换 glm_ocr_port",
        )
        for holder in foreign(holders, own_pid)
    ]


def check_devices(devices: Sequence[str], missing: Sequence[str]) -> List[Finding]:
    """``devices`` of the inventory, ``missing`` those of them that are no device nodes."""
    found = ["missing: " + ", ".join(missing)] if missing else []
    if not card_numbers(devices):
        found.append("no /dev/davinciN in glm_ocr_devices")
    if not found:
        return []
    return [
        Finding(
            "HOST_DEVICES",
            "the device nodes of glm_ocr_devices, at least one NPU among them",
            "; ".join(found),
            "check the driver and the cards (`npu-smi info`, `ls -l /dev/davinci*`), or correct glm_ocr_devices",
            "检查驱动和加速卡（`npu-smi info`、`ls -l /dev/davinci*`），或修正 glm_ocr_devices",
        )
    ]


def card_numbers(devices: Iterable[str]) -> List[int]:
    """N of every /dev/davinciN, ascending: the NPUs among device nodes."""
    matches = [re.fullmatch(r"/dev/davinci(\d+)", device) for device in devices]
    return sorted(int(match[1]) for match in matches if match)


def check_driver_files(missing: Sequence[str]) -> List[Finding]:
    if not missing:
        return []
    return [
        Finding(
            "HOST_DRIVER",
            "the driver's files of glm_ocr_driver_paths",
            "missing: " + ", ".join(missing),
            f"install the NPU driver and firmware (`ls -d {' '.join(missing)}`), or correct glm_ocr_driver_paths",
            f"安装 NPU 驱动和固件（`ls -d {' '.join(missing)}`），或修正 glm_ocr_driver_paths",
        )
    ]


def driver_version(text: str) -> str:
    """The version in the driver's version.info, empty when it has none."""
    match = re.search(r"^(?:Version|package_version)=(\S+)", text, re.MULTILINE)
    return match[1] if match else ""


def check_driver_version(version: str, supported: Sequence[str]) -> List[Finding]:
    """``supported`` are releases of Ascend HDK such as 25.2, each with all its patch versions."""
    if ".".join(map(str, version_of(version)[:2])) in supported:
        return []
    return [
        Finding(
            "HOST_DRIVER_VERSION",
            f"a driver of Ascend HDK {', '.join(supported)}, which CANN in the image supports",
            version or "no version in the driver's version.info",
            f"install the driver and firmware of Ascend HDK {supported[-1]} and reboot"
            " (`cat /usr/local/Ascend/driver/version.info`); for an image with another CANN set"
            " ascend_host_driver_versions",
            f"安装 Ascend HDK {supported[-1]} 的驱动和固件并重启（`cat /usr/local/Ascend/driver/version.info`）；"
            "若镜像中的 CANN 版本不同，设置 ascend_host_driver_versions",
        )
    ]


def listening_inodes(table: str, port: int) -> List[str]:
    """Socket inodes that listen on ``port`` in the text of /proc/net/tcp or tcp6 (proc(5): state 0A)."""
    inodes = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
            inodes.append(fields[9])
    return inodes


def container_id(cgroup: str) -> str:
    """The container's id in the text of /proc/PID/cgroup, empty when the process is in none.

    docker-ID.scope and /docker/ID, libpod-ID.scope, cri-containerd-ID.scope: always 64 hexadecimal digits.
    """
    found = re.findall(r"[0-9a-f]{64}", cgroup)
    return found[-1] if found else ""


def of_unit(cgroup: str, unit: str) -> bool:
    """Whether the text of /proc/PID/cgroup is that of a process of the systemd unit."""
    return any(line.endswith(f"/{unit}") for line in cgroup.splitlines())


def memory_bytes(meminfo: str, field: str) -> int:
    """A field of /proc/meminfo, which counts in KiB.  Raises ``ValueError``."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if not match:
        raise ValueError(f"/proc/meminfo has no {field}")
    return int(match[1]) * 1024
