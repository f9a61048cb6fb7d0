"""What an image's name means, and a registry asked over its HTTP API (github.com/opencontainers/distribution-spec).

Runs on the controller, in the project's environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Dict, Iterator

import requests

#: The one index or manifest that a name stands for, in either of its forms.
MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
#: The specification lets a registry refuse larger ones.
MANIFEST_MAX_BYTES = 4 * 2**20
TIMEOUT_SECONDS = 30
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
NAME = re.compile(r"(?P<path>[^@]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?")


class RegistryError(Exception):
    """The registry does not answer, or not with what was asked for; the text says which."""


class Absent(RegistryError):
    """The registry answers, and does not have it."""


@dataclass(frozen=True)
class Reference:
    """``digest`` is empty in a name that has none, ``tag`` then ``latest`` unless the name says another."""

    host: str
    repository: str
    tag: str
    digest: str


def parse(image: str) -> Reference:
    """As container engines read a name.  Raises ``ValueError``."""
    match = NAME.fullmatch(image)
    if not match:
        raise ValueError(f"{image} is no name of an image")
    host, _, repository = match["path"].partition("/")
    if not repository or not (set(host) & set(".:") or host == "localhost"):
        host, repository = "registry-1.docker.io", match["path"] if repository else f"library/{match['path']}"
    digest = match["digest"] or ""
    return Reference(host, repository, match["tag"] or ("" if digest else "latest"), digest)


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@contextmanager
def alone(partial: Path) -> Iterator[IO[bytes]]:
    """The file, open for appending, when nobody else writes it: what was killed may have left a worker that goes on."""
    while True:
        with partial.open("ab") as writing:
            fcntl.flock(writing, fcntl.LOCK_EX)
            # Who had it meanwhile may have renamed or removed it.
            if partial.exists() and os.path.samestat(partial.stat(), os.fstat(writing.fileno())):
                yield writing
                return


def sha256_of(file: Path) -> str:
    """Of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as reading:
        for block in iter(lambda: reading.read(2**20), b""):
            digest.update(block)
    return "sha256:" + digest.hexdigest()


class Registry:
    """One repository, with what its registry asks of everyone: an anonymous token, or the password in ~/.netrc."""

    def __init__(self, base: str, repository: str, ca: str = "") -> None:
        self.base = base.rstrip("/")
        self.repository = repository
        self.session = requests.Session()
        # Said with every request: what REQUESTS_CA_BUNDLE says has precedence over the session's.
        self.verify = ca or None

    def manifest(self, reference: str) -> bytes:
        """The bytes under a tag or digest; those under a digest are the ones it stands for."""
        content = self.get(f"manifests/{reference}", MANIFEST_MAX_BYTES, {"Accept": MANIFESTS})
        return expected(content, reference, f"the manifest {reference}")

    def blob(self, digest: str, max_bytes: int) -> bytes:
        return expected(self.get(f"blobs/{digest}", max_bytes, {}), digest, f"the blob {digest}")

    def download(self, digest: str, size: int, target: Path) -> bool:
        """Have the blob in ``target``; whether anything was fetched.

        What is there and right is kept, and so is the beginning of it in ``target.partial``, where an earlier download
        was cut off.
        """
        if target.is_file():
            if sha256_of(target) == digest:
                return False
            target.unlink()
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(partial) as writing:
            if target.is_file():
                partial.unlink()
                return False
            there = writing.seek(0, os.SEEK_END)
            if there >= size:
                writing.truncate(0)
                there = 0
            with self.ask(f"blobs/{digest}", {"Range": f"bytes={there}-"} if there else {}) as response:
                if response.status_code != 206:
                    writing.truncate(0)
                try:
                    # Small, for a block that does not come whole is lost.
                    for block in response.iter_content(2**16):
                        writing.write(block)
                except requests.RequestException as error:
                    raise RegistryError(f"{error}; what came of {digest} is kept, run again to go on") from error
            writing.flush()
            found = sha256_of(partial)
            if found != digest:
                partial.unlink()
                raise RegistryError(f"the blob {digest} was altered: what the registry sends has {found}")
            partial.replace(target)
        return True

    def get(self, path: str, max_bytes: int, headers: Dict[str, str]) -> bytes:
        """Raises ``RegistryError``, ``Absent`` for what is not there."""
        with self.ask(path, headers) as response:
            content = b""
            try:
                for block in response.iter_content(2**16):
                    content += block
                    if len(content) > max_bytes:
                        raise RegistryError(f"{response.url} has more than {max_bytes} bytes")
            except requests.RequestException as error:
                raise RegistryError(str(error)) from error
        return content

    def ask(self, path: str, headers: Dict[str, str]) -> requests.Response:
        """The open answer to a GET."""
        url = f"{self.base}/v2/{self.repository}/{path}"
        try:
            response = self.session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, verify=self.verify)
            challenge = response.headers.get("WWW-Authenticate", "")
            if response.status_code == 401 and challenge.lower().startswith("bearer "):
                response.close()
                self.session.headers["Authorization"] = f"Bearer {self.token(challenge)}"
                response = self.session.get(
                    url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, verify=self.verify
                )
        except requests.RequestException as error:
            raise RegistryError(str(error)) from error
        if response.ok:
            return response
        response.close()
        kind = Absent if response.status_code == 404 else RegistryError
        raise kind(f"HTTP {response.status_code} from {url}")

    def token(self, challenge: str) -> str:
        """What the challenge's service gives (distribution.github.io/distribution/spec/auth/token)."""
        asked: Dict[str, Any] = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        answer = self.session.get(asked.pop("realm", ""), params=asked, timeout=TIMEOUT_SECONDS, verify=self.verify)
        try:
            given = answer.json()
            return str(given.get("token") or given["access_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise RegistryError(f"no token from {answer.url}: HTTP {answer.status_code}") from error


def expected(content: bytes, reference: str, what: str) -> bytes:
    """``content``, unless ``reference`` is the digest of something else."""
    if DIGEST.fullmatch(reference) and sha256(content) != reference:
        raise RegistryError(f"{what} was altered: what the registry sends has {sha256(content)}")
    return content
