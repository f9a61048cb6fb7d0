"""Key pairs, and signatures of images in the form that `cosign sign --key` puts into a registry."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def payload(digest: str, kind: str = "cosign container image signature", name: str = "registry.lab/image") -> bytes:
    critical = {"identity": {"docker-reference": name}, "image": {"docker-manifest-digest": digest}, "type": kind}
    return json.dumps({"critical": critical, "optional": None}, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Signer:
    private: PrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def write(self, path: Path) -> str:
        path.write_bytes(self.pem)
        return str(path)

    def sign(self, content: bytes) -> str:
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            signed = self.private.sign(content, ec.ECDSA(SHA256()))
        elif isinstance(self.private, rsa.RSAPrivateKey):
            signed = self.private.sign(content, padding.PKCS1v15(), SHA256())
        else:
            signed = self.private.sign(content)
        return base64.b64encode(signed).decode()


def downloaded(content: bytes, signature: str) -> str:
    """The line that `cosign download signature` prints."""
    row = {"Base64Signature": signature, "Payload": base64.b64encode(content).decode(), "Cert": None, "Bundle": None}
    return json.dumps(row) + "\n"


@dataclass(frozen=True)
class Repository:
    """A registry's repository, written to over its HTTP API."""

    url: str
    name: str
    verify: str | bool = True

    def ask(self, verb: str, path: str, **more: Any) -> requests.Response:
        url = path if path.startswith("http") else f"{self.url}/v2/{self.name}/{path}"
        answer = requests.request(verb, url, verify=self.verify, timeout=30, **more)
        answer.raise_for_status()
        return answer

    def manifest(self, reference: str) -> bytes:
        return self.ask("GET", f"manifests/{reference}", headers={"Accept": f"{MANIFEST}, {DOCKER_MANIFEST}"}).content

    def push_blob(self, content: bytes) -> str:
        place = self.ask("POST", "blobs/uploads/").headers["Location"]
        place = place if place.startswith("http") else self.url + place
        separator = "&" if "?" in place else "?"
        self.ask("PUT", f"{place}{separator}digest={sha256(content)}", data=content)
        return sha256(content)

    def push_manifest(self, reference: str, config: bytes, layers: list[dict[str, Any]]) -> str:
        """Returns its digest; the layers' blobs are there already."""
        described = {"mediaType": CONFIG, "size": len(config), "digest": self.push_blob(config)}
        content = json.dumps(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers}
        ).encode()
        self.ask("PUT", f"manifests/{reference}", data=content, headers={"Content-Type": MANIFEST})
        return sha256(content)

    def push_signature(self, image: str, content: bytes, signature: str) -> str:
        """Puts it where it is looked for as one of the image with this digest; returns the payload's digest."""
        layer = {
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "size": len(content),
            "digest": self.push_blob(content),
            "annotations": {"dev.cosignproject.cosign/signature": signature},
        }
        config = json.dumps({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}})
        self.push_manifest(image.replace(":", "-") + ".sig", config.encode(), [layer])
        return str(layer["digest"])

    def sign(self, image: str, signer: Signer) -> None:
        content = payload(image)
        self.push_signature(image, content, signer.sign(content))
