"""What a host remembers of its releases, and how it is read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible.module_utils.releases import Store

import vllm_release


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "releases"))


def stage(store: Store, *identifiers: str) -> None:
    for identifier in identifiers:
        store.stage(identifier, f"unit of {identifier}", "A=1\n", {"image": identifier})


def good(store: Store, identifier: str, at: float) -> None:
    store.mark_good(identifier)
    os.utime(store.path(identifier, "good"), (at, at))


def test_a_staged_release_is_read_back_and_is_roots_alone(store: Store) -> None:
    stage(store, "a")
    release = store.get("a")
    assert release is not None
    assert (release.unit, release.environment, release.record) == ("unit of a", "A=1\n", {"image": "a"})
    assert release.good_at is None
    assert {path.stat().st_mode & 0o077 for path in Path(store.folder).rglob("*")} == {0}


@pytest.mark.parametrize("lost", ["unit", "environment", "release.json"])
def test_a_damaged_release_counts_as_absent_and_is_staged_anew(lost: str, store: Store) -> None:
    stage(store, "a")
    Path(store.path("a", lost)).unlink()
    assert store.get("a") is None
    stage(store, "a")
    assert store.get("a") is not None


def test_the_last_good_one_is_the_one_found_good_last(store: Store) -> None:
    assert store.last_good() is None
    stage(store, "a", "b", "c")
    assert store.last_good() is None
    good(store, "a", 10)
    good(store, "b", 20)
    assert [release.id for release in store.all()] == ["b", "a", "c"]
    good(store, "a", 30)
    latest, before = store.last_good(), store.last_good(besides="a")
    assert latest is not None
    assert before is not None
    assert (latest.id, before.id) == ("a", "b")


def test_a_release_that_was_good_before_another_is_to_be_proven_again(store: Store, tmp_path: Path) -> None:
    """A play that died between the swap and the proof left `a` running and `b` as what a failure would put back."""
    options = {"service": "s", "store": store.folder, "environment_file": "", "container_engine": str(tmp_path)}
    stage(store, "a", "b")
    good(store, "a", 10)
    assert vllm_release.Service({**options, "release": "a"}).identity()["good"]
    good(store, "b", 20)
    assert not vllm_release.Service({**options, "release": "a"}).identity()["good"]
    assert not vllm_release.Service({**options, "release": None}).identity()["good"]


def test_pruning_keeps_the_last_good_ones_and_the_protected(store: Store) -> None:
    stage(store, "a", "b", "c", "never-good")
    for at, identifier in enumerate("abc"):
        good(store, identifier, at + 1)
    Path(store.path(".staging-of-a-killed-run")).mkdir()
    assert store.prune(2, protect="a") == [".staging-of-a-killed-run", "never-good"]
    assert {release.id for release in store.all()} == {"a", "b", "c"}
    assert store.prune(1, protect="c") == ["a", "b"]


def test_the_history_is_told_oldest_first(store: Store) -> None:
    stage(store, "a")
    for number in range(3):
        store.note({"number": number})
    assert store.history(2) == [{"number": 1}, {"number": 2}]
    with Path(store.path("history.jsonl")).open("a") as file:
        file.write('{"numb')
    assert store.history(2) == [{"number": 2}]
    assert [release.id for release in store.all()] == ["a"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01T00:00:10.25Z", 10.25),
        ("1970-01-01T08:00:10.123456789+08:00", 10.123456789),
    ],
)
def test_the_engines_times_are_read(text: str, seconds: float) -> None:
    assert vllm_release.seconds_since_epoch(text) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-01-02 03:04:05 +0000 UTC"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a time of a container engine"):
        vllm_release.seconds_since_epoch(text)


def test_the_release_of_a_unit_is_its_label() -> None:
    assert vllm_release.release_of_unit("ExecStart=x run \\\n  --label glm-ocr.release=0123 \\\n  image") == "0123"
    assert vllm_release.release_of_unit("ExecStart=/bin/true") == ""
    assert vllm_release.release_of_unit(None) == ""


def test_a_record_is_kept_as_json(store: Store) -> None:
    stage(store, "a")
    assert json.loads(Path(store.path("a", "release.json")).read_text()) == {"image": "a"}
