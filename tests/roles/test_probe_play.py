"""The role around the probe: what it passes on, when it asks again, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from local_play import LocalPlay
from rendering import PROJECT, deploy_task

FINDING = {"id": "PROBE_FLAGS", "severity": "error", "expected": "a", "found": "b", "fix": "c", "fix_zh": "d"}
WARNING = FINDING | {"id": "PROBE_DTYPE", "severity": "warning"}
IMAGE_ID = "sha256:" + "1" * 64
FACTS: dict[str, Any] = {
    "vllm_weights_fingerprint": "f" * 64,
    "vllm_service_flags": {"max-model-len": 8192, "compilation-config": {"cudagraph_mode": "NONE"}},
    "vllm_service_environment": {"OMP_NUM_THREADS": "1"},
    "vllm_service_overlays": [{"source": "/c/a.py", "target": "/i/a.py", "original_sha256": "0" * 64}],
}


def entry() -> dict[str, Any]:
    """The task of the deployment that runs the role, with the image's id."""
    task = deploy_task("vllm_probe")
    return task | {"vars": task["vars"] | {"vllm_image_id": IMAGE_ID}}


@pytest.fixture
def play(tmp_path: Path) -> LocalPlay:
    return LocalPlay(tmp_path)


def answer(play: LocalPlay, *findings: dict[str, str]) -> None:
    (play.folder / "answer").write_text("INFO something\n" + json.dumps({"findings": findings, "versions": {}}))


def test_the_probe_gets_what_the_service_gets_and_is_not_asked_twice(play: LocalPlay) -> None:
    driver = play.folder / "lib64"
    driver.mkdir()
    given: dict[str, Any] = FACTS | {"glm_ocr_devices": ["/dev/davinci0"], "glm_ocr_driver_paths": [str(driver)]}
    answer(play, WARNING)
    # Check mode on a fresh host has no image to ask.
    without_image = entry() | {"vars": entry()["vars"] | {"vllm_image_id": ""}}
    first = play.run(without_image, entry(), **given)
    assert (first.rc, first.changed) == (0, 0), first.stdout
    assert "[PROBE_DTYPE] warning: expected a; found b." in first.stdout
    (call,) = play.calls("run")
    arguments = call["arguments"]
    assert {"--network=none", "--device=/dev/davinci0", f"--volume={driver}:{driver}:ro"} <= set(arguments)
    assert "--env=OMP_NUM_THREADS" in arguments
    assert arguments[-7:-1] == [IMAGE_ID, "timeout", "--kill-after=10", "300", "python3", "-"]
    asked = json.loads(arguments[-1])
    assert asked["serve_arguments"][0] == asked["weights"] == "/opt/atomgit/weights/GLM-OCR-bf16"
    assert asked["serve_arguments"][-2:] == ["--compilation-config", '{"cudagraph_mode":"NONE"}']
    assert (asked["client_max_tokens"], asked["devices"]) == (4096, ["/dev/davinci0"])
    assert asked["overlays"][0]["original_sha256"] == "0" * 64
    assert call["stdin"].strip() == (PROJECT / "roles" / "vllm_probe" / "files" / "probe.py").read_text().strip()

    second = play.run(entry(), **given)
    assert second.rc == 0, second.stdout
    assert len(play.calls("run")) == 1, "nothing changed, and the image was asked again"
    assert "[PROBE_DTYPE] warning" in second.stdout, "a warning is told at every run"

    # The engine in its sandbox may not look into it any more.
    driver.chmod(0o700)
    third = play.run(entry(), **given)
    assert third.rc == 0, third.stdout
    assert len(play.calls("run")) == 2, "a mode changed, and the image was not asked"


def test_an_error_refuses_with_all_findings_and_is_not_remembered(play: LocalPlay) -> None:
    answer(play, FINDING, WARNING)
    (play.folder / "status").write_text("1")
    refused = play.run(entry(), check=True, **FACTS)
    assert refused.rc != 0
    assert "2 finding(s)" in refused.stdout
    for text in ("[PROBE_FLAGS] error: expected a; found b.", "Fix: c", "处理：d"):
        assert text in refused.stdout
    assert "[PROBE_DTYPE] warning: expected a" in refused.stdout
    assert not (play.folder / "state").exists()


def test_an_image_that_gives_no_answer_is_refused(play: LocalPlay) -> None:
    (play.folder / "answer").write_text("Segmentation fault")
    (play.folder / "status").write_text("139")
    refused = play.run(entry(), **FACTS)
    assert refused.rc != 0
    assert "[PROBE_RUN]" in refused.stdout
    assert "exit status 139" in refused.stdout
