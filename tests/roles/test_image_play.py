"""The role of the image: pinned, signed and derived."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import signing
from fake_registry import FakeRegistry, registry
from local_play import LocalPlay, Played, role
from signing import Repository, Signer

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
    # Made by whoever takes it: the host's other instances wait for the build.
    lock = play.folder / "build.lock"
    assert not lock.exists()

    first = play.run(ROLE, **given)
    assert first.rc == 0, first.stdout
    assert lock.exists()
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


# --- pinned by its digest, and signed -----------------------------------------------------------------------

REPOSITORY = IMAGE.partition(":")[0]
CONFIG = b"{}"


class Site:
    """A registry with an image, a key, and a host that can pull from it."""

    def __init__(self, play: LocalPlay, fake: FakeRegistry) -> None:
        self.play, self.fake = play, fake
        self.signer = Signer()
        self.repository = Repository(fake.url, REPOSITORY.partition("/")[2])
        self.digest = self.push(CONFIG)
        self.given: dict[str, Any] = {
            "vllm_image_signature_key": self.signer.write(play.folder / "cosign.pub"),
            "vllm_image_registry_url": fake.url,
        }

    def push(self, config: bytes) -> str:
        """The tag's new image, which hosts can pull; returns its digest."""
        digest = self.repository.push_manifest(IMAGE.rpartition(":")[2], config, [])
        name = f"{REPOSITORY}@{digest}"
        (self.play.folder / "registry.json").write_text(json.dumps({name: f"{signing.sha256(config)} [{name}]"}))
        return digest

    def run(self, **given: Any) -> Played:
        return self.play.run(ROLE, SAY, **{**self.given, **given})

    def on_host(self) -> str:
        return str(json.loads((self.play.folder / "images.json").read_text())[IMAGE])


@pytest.fixture
def site(play: LocalPlay) -> Iterator[Site]:
    with registry() as fake:
        yield Site(play, fake)


def test_the_signed_digest_is_pulled_once_and_named(site: Site) -> None:
    site.repository.sign(site.digest, site.signer)
    first = site.run()
    assert (first.rc, first.changed) == (0, 1), first.stdout
    assert [call["arguments"][1] for call in site.play.calls("pull")] == [f"{REPOSITORY}@{site.digest}"]
    assert f"serves {signing.sha256(CONFIG)}" in first.stdout
    second = site.run()
    assert (second.rc, second.changed) == (0, 0), second.stdout
    assert len(site.play.calls("pull")) == 1


def test_an_image_without_a_valid_signature_is_refused_before_the_host_is_asked(site: Site) -> None:
    refused = site.run()
    assert refused.rc != 0
    assert "[IMAGE_SIGNATURE]" in refused.stdout
    assert f"for {site.digest} no signature" in refused.stdout
    site.repository.sign(site.digest, Signer())
    refused = site.run()
    assert refused.rc != 0
    assert "one that this key did not make" in refused.stdout
    assert not (site.play.folder / "calls.jsonl").exists()


def test_what_was_verified_is_pulled_though_the_tag_moves_meanwhile(site: Site) -> None:
    site.repository.sign(site.digest, site.signer)
    moves: dict[str, Any] = {
        "url": f"{site.repository.url}/v2/{site.repository.name}/manifests/{IMAGE.rpartition(':')[2]}"
    }
    moves |= {"method": "PUT", "body": "{}", "status_code": 201}
    look = {"ansible.builtin.include_role": {"name": "vllm_image", "tasks_from": "look"}}
    played = site.play.run(look, {"ansible.builtin.uri": moves}, ROLE, **site.given)
    assert played.rc == 0, played.stdout
    assert site.repository.manifest(IMAGE.rpartition(":")[2]) == b"{}"
    assert [call["arguments"][1] for call in site.play.calls("pull")] == [f"{REPOSITORY}@{site.digest}"]


def test_a_pinned_digest_is_pulled_though_the_tag_has_moved(site: Site) -> None:
    given = {"vllm_image_signature_key": "", "vllm_image_expected_digest": site.digest}
    pullable = (site.play.folder / "registry.json").read_text()
    site.push(b"another")
    (site.play.folder / "registry.json").write_text(pullable)
    pulled = site.run(**given)
    assert pulled.rc == 0, pulled.stdout
    assert site.on_host().startswith(signing.sha256(CONFIG))
    assert not any("manifests" in path for path in site.fake.asked), "no key, no question"


def test_an_image_that_is_another_after_the_pull_is_refused(site: Site) -> None:
    (site.play.folder / "registry.json").write_text(json.dumps({f"{REPOSITORY}@{site.digest}": BASE}))
    refused = site.run(vllm_image_signature_key="", vllm_image_expected_digest=site.digest)
    assert refused.rc != 0
    assert "[IMAGE_DIGEST]" in refused.stdout
    assert site.digest in refused.stdout
    assert BASE in refused.stdout


def test_check_mode_says_that_the_signed_image_would_be_pulled(site: Site) -> None:
    site.repository.sign(site.digest, site.signer)
    checked = site.play.run(ROLE, check=True, **site.given)
    assert (checked.rc, checked.changed, site.play.calls("pull")) == (0, 1, []), checked.stdout


def test_an_archive_is_known_by_the_signed_manifest_without_a_registry(site: Site) -> None:
    folder = site.play.folder / "signed"
    folder.mkdir()
    content = signing.payload(site.digest)
    (folder / "signature.json").write_text(signing.downloaded(content, site.signer.sign(content)))
    (folder / "manifest.json").write_bytes(site.repository.manifest(site.digest))
    given = {"vllm_image_signature_dir": str(folder), "vllm_image_registry_url": "http://nowhere.invalid"}
    refused = site.run(**given)
    assert refused.rc != 0
    assert "[IMAGE_DIGEST]" in refused.stdout
    (site.play.folder / "images.json").write_text(json.dumps({IMAGE: f"{signing.sha256(CONFIG)} []"}))
    loaded = site.run(**given)
    assert (loaded.rc, loaded.changed) == (0, 0), loaded.stdout
    assert site.play.calls("pull") == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vllm_image_expected_digest": "sha256:short"}, "vllm_image_expected_digest must be sha256:"),
        (
            {"vllm_image_expected_digest": BASE, "glm_ocr_image": f"{REPOSITORY}@{DERIVED}"},
            "name two digests",
        ),
        ({"vllm_image_signature_dir": "/signed"}, "vllm_image_signature_dir needs vllm_image_signature_key"),
    ],
)
def test_variables_that_do_not_fit_together_are_told(given: dict[str, Any], told: str, play: LocalPlay) -> None:
    refused = play.run(ROLE, **given)
    assert refused.rc != 0
    assert told in refused.stdout
    assert play.calls("image") == []
