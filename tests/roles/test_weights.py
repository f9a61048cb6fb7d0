"""The checks of the weights: each thing is broken once and must be told, unchanged files are not read twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.weights_manifest import bytes_on_disk, hash_files, list_files, parse, room_bytes

import vllm_weights_check as weights
from model_files import NANO, NANO_MANIFEST, flip, safetensors, sha256, sha256sum

ARCHITECTURE = "GlmOcrForConditionalGeneration"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE]}))
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def look(model: Path, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    options = {"hash": "listed", "memory": "", "manifest": "", "trust_remote_code": False, "partial": "", **options}
    options.setdefault("manifest_name", "list.sha256" if options["manifest"] else "")
    return weights.examine({"path": str(model), "architecture": ARCHITECTURE, **options}, may_remember=True)


def errors(model: Path, **options: Any) -> list[str]:
    return [finding.id for finding in look(model, **options)[0] if finding.severity == "error"]


def test_whole_weights_only_lack_a_manifest(model: Path) -> None:
    (finding,) = look(model)[0]
    assert (finding.id, finding.severity) == ("WEIGHTS_UNVERIFIED", "warning")
    assert "playbooks/weights_manifest.yml -l HOST" in finding.fix
    assert "playbooks/weights_manifest.yml -l HOST" in finding.fix_zh


@pytest.mark.parametrize(
    ("file", "content", "identifier"),
    [
        ("config.json", b'{"architectures": ["Qwen2VLForConditionalGeneration"]}', "WEIGHTS_CONFIG"),
        ("config.json", b"[]", "WEIGHTS_CONFIG"),
        ("config.json", b"{", "WEIGHTS_CONFIG"),
        ("config.json", b"\xff", "WEIGHTS_CONFIG"),
        ("model.safetensors", safetensors()[:-1], "WEIGHTS_DAMAGED"),
        ("model.safetensors", safetensors() + b"\0", "WEIGHTS_DAMAGED"),
        ("model.safetensors", b"", "WEIGHTS_DAMAGED"),
        ("model.safetensors", b"\xff" * 64, "WEIGHTS_DAMAGED"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "WEIGHTS_DAMAGED"),
        ("model.safetensors", (8).to_bytes(8, "little") + b'{"t": 1}', "WEIGHTS_DAMAGED"),
    ],
)
def test_damage_is_found_without_a_manifest(file: str, content: bytes, identifier: str, model: Path) -> None:
    (model / file).write_bytes(content)
    assert errors(model) == [identifier]


@pytest.mark.parametrize("found", ["no such folder", "an empty folder"])
def test_an_absent_or_empty_folder_is_one_error(found: str, model: Path) -> None:
    folder = model / "other"
    if found == "an empty folder":
        folder.mkdir()
    (finding,) = look(folder, manifest=sha256sum_of_two(model))[0]
    assert (finding.id, finding.found) == ("HOST_WEIGHTS", found)
    assert str(folder) in finding.expected
    assert errors(folder) == ["HOST_WEIGHTS"], "the missing manifest stays a warning"


@pytest.mark.parametrize(
    ("file", "missing"), [("config.json", "WEIGHTS_CONFIG"), ("model.safetensors", "WEIGHTS_FORMAT")]
)
def test_a_missing_file_is_told_without_a_manifest(file: str, missing: str, model: Path) -> None:
    (model / file).unlink()
    assert errors(model) == [missing]


def test_weights_below_an_absent_mount_are_refused_even_when_files_lie_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"/etc/fstab": f"/dev/sdb1 {model} ext4 defaults 0 0", "/proc/self/mounts": ""}
    monkeypatch.setattr(weights, "text_of", texts.__getitem__)
    found = {finding.id: finding for finding in look(model)[0]}
    assert found["HOST_WEIGHTS"].found == f"{model} of /etc/fstab is not mounted"
    assert f"`mount {model}`" in found["HOST_WEIGHTS"].fix
    assert f"`mount {model}`" in found["HOST_WEIGHTS"].fix_zh


FSTAB = """
# /dev/sdz /opt/commented ext4 defaults 0 0
UUID=1 / ext4 defaults 0 1
nas:/weights /opt/atomgit/ nfs defaults 0 0
/dev/sdb1 /opt/my\\040disk ext4 defaults 0 0
/dev/sdc1 /opt/atom ext4 defaults 0 0
/dev/sdd1 none swap sw 0 0
"""


@pytest.mark.parametrize(
    ("path", "mounts", "missing"),
    [
        ("/opt/atomgit/weights", "", ["/opt/atomgit"]),
        ("/opt/atomgit/weights", "nas:/weights /opt/atomgit nfs4 rw 0 0", []),
        ("/opt/atomgit", "", ["/opt/atomgit"]),
        ("/opt/my disk/w", "", ["/opt/my disk"]),
        ("/opt/my disk/w", "/dev/sdb1 /opt/my\\040disk ext4 rw 0 0", []),
        ("/opt/commented/w", "", []),
        ("/srv/w", "", []),
    ],
)
def test_what_fstab_mounts_above_the_weights_must_be_mounted(path: str, mounts: str, missing: list[str]) -> None:
    assert weights.unmounted(FSTAB, mounts, path) == missing


def test_a_disk_that_is_too_small_for_the_manifests_sizes_is_told_before_a_fetch(model: Path) -> None:
    absent = model / "absent"
    large = f"# size {10**18} model.safetensors\n{'0' * 64}  model.safetensors\n"
    (folder, disk) = look(absent, manifest=large)[0]
    assert (folder.id, disk.id) == ("HOST_WEIGHTS", "WEIGHTS_DISK")
    assert "1000000000.0 GB free" in disk.expected
    assert f"`df -h {model}`" in disk.fix
    assert "WEIGHTS_DISK" not in errors(model, manifest=large), "it is there"
    assert errors(absent, manifest=large.replace(str(10**18), "1000")) == ["HOST_WEIGHTS"]


def test_what_an_earlier_fetch_left_counts_as_room(tmp_path: Path) -> None:
    partial = tmp_path / "made" / "later"
    free = shutil.disk_usage(tmp_path).free
    assert room_bytes(partial) == pytest.approx(free, abs=10**9)
    partial.mkdir(parents=True)
    (partial / "part").write_bytes(b"x" * 10**6)
    used = bytes_on_disk(partial)
    assert used == 10**6
    assert room_bytes(partial) == pytest.approx(shutil.disk_usage(partial).free + used, abs=10**9)


def test_pickles_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert errors(model) == ["WEIGHTS_FORMAT", "WEIGHTS_PICKLE"]
    (model / "extra.pt").touch()
    assert errors(model, manifest=sha256sum(model).stdout).count("WEIGHTS_PICKLE") == 2, "listing them does not help"


def test_python_needs_trust_and_then_a_manifest(model: Path) -> None:
    listed = sha256sum(model).stdout
    (model / "modeling.py").write_text("raise SystemExit")
    assert errors(model) == ["WEIGHTS_CODE"]
    assert errors(model, manifest=sha256sum(model).stdout) == ["WEIGHTS_CODE"]
    assert errors(model, trust_remote_code=True, manifest=listed) == ["WEIGHTS_EXTRA"]
    assert errors(model, trust_remote_code=True, manifest=sha256sum(model).stdout) == []
    assert errors(model, trust_remote_code=True) == ["WEIGHTS_CODE"], "trusted, and in no manifest"
    assert errors(model, trust_remote_code=True, hash="all") == [], "a manifest is being made"
    assert errors(model, hash="all") == ["WEIGHTS_CODE"]


# --- the manifest -----------------------------------------------------------------------------------------


def test_what_matches_the_publishers_list_has_no_findings(model: Path) -> None:
    for options in ([], ["--binary"]):
        assert look(model, manifest=sha256sum(model, *options).stdout)[0] == []
    published = "# SHA-256\r\n" + sha256sum(model).stdout.replace("  ", "  ./").upper().replace("\n", "\r\n")
    published = published.replace("CONFIG.JSON", "config.json").replace("MODEL.SAFETENSORS", "model.safetensors")
    assert look(model, manifest=published)[0] == []


def test_everything_that_differs_is_told_at_once(model: Path) -> None:
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    listed = sha256sum(model).stdout
    flip(model / "model.safetensors")
    (model / "vocab.json").unlink()
    (model / "merges.txt").unlink()
    (model / "merges.txt").symlink_to("nowhere")
    (model / "added.json").write_text("[]")
    all_found = look(model, manifest=listed)[0]
    found = {finding.id: finding for finding in all_found}
    assert set(found) == {"WEIGHTS_ALTERED", "WEIGHTS_MISSING", "WEIGHTS_EXTRA", "WEIGHTS_DAMAGED"}
    assert len(all_found) == 4, "each file once"
    assert "model.safetensors" in found["WEIGHTS_ALTERED"].expected
    assert parse(listed)["model.safetensors"].sha256 in found["WEIGHTS_ALTERED"].expected
    assert sha256(model / "model.safetensors") in found["WEIGHTS_ALTERED"].found
    assert "vocab.json" in found["WEIGHTS_MISSING"].expected
    assert "added.json" in found["WEIGHTS_EXTRA"].found
    assert "merges.txt" in found["WEIGHTS_DAMAGED"].expected
    for finding in found.values():
        assert finding.fix
        assert finding.fix_zh
    assert "vllm_weights_manifest_replace=true" in found["WEIGHTS_ALTERED"].fix


def test_files_that_nothing_loads_are_ignored(model: Path) -> None:
    listed = sha256sum(model).stdout
    (model / "README.md").write_text("read me")
    (model / ".msc").write_bytes(b"bookkeeping")
    (model / ".cache").mkdir()
    (model / ".cache" / "part.json").write_text("{}")
    (model / "gone").symlink_to("nowhere")
    assert look(model, manifest=listed)[0] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no line at all"),
        ("# only a comment\n", "no line at all"),
        ("abc  config.json\n" + "0" * 64 + "\n", "line 1: abc  config.json; line 2: 000"),
        ("0" * 64 + "  ../config.json\n", "line 1: "),
        ("0" * 64 + "  /etc/passwd\n", "line 1: "),
        ("0" * 64 + "  a.json\n" + "1" * 64 + "  a.json\n", "line 2: another SHA-256 for a.json"),
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, complaint: str, model: Path) -> None:
    found = look(model, manifest=text, manifest_name="list.sha256")[0]
    assert [finding.id for finding in found] == ["WEIGHTS_MANIFEST"]
    assert complaint in found[0].found
    assert "list.sha256" in found[0].expected


def test_a_manifest_made_here_is_one_for_sha256sum_and_tells_sizes(model: Path) -> None:
    (model / "README.md").write_text("read me")
    (model / ".gitattributes").write_text("*")
    made = look(model, hash="all")[1]["manifest"]
    assert parse(made)["README.md"].size == len("read me")
    assert ".gitattributes" not in made
    checked = sha256sum(model, "--check", "--strict", text=made)
    assert checked.returncode == 0, checked.stderr
    (model / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE], "more": 1}))
    # Told without reading anything.
    found, result = look(model, hash="remembered", manifest=made)
    assert ([finding.id for finding in found], result["hashed_bytes"]) == (["WEIGHTS_ALTERED"], 0)
    assert "bytes" in found[0].found


def test_awkward_names_are_told_not_listed(model: Path) -> None:
    (model / "two\nlines.json").write_text("{}")
    (model / os.fsdecode(b"\xff.json")).write_text("{}")
    found, result = look(model, hash="all")
    assert [finding.id for finding in found if finding.severity == "error"] == ["WEIGHTS_DAMAGED"] * 2
    assert set(parse(result["manifest"])) == {"config.json", "model.safetensors"}


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "tokenizer.json")
    (finding,) = look(model, manifest=sha256sum_of_two(model))[0]
    assert (finding.id, finding.found) == ("WEIGHTS_DAMAGED", "not a regular file")


def test_the_labs_manifest_is_the_nano_models() -> None:
    text = NANO_MANIFEST.read_text()
    listed = {name: entry.sha256 for name, entry in parse(text).items()}
    assert listed == {path.name: sha256(path) for path in NANO.iterdir()}
    assert look(NANO, manifest=text)[0] == []


# --- read once --------------------------------------------------------------------------------------------


def sha256sum_of_two(model: Path) -> str:
    return "".join(f"{sha256(model / name)}  {name}\n" for name in ("config.json", "model.safetensors"))


def test_unchanged_files_are_not_read_again(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "state" / "hashes.json"
    options = {"manifest": sha256sum(model).stdout, "memory": str(memory)}
    _, first = look(model, **options)
    assert first["hashed_bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    _, second = look(model, **options)
    assert (second["hashed_bytes"], second["remembered"]) == (0, 2)
    os.utime(model / "config.json")
    _, third = look(model, **options)
    assert (third["hashed_bytes"], third["remembered"]) == ((model / "config.json").stat().st_size, 1)


def test_a_file_that_changes_while_it_is_read_is_told(model: Path) -> None:
    files, _ = list_files(model)
    (model / "config.json").write_text("{}")
    hashes, problems = hash_files(model, files)
    assert problems == {"config.json": "it changed while it was read"}
    assert set(hashes) == {"model.safetensors"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config.json": 1}', '{"config.json": {"identity": 1, "sha256": ""}}']
)
def test_a_damaged_memory_costs_a_read(text: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text(text)
    found, result = look(model, manifest=sha256sum(model).stdout, memory=str(tmp_path / "hashes.json"))
    assert (found, result["remembered"]) == ([], 0)
    assert result["hashed_bytes"] > 0


def test_a_memory_that_cannot_be_written_is_a_warning(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, result = look(model, manifest=sha256sum(model).stdout, memory=str(tmp_path / "file" / "hashes.json"))
    assert found == []
    assert "will be read again" in result["warnings"][0]


def test_a_flipped_byte_is_seen_although_size_and_mtime_are_the_same(model: Path, tmp_path: Path) -> None:
    options = {"manifest": sha256sum(model).stdout, "memory": str(tmp_path / "hashes.json")}
    assert errors(model, **options) == []
    before = (model / "model.safetensors").stat()
    while (model / "model.safetensors").stat().st_ctime_ns == before.st_ctime_ns:  # the clock's tick
        flip(model / "model.safetensors")
        flip(model / "model.safetensors")
    flip(model / "model.safetensors")
    after = (model / "model.safetensors").stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert errors(model, **options) == ["WEIGHTS_ALTERED"]
    # And is still refused when it is remembered, also by the look that reads nothing.
    assert errors(model, **options) == ["WEIGHTS_ALTERED"]
    assert errors(model, **{**options, "hash": "remembered"}) == ["WEIGHTS_ALTERED"]


def test_check_mode_remembers_nothing(model: Path, tmp_path: Path) -> None:
    options = {"hash": "listed", "manifest": sha256sum(model).stdout, "manifest_name": "m", "trust_remote_code": False}
    options |= {
        "partial": "",
        "path": str(model),
        "architecture": ARCHITECTURE,
        "memory": str(tmp_path / "hashes.json"),
    }
    assert weights.examine(options, may_remember=False)[1]["hashed_bytes"] > 0
    assert not (tmp_path / "hashes.json").exists()


def test_the_fingerprint_follows_the_files_or_the_manifest(model: Path) -> None:
    listed = sha256sum(model).stdout
    files, manifest = look(model)[1]["fingerprint"], look(model, manifest=listed)[1]["fingerprint"]
    (model / "README.md").touch()
    assert look(model)[1]["fingerprint"] == files
    assert manifest == look(model, manifest=listed)[1]["manifest_sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert look(model)[1]["fingerprint"] != files
    assert look(model, manifest=listed)[1]["fingerprint"] == manifest
    assert look(model, manifest=listed + "# new\n")[1]["fingerprint"] != manifest
