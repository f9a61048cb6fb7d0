"""What a host remembers of its releases, and how it is read back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import host_checks, provided
from ansible.module_utils.releases import Store

import vllm_release
from deployment import deployment
from rendering import ROLES


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


def test_a_release_that_finds_no_room_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stage(store, "a")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stage(store, "b")
    assert store.folders() == ["a"]


@pytest.mark.parametrize("lost", ["unit", "environment", "release.json"])
def test_a_damaged_release_counts_as_absent_and_is_staged_anew(lost: str, store: Store) -> None:
    stage(store, "a")
    Path(store.path("a", lost)).unlink()
    assert store.get("a") is None
    stage(store, "a")
    assert store.get("a") is not None


def test_a_release_whose_record_is_cut_off_counts_as_absent_and_is_staged_anew(store: Store) -> None:
    stage(store, "a", "b")
    Path(store.path("a", "release.json")).write_text('{"image": "qu')
    assert store.get("a") is None
    assert [release.id for release in store.all()] == ["b"]
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
    latest = store.last_good()
    assert latest is not None
    assert latest.id == "a"


def test_a_release_that_was_good_before_another_is_to_be_proven_again(store: Store, tmp_path: Path) -> None:
    """A play that died between the swap and the proof left `a` running and `b` as what a failure would put back."""
    stage(store, "a", "b")
    good(store, "a", 10)
    service = service_of(store, tmp_path)
    assert service.identity({}, "a")["good"]
    good(store, "b", 20)
    assert not service.identity({}, "a")["good"]
    assert not service.identity({}, None)["good"]


def service_of(store: Store, folder: Path) -> vllm_release.Service:
    names = {"name": "s", "label": "glm-ocr.release", "container_engine": "", "store": store.folder}
    return vllm_release.Service(
        {**names, "unit_file": str(folder / "unit"), "environment_file": str(folder / "etc" / "env")}
    )


def test_a_file_that_was_opened_to_others_by_hand_is_found(store: Store, tmp_path: Path) -> None:
    stage(store, "a")
    release, service = store.get("a"), service_of(store, tmp_path)
    assert release is not None
    service.install(release)
    assert not service.differs(release)
    assert service.opened() == {}
    (tmp_path / "etc" / "env").chmod(0o644)
    assert service.opened() == {str(tmp_path / "etc" / "env"): 0o640}


def test_one_look_at_the_container_tells_what_runs_and_since_when(store: Store, tmp_path: Path) -> None:
    """A second one might find that it died meanwhile."""
    stage(store, "a")
    release, service = store.get("a"), service_of(store, tmp_path)
    assert release is not None
    service.install(release)
    labels = {"Labels": {"glm-ocr.release": "a"}}
    container: dict[str, Any] = {"State": {"StartedAt": "2000-01-01T00:00:00Z"}, "Config": labels}
    assert service.identity(container, "a")["running"] == "a"
    assert service.older_than_its_files(container)
    container["State"]["StartedAt"] = "2100-01-01T00:00:00Z"
    assert not service.older_than_its_files(container)


def test_pruning_keeps_the_last_good_ones_and_the_protected(store: Store) -> None:
    stage(store, "a", "b", "c", "never-good")
    for at, identifier in enumerate("abc"):
        good(store, identifier, at + 1)
    # Killed right before the rename: everything is in it.
    shutil.copytree(store.path("c"), store.path(".staging-of-a-killed-run"))
    assert [release.id for release in store.all()] == ["c", "b", "a", "never-good"]
    assert store.prune(2, protect="a") == [".staging-of-a-killed-run", "never-good"]
    assert {release.id for release in store.all()} == {"a", "b", "c"}
    assert store.prune(1, protect="c") == ["a", "b"]


def test_a_trial_takes_no_kept_ones_place_and_ends_with_the_next(store: Store) -> None:
    stage(store, "a", "b", "one", "two")
    good(store, "a", 1)
    good(store, "b", 2)
    for at, identifier in ((3, "one"), (4, "two")):
        store.mark_good(identifier, trial=True)
        os.utime(store.path(identifier, "good"), (at, at))
    assert [release.id for release in store.all() if release.trial] == ["two", "one"]
    assert store.prune(2, protect="two") == ["one"]
    # What the inventory had wanted is tried too: it remains what it was.
    store.mark_good("b", trial=True)
    assert [release.id for release in store.all() if release.trial] == ["two"]
    store.mark_good("two")
    assert not [release for release in store.all() if release.trial]
    assert store.prune(2, protect="two") == ["a"]


def test_a_trial_that_is_wanted_after_all_is_proven_anew(store: Store, tmp_path: Path) -> None:
    stage(store, "a")
    store.mark_good("a", trial=True)
    service = service_of(store, tmp_path)
    assert service.identity({}, "a")["last_good"] == "a", "it can be put back"
    assert not service.identity({}, "a")["good"]
    store.mark_good("a")
    assert service.identity({}, "a")["good"]


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
    unit = "ExecStart=x run \\\n  --label glm-ocr.release=0123 \\\n  image"
    assert vllm_release.release_of_unit(unit, "glm-ocr.release") == "0123"
    assert vllm_release.release_of_unit("ExecStart=/bin/true", "glm-ocr.release") == ""
    assert vllm_release.release_of_unit(None, "glm-ocr.release") == ""


def test_the_label_of_the_unit_is_the_one_that_others_look_for() -> None:
    label = yaml.safe_load((ROLES / "glm_ocr" / "vars" / "main.yml").read_text())["glm_ocr_release_label"]
    assert label == host_checks.OUR_LABEL
    (told,) = [{"Config": {"Labels": {label: "a"}}}]
    assert deployment([told], "host", "image", "", "docker")["release"] == "a"


def test_a_record_is_kept_as_json(store: Store) -> None:
    stage(store, "a")
    assert json.loads(Path(store.path("a", "release.json")).read_text()) == {"image": "a"}


def test_what_the_unit_calls_is_put_in_place_once_and_mended(tmp_path: Path) -> None:
    tool, folder = tmp_path / "lib" / "wait_ready.py", tmp_path / "state" / "cache"

    def provide(text: str, write: bool = True) -> list[str]:
        return [part["prepared"] for part in provided.provide({str(tool): text}, [str(folder)], write)]

    assert len(provide("one\n", write=False)) == 2
    assert not tool.exists()
    assert not folder.exists()
    assert len(provide("one\n")) == 2
    assert (tool.read_text(), tool.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == ("one\n", 0o755, 0o755)
    assert provide("one\n") == []
    (told,) = provide("two\n")
    assert "-one\n+two\n" in told
    tool.chmod(0o600)
    assert len(provide("two\n", write=False)) == 1
    assert tool.stat().st_mode & 0o777 == 0o600
    folder.chmod(0o700)
    assert len(provide("two\n")) == 2
    assert (tool.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o755, 0o755)


def test_lines_that_an_older_systemd_leaves_out_are_no_reason_to_refuse_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd 243 knows them not, and goes on without; anything else that it does not know is a fault of the unit."""
    said = [
        f"/tmp/x/glm-ocr.service:{number}: Unknown {what} '{name}' in section 'Service'{end}"
        for number, (what, name, end) in enumerate(
            [("lvalue", "ProtectClock", ""), ("key name", "ProtectProc", ", ignoring."), ("lvalue", "ExecStrt", "")]
        )
    ]
    done = subprocess.CompletedProcess([], 0, "\n".join([*said, "other.service: not ours"]))
    monkeypatch.setattr(vllm_release, "run", lambda command: done)
    assert vllm_release.verify("", "glm-ocr.service") == [said[2]]
