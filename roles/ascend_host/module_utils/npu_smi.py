"""What `npu-smi info` and `npu-smi info -m` print, as data.

Nothing is guessed: a table that ends early, lacks a row or says something unknown raises ``NpuSmiError`` with the
line in question.  The forms this was written for are recorded in ``tests/roles/npu_smi/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

BORDER = re.compile(r"\+[-=+]*\+")
IDLE = re.compile(r"No running processes found in NPU (\d+)")
PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")


class NpuSmiError(ValueError):
    """npu-smi did not answer, or with something that cannot be understood; the text quotes it."""


@dataclass(frozen=True)
class Chip:
    """One chip: a card of Atlas A2, one of the two dies of an A3 card, one of the chips of a 310P card.

    ``number`` is N of /dev/davinciN where the table tells it (columns Phy-ID and Device), else None.
    ``bus_id`` is written as in /sys/bus/pci/devices.  Memory is the device's, in MB: HBM, or DDR on 310P.
    """

    npu: int
    chip: int
    number: Optional[int]
    name: str
    health: str
    bus_id: str
    memory_used: int
    memory_total: int


@dataclass(frozen=True)
class Process:
    """A process that holds a chip; npu-smi often leaves ``name`` empty.  ``memory`` is in MB."""

    npu: int
    chip: int
    pid: int
    name: str
    memory: int


@dataclass(frozen=True)
class Table:
    chips: Tuple[Chip, ...]
    processes: Tuple[Process, ...]


def parse_info(text: str) -> Table:
    """The table of `npu-smi info`.  Raises ``NpuSmiError``."""
    chips: List[Chip] = []
    processes: List[Process] = []
    idle: Set[int] = set()
    section = ""
    numbered, pairs = False, 0  # the columns this form has
    above = ""  # the first of a chip's two rows, until the second is read
    unclosed = ""  # the last process row, until a border ends its NPU
    for line, cells in _rows(text):
        if above and (cells is None or len(cells) != 3):
            raise _instead_of("the second row of a chip", f"{line} after {above}")
        if cells is None:
            unclosed = ""
        elif cells[0].split()[:2] == ["NPU", "Name"] and not section:
            section = "columns"
        elif section == "columns":
            section, (numbered, pairs) = "chips", _columns(cells, line)
        elif cells[0].split() == ["NPU", "Chip"] and section == "chips":
            section = "processes"
        elif section == "chips" and not above:
            _first_row(cells, line)
            above = line
        elif section == "chips":
            chips.append(_chip(_first_row(_cells(above), above), cells, line, numbered, pairs))
            above = ""
        elif section == "processes" and IDLE.fullmatch(cells[0]):
            idle.add(_known_npu(int(cells[0].split()[-1]), chips, line))
        elif section == "processes":
            processes.append(_process(cells, chips, line))
            unclosed = line
        elif not cells[0].startswith("npu-smi "):
            raise _instead_of("the heading of the chips", line)
    if section != "processes" or not chips:
        raise _instead_of("a table of chips and one of processes", f"{len(chips)} chips, then the end")
    if unclosed:
        raise _instead_of("more processes or the end of the table", f"nothing after {unclosed}")
    silent = {chip.npu for chip in chips} - idle - {process.npu for process in processes}
    if silent:
        raise _instead_of(f"the processes of NPU {min(silent)}, or that it has none", "neither")
    return Table(tuple(chips), tuple(processes))


def parse_mapping(text: str) -> Dict[Tuple[int, int], int]:
    """(NPU ID, Chip ID) to Chip Logic ID, from `npu-smi info -m`; Mcu rows have none.  Raises ``NpuSmiError``."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    columns = lines[0] if lines else []
    if columns[:3] != ["NPU ID", "Chip ID", "Chip Logic ID"]:
        raise _instead_of("the columns NPU ID, Chip ID, Chip Logic ID", "  ".join(columns))
    mapping = {}
    for fields in lines[1:]:
        if len(fields) != len(columns) or not re.fullmatch(r"\d+ \d+ (\d+|-)", " ".join(fields[:3])):
            raise _instead_of("a row of the mapping", "  ".join(fields))
        if fields[2] != "-":
            mapping[int(fields[0]), int(fields[1])] = int(fields[2])
    return mapping


def by_device_number(chips: Sequence[Chip], nodes: Set[int], mapping: Callable[[], str]) -> Dict[int, Chip]:
    """The chip behind each /dev/davinciN, N being the physical id; ``nodes`` are the N that exist in /dev.

    A3 and 310P say it.  On A2 the NPU ID is N on servers; where it is not (PCIe cards are numbered by slot), the
    logic id is, read from ``mapping()``, the output of `npu-smi info -m`.  Raises ``NpuSmiError``.
    """
    if any(chip.number is None for chip in chips):
        if {chip.npu for chip in chips} <= nodes:
            chips = [replace(chip, number=chip.npu) for chip in chips]
        else:
            logic = parse_mapping(mapping())
            chips = [replace(chip, number=logic.get((chip.npu, chip.chip))) for chip in chips]
    found = {chip.number: chip for chip in chips if chip.number is not None}
    if len(found) != len(chips):
        raise _instead_of("one number of its own for each chip", ", ".join(str(chip.number) for chip in chips))
    return found


def _instead_of(expected: str, found: str) -> NpuSmiError:
    return NpuSmiError(f"instead of {expected}: {found.strip() or 'nothing'}")


def _rows(text: str) -> Iterator[Tuple[str, Optional[List[str]]]]:
    """Each line of the table with its cells, None for a border; what is printed before the table is passed over."""
    lines = [line for line in text.splitlines() if line.strip()]
    start = next((index for index, line in enumerate(lines) if BORDER.fullmatch(line.strip())), None)
    if start is None:
        raise _instead_of("a table", " ".join(lines[:2]))
    for line in lines[start:]:
        if BORDER.fullmatch(line.strip()):
            yield line, None
        elif len(line.strip()) > 1 and line.strip()[0] == line.strip()[-1] == "|":
            yield line, _cells(line)
        else:
            raise _instead_of("a whole line of the table", line)


def _cells(line: str) -> List[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def _columns(cells: List[str], line: str) -> Tuple[bool, int]:
    """From the second heading: is there a column for the device's number, and how many `used / total` are there?"""
    words = cells[0].split()
    if (
        len(cells) != 3
        or words[:1] != ["Chip"]
        or words[1:] not in ([], ["Phy-ID"], ["Device"])
        or "-Usage(MB)" not in cells[2]
    ):
        raise _instead_of("the second heading of the chips", line)
    return len(words) > 1, cells[2].count("-Usage(MB)")


def _first_row(cells: List[str], line: str) -> Tuple[int, str, str]:
    """NPU ID, name, health."""
    match = re.fullmatch(r"(\d+)\s+(\S+)", cells[0])
    if not match or len(cells) != 3 or not cells[1]:
        raise _instead_of("the first row of a chip (NPU, name, health)", line)
    return int(match[1]), match[2], cells[1]


def _chip(first: Tuple[int, str, str], cells: List[str], line: str, numbered: bool, pairs: int) -> Chip:
    npu, name, health = first
    match = re.fullmatch(r"(\d+)\s+(\d+)" if numbered else r"(\d+)()", cells[0])
    memory = PAIR.findall(cells[2])
    if not match or len(memory) != pairs or not cells[1]:
        raise _instead_of("the second row of a chip (chip, bus id, memory)", line)
    used, total = memory[-1]  # HBM stands behind the DDR memory of the same chip
    number = int(match[2]) if numbered else None
    return Chip(npu, int(match[1]), number, name, health, cells[1].lower(), int(used), int(total))


def _process(cells: List[str], chips: Sequence[Chip], line: str) -> Process:
    match = re.fullmatch(r"(\d+)\s+(\d+)", cells[0])
    if not match or len(cells) < 4 or not cells[1].isdigit() or not cells[3].isdigit():
        raise _instead_of("a process (NPU, chip, pid, name, memory)", line)
    npu, chip = int(match[1]), int(match[2])
    if (npu, chip) not in {(known.npu, known.chip) for known in chips}:
        raise _instead_of("processes of the chips listed above", line)
    return Process(npu, chip, int(cells[1]), cells[2], int(cells[3]))


def _known_npu(npu: int, chips: Sequence[Chip], line: str) -> int:
    if npu not in {chip.npu for chip in chips}:
        raise _instead_of("the processes of the NPUs listed above", line)
    return npu
