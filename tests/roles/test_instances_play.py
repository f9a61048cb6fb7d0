"""Several lines of one host in one play: what the inventory may not say, and what is the host's is done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from playing import HERE, Played, ansible_playbook, play
from rendering import ROLES

ONE = {**HERE, "ansible_host": "192.0.2.13"}
CARD = "/dev/davinci{}"


def line(number: int, **more: Any) -> dict[str, Any]:
    return {**ONE, "glm_ocr_instance": number, "glm_ocr_devices": [CARD.format(number)], **more}


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (line(0), "npu-03 and npu-03-1 are one host, 192.0.2.13, and both have the service glm-ocr"),
        (line(1, glm_ocr_port=8000), "npu-03 and npu-03-1 are one host, 192.0.2.13, and both have glm_ocr_port 8000"),
        (line(1, glm_ocr_devices=[CARD.format(0)]), "both have /dev/davinci0 in glm_ocr_devices"),
        (line(-1), "glm_ocr_instance must be a whole number from 0 up, found -1"),
        ({**line(1), "glm_ocr_instance": "second"}, "glm_ocr_instance"),
    ],
)
def test_lines_that_mean_the_same_are_refused_though_one_alone_is_played(
    second: dict[str, Any], found: str, tmp_path: Path
) -> None:
    hosts = {"npu-03": line(0), "npu-03-1": second, "npu-04": HERE}
    played = play(tmp_path, "playbooks/preflight.yml", hosts, "-l", "npu-03-1")
    assert played.rc != 0
    assert found in " ".join(played.output.split())
    assert "Host | Look at the machine" not in played.output


def told(folder: Path, hosts: dict[str, Any], expression: str, *options: str) -> Played:
    """What an expression is for every host of a play that begins with the contract."""
    say = {"ansible.builtin.debug": {"msg": f"{{{{ inventory_hostname }}}}: {expression}"}}
    contract = {"ansible.builtin.import_role": {"name": "glm_ocr"}}
    tasks = {"hosts": "ascend910", "gather_facts": False, "tasks": [contract, say]}
    (folder / "play.yml").write_text(yaml.safe_dump([tasks]))
    (folder / "hosts.yml").write_text(yaml.safe_dump({"ascend910": {"hosts": hosts}}))
    arguments = ("-i", str(folder / "hosts.yml"), *options, str(folder / "play.yml"))
    return ansible_playbook(*arguments, folder=folder, ANSIBLE_ROLES_PATH=str(ROLES))


HOSTS = {"npu-03": line(0), "npu-03-1": line(1), "npu-03-2": line(2, glm_ocr_weights_path="/other"), "npu-04": HERE}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("all", {"npu-03": True, "npu-03-1": False, "npu-03-2": True, "npu-04": True}),
        ("npu-03-1", {"npu-03-1": True}),
    ],
)
def test_one_line_of_a_host_fetches_for_all_that_read_the_same(
    limit: str, expected: dict[str, bool], tmp_path: Path
) -> None:
    played = told(tmp_path, HOSTS, "{{ glm_ocr_first_of_host }}", "-l", limit)
    assert played.rc == 0
    assert [name for name, value in expected.items() if f"{name}: {value}" not in played.output] == []


def test_an_instance_knows_the_others_of_its_host(tmp_path: Path) -> None:
    expression = "{{ glm_ocr_other_services | join(' ') }} played {{ glm_ocr_played_services | join(' ') }}."
    played = told(tmp_path, HOSTS, expression, "-l", "npu-03-1,npu-03-2,npu-04")
    assert "npu-03-1: glm-ocr glm-ocr-2 played glm-ocr-2." in played.output
    assert "npu-04:  played ." in played.output
