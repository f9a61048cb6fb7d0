"""Several instances on one host: what the second has of its own, and what two lines of the inventory may not share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import host_lines
from rendering import PROJECT, HostVariables
from unit_file import exec_start

GOLDEN = Path(__file__).parent / "golden"
#: What a host has once for each instance.
PLACES = (
    "glm_ocr_service_name",
    "glm_ocr_front_service",
    "glm_ocr_watchdog_service",
    "glm_ocr_watchdog_state",
    "glm_ocr_engine_socket",
    "glm_ocr_state_dir",
    "glm_ocr_library_dir",
    "glm_ocr_lock_path",
    "glm_ocr_port",
    "glm_ocr_local_port",
    "__vllm_service_unit",
    "__vllm_service_environment_file",
    "__vllm_service_store",
)


def instance(folder: Path, number: Any, **overrides: Any) -> HostVariables:
    return HostVariables(folder, "ascend910_per_card", glm_ocr_instance=number, **overrides)


def test_golden(tmp_path: Path) -> None:
    host = instance(tmp_path, 1)
    for name, golden in (("glm-ocr.service.j2", "instance.service"), ("glm-ocr.env.j2", "instance.env")):
        rendered = host.template_file(name)
        if os.environ.get("UPDATE_GOLDEN"):
            (GOLDEN / golden).write_text(rendered)
        assert rendered == (GOLDEN / golden).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_a_second_instance_shares_nothing_of_a_first_ones(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    first, second = instance(tmp_path, 0), instance(tmp_path / "second", "1")
    for name in PLACES:
        one, other = (str(host.template(f"{{{{ {name} }}}}")) for host in (first, second))
        assert one != other, name
        # What one removes is not above what the other has.
        assert not other.startswith(f"{one}/"), name
    assert second.template("{{ glm_ocr_base_url }}") == "http://127.0.0.1:8001"
    assert second.template("{{ __glm_ocr_problems + __vllm_service_problems }}") == []


def test_the_first_instance_is_where_it_was(tmp_path: Path) -> None:
    host = HostVariables(tmp_path)
    found = [host.template(f"{{{{ {name} }}}}") for name in PLACES]
    assert found == [
        "glm-ocr",
        "glm-ocr-front",
        "glm-ocr-watchdog",
        "/var/lib/glm-ocr/watchdog.json",
        "/run/glm-ocr/engine.sock",
        "/var/lib/glm-ocr",
        "/usr/local/lib/glm-ocr",
        "/run/lock/glm-ocr.deploy",
        8000,
        8100,
        "/etc/systemd/system/glm-ocr.service",
        "/etc/glm-ocr/glm-ocr.env",
        "/var/lib/glm-ocr/releases",
    ]


@pytest.mark.parametrize("number", [0, 1, 12])
def test_the_lines_know_the_services_by_the_contracts_names(number: int, tmp_path: Path) -> None:
    host = HostVariables(tmp_path, glm_ocr_instance=number)
    assert host_lines.service_name(number) == host.template("{{ glm_ocr_service_name }}")


def test_a_card_for_each_instance_is_numbered_from_0_inside(tmp_path: Path) -> None:
    host = instance(tmp_path, 3)
    started = exec_start(host.template_file("glm-ocr.service.j2"))
    cards = [word for word in started if re.fullmatch(r"/dev/davinci\d+", word)]
    assert cards == ["/dev/davinci3"]
    assert "ASCEND_RT_VISIBLE_DEVICES=0\n" in host.template_file("glm-ocr.env.j2")


def test_what_the_group_repeats_is_the_sites_choice() -> None:
    groups = PROJECT / "inventory" / "group_vars"
    both = [
        yaml.safe_load((groups / path).read_text())["vllm_service_extra_environment"]
        for path in ("ascend910/vllm_service.yml", "ascend910_per_card/cards.yml")
    ]
    assert both[1] == both[0] | {"ASCEND_RT_VISIBLE_DEVICES": "0"}


# --- lines that mean the same -----------------------------------------------------------------------------

CARDS = ["/dev/davinci_manager", "/dev/davinci{}"]


def line(name: str, number: Any, host: str = "192.0.2.13", **more: Any) -> dict[str, Any]:
    told = {"line": name, "host": host, "ssh_port": 22, "instance": number, "service": "", "weights": ""}
    own = {"glm_ocr_port": 8000 + number, "glm_ocr_state_dir": "", "vllm_watchdog_textfile": ""} | more.pop("own", {})
    return told | {"devices": [CARDS[0], CARDS[1].format(number)], "own": own} | more


def problems(*lines: dict[str, Any]) -> list[str]:
    return host_lines.shared_with(host_lines.on_the_host_of(lines, "npu-03"), "npu-03")


FIRST = line("npu-03", 0)
BOTH = "npu-03 and npu-03-1 are one host, 192.0.2.13, and both have "
OWN_INSTANCE = ": give each line its own glm_ocr_instance, and leave glm_ocr_service_name out of groups and of -e"
OWN_VALUE = ": give each line its own; with -e all lines have it"


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (line("npu-03-1", 1), []),
        (line("npu-03-1", 0), ["the service glm-ocr" + OWN_INSTANCE]),
        (line("npu-03-1", 1, service="glm-ocr"), ["the service glm-ocr" + OWN_INSTANCE]),
        (line("npu-03-1", 1, own={"glm_ocr_port": "8000"}), ["glm_ocr_port 8000" + OWN_VALUE]),
        (line("npu-03-1", 1, devices=["/dev/davinci0"]), ["/dev/davinci0 in glm_ocr_devices" + OWN_VALUE]),
        (line("npu-03-1", 0, host="192.0.2.14"), []),
        (line("npu-03-1", 0, ssh_port=2222), []),
        (line("npu-03-1", 0, service="other", own={"glm_ocr_port": 8001}, devices=[]), []),
    ],
)
def test_two_lines_of_a_host_that_mean_the_same_are_told(other: dict[str, Any], found: list[str]) -> None:
    assert problems(FIRST, other) == [BOTH + text for text in found]


def test_folders_that_the_inventory_names_are_told_where_they_are_the_same() -> None:
    own = {"glm_ocr_state_dir": "/data/ocr", "vllm_watchdog_textfile": "/textfiles/ocr.prom"}
    told = problems(line("npu-03", 0, own=own), line("npu-03-1", 1, own=own))
    assert told == [
        f"{BOTH}glm_ocr_state_dir /data/ocr{OWN_VALUE}",
        f"{BOTH}vllm_watchdog_textfile /textfiles/ocr.prom{OWN_VALUE}",
    ]


def test_a_host_of_another_group_has_no_instances() -> None:
    assert host_lines.on_the_host_of([FIRST], "gw-01") == []
