"""The smoke as a gate, included at run time as a restart and a rollback include it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from local_play import LocalPlay
from playing import installed_scripts

GATE: dict[str, Any] = {"ansible.builtin.include_role": {"name": "ocr_smoke", "tasks_from": "gate"}}
RELEASE = {"ocr_smoke_release": "0123"}


@pytest.fixture
def play(tmp_path: Path) -> LocalPlay:
    installed_scripts(tmp_path)
    (tmp_path / "answer").write_text("sha256:" + "5" * 64)
    return LocalPlay(tmp_path)


def test_the_gate_asks_the_release_that_runs(play: LocalPlay) -> None:
    proven = GATE | {"vars": RELEASE | {"ocr_smoke_model": "another", "ocr_smoke_base_url": "http://127.0.0.1:1"}}
    passed = play.run(proven, glm_ocr_run="now")
    assert passed.rc == 0, passed.stdout
    (call,) = play.calls("run")
    arguments = call["arguments"]
    image = arguments.index("sha256:" + "5" * 64)
    assert {"--network=host", "--entrypoint=python3", f"--volume={play.folder}/state/reports/now:/reports"} <= set(
        arguments[:image]
    )
    assert arguments[image + 1 : image + 4] == ["/scripts/smoke.py", "--base-url=http://127.0.0.1:1", "--model=another"]
    assert arguments[-1] == "--output=/reports/ocr_smoke.0123.json"


@pytest.mark.parametrize("status", [1, 125])
def test_a_service_that_does_not_read_is_refused(status: int, play: LocalPlay) -> None:
    (play.folder / "status").write_text(str(status))
    refused = play.run(GATE | {"vars": RELEASE}, glm_ocr_run="now")
    assert refused.rc != 0
    assert ("The smoke did not pass" in refused.stdout) == (status == 1), "125 is the container engine's own failure"
