"""In which batches a deployment goes: its plays' heads, with hosts that say themselves whether they are settled."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from playing import HERE, ansible_playbook
from rendering import PROJECT

HOSTS = [f"npu-{number}" for number in range(1, 9)]
QUARTERS = ["1", "2 3", "4 5", "6 7", "8"]


def batches(folder: Path, settled: str, *options: str, gateway: bool = False) -> list[str]:
    """The numbers of the hosts of each batch; within a batch they have no order."""
    _, look, rollout = yaml.safe_load((PROJECT / "playbooks" / "deploy.yml").read_text())
    say = {"ansible.builtin.debug": {"msg": "batch: {{ ansible_play_batch | join(' ') }}."}, "run_once": True}
    path = folder / "plays.yml"
    path.write_text(yaml.safe_dump([{**look, "tasks": look["tasks"][-1:]}, {**rollout, "tasks": [say]}]))
    hosts = {
        name: {**HERE, "vllm_service_settled": name[-1] in settled, "vllm_weights_fingerprint": "0"} for name in HOSTS
    }
    groups = {"ascend910": {"hosts": hosts}} | ({"gateway": {"hosts": {"gw-1": HERE}}} if gateway else {})
    (folder / "hosts.yml").write_text(yaml.safe_dump(groups))
    played = ansible_playbook(str(path), "-i", str(folder / "hosts.yml"), *options)
    assert played.rc == 0
    assert "WARNING" not in played.output
    assert "changed=1" not in played.output
    found = re.findall(r"batch: (.*?)\.", played.output)
    return [" ".join(sorted(batch.replace("npu-", "").split())) for batch in found]


@pytest.mark.parametrize(
    ("settled", "expected"),
    [
        ("", QUARTERS),
        ("12345678", ["1 2 3 4 5 6 7 8"]),
        ("1", ["1", "2", "3 4", "5 6", "7 8"]),
        ("35", ["3 5", "1", "2 4", "6 7", "8"]),
    ],
)
def test_those_that_go_on_as_they_are_first_and_of_the_others_one_and_then_a_quarter(
    settled: str, expected: list[str], tmp_path: Path
) -> None:
    assert batches(tmp_path, settled) == expected


def test_behind_a_gateway_the_others_go_one_at_a_time(tmp_path: Path) -> None:
    assert batches(tmp_path, "12345", gateway=True) == ["1 2 3 4 5", "6", "7", "8"]
    assert batches(tmp_path, "", gateway=True) == list("12345678")


@pytest.mark.parametrize("wanted", [["50%"], "50%"])
def test_other_batches_are_those_of_the_others(wanted: object, tmp_path: Path) -> None:
    given = json.dumps({"glm_ocr_rollout_batches": wanted})
    assert batches(tmp_path, "8", "-e", given) == ["8", "1 2 3 4", "5 6 7"]


def test_a_limit_holds_for_both(tmp_path: Path) -> None:
    assert batches(tmp_path, "28", "-l", "npu-1:npu-2:npu-3:npu-4") == ["2", "1", "3", "4"]
