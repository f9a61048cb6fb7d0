"""A bundle is made from a registry, and unpacked on a host: this machine is all three, and docker a stand-in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fake_registry import FakeRegistry, registry
from model_files import NANO, NANO_MANIFEST, flip
from playing import HERE, Played, play
from rendering import PROJECT
from signing import Repository, Signer, sha256

IMAGE = "registry.lab:5000/a/b:1"
CONFIG, LAYER = b'{"architecture": "arm64"}', b"a layer" * 30_000


def empty_wheels(folder: Path) -> None:
    """One of every package that the project asks for, with nothing in it: pip has no index here."""
    folder.mkdir()
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            stem = f"{name.replace('-', '_')}-{version}"
            with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(
                    f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                )
                wheel.writestr(
                    f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
                )
                wheel.writestr(f"{stem}.dist-info/RECORD", "")


class Site:
    """Both sides; ``bundle`` and ``unbundle`` are what an operator types there."""

    def __init__(self, folder: Path, fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.fake, self.signer = folder, fake, Signer()
        self.bundled, self.model = folder / "bundle", folder / "model"
        repository = Repository(fake.url, "a/b")
        layer = {"digest": repository.push_blob(LAYER), "size": len(LAYER)}
        self.digest = repository.push_manifest("1", CONFIG, [layer])
        repository.sign(self.digest, self.signer)
        empty_wheels(folder / "index")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "index"))
        self.engine = folder / "bin" / "docker"
        self.engine.parent.mkdir()
        shutil.copyfile(PROJECT / "tests" / "support" / "fake_engine.py", self.engine)
        self.engine.chmod(0o755)
        (folder / "private.pem").write_bytes(
            self.signer.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        self.given: dict[str, Any] = {
            **HERE,
            "glm_ocr_image": IMAGE,
            "glm_ocr_weights_path": str(self.model),
            "site_bundle_dir": str(self.bundled),
            "site_bundle_weights_dir": str(NANO),
            "vllm_image_registry_url": fake.url,
            "vllm_image_pull_tries": 0,
            "vllm_weights_manifest": str(NANO_MANIFEST),
        }

    def run(self, verb: str, **more: Any) -> Played:
        return play(self.folder, f"playbooks/{verb}.yml", {"npu-01": self.given | more})

    def calls(self) -> list[str]:
        log = self.engine.with_name("calls.jsonl")
        return [json.loads(line)["arguments"][0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with registry() as fake:
        yield Site(tmp_path, fake, monkeypatch)


def changed(played: Played) -> int:
    return played.recap("npu-01")["changed"]


def test_a_bundle_is_made_carried_and_unpacked_and_nothing_twice(site: Site) -> None:
    keys = {"vllm_image_signature_key": site.signer.write(site.folder / "cosign.pub")}
    made = site.run("bundle", **keys, site_bundle_private_key=str(site.folder / "private.pem"))
    assert made.rc == 0, made.output
    assert {path.name for path in site.bundled.iterdir()} == {
        *("SHA256SUMS", "SHA256SUMS.sig", "image", "image-wheels", "project", "signed", "weights", "wheels")
    }
    assert (site.bundled / "image" / "blobs" / sha256(LAYER).replace(":", "/")).read_bytes() == LAYER
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"],
        cwd=site.bundled,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    asked = [path for path in site.fake.asked if "/blobs/" in path]
    again = site.run("bundle", **keys, site_bundle_private_key=str(site.folder / "private.pem"))
    assert (again.rc, changed(again)) == (0, 0), again.output
    asked_again = [path for path in site.fake.asked if "/blobs/" in path][len(asked) :]
    assert not [path for path in asked_again if sha256(LAYER) in path]

    site.fake.content.clear()
    isolated = {**keys, "site_bundle_public_key": keys["vllm_image_signature_key"]}
    unpacked = site.run("unbundle", **isolated)
    assert unpacked.rc == 0, unpacked.output
    assert json.loads(site.engine.with_name("images.json").read_text()) == {IMAGE: f"{sha256(CONFIG)} []"}
    assert (site.model / "model.safetensors").read_bytes() == (NANO / "model.safetensors").read_bytes()
    assert not (site.folder / "state" / "bundle").exists()
    once_more = site.run("unbundle", **isolated)
    assert (once_more.rc, changed(once_more)) == (0, 0), once_more.output
    assert site.calls().count("load") == 1


def test_a_bundle_that_is_another_is_refused_with_all_its_differences(site: Site) -> None:
    assert site.run("bundle").rc == 0
    layer = site.bundled / "image" / "blobs" / sha256(LAYER).replace(":", "/")
    flip(layer)
    (site.bundled / "weights" / "config.json").unlink()
    (site.bundled / "wheels" / "more.whl").touch()
    refused = site.run("unbundle", site_bundle_public_key=site.signer.write(site.folder / "cosign.pub"))
    assert refused.rc != 0
    assert "[BUNDLE_ALTERED]" in refused.output
    assert "found 4 difference(s)" in refused.output
    for told in (
        "SHA256SUMS.sig: ",
        f"image/blobs/{sha256(LAYER).replace(':', '/')}: altered",
        "weights/config.json: missing",
        "wheels/more.whl: not listed",
    ):
        assert told in refused.output
    assert site.calls() == []
    # Made again it is whole: the layer is fetched, for its name says what it must be.
    (site.bundled / "wheels" / "more.whl").unlink()
    mended = site.run("bundle")
    assert mended.rc == 0, mended.output
    assert layer.read_bytes() == LAYER


def test_a_bundle_that_was_cut_off_is_none_and_goes_on(site: Site) -> None:
    site.fake.cut = 100_000
    failed = site.run("bundle")
    assert failed.rc != 0
    assert "is kept, run again to go on" in failed.output
    refused = site.run("unbundle")
    assert refused.rc != 0
    assert "was not made to its end" in refused.output
    site.fake.cut = None
    done = site.run("bundle")
    assert done.rc == 0, done.output
    assert [path for path in site.fake.asked if path.endswith("#65536-")]


def test_an_unsigned_image_is_not_bundled_where_a_key_is_given(site: Site) -> None:
    refused = site.run("bundle", vllm_image_signature_key=Signer().write(site.folder / "other.pub"))
    assert refused.rc != 0
    assert "[IMAGE_SIGNATURE]" in refused.output
    assert not site.bundled.exists()


def test_an_image_of_several_architectures_asks_which(site: Site) -> None:
    manifest = site.fake.content["a/b/manifests/1"]
    index = {"manifests": [{"digest": sha256(manifest), "platform": {"os": "linux", "architecture": "arm64"}}]}
    site.fake.content["a/b/manifests/1"] = json.dumps(index).encode()
    refused = site.run("bundle")
    assert refused.rc != 0
    assert re.search(r"the image is for arm64, found site_bundle_architecture\s+''", refused.output)
    assert site.run("bundle", site_bundle_architecture="arm64").rc == 0


def test_what_a_bundle_needs_is_told_before_anything_is_fetched(site: Site) -> None:
    refused = site.run("bundle", site_bundle_dir="bundle", glm_ocr_image=f"a/b@{sha256(b'')}")
    assert refused.rc != 0
    assert "site_bundle_dir must be a folder" in refused.output
    assert "glm_ocr_image must have a tag" in refused.output
    assert site.fake.asked == []
