"""What the observations of the NPUs mean: pure checks, each gives the findings it leads to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from ansible.module_utils.findings import ERROR, WARNING, Finding
from ansible.module_utils.host_checks import Holder, foreign
from ansible.module_utils.npu_smi import Chip, Process

#: PCI device ids of vendor 19e5 that are NPUs (Ascend's own log collector names them so), and their product line.
PCI_VENDOR = "0x19e5"
PCI_LINES = {"0xd801": "910", "0xd802": "A2", "0xd803": "A3", "0xd500": "310P", "0xd100": "310"}

#: Product lines vLLM-Ascend runs on, and the part of the image's tag that stands for each.
VARIANTS = {"A2": "", "A3": "a3", "310P": "310p"}

IMAGE = re.compile(r"(?P<name>(?:.*/)?vllm-ascend):(?P<tag>[\w.-]+)(?P<digest>@sha256:[0-9a-f]{64})?")
TAG_VARIANT = re.compile(r"-(a\d|310p)(?=-|$)")


@dataclass(frozen=True)
class PciDevice:
    bus_id: str
    line: str


@dataclass(frozen=True)
class Card:
    """A chip by its device number; ``mapped`` into our container, and ``used`` by the engine."""

    number: int
    chip: Chip
    mapped: bool
    used: bool

    @property
    def device(self) -> str:
        return f"/dev/davinci{self.number}"


def check_npu_smi(error: str) -> List[Finding]:
    return [
        Finding(
            "NPU_SMI",
            "`npu-smi info` tells of every NPU",
            error,
            "run `npu-smi info` on the host; reboot it after an update of driver or firmware, reinstall the driver"
            " if that does not help",
            "在主机上运行 `npu-smi info`；更新驱动或固件后需重启主机，仍无效则重装驱动",
        )
    ]


def visible_ids(value: Optional[str], mapped: int, needed: int) -> Tuple[List[int], List[Finding]]:
    """The ids of ASCEND_RT_VISIBLE_DEVICES, and what is wrong with them.

    CANN reads ids up to the first other character or invalid id and takes ascending ones only (CANN 8.5.0,
    environment variables).  Inside the container the ``mapped`` NPUs are numbered from 0 without gaps, whatever
    their numbers on the host.  Unset means all of them.  ``needed`` is the number of NPUs the engine starts on.
    """
    everything = list(range(mapped))
    if not mapped:
        return [], []  # told by check_devices
    problems = []
    ids = everything
    if value is not None and not re.fullmatch(r"\d+(,\d+)*", value):
        problems.append("it must be ids separated by commas, without spaces")
    elif value is not None:
        ids = [int(word) for word in value.split(",")]
        if ids != sorted(set(ids)):
            problems.append("the ids must ascend, each once")
        outside = [str(number) for number in ids if number >= mapped]
        if outside:
            problems.append(f"no such NPU in the container: {', '.join(outside)}")
    if not problems and len(ids) < needed:
        problems.append(f"the engine starts on {needed} NPUs (tensor x pipeline x data parallel size)")
    if not problems:
        return ids, []
    name = "ASCEND_RT_VISIBLE_DEVICES"
    finding = Finding(
        "NPU_VISIBLE",
        f"{name} with ids of 0 to {mapped - 1}, as many NPUs as glm_ocr_devices maps",
        f"{name} {'unset' if value is None else repr(value)}: {'; '.join(problems)}",
        f"correct {name} in vllm_service_environment, or glm_ocr_devices (`ls /dev/davinci*`)",
        f"修正 vllm_service_environment 中的 {name}，或 glm_ocr_devices（`ls /dev/davinci*`）",
    )
    return everything, [finding]


def check_idle(visible: int, needed: int) -> List[Finding]:
    if visible <= needed:
        return []
    return [
        Finding(
            "NPU_IDLE",
            f"as many visible NPUs as the engine starts on: {needed}",
            f"{visible} visible, {visible - needed} will idle",
            "set data-parallel-size in vllm_service_flags, or leave the NPU to others: glm_ocr_devices and"
            " ASCEND_RT_VISIBLE_DEVICES",
            "在 vllm_service_flags 中设置 data-parallel-size，或将多余的 NPU 让给其他业务："
            "修改 glm_ocr_devices 和 ASCEND_RT_VISIBLE_DEVICES",
            WARNING,
        )
    ]


def cards_of(chips: Mapping[int, Chip], mapped: Sequence[int], visible: Sequence[int], needed: int) -> List[Card]:
    """``mapped`` are device numbers, ``visible`` indices into them; the engine starts on the first of those."""
    used = {mapped[index] for index in visible[:needed]}
    return [Card(number, chip, number in mapped, number in used) for number, chip in sorted(chips.items())]


def check_absent(chips: Mapping[int, Chip], mapped: Sequence[int]) -> List[Finding]:
    absent = [f"/dev/davinci{number}" for number in mapped if number not in chips]
    if not absent:
        return []
    return [
        Finding(
            "NPU_ABSENT",
            "npu-smi shows every NPU of glm_ocr_devices",
            f"{', '.join(absent)} not among its {len(chips)}",
            "see which NPUs work (`npu-smi info`, `npu-smi info -m`), then correct glm_ocr_devices or mend the card",
            "确认可用的 NPU（`npu-smi info`、`npu-smi info -m`），再修正 glm_ocr_devices 或维修该卡",
        )
    ]


def check_health(cards: Sequence[Card]) -> List[Finding]:
    """OK, Warning (minor), Alarm (major), Critical, UNKNOWN: npu-smi's reference.  Any other word is no OK either."""
    return [
        Finding(
            "NPU_HEALTH",
            f"health OK of {card.device}",
            f"{card.chip.health} (NPU {card.chip.npu}, chip {card.chip.chip})",
            f"see the error code (`npu-smi info -t health -i {card.chip.npu} -c {card.chip.chip}`), reset or replace"
            " the card, or map another one (glm_ocr_devices)",
            f"查看错误码（`npu-smi info -t health -i {card.chip.npu} -c {card.chip.chip}`），复位或更换该卡，"
            "或映射其他卡（glm_ocr_devices）",
            ERROR if card.mapped and card.chip.health != "Warning" else WARNING,
        )
        for card in cards
        if card.chip.health != "OK"
    ]


def check_occupied(
    cards: Sequence[Card], processes: Sequence[Process], holders: Mapping[int, Holder], own_pid: Optional[int]
) -> List[Finding]:
    """``holders`` tells of each process by its pid; our own container is no conflict."""
    findings = []
    for card in cards:
        memory = _memory_by_pid(card, processes)
        others = foreign([holders[pid] for pid in memory], own_pid)
        if card.mapped and others:
            findings.append(
                Finding(
                    "NPU_OCCUPIED",
                    f"no process of others on {card.device}",
                    "; ".join(f"{holder}, {memory[holder.pid]} MB" for holder in others),
                    "stop it (`npu-smi info` lists it, `docker ps` its container), or map another NPU"
                    " (glm_ocr_devices)",
                    "停止该进程（`npu-smi info` 可见，`docker ps` 查看其容器），或映射其他 NPU（glm_ocr_devices）",
                    ERROR if card.used else WARNING,
                )
            )
    return findings


def check_device_memory(
    cards: Sequence[Card],
    processes: Sequence[Process],
    holders: Mapping[int, Holder],
    own_pid: Optional[int],
    utilization: float,
) -> List[Finding]:
    """vLLM refuses to start when less than ``utilization`` of all memory is free (vllm_ascend/worker/worker.py).

    A card our running service holds is not judged: the restart frees it.
    """
    findings = []
    for card in cards:
        pids = _memory_by_pid(card, processes)
        ours = len(foreign([holders[pid] for pid in pids], own_pid)) < len(pids)
        total = card.chip.memory_total
        free = total - card.chip.memory_used
        if card.used and not ours and (free < utilization * total or total == 0):
            findings.append(
                Finding(
                    "NPU_MEMORY",
                    f"{utilization * total:.0f} MB free on {card.device}, {utilization:.2f} of its {total} MB",
                    f"{free} MB free",
                    "free it (`npu-smi info` shows who holds it; without a process reset the card), or lower"
                    " gpu-memory-utilization in vllm_service_flags",
                    "释放显存（`npu-smi info` 查看占用者；若无进程则复位该卡），"
                    "或调低 vllm_service_flags 中的 gpu-memory-utilization",
                )
            )
    return findings


def _memory_by_pid(card: Card, processes: Sequence[Process]) -> Dict[int, int]:
    """MB that each process holds on the card."""
    return {p.pid: p.memory for p in processes if (p.npu, p.chip) == (card.chip.npu, card.chip.chip)}


def product_line(chip: Chip) -> str:
    """A2, A3 or 310P; for a chip vLLM-Ascend does not run on, its name.

    910B1 to 910B4 are Atlas A2; 910A, 910B, 910ProA, 910ProB and 910PremiumA are the first generation.  A3 is
    printed as Ascend910 with a Phy-ID column; its chips proper are named Ascend910_93xx.
    """
    name = re.sub("^Ascend", "", chip.name)
    if re.match(r"910B\d", name):
        return "A2"
    if re.fullmatch(r"910(_93\w+)?", name) and chip.number is not None:
        return "A3"
    if re.match(r"310P\d", name):
        return "310P"
    return name


def check_supported(lines: Sequence[str]) -> List[Finding]:
    """``lines`` are the product lines on the host, as npu-smi and the PCI bus tell them."""
    others = sorted(set(lines) - set(VARIANTS))
    if not others:
        return []
    return [
        Finding(
            "NPU_UNSUPPORTED",
            "Atlas A2 (910B1 to 910B4), Atlas A3 or 310P",
            ", ".join(others),
            "deploy on a host with a supported NPU: there is no image for this one (`npu-smi info`, `lspci -d 19e5:`)",
            "请部署到受支持的 NPU 主机：没有适用于该芯片的镜像（`npu-smi info`、`lspci -d 19e5:`）",
        )
    ]


def check_variant(image: str, lines: Sequence[str]) -> List[Finding]:
    """Judged only for images named vllm-ascend, whose tags name the chip; ``lines`` of the mapped cards."""
    match = IMAGE.fullmatch(image)
    known = sorted(set(lines) & set(VARIANTS))
    if not match or not known:
        return []
    tag = match["tag"]
    variant = TAG_VARIANT.search(tag)
    found = variant[1] if variant else ""
    wrong = [line for line in known if VARIANTS[line] != found]
    if not wrong:
        return []
    base, openeuler, _ = TAG_VARIANT.sub("", tag).partition("-openeuler")
    suffix = f"-{VARIANTS[wrong[0]]}" if VARIANTS[wrong[0]] else ""
    right = f"{match['name']}:{base}{suffix}{openeuler}"
    return [
        Finding(
            "IMAGE_VARIANT",
            f"{right} for the chips of this host ({', '.join(known)})",
            image,
            f"set glm_ocr_image: {right}",
            f"设置 glm_ocr_image: {right}",
        )
    ]


def check_pci(devices: Sequence[PciDevice], chips: Sequence[Chip]) -> List[Finding]:
    """The PCI bus as a second source: what npu-smi lost is still there, and a wrong driver cannot rename it."""
    if not devices and not chips:
        return []
    on_bus = {device.bus_id: device.line for device in devices}
    shown = {chip.bus_id: product_line(chip) for chip in chips}
    both = sorted(set(on_bus) & set(shown))
    # Chips without an image have many names: 910ProB is a 910 on the bus.
    known = [bus for bus in both if {on_bus[bus], shown[bus]} & set(VARIANTS)]
    differing = [f"{bus} is {on_bus[bus]}, not {shown[bus]}" for bus in known if on_bus[bus] != shown[bus]]
    if differing:
        found, severity = "; ".join(differing), ERROR
    elif set(on_bus) != set(shown):
        found = f"PCI: {', '.join(sorted(on_bus)) or 'none'}; npu-smi: {', '.join(sorted(shown)) or 'none'}"
        severity = WARNING
    else:
        return []
    return [
        Finding(
            "HOST_PCI",
            "the same NPUs on the PCI bus as in npu-smi",
            found,
            "compare `lspci -d 19e5:` with `npu-smi info`; a card that is missing in one is lost to the driver: reseat"
            " or reset it, or reinstall the driver",
            "对比 `lspci -d 19e5:` 与 `npu-smi info`；只出现在一边的卡已脱离驱动：重新插拔或复位该卡，或重装驱动",
            severity,
        )
    ]
