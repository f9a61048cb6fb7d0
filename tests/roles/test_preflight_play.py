"""The preflight as an operator runs it: what the inventory says wrong is told before anything is asked of a host."""

from __future__ import annotations

from pathlib import Path

import pytest

from playing import HERE, play


@pytest.mark.parametrize("playbook", ["playbooks/preflight.yml", "deploy.yml"])
def test_variables_that_contradict_each_other_are_told_first(playbook: str, tmp_path: Path) -> None:
    host = {**HERE, "vllm_service_extra_flags": {"port": 8001}}
    played = play(tmp_path, playbook, {"npu-01": host}, "--tags", "preflight")
    assert played.rc != 0
    assert "expected port: 8000, as glm_ocr_port says; found 8001" in played.output
    assert "Host | Look at the machine" not in played.output
