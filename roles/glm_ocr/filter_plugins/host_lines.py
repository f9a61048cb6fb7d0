"""The inventory's lines that are one host: each instance of the service has a line of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def on_the_host_of(lines: Sequence[Line], name: str) -> list[dict[str, Any]]:
    """Those of ``lines`` with the address of ``name``'s, itself among them; none when it has no line.

    What the inventory leaves to the contract, the service's name, is filled in.
    """
    hosts = {line["line"]: address(line) for line in lines}
    found = [dict(line) for line in lines if hosts[line["line"]] == hosts.get(name)]
    return [line | {"service": line["service"] or service_name(line["instance"])} for line in found]


def address(line: Line) -> tuple[str, str]:
    """By another port of SSH it is another machine."""
    return str(line["host"]), str(line["ssh_port"])


def service_name(instance: Any) -> str:
    """As the default of glm_ocr_service_name says it."""
    return "glm-ocr" if str(instance) == "0" else f"glm-ocr-{instance}"


def shared_with(lines: Sequence[Line], name: str) -> list[str]:
    """What the line ``name`` must not have, because another line of its host has it: a sentence for each."""
    pairs = [pair for pair in itertools.combinations(lines, 2) if name in (pair[0]["line"], pair[1]["line"])]
    return [problem for one, other in pairs for problem in shared(one, other)]


def shared(one: Line, other: Line) -> list[str]:
    pair = f"{one['line']} and {other['line']} are one host, {one['host']}, and both have "
    if one["service"] == other["service"]:
        return [
            f"{pair}the service {one['service']}: give each line its own glm_ocr_instance,"
            " and leave glm_ocr_service_name out of groups and of -e"
        ]
    both = [f"{name} {value}" for name, value in one["own"].items() if str(value) == str(other["own"][name]) != ""]
    both += [f"{card} in glm_ocr_devices" for card in filter(is_card, one["devices"]) if card in other["devices"]]
    return [f"{pair}{found}: give each line its own; with -e all lines have it" for found in both]


def is_first_of(lines: Sequence[Line], name: str, played: Collection[str]) -> bool:
    """Whether ``name`` is the first line of its host among ``played`` that reads the same weights; alone it is."""
    weights = {line["line"]: line["weights"] for line in lines if line["line"] in played}
    return name == next((line for line in weights if weights[line] == weights.get(name)), name)


def is_card(device: str) -> bool:
    return re.fullmatch(r"/dev/davinci\d+", device) is not None


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"on_the_host_of": on_the_host_of, "shared_with": shared_with, "is_first_of": is_first_of}
