"""The checks of the NPUs: each is broken once and must say so, and is quiet when nothing is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.module_utils import npu_checks as npu
from ansible.module_utils.host_checks import Holder
from ansible.module_utils.npu_smi import Chip, Process

IMAGE = "quay.io/ascend/vllm-ascend:v0.18.0rc1"


def chip(number: int = 0, name: str = "910B2", health: str = "OK", used: int = 3191, total: int = 65536) -> Chip:
    """As A2 shows it: the device number is not in the table."""
    return Chip(number, 0, None, name, health, f"0000:c{number}:00.0", used, total)


def cards(*chips: Chip, mapped: int = 2, needed: int = 1) -> list[Any]:
    """The first ``mapped`` of the chips are mapped, the engine starts on the first ``needed`` of those."""
    numbers = list(range(mapped))
    found: list[Any] = npu.cards_of(dict(enumerate(chips)), numbers, numbers, needed)
    return found


def ids(findings: list[Any]) -> list[tuple[str, str]]:
    return [(finding.id, finding.severity) for finding in findings]


# --- ASCEND_RT_VISIBLE_DEVICES ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mapped", "needed", "visible"),
    [(None, 2, 1, [0, 1]), ("0,1", 2, 1, [0, 1]), ("1", 2, 1, [1]), ("0", 1, 1, [0]), ("0,2,3", 4, 2, [0, 2, 3])],
)
def test_good_ids_are_taken(value: str | None, mapped: int, needed: int, visible: list[int]) -> None:
    assert npu.visible_ids(value, mapped, needed) == (visible, [])


@pytest.mark.parametrize(
    ("value", "mapped", "needed", "found"),
    [
        ("0, 1", 2, 1, "without spaces"),
        ("", 2, 1, "without spaces"),
        ("0;1", 2, 1, "without spaces"),
        ("0,1,", 2, 1, "without spaces"),
        ("all", 2, 1, "without spaces"),
        ("-1", 2, 1, "without spaces"),
        ("1,0", 2, 1, "must ascend"),
        ("0,0", 2, 1, "each once"),
        ("0,2", 2, 1, "no such NPU in the container: 2"),
        # Host ids of a subset: inside, davinci4 and davinci5 are 0 and 1.
        ("4,5", 2, 1, "no such NPU in the container: 4, 5"),
        ("0", 2, 2, "starts on 2 NPUs"),
        (None, 2, 4, "starts on 4 NPUs"),
    ],
)
def test_bad_ids_are_told(value: str | None, mapped: int, needed: int, found: str) -> None:
    visible, (finding,) = npu.visible_ids(value, mapped, needed)
    assert (finding.id, finding.severity) == ("NPU_VISIBLE", "error")
    assert found in finding.found
    assert visible == list(range(mapped))


def test_all_faults_of_the_ids_are_told_at_once() -> None:
    _, (finding,) = npu.visible_ids("5,5", 2, 1)
    assert "must ascend" in finding.found
    assert "no such NPU" in finding.found


def test_without_a_mapped_npu_the_ids_are_not_judged() -> None:
    assert npu.visible_ids("0,1", 0, 1) == ([], [])


def test_the_seeds_idle_second_card_is_a_warning() -> None:
    assert ids(npu.check_idle(2, 1)) == [("NPU_IDLE", "warning")]
    assert npu.check_idle(2, 2) == []


# --- cards ------------------------------------------------------------------------------------------------


def test_the_engine_uses_the_first_visible_cards_whatever_their_numbers() -> None:
    chips = {number: chip(number) for number in (3, 4, 5)}
    found = npu.cards_of(chips, mapped=[4, 5], visible=[1], needed=1)
    assert [(card.device, card.mapped, card.used) for card in found] == [
        ("/dev/davinci3", False, False),
        ("/dev/davinci4", True, False),
        ("/dev/davinci5", True, True),
    ]


def test_a_mapped_device_npu_smi_does_not_show_is_told() -> None:
    (finding,) = npu.check_absent({0: chip()}, [0, 1, 2])
    assert finding.id == "NPU_ABSENT"
    assert "/dev/davinci1, /dev/davinci2" in finding.found
    assert npu.check_absent({0: chip(), 1: chip(1)}, [0]) == []


@pytest.mark.parametrize(
    ("health", "severity"),
    [("Warning", "warning"), ("Alarm", "error"), ("Critical", "error"), ("UNKNOWN", "error"), ("Fine", "error")],
)
def test_every_health_but_ok_is_told(health: str, severity: str) -> None:
    assert ids(npu.check_health(cards(chip(), chip(1, health=health)))) == [("NPU_HEALTH", severity)]


def test_a_sick_card_we_do_not_map_is_a_warning() -> None:
    assert ids(npu.check_health(cards(chip(), chip(1, health="Critical"), mapped=1))) == [("NPU_HEALTH", "warning")]


def test_healthy_cards_are_quiet() -> None:
    assert npu.check_health(cards(chip(), chip(1))) == []


# --- occupied ---------------------------------------------------------------------------------------------

FOREIGN = {41: Holder(41, "python", (41, 1), "trainer")}


def test_a_foreign_process_is_named_with_its_container_and_memory() -> None:
    (finding,) = npu.check_occupied(cards(chip(), chip(1)), [Process(0, 0, 41, "python", 37709)], FOREIGN, None)
    assert (finding.id, finding.severity) == ("NPU_OCCUPIED", "error")
    assert finding.found == "pid 41: python (container trainer), 37709 MB"
    assert "/dev/davinci0" in finding.expected


@pytest.mark.parametrize(("npu_id", "severities"), [(1, ["warning"]), (2, [])])
def test_a_foreign_process_where_the_engine_does_not_start(npu_id: int, severities: list[str]) -> None:
    """A warning on the card that idles, nothing on one that is not ours."""
    processes = [Process(npu_id, 0, 41, "python", 100)]
    findings = npu.check_occupied(cards(chip(), chip(1), chip(2)), processes, FOREIGN, None)
    assert [finding.severity for finding in findings] == severities


def test_our_own_container_is_no_conflict() -> None:
    holders = {99: Holder(99, "VLLMWorker", (99, 90, 1), "glm-ocr")}
    processes = [Process(0, 0, 99, "VLLMWorker", 54000)]
    assert npu.check_occupied(cards(chip()), processes, holders, own_pid=90) == []
    assert len(npu.check_occupied(cards(chip()), processes, holders, own_pid=None)) == 1
    assert len(npu.check_occupied(cards(chip()), processes, holders, own_pid=7)) == 1


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("used", "count"), [(3191, 0), (9830, 0), (9831, 1), (65536, 1)])
def test_the_reserved_share_must_be_free(used: int, count: int) -> None:
    """0.85 of 65536 MB are 55705.6 MB."""
    findings = npu.check_device_memory(cards(chip(used=used)), [], {}, None, 0.85)
    assert ids(findings) == [("NPU_MEMORY", "error")] * count


def test_the_memory_is_told_in_mb() -> None:
    (finding,) = npu.check_device_memory(cards(chip(used=60000)), [], {}, None, 0.85)
    assert finding.expected == "55706 MB free on /dev/davinci0, 0.85 of its 65536 MB"
    assert finding.found == "5536 MB free"


def test_a_card_without_memory_is_not_free() -> None:
    assert ids(npu.check_device_memory(cards(chip(used=0, total=0)), [], {}, None, 0.85)) == [("NPU_MEMORY", "error")]


def test_what_our_running_service_holds_is_freed_by_the_restart() -> None:
    holders = {99: Holder(99, "VLLMWorker", (99, 90, 1))}
    processes = [Process(0, 0, 99, "VLLMWorker", 54000)]
    assert npu.check_device_memory(cards(chip(used=58000)), processes, holders, 90, 0.85) == []
    assert len(npu.check_device_memory(cards(chip(used=58000)), processes, holders, None, 0.85)) == 1


def test_only_the_cards_the_engine_starts_on_need_memory() -> None:
    assert npu.check_device_memory(cards(chip(), chip(1, used=65536)), [], {}, None, 0.85) == []


# --- the chip and the image -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "line"),
    [
        ("910B1", None, "A2"),
        ("910B2C", None, "A2"),
        ("910B4-1", None, "A2"),
        ("910B3vir05_1c_16g", None, "A2"),
        ("Ascend910", 3, "A3"),
        ("Ascend910_9392", 0, "A3"),
        ("310P3", 0, "310P"),
        # The first generation: 910B is one of its names, and a bare 910 has no Phy-ID.
        ("910ProB", None, "910ProB"),
        ("910A", None, "910A"),
        ("910B", None, "910B"),
        ("Ascend910", None, "910"),
        ("310", None, "310"),
        ("310B4", None, "310B4"),
        ("Ascend950PR", 0, "950PR"),
    ],
)
def test_the_product_line_is_told_from_the_name(name: str, number: int | None, line: str) -> None:
    found = npu.product_line(Chip(0, 0, number, name, "OK", "", 0, 1))
    assert found == line
    assert ids(npu.check_supported([found])) == [("NPU_UNSUPPORTED", "error")] * (line not in {"A2", "A3", "310P"})


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (IMAGE, "A2"),
        (f"{IMAGE}-openeuler", "A2"),
        (f"{IMAGE}-a3", "A3"),
        (f"{IMAGE}-a3-openeuler", "A3"),
        (f"{IMAGE}-310p", "310P"),
        (f"{IMAGE}-a3@sha256:{'0' * 64}", "A3"),
        # Not judged: no image of vllm-ascend, no tag, or a chip that no image fits.
        ("registry.lab:5000/glm-ocr-lab/vllm-cpu:0.32.0", "A2"),
        ("registry.site/my-vllm-ascend:1-a3", "A2"),
        (f"quay.io/ascend/vllm-ascend@sha256:{'0' * 64}", "A3"),
        (IMAGE, "910"),
    ],
)
def test_an_image_for_the_chip_is_taken(image: str, line: str) -> None:
    assert npu.check_variant(image, [line]) == []


@pytest.mark.parametrize(
    ("image", "line", "right"),
    [
        (IMAGE, "A3", f"{IMAGE}-a3"),
        (IMAGE, "310P", f"{IMAGE}-310p"),
        (f"{IMAGE}-a3", "A2", IMAGE),
        (f"{IMAGE}-openeuler", "A3", f"{IMAGE}-a3-openeuler"),
        (f"{IMAGE}-310p-openeuler", "A2", f"{IMAGE}-openeuler"),
        (f"{IMAGE}-a3-openeuler@sha256:{'0' * 64}", "310P", f"{IMAGE}-310p-openeuler"),
        ("10.0.0.1:5000/vllm-ascend:main", "A3", "10.0.0.1:5000/vllm-ascend:main-a3"),
        ("vllm-ascend:v0.18.0rc1-a5", "A2", "vllm-ascend:v0.18.0rc1"),
    ],
)
def test_an_image_for_another_chip_is_refused_with_the_right_tag(image: str, line: str, right: str) -> None:
    (finding,) = npu.check_variant(image, [line])
    assert (finding.id, finding.severity, finding.found) == ("IMAGE_VARIANT", "error", image)
    assert finding.fix == f"set glm_ocr_image: {right}"


# --- the PCI bus ------------------------------------------------------------------------------------------


def test_two_sources_that_agree_are_quiet() -> None:
    devices = [npu.PciDevice("0000:c0:00.0", "A2"), npu.PciDevice("0000:c1:00.0", "A2")]
    assert npu.check_pci(devices, [chip(), chip(1)]) == []
    assert npu.check_pci([], []) == []
    assert npu.check_pci([npu.PciDevice("0000:c0:00.0", "910")], [chip(name="910ProB")]) == []
    # Both chips of a 310P card share a bus id.
    duo = [Chip(1, index, index, "310P3", "OK", "0000:01:00.0", 0, 1) for index in (0, 1)]
    assert npu.check_pci([npu.PciDevice("0000:01:00.0", "310P")], duo) == []


@pytest.mark.parametrize(
    ("devices", "chips", "severity", "found"),
    [
        ([], [chip()], "warning", "PCI: none; npu-smi: 0000:c0:00.0"),
        ([npu.PciDevice("0000:c0:00.0", "A2")], [], "warning", "PCI: 0000:c0:00.0; npu-smi: none"),
        ([npu.PciDevice("0000:c1:00.0", "A2")], [chip()], "warning", "PCI: 0000:c1:00.0; npu-smi: 0000:c0:00.0"),
        ([npu.PciDevice("0000:c0:00.0", "A3")], [chip()], "error", "0000:c0:00.0 is A3, not A2"),
        ([npu.PciDevice("0000:c0:00.0", "910")], [chip()], "error", "0000:c0:00.0 is 910, not A2"),
    ],
)
def test_two_sources_that_disagree_are_told(devices: list[Any], chips: list[Chip], severity: str, found: str) -> None:
    (finding,) = npu.check_pci(devices, chips)
    assert (finding.id, finding.severity, finding.found) == ("HOST_PCI", severity, found)


def test_a_silent_npu_smi_is_told_with_its_words() -> None:
    (finding,) = npu.check_npu_smi("exit status 124: did not answer within 60 s")
    assert (finding.id, finding.severity) == ("NPU_SMI", "error")
    assert "60 s" in finding.found
