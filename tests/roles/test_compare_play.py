"""The comparison as a play: each variant with its own variables, one that fails, and what comes back at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import again
from fake_gateway import admin
from playing import HERE, Played, ansible_playbook
from rendering import PROJECT
from variant_reports import bench, phase, report

#: Stands in for the deployment: fails where the variables say so, and writes down what it was told.
DEPLOY = """
- hosts: ascend910
  gather_facts: false
  tasks:
    - ansible.builtin.shell: >-
        echo
        '{{ vllm_service_keep_releases }} {{ vllm_service_operator }} {{ glm_ocr_gateways | default([]) | length }}{{
        ' joins' if glm_ocr_joins | default(false) | bool }}{{ ' trial' if vllm_service_trial | default(false) }}' >>
        {{ site }}/deployed
    - name: Run | Start it
      ansible.builtin.fail: {msg: "no such flag, [secretless]"}
      when: vllm_service_shm_size == '13g'
    - name: Run | Bring it back
      ansible.builtin.fail: {msg: "nothing comes back"}
      when: lost is defined and vllm_service_keep_releases == 5
"""
#: And for the validation: a report such as the real one leaves.
VALIDATE = """
- hosts: ascend910
  gather_facts: false
  tags: ocr_bench
  tasks:
    - ansible.builtin.file:
        path: "{{ glm_ocr_reports_dir }}/npu-01/latest"
        state: directory
    - ansible.builtin.copy:
        src: "{{ site }}/report.json"
        dest: "{{ glm_ocr_reports_dir }}/npu-01/latest/report.json"
    - ansible.builtin.fail: {msg: "another stage was asked for"}
      tags: ocr_smoke
      when: "'ocr_bench' not in ansible_run_tags"
"""
#: The inventory's own choice, which is what shall come back.
OWN = {"vllm_service_keep_releases": 5, "vllm_service_operator": "inventory", "vllm_service_shm_size": "1g"}


class Site:
    """The project as far as the comparison uses it, with stand-ins for the two verbs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder, folder / "project"
        for name in ("roles", "files", "inventory"):
            (self.project / name).parent.mkdir(exist_ok=True)
            (self.project / name).symlink_to(PROJECT / name)
        # The role finds the project by its own place.
        (self.project / "roles").unlink()
        (self.project / "roles").mkdir()
        for role in (PROJECT / "roles").iterdir():
            (self.project / "roles" / role.name).symlink_to(role)
        (self.project / "roles" / "ocr_compare").unlink()
        shutil.copytree(PROJECT / "roles" / "ocr_compare", self.project / "roles" / "ocr_compare")
        shutil.copytree(PROJECT / "playbooks", self.project / "playbooks")
        (self.project / "deploy.yml").write_text(DEPLOY)
        (self.project / "validate.yml").write_text(VALIDATE)
        (folder / "report.json").write_text(json.dumps(report(bench(phase("latency", 1)))))

    def compare(
        self,
        variants: Any,
        *more: str,
        hosts: tuple[str, ...] = ("npu-01",),
        others: Mapping[str, Any] | None = None,
    ) -> Played:
        own = {**HERE, **OWN, "ocr_compare_variants": variants}
        groups = {"ascend910": {"hosts": {**dict.fromkeys(hosts, own), **(others or {})}}}
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(groups, sort_keys=False))
        variables = {"site": str(self.folder), "glm_ocr_reports_dir": str(self.folder / "reports")}
        return ansible_playbook(
            "playbooks/compare.yml",
            *("-i", os.path.relpath(self.folder / "hosts.yml", self.project)),
            *("-e", json.dumps(variables), *more),
            folder=self.project,
            ANSIBLE_ROLES_PATH=str(self.project / "roles"),
            ANSIBLE_CONFIG=str(PROJECT / "ansible.cfg"),
        )

    def deployed(self) -> list[str]:
        path = self.folder / "deployed"
        return path.read_text().splitlines() if path.exists() else []

    def comparison(self) -> dict[str, Any]:
        (path,) = (self.folder / "reports" / "compare" / "npu-01").glob("*/comparison.json")
        return dict(json.loads(path.read_text()))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_variant_is_measured_though_one_fails_and_the_inventorys_choice_comes_back(site: Site) -> None:
    variants = {
        "two": {"vllm_service_keep_releases": 2},
        "broken": {"vllm_service_shm_size": "13g"},
        "three": {"vllm_service_keep_releases": 3},
    }
    played = site.compare(variants, "-e", "vllm_service_operator=someone")
    assert played.rc != 0
    # The command line's own variables hold for all of them.
    assert site.deployed() == [
        *("2 someone 0 trial", "5 someone 0 trial", "3 someone 0 trial"),
        "5 someone 0 joins",
    ]
    comparison = site.comparison()
    assert comparison["verdict"] == "FAIL"
    assert [one["name"] for one in comparison["variants"]] == list(variants)
    assert [bool(one["loads"]) for one in comparison["variants"]] == [True, False, True]
    broken = comparison["variants"][1]
    assert broken["failure"] == "Run | Start it: no such flag, [secretless]"
    assert broken["failure"] in " ".join(played.output.split())
    (folder,) = (site.folder / "reports" / "compare" / "npu-01").iterdir()
    assert "no such flag" in (folder / "broken" / "deploy.log").read_text()
    assert (folder / "two" / "variables.json").stat().st_mode & 0o777 == 0o600


def test_all_measured_is_green(site: Site) -> None:
    played = site.compare({"as-it-is": {}})
    assert played.rc == 0
    assert site.comparison()["verdict"] == "PASS"
    assert "| as-it-is | latency, 1 at a time | 1.25 |" in played.output


@contextmanager
def behind_a_gateway(site: Site) -> Iterator[str]:
    """The variables that say so; what the gateway is told is among the deployments."""
    socket = site.folder / "admin.sock"
    given = {
        "glm_ocr_gateways": ["localhost"],
        "__gateway_socket": str(socket),
        "__gateway_states": f"{socket}.states",
    }
    with admin(socket, site.folder / "deployed", ["npu-01", "npu-02"]):
        yield json.dumps(given)


def test_the_host_is_out_of_the_pools_until_the_inventorys_choice_is_back(site: Site) -> None:
    with behind_a_gateway(site) as gateway:
        played = site.compare({"two": {"vllm_service_keep_releases": 2}}, "-e", gateway)
    assert played.rc == 0
    left, *deployed, back = site.deployed()
    assert ("drain npu-01" in left, "ready npu-01" in back) == (True, True)
    # The variant knows no gateway that would send it clients, and the way back leaves that to the comparison.
    assert deployed == ["2 inventory 0 trial", "5 inventory 1 joins"]


def test_a_choice_that_does_not_come_back_is_said_first_and_no_client_meets_what_runs_instead(site: Site) -> None:
    with behind_a_gateway(site) as gateway:
        played = site.compare({"two": {"vllm_service_keep_releases": 2}}, "-e", "lost=1", "-e", gateway)
    assert played.rc != 0
    assert site.comparison()["verdict"] == "ERROR"
    told = " ".join(played.output.split())
    assert "npu-01 may run a variant, or nothing" in told
    assert "ansible-playbook deploy.yml -l npu-01 -e glm_ocr_joins=true brings the choice back, and the same" in told
    assert site.deployed()[-1] == "5 inventory 1 joins"


def test_what_the_command_line_says_is_in_no_log(site: Site) -> None:
    played = site.compare({"as-it-is": {}}, "-vvv", "-e", "somebodys=secret-of-the-command-line")
    assert played.rc == 0
    assert "secret-of-the-command-line" not in played.output


@pytest.mark.parametrize(
    ("variants", "more", "told"),
    [
        ({}, (), "ocr_compare_variants must have a variant, found none"),
        ({"A b": {}}, (), "a name is of lower-case letters, digits and dashes, found A b"),
        ({"a": [1]}, (), "a in ocr_compare_variants must be variables and their values"),
        ({"a": {"vllm_service_flag": {}}}, (), "no role has the variable vllm_service_flag"),
        ({"a": {"glm_ocr_instance": 1}}, (), "glm_ocr_instance in ocr_compare_variants is the same for all variants"),
        ({"a": {}}, ("--skip-tags", "x"), "expected the whole of the play, found --tags or --skip-tags"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_changed(
    variants: Any, more: tuple[str, ...], told: str, site: Site
) -> None:
    played = site.compare(variants, *more)
    assert played.rc != 0
    assert told in " ".join(played.output.split())
    assert site.deployed() == []


def test_two_hosts_are_refused_and_check_mode_compares_nothing(site: Site) -> None:
    refused = site.compare({"a": {}}, hosts=("npu-01", "npu-02"))
    assert "expected one host, found npu-01, npu-02" in " ".join(refused.output.split())
    assert site.compare({"a": {}}, "--check").rc == 0
    assert site.deployed() == []


def test_a_variant_has_nothing_that_another_line_of_its_host_would_have_too(site: Site) -> None:
    second = {"npu-01-1": {**HERE, "ansible_host": "npu-01", "glm_ocr_instance": 1}}
    refused = site.compare({"a": {"glm_ocr_devices": ["/dev/davinci0"]}}, "-l", "npu-01", others=second)
    told = " ".join(refused.output.split())
    assert "glm_ocr_devices in ocr_compare_variants would be that of npu-01-1 too, on the same host" in told
    assert site.deployed() == []


def test_the_command_line_is_this_plays_own_with_another_playbook() -> None:
    argv = ["/bin/ansible-playbook", "-i", "inventory/lab", "playbooks/compare.yml", "-l", "npu-01", "-e", "a=1"]
    words = again.again(argv, ("playbooks/compare.yml",), ["deploy.yml", "-e", "@variables.json"])
    assert words[1:] == [
        *("/bin/ansible-playbook", "-i", "inventory/lab", "-l", "npu-01", "-e", "a=1"),
        *("deploy.yml", "-e", "@variables.json"),
    ]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"ask_vault_pass": True}, ["--ask-vault-pass"]),
        ({"ask_pass": True, "become_ask_pass": True}, ["--ask-pass", "--ask-become-pass"]),
        ({"vault_ids": ["site@prompt", "other@file"]}, ["--vault-id site@prompt"]),
        ({"ask_vault_pass": False, "vault_ids": None}, []),
    ],
)
def test_a_password_that_somebody_types_is_told(options: dict[str, Any], flags: list[str]) -> None:
    assert again.typed(options) == flags
