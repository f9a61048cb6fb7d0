"""Fetching weights: what is run for each source, what is kept of a run that was cut off, how far it is."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.weights_manifest import bytes_on_disk

import vllm_weights_fetch as fetching
import vllm_weights_progress as progress
from rendering import ROLES, HostVariables

PARTIAL = "/opt/atomgit/weights/GLM-OCR-bf16.partial"


def variables(tmp_path: Path, **overrides: Any) -> HostVariables:
    host = HostVariables(tmp_path, **overrides)
    host.values = host.load(ROLES / "vllm_weights" / "vars" / "main.yml") | host.values
    return host


@pytest.mark.parametrize(
    ("source", "client"),
    [
        (
            "modelscope:ZhipuAI/GLM-OCR",
            ["modelscope", "download", "--model", "ZhipuAI/GLM-OCR", "--local_dir", PARTIAL],
        ),
        (
            "modelscope:ZhipuAI/GLM-OCR@v1.0",
            ["modelscope", "download", "--model", "ZhipuAI/GLM-OCR", "--local_dir", PARTIAL, "--revision", "v1.0"],
        ),
        ("huggingface:zai-org/GLM-OCR", ["hf", "download", "zai-org/GLM-OCR", "--local-dir", PARTIAL]),
        (
            "huggingface:zai-org/GLM-OCR@refs/pr/1",
            ["hf", "download", "zai-org/GLM-OCR", "--local-dir", PARTIAL, "--revision", "refs/pr/1"],
        ),
        ("rsync:me@backup:/srv/GLM-OCR", ["me@backup:/srv/GLM-OCR/", f"{PARTIAL}/"]),
        ("rsync://backup/models/GLM-OCR", ["rsync://backup/models/GLM-OCR/", f"{PARTIAL}/"]),
        ("rsync:///mnt/GLM-OCR", ["///mnt/GLM-OCR/", f"{PARTIAL}/"]),
    ],
)
def test_the_client_of_each_source(source: str, client: list[str], tmp_path: Path) -> None:
    host = variables(tmp_path, vllm_weights_source=source, vllm_weights_fetch_environment={"HF_ENDPOINT": "https://m"})
    command = host.template("{{ __vllm_weights_commands[__vllm_weights_kind] }}")
    assert command[-len(client) :] == client
    assert host.template("{{ vllm_weights_source is match(__vllm_weights_source_form) }}") is True
    if source.startswith("rsync:"):
        assert command[0] == "rsync"
    else:
        assert command[:2] == ["docker", "run"]
        assert "--env=HF_ENDPOINT" in command, "the name alone: values do not belong on a command line"
        assert command[-len(client) - 1] == host.values["glm_ocr_image"]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "modelscope:",
        "modelscope:GLM-OCR",
        "huggingface:a/b c",
        "folder:relative",
        "rsync:-e sh",
        "/opt/model",
        "ftp://a/b",
    ],
)
def test_a_source_that_is_none_is_refused(source: str, tmp_path: Path) -> None:
    host = variables(tmp_path, vllm_weights_source=source)
    assert host.template("{{ vllm_weights_source is match(__vllm_weights_source_form) }}") is False


def test_a_copy_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"0123456789")
    os.utime(source, ns=(1, 1))
    target.write_bytes(b"AAAA")
    fetching.copy_file(source, target)
    assert target.read_bytes() == b"AAAA456789", "the first four bytes are not read again"
    target.write_bytes(b"BBBBBBBBBB")
    os.utime(target, ns=(1, 1))
    fetching.copy_file(source, target)
    assert target.read_bytes() == b"BBBBBBBBBB", "complete: same size and time"


@pytest.mark.parametrize(
    ("there", "mtime_ns"), [(b"", 1), (b"AAAA", 1), (b"AAAAAAAAAA", 3), (b"longer than the source", 3)]
)
def test_a_copy_begins_again_when_the_source_is_newer_or_shorter(there: bytes, mtime_ns: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.write_bytes(there)
    source.write_bytes(b"0123456789")
    os.utime(source, ns=(2, 2))
    os.utime(target, ns=(mtime_ns, mtime_ns))
    fetching.copy_file(source, target)
    assert target.read_bytes() == b"0123456789"
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_a_folder_is_copied_without_hidden_files_and_with_what_links_lead_to(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    (source / ".git" / "config").touch()
    (source / "sub").mkdir()
    (source / "sub" / "a.json").write_text("{}")
    (tmp_path / "blob").write_text("blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    fetching.fetch(tmp_path / "target", [], str(source))
    found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*")}
    assert found == {"sub", "sub/a.json", "model.safetensors"}
    assert not (tmp_path / "target" / "model.safetensors").is_symlink()


def test_a_disk_that_is_too_small_is_told_and_nothing_is_fetched(tmp_path: Path) -> None:
    target, source = tmp_path / "target", tmp_path / "source"
    with pytest.raises(fetching.FetchError, match=r"\[WEIGHTS_DISK\] expected 1000000000.0 GB free .*; found .* GB"):
        fetching.fetch(target, ["true"], "", 10**18)
    source.mkdir()
    with (source / "model.safetensors").open("wb") as file:
        file.truncate(10**13)  # sparse: a copy would not be
    with pytest.raises(fetching.FetchError, match=r"expected 10000.0 GB free"):
        fetching.fetch(target, [], str(source))
    assert not target.exists()
    fetching.fetch(target, ["true"], "", 1)


def test_a_client_that_is_absent_or_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(fetching.FetchError, match="absent-client cannot be run on this host: No such file"):
        fetching.fetch(tmp_path / "target", ["absent-client"], "")
    noisy = ["sh", "-c", "printf '1 %%\\r2 %%\\r'; seq 100; echo no route >&2; exit 7"]
    with pytest.raises(fetching.FetchError) as caught:
        fetching.fetch(tmp_path / "target", noisy, "")
    lines = str(caught.value).splitlines()
    assert lines[0] == "sh ended with status 7:"
    assert (lines[-1], len(lines)) == ("no route", 1 + fetching.OUTPUT_LINES)


def test_a_second_run_waits_and_notices_that_the_first_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "model.partial"
    partial.mkdir()
    first = os.open(partial, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    lock = fcntl.flock

    def waits(handle: int, operation: int) -> None:
        with pytest.raises(BlockingIOError):
            lock(handle, operation | fcntl.LOCK_NB)
        # Meanwhile the first completes.
        partial.rename(tmp_path / "model")
        os.close(first)
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", waits)
    with pytest.raises(fetching.FetchError, match=f"another run completed {partial} meanwhile"):
        fetching.fetch(partial, ["touch", str(tmp_path / "fetched")], "")
    assert not (tmp_path / "fetched").exists()


def test_how_far_it_is(tmp_path: Path) -> None:
    result = tmp_path / "job"
    result.write_text(json.dumps({"started": True, "finished": False}))
    assert not progress.wait(result, 0)
    result.write_text('{"sta')
    assert not progress.has_ended(result)
    result.write_text(json.dumps({"changed": True}))
    assert progress.wait(result, 0)
    assert progress.has_ended(tmp_path / "absent")
    folder = tmp_path / "partial"
    folder.mkdir()
    (folder / ".incomplete").write_bytes(b"x" * 10_000)
    with (folder / "sparse").open("wb") as file:
        file.truncate(10**9)
    assert bytes_on_disk(folder) == 10_000
