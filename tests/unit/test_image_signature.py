"""Whether a key has signed an image: the form, and everything that is no signature of it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import image_registry, image_signature
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import signing
import vllm_image_signature
from fake_registry import FakeRegistry, registry
from signing import Repository, Signer, payload

DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SIGNER, STRANGER = Signer(), Signer()
KEY = image_signature.load_key(SIGNER.pem)


def signed(content: bytes, signer: Signer = SIGNER) -> image_signature.Signature:
    return image_signature.Signature(content, signer.sign(content))


@pytest.mark.parametrize(
    "private",
    [
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["ecdsa", "rsa", "ed25519"],
)
def test_a_signature_of_the_image_by_the_key_is_one(private: signing.PrivateKey) -> None:
    signer = Signer(private)
    key = image_signature.load_key(signer.pem)
    image_signature.vouch(key, [signed(payload(DIGEST), signer)], DIGEST)
    # One among others is enough: an image may be signed by several.
    image_signature.vouch(key, [signed(payload(DIGEST), STRANGER), signed(payload(DIGEST), signer)], DIGEST)
    with pytest.raises(image_signature.Refused, match="this key did not make"):
        image_signature.vouch(key, [signed(payload(DIGEST), STRANGER)], DIGEST)


def altered(change: Callable[[bytes, str], tuple[bytes, str]]) -> image_signature.Signature:
    one = signed(payload(DIGEST))
    return image_signature.Signature(*change(one.payload, one.base64))


#: What is no signature of DIGEST by SIGNER, and what is said of it.
BROKEN: dict[str, tuple[list[image_signature.Signature], str]] = {
    "none": ([], "no signature"),
    "another key": ([signed(payload(DIGEST), STRANGER)], "this key did not make"),
    "another image": ([signed(payload(OTHER))], f"another image, {OTHER}"),
    "payload altered": ([altered(lambda text, sig: (text.replace(b"null", b"{}"), sig))], "an altered payload"),
    "digest put in": (
        [image_signature.Signature(payload(DIGEST), signed(payload(OTHER)).base64)],
        "an altered payload",
    ),
    "signature cut": ([altered(lambda text, sig: (text, sig[:-8]))], "this key did not make"),
    "signature empty": ([altered(lambda text, sig: (text, ""))], "this key did not make"),
    "no base64": ([altered(lambda text, sig: (text, sig + "!"))], "this key did not make"),
    "another kind": ([signed(payload(DIGEST, kind="atomic container signature"))], "another kind, atomic"),
    "no JSON": ([signed(b"nothing")], "not in cosign's form"),
    "no object": ([signed(b"[]")], "not in cosign's form"),
    "no image": ([signed(b'{"critical": {"type": "cosign container image signature"}}')], "not in cosign's form"),
    "digest no text": (
        [signed(payload(DIGEST).replace(f'"{DIGEST}"'.encode(), b"7"))],
        "another kind",
    ),
    "two, each said": ([signed(payload(OTHER)), signed(b"nothing")], f"another image, {OTHER}; one whose payload"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_signature_of_the_image_is_refused_and_named(case: str) -> None:
    signatures, told = BROKEN[case]
    with pytest.raises(image_signature.Refused, match=told) as refused:
        image_signature.vouch(KEY, signatures, DIGEST)
    assert DIGEST in str(refused.value)


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        dsa.generate_private_key(2048).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "damaged", "dsa"],
)
def test_what_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(image_signature.Refused, match=r"no public key|another kind than"):
        image_signature.load_key(pem)


@pytest.mark.parametrize("text", ["nothing", "{}", '{"Payload": "!", "Base64Signature": ""}', "[]"])
def test_a_file_of_signatures_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(image_signature.Refused, match="another form"):
        image_signature.downloaded(text)


@pytest.mark.parametrize("manifest", [b"nothing", b"{}", b"[]", b'{"layers": [7]}'])
def test_a_manifest_that_is_none_is_refused(manifest: bytes) -> None:
    with pytest.raises(image_signature.Refused):
        image_signature.layers(manifest)
    with pytest.raises(image_signature.Refused):
        image_signature.ids(manifest)


def test_an_index_vouches_for_the_manifests_that_it_lists_and_no_others() -> None:
    ours, theirs = (json.dumps({"config": {"digest": digest}, "layers": []}).encode() for digest in (DIGEST, OTHER))
    index = json.dumps({"manifests": [{"digest": signing.sha256(ours)}]}).encode()
    assert image_signature.ids(ours) == [signing.sha256(ours), DIGEST]
    assert image_signature.ids(index) == [signing.sha256(index), signing.sha256(ours)]
    assert image_signature.ids(index, [theirs, ours, index]) == [signing.sha256(index), signing.sha256(ours), DIGEST]


@pytest.mark.parametrize(
    ("image", "meant"),
    [
        ("quay.io/ascend/vllm-ascend:v1", ("quay.io", "ascend/vllm-ascend", "v1", "")),
        ("registry.lab:5000/a/b", ("registry.lab:5000", "a/b", "latest", "")),
        (f"localhost/a@{DIGEST}", ("localhost", "a", "", DIGEST)),
        (f"quay.io/a/b:v1@{DIGEST}", ("quay.io", "a/b", "v1", DIGEST)),
        ("ascend/vllm:1", ("registry-1.docker.io", "ascend/vllm", "1", "")),
        ("debian", ("registry-1.docker.io", "library/debian", "latest", "")),
    ],
)
def test_a_name_is_read_as_engines_read_it(image: str, meant: tuple[str, str, str, str]) -> None:
    assert image_registry.parse(image) == image_registry.Reference(*meant)


def test_what_is_no_name_is_told() -> None:
    with pytest.raises(ValueError, match="no name of an image"):
        image_registry.parse("quay.io/a@sha256:short")


# --- with a registry ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """An image in a registry, and the module's answer about it."""

    registry: FakeRegistry
    repository: Repository
    key: str
    digest: str

    def asked(self, **more: str) -> tuple[str, list[str]]:
        given: dict[str, Any] = {"registry_url": self.registry.url, "registry_ca": "", "folder": "", "digest": ""}
        given |= {"image": "registry.lab:5000/a/b:1", "key": self.key}
        return vllm_image_signature.trusted(given | more)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Signed]:
    with registry() as fake:
        repository = Repository(fake.url, "a/b")
        digest = repository.push_manifest("1", b"{}", [])
        repository.sign(digest, SIGNER)
        yield Signed(fake, repository, SIGNER.write(tmp_path / "cosign.pub"), digest)


def test_the_registry_is_asked_for_manifest_and_signature(image: Signed) -> None:
    assert image.asked() == (image.digest, [image.digest, signing.sha256(b"{}")])
    assert len(image.registry.asked) == 3


def test_a_registry_that_wants_a_token_gets_its_own(image: Signed) -> None:
    image.registry.guarded = True
    assert image.asked()[0] == image.digest
    assert image.registry.asked.count("/token") == 1


def test_a_pinned_digest_is_verified_though_the_tag_moved(image: Signed) -> None:
    moved = image.repository.push_manifest("1", b"other", [])
    assert image.asked(digest=image.digest)[0] == image.digest
    assert image.asked(image=f"registry.lab:5000/a/b@{image.digest}")[0] == image.digest
    with pytest.raises(image_signature.Refused, match=f"for {moved} no signature"):
        image.asked()


def test_what_a_registry_altered_is_refused(image: Signed) -> None:
    before = dict(image.registry.content)
    pushed = image.repository.push_signature(image.digest, payload(image.digest), SIGNER.sign(payload(image.digest)))
    image.registry.content[f"a/b/blobs/{pushed}"] += b" "
    with pytest.raises(image_registry.RegistryError, match=f"the blob {pushed} was altered"):
        image.asked()
    image.registry.content = before | {f"a/b/manifests/{image.digest}": b"{}"}
    with pytest.raises(image_registry.RegistryError, match=f"the manifest {image.digest} was altered"):
        image.asked(digest=image.digest)
    image.registry.content = before | {f"a/b/blobs/{pushed}": b"x" * (image_signature.PAYLOAD_MAX_BYTES + 1)}
    with pytest.raises(image_registry.RegistryError, match="more than 65536 bytes"):
        image.asked()


def test_an_image_that_is_not_there_and_a_registry_that_does_not_answer_are_told(
    image: Signed, closed_url: str
) -> None:
    with pytest.raises(image_registry.Absent, match=r"HTTP 404 from .*/manifests/2"):
        image.asked(image="registry.lab:5000/a/b:2")
    with pytest.raises(image_registry.RegistryError, match="refused"):
        image.asked(registry_url=closed_url)


def test_the_given_authority_has_precedence_over_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/of/the/environment.pem")
    for ca, taken in (("/given.pem", "/given.pem"), ("", "/of/the/environment.pem")):
        with pytest.raises(OSError, match=f"invalid path: {taken}"):
            image_registry.Registry("https://127.0.0.1:1", "a/b", ca).manifest("1")


def test_a_folder_stands_for_the_registry(image: Signed, tmp_path: Path, closed_url: str) -> None:
    folder = tmp_path / "signed"
    folder.mkdir()
    given = {"folder": str(folder), "registry_url": closed_url}
    content = payload(image.digest)
    (folder / "signature.json").write_text(signing.downloaded(content, SIGNER.sign(content)))
    with pytest.raises(OSError, match=r"manifest\.json"):
        image.asked(**given)
    (folder / "manifest.json").write_bytes(image.repository.manifest("1"))
    assert image.asked(**given) == (image.digest, [image.digest, signing.sha256(b"{}")])
    with pytest.raises(image_signature.Refused, match=f"{image.digest} instead of {OTHER}"):
        image.asked(**given, digest=OTHER)
    (folder / "manifest.json").write_bytes(image.repository.manifest("1") + b" ")
    with pytest.raises(image_signature.Refused, match="another image"):
        image.asked(**given)


# --- blobs that are fetched to the disk -----------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    fake: FakeRegistry
    registry: image_registry.Registry
    content: bytes
    digest: str
    target: Path

    def fetch(self) -> bool:
        return bool(self.registry.download(self.digest, len(self.content), self.target))

    def asked(self) -> list[str]:
        return [path.partition("#")[2] for path in self.fake.asked]


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[Blob]:
    with registry() as fake:
        content = bytes(range(256)) * 1024
        digest = Repository(fake.url, "a/b").push_blob(content)
        yield Blob(fake, image_registry.Registry(fake.url, "a/b"), content, digest, tmp_path / "blobs" / "one")


def test_a_complete_blob_is_not_fetched_again_and_an_altered_one_is(blob: Blob) -> None:
    assert (blob.fetch(), blob.fetch()) == (True, False)
    assert blob.target.read_bytes() == blob.content
    assert blob.asked() == [""]
    blob.target.write_bytes(blob.content[:-1] + b"x")
    assert blob.fetch()
    assert blob.target.read_bytes() == blob.content


@pytest.mark.parametrize("ranges", [True, False])
def test_a_fetch_that_was_cut_off_goes_on(ranges: bool, blob: Blob) -> None:
    blob.fake.cut, blob.fake.ranges = 100_000, ranges
    with pytest.raises(image_registry.RegistryError, match="run again to go on"):
        blob.fetch()
    assert not blob.target.exists()
    blob.fake.cut = None
    assert blob.fetch()
    assert blob.target.read_bytes() == blob.content
    assert blob.asked() == ["", "65536-"], "a registry that knows no ranges sends all of it"


def test_what_a_registry_altered_is_not_kept(blob: Blob) -> None:
    blob.fake.content[f"a/b/blobs/{blob.digest}"] = blob.content[::-1]
    with pytest.raises(image_registry.RegistryError, match="was altered"):
        blob.fetch()
    assert list(blob.target.parent.iterdir()) == []


@pytest.mark.parametrize(("end", "asked"), [("completed", []), ("removed", [""]), ("cut off", ["1000-"])])
def test_what_another_run_still_fetches_is_waited_for(end: str, asked: list[str], blob: Blob) -> None:
    partial = blob.target.with_name("one.partial")
    partial.parent.mkdir()
    with ThreadPoolExecutor(1) as beside:
        with partial.open("wb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            fetched = beside.submit(blob.fetch)
            while sum(os.path.realpath(link) == str(partial) for link in Path("/proc/self/fd").iterdir()) < 2:
                assert not fetched.done()
            if end == "removed":
                partial.unlink()
            else:
                other.write(blob.content if end == "completed" else blob.content[:1000])
                other.flush()
            if end == "completed":
                partial.replace(blob.target)
        assert fetched.result() == (end != "completed")
    assert blob.asked() == asked
    assert blob.target.read_bytes() == blob.content
    assert list(partial.parent.iterdir()) == [blob.target]
