"""Recorded output of npu-smi is read as it is meant, and nothing that was cut or altered passes for a healthy card."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from ansible.module_utils import npu_smi
from ansible.module_utils.npu_smi import NpuSmiError

from rendering import ROLES

FOLDER = Path(__file__).parent / "npu_smi"
#: File: chips, name, health words beside OK, device numbers, MB used and in all of the first chip, busy (npu, chip).
RECORDED: dict[str, tuple[int, str, set[str], list[int | None], tuple[int, int], set[tuple[int, int]]]] = {
    "910b4_one_of_eight": (1, "910B4", set(), [None], (2922, 32768), set()),
    "910b3_unnamed_process": (8, "910B3", set(), [None] * 8, (3408, 65536), {(2, 0)}),
    "910b4_four_busy": (4, "910B4", set(), [None] * 4, (30237, 32768), {(n, 0) for n in range(4)}),
    "910b2c_four_busy": (4, "910B2C", set(), [None] * 4, (52675, 65536), {(n, 0) for n in range(12, 16)}),
    "910b3_virtual": (1, "910B3vir05_1c_16g", set(), [None], (4713, 16384), {(7, 0)}),
    "910b4_wide": (1, "910B4", set(), [None], (2871, 32768), set()),
    "910prob_first_generation": (8, "910ProB", set(), [None] * 8, (18, 32768), set()),
    "a3_sixteen_dies": (
        16,
        "Ascend910",
        set(),
        list(range(16)),
        (53444, 65536),
        {(npu, chip) for npu in (0, 1, 6, 7) for chip in (0, 1)},
    ),
    "310p_single": (1, "310P3", set(), [0], (1839, 21525), set()),
    "310p_duo_critical": (8, "310P3", {"Critical"}, list(range(8)), (1607, 47304), set()),
    "310p_large_id": (2, "310P3", set(), [0, 1], (1821, 44280), set()),
    "constructed_alarm_and_warning": (2, "910B2", {"Alarm", "Warning"}, [None, None], (3191, 65536), set()),
}
#: File: what the error must quote.
REFUSED = {
    "failed_driver": "dcmi module initialize failed. ret is -8005",
    "constructed_second_row_missing": "| 0     910B2               | Alarm",
    "constructed_memory_unreadable": "NA",
    "constructed_chip_lost": "| No running processes found in NPU 1",
    "constructed_no_chips": "0 chips",
    "constructed_cut_in_a_line": "| 1     9",
}
MAPPINGS = {
    "map_910b3": {(3, 0): 0, (4, 0): 1},
    "map_310p": {(card, chip): 2 * index + chip for index, card in enumerate((1, 2, 4, 5)) for chip in (0, 1)},
    "map_a3": {(0, 0): 0, (0, 1): 1, (1, 0): 2},
}


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text()


def test_every_form_has_a_test_and_a_line_in_the_readme() -> None:
    files = {path.stem for path in FOLDER.glob("*.txt")}
    assert files == RECORDED.keys() | REFUSED.keys() | MAPPINGS.keys()
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in files if f"`{name}.txt`" not in readme] == []


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_form_is_read(name: str) -> None:
    count, chip_name, unhealthy, numbers, memory, busy = RECORDED[name]
    table = npu_smi.parse_info(text_of(name))
    assert len(table.chips) == count
    assert {chip.name for chip in table.chips} == {chip_name}
    assert {chip.health for chip in table.chips} - {"OK"} == unhealthy
    assert [chip.number for chip in table.chips] == numbers
    assert (table.chips[0].memory_used, table.chips[0].memory_total) == memory
    assert {(process.npu, process.chip) for process in table.processes} == busy


def test_processes_are_read_with_and_without_a_name() -> None:
    (process,) = npu_smi.parse_info(text_of("910b3_unnamed_process")).processes
    assert process == npu_smi.Process(npu=2, chip=0, pid=1333928, name="", memory=37709)
    first = npu_smi.parse_info(text_of("910b2c_four_busy")).processes[0]
    assert first == npu_smi.Process(npu=12, chip=0, pid=78617, name="python", memory=49385)


def test_the_bus_id_is_written_as_in_sysfs() -> None:
    assert npu_smi.parse_info(text_of("910b2c_four_busy")).chips[0].bus_id == "0000:d9:00.0"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_understood_is_quoted(name: str) -> None:
    with pytest.raises(NpuSmiError) as error:
        npu_smi.parse_info(text_of(name))
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize("name", RECORDED)
def test_no_truncation_changes_what_is_read(name: str) -> None:
    """Cut behind each line, and in the middle of each: the same table, or an error."""
    text = text_of(name)
    whole = npu_smi.parse_info(text)
    ends = [index + 1 for index, character in enumerate(text) if character == "\n"]
    refused = 0
    for end in sorted({0, *ends, *(end - 50 for end in ends), *(end - 2 for end in ends)}):
        try:
            assert npu_smi.parse_info(text[:end]) == whole, text[:end]
        except NpuSmiError:
            refused += 1
    assert refused > 2 * len(ends)


@pytest.mark.parametrize("name", RECORDED)
def test_no_lost_line_loses_a_chip(name: str) -> None:
    lines = text_of(name).splitlines(keepends=True)
    whole = npu_smi.parse_info("".join(lines)).chips
    for index in range(len(lines)):
        try:
            assert npu_smi.parse_info("".join(lines[:index] + lines[index + 1 :])).chips == whole, lines[index]
        except NpuSmiError:
            continue


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 5     910B4   ", "| 5             "),
        ("| OK            |", "|               |"),
        ("| 0000:41:00.0  |", "|               |"),
        ("| 0                         |", "| x                         |"),
        ("2922 / 32768", "2922 - 32768"),
        ("No running processes found in NPU 5", "No idea about the processes of NPU 5"),
        ("Chip                      ", "Chip  Sth-New             "),
        ("| NPU   Name ", "| NPU   Label"),
        ("| NPU     Chip ", "| NPU ID       "),
        ("+===========================+===============+", "=============================================\n+"),
    ],
)
def test_an_altered_table_is_refused(old: str, new: str) -> None:
    text = text_of("910b4_one_of_eight")
    assert old in text
    with pytest.raises(NpuSmiError):
        npu_smi.parse_info(text.replace(old, new))


@pytest.mark.parametrize(
    "row",
    [
        "| 9 0 | 1333928 | | 37709 |",  # no such NPU
        "| 2 1 | 1333928 | | 37709 |",  # no such chip
        "| 2   | 1333928 | | 37709 |",
        "| 2 0 | none    | | 37709 |",
        "| 2 0 | 1333928 | | much  |",
        "| 2 0 | 1333928 |",
    ],
)
def test_a_process_row_that_fits_no_chip_is_refused(row: str) -> None:
    lines = text_of("910b3_unnamed_process").splitlines()
    (index,) = [index for index, line in enumerate(lines) if "1333928" in line]
    with pytest.raises(NpuSmiError):
        npu_smi.parse_info("\n".join([*lines[:index], row, *lines[index + 1 :]]))


@pytest.mark.parametrize("text", ["", "\n", "Killed", "| 0 |", "+--+\n||\n"])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(NpuSmiError):
        npu_smi.parse_info(text)


def test_words_before_the_table_are_passed_over() -> None:
    text = text_of("310p_single")
    assert npu_smi.parse_info("[WARN] something\n" + text) == npu_smi.parse_info(text)


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_is_read_without_its_mcu_rows(name: str) -> None:
    assert npu_smi.parse_mapping(text_of(name)) == MAPPINGS[name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dcmi module initialize failed. ret is -8005",
        # Ascend 950 has no logic ids.
        "NPU ID   Slot ID   Chip ID   Chip Phy-ID   Chip Name\n0   1   0   0   Ascend950\n",
        "NPU ID   Chip ID   Chip Logic ID   Chip Name\n0   0   0\n",
        "NPU ID   Chip ID   Chip Logic ID   Chip Name\n0   0   zero   Ascend 910B2\n",
    ],
)
def test_a_mapping_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(NpuSmiError):
        npu_smi.parse_mapping(text)


def unexpected() -> str:
    raise AssertionError("npu-smi info -m is not needed here")


def test_the_device_number_is_the_physical_id_where_the_table_tells_it() -> None:
    chips = npu_smi.parse_info(text_of("310p_duo_critical")).chips
    found = npu_smi.by_device_number(chips, set(), unexpected)
    assert {number: (chip.npu, chip.chip) for number, chip in found.items()}[5] == (4, 1)


def test_the_device_number_is_the_npu_id_where_such_nodes_exist() -> None:
    chips = npu_smi.parse_info(text_of("910b2c_four_busy")).chips
    assert set(npu_smi.by_device_number(chips, set(range(16)), unexpected)) == {12, 13, 14, 15}


def test_the_device_number_is_the_logic_id_else() -> None:
    chips = npu_smi.parse_info(text_of("constructed_alarm_and_warning")).chips
    moved = [replace(chip, npu=chip.npu + 3) for chip in chips]
    found = npu_smi.by_device_number(moved, {0, 1}, lambda: text_of("map_910b3"))
    assert {number: chip.npu for number, chip in found.items()} == {0: 3, 1: 4}


def test_a_chip_without_a_device_number_is_an_error() -> None:
    chips = npu_smi.parse_info(text_of("910b4_one_of_eight")).chips
    with pytest.raises(NpuSmiError):
        npu_smi.by_device_number(chips, {0}, lambda: text_of("map_910b3"))


def test_the_labs_fixture_is_two_healthy_cards() -> None:
    fixture = ROLES / "lab_node" / "files" / "npu" / "npu-smi"
    text = subprocess.run(["sh", fixture, "info"], capture_output=True, text=True, check=True).stdout
    table = npu_smi.parse_info(text)
    assert [(chip.name, chip.health) for chip in table.chips] == [("910B2", "OK")] * 2
    mapping = subprocess.run(["sh", fixture, "info", "-m"], capture_output=True, text=True, check=True).stdout
    assert npu_smi.parse_mapping(mapping) == {(0, 0): 0, (1, 0): 1}
