"""Whether a key vouches for an image: bytes in, a verdict out.

The form is that of `cosign sign --key` (github.com/sigstore/cosign, specs/SIGNATURE_SPEC.md): a small JSON text, the
payload, names the digest of the image's manifest, and its bytes are signed.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, List, Sequence, Tuple

from ansible.module_utils.image_registry import DIGEST, Absent, Registry, sha256
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

TYPE = "cosign container image signature"
ANNOTATION = "dev.cosignproject.cosign/signature"
PAYLOAD_MAX_BYTES = 64 * 2**10


class Refused(Exception):
    """The text says what was found instead."""


@dataclass(frozen=True)
class Signature:
    payload: bytes
    base64: str


def load_key(pem: bytes) -> Any:
    """The public key."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused("no public key in PEM form") from error
    if not isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey)):
        raise Refused(f"a key of another kind than ECDSA, RSA or Ed25519: {type(key).__name__}")
    return key


def verify(key: Any, content: bytes, signature: str) -> None:
    """Raises ``Refused`` unless the key has signed these bytes."""
    try:
        signed = base64.b64decode(signature, validate=True)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signed, content, ec.ECDSA(SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signed, content, padding.PKCS1v15(), SHA256())
        else:
            key.verify(signed, content)
    except (InvalidSignature, binascii.Error) as error:
        raise Refused("one that this key did not make, or of an altered payload") from error


def signed_digest(key: Any, signature: Signature) -> str:
    """The digest that the payload names, once the key has signed the payload."""
    verify(key, signature.payload, signature.base64)
    try:
        critical = json.loads(signature.payload)["critical"]
        kind, digest = critical["type"], critical["image"]["docker-manifest-digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("one whose payload is not in cosign's form") from error
    if kind != TYPE or not isinstance(digest, str):
        raise Refused(f"one of another kind, {kind}")
    return digest


def vouch(key: Any, signatures: Sequence[Signature], digest: str) -> None:
    """Returns when one of them is of this digest and by this key; raises ``Refused`` with what each of them is."""
    problems: List[str] = []
    for signature in signatures:
        try:
            signed = signed_digest(key, signature)
        except Refused as error:
            problems.append(str(error))
            continue
        if signed == digest:
            return
        problems.append(f"one of another image, {signed}")
    raise Refused(f"for {digest} " + ("; ".join(problems) or "no signature"))


def layers(manifest: bytes) -> List[Tuple[str, str]]:
    """Digest of the payload and the signature, of each signature that a ``sha256-….sig`` manifest lists."""
    try:
        listed = [
            (layer["digest"], (layer.get("annotations") or {}).get(ANNOTATION))
            for layer in json.loads(manifest)["layers"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("a manifest of signatures that is none") from error
    return [
        (str(digest), str(signature)) for digest, signature in listed if signature and DIGEST.fullmatch(str(digest))
    ]


def of_image(registry: Registry, digest: str) -> List[Signature]:
    """What the registry has beside the image."""
    try:
        listed = layers(registry.manifest(digest.replace(":", "-") + ".sig"))
    except Absent:
        return []
    return [Signature(registry.blob(name, PAYLOAD_MAX_BYTES), text) for name, text in listed]


def printed(signatures: Sequence[Signature]) -> str:
    """As `cosign download signature` prints them."""
    rows = [{"Base64Signature": one.base64, "Payload": base64.b64encode(one.payload).decode()} for one in signatures]
    return "".join(json.dumps(row) + "\n" for row in rows)


def downloaded(text: str) -> List[Signature]:
    """What `cosign download signature` prints, a signature a line."""
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [Signature(base64.b64decode(row["Payload"], validate=True), str(row["Base64Signature"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("signatures in another form than `cosign download signature` prints") from error


def ids(manifest: bytes, others: Sequence[bytes] = ()) -> List[str]:
    """The ids under which a container engine may have what ``manifest`` stands for.

    Docker and podman call an image by the digest of its configuration, Docker with containerd's store by that of its
    manifest.  Of an index each is in a manifest of its own: ``others``, as far as the index lists them.
    """
    found = [sha256(manifest)]
    try:
        content = json.loads(manifest)
        if "config" in content:
            return [*found, str(content["config"]["digest"])]
        listed = [str(entry["digest"]) for entry in content["manifests"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("a manifest that is none") from error
    found += listed
    for other in others:
        if sha256(other) in listed:
            found += ids(other)[1:]
    return found
