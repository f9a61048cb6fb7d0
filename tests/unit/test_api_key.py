"""Where the key of a guarded service comes from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

import api_key


@pytest.fixture(autouse=True)
def nothing_read_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY_FILE", raising=False)
    api_key._read.cache_clear()
    yield
    api_key._read.cache_clear()


def test_without_one_there_is_none() -> None:
    assert api_key.api_key() == ""


def test_the_variable_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("of-the-file\n")
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "key"))
    assert api_key.api_key() == "of-the-file"
    monkeypatch.setenv("VLLM_API_KEY", "of-the-variable")
    assert api_key.api_key() == "of-the-variable"


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY_FILE", "-")
    monkeypatch.setattr("sys.stdin", io.StringIO("of-stdin\nmore\n"))
    assert [api_key.api_key(), api_key.api_key()] == ["of-stdin"] * 2


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY_FILE", "/absent/key")
    with pytest.raises(SystemExit, match="expected a file with the key at /absent/key; found No such file"):
        api_key.api_key()
