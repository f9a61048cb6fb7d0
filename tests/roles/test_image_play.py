"""The role of the image: pinned and derived."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from local_play import LocalPlay, role

IMAGE = "quay.io/ascend/vllm-ascend:v0.18.0rc1"
BASE = "sha256:" + "b" * 64
DERIVED = "sha256:" + "d" * 64
REQUIREMENT = "transformers==5.3.0"


@pytest.fixture
def play(tmp_path: Path) -> LocalPlay:
    local = LocalPlay(tmp_path)
    (tmp_path / "images.json").write_text(json.dumps({IMAGE: BASE}))
    return local


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "transformers-5.3.0-py3-none-any.whl").write_bytes(b"wheel")
    return folder


ROLE = role("vllm_image")
SAY = {"ansible.builtin.debug": {"msg": "serves {{ vllm_image_id }}"}}


def test_another_image_than_the_pinned_one_is_refused(play: LocalPlay) -> None:
    refused = play.run(ROLE, vllm_image_expected_id="a" * 64)
    assert refused.rc != 0
    assert "[IMAGE_ID]" in refused.stdout
    assert "a" * 64 in refused.stdout
    assert BASE in refused.stdout
    assert play.calls("pull") == []


def test_a_derived_image_is_built_once_from_wheels_without_a_network(play: LocalPlay, wheels: Path) -> None:
    (play.folder / "answer").write_text("vllm 0.18.0 has requirement transformers<5, but you have 5.3.0")
    given: dict[str, Any] = {"vllm_image_derived_wheels": [REQUIREMENT], "vllm_image_derived_wheels_dir": str(wheels)}
    given |= {"vllm_image_expected_id": "b" * 64}
    before = play.run(ROLE, check=True, **given)
    assert (before.rc, before.changed) == (0, 1), before.stdout
    assert play.calls("build") == []

    first = play.run(ROLE, **given)
    assert first.rc == 0, first.stdout
    (build,) = play.calls("build")
    assert "--network=none" in build["arguments"]
    assert any(word.startswith("--label=glm-ocr.project-version=") for word in build["arguments"])
    context = play.folder / "context"
    assert (context / "transformers-5.3.0-py3-none-any.whl").read_bytes() == b"wheel"
    assert (context / "requirements.txt").read_text() == REQUIREMENT + "\n"
    assert hashlib.sha256(b"wheel").hexdigest() in (context / "Dockerfile").read_text()
    assert "has requirement transformers<5" in first.stdout
    assert not (play.folder / "state" / "derived-image").exists()

    second = play.run(ROLE, SAY, **given)
    assert (second.rc, second.changed) == (0, 0), second.stdout
    assert len(play.calls("build")) == 1
    assert f"serves {DERIVED}" in second.stdout


def test_a_build_that_fails_ends_with_the_engines_words(play: LocalPlay, wheels: Path) -> None:
    (play.folder / "answer").write_text("ERROR: No matching distribution found for transformers==5.3.0")
    (play.folder / "status").write_text("1")
    given: dict[str, Any] = {"vllm_image_derived_wheels": [REQUIREMENT], "vllm_image_derived_wheels_dir": str(wheels)}
    refused = play.run(ROLE, **given)
    assert refused.rc != 0
    assert "[IMAGE_DERIVE]" in refused.stdout
    assert "No matching distribution found" in refused.stdout
    assert not (play.folder / "state" / "derived-image").exists()
