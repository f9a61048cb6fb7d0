"""A host that joins is believed by its key, or refused before anything is sent to it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from playing import HERE, Played, play, stub

PLAY = [{"hosts": "ascend910", "gather_facts": False, "roles": ["host_key"]}]


class Site:
    """A controller, and a host that shows ``key``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = folder / "known_hosts"
        self.key = self.made("key")
        stub(folder / "bin", "ssh-keyscan", f"echo '# npu-01:22 SSH-2.0'; sed 's/^/npu-01.example /' {folder}/key.pub")

    def made(self, name: str) -> str:
        """The fingerprint of a new key."""
        path = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
        told = subprocess.run(["ssh-keygen", "-lf", f"{path}.pub"], check=True, capture_output=True, text=True)
        return told.stdout.split()[1]

    def join(self, address: str = "npu-01.example", **variables: Any) -> Played:
        path = self.folder / "join.yml"
        path.write_text(yaml.safe_dump(PLAY))
        host = HERE | ({"ansible_host": address} if address else {})
        given = {"host_key_known_hosts": str(self.known), **variables}
        return play(self.folder, str(path), {"npu-01": host}, "-e", json.dumps(given))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_host_is_known_by_its_fingerprint_and_from_then_on(site: Site) -> None:
    nobody = site.join()
    assert nobody.rc != 0
    assert "-e host_key_fingerprint=SHA256:..." in nobody.output
    assert site.join(host_key_fingerprint=site.key).rc == 0
    assert (site.folder / "key.pub").read_text().split()[1] in site.known.read_text()
    again = site.join()
    assert (again.rc, again.recap("npu-01")["changed"]) == (0, 0)


def test_a_host_with_another_key_is_refused(site: Site) -> None:
    played = site.join(host_key_fingerprint=site.made("other"))
    assert played.rc != 0
    assert f"found 256 {site.key}" in " ".join(played.output.split())
    assert not site.known.exists()


def test_another_port_is_another_host(site: Site) -> None:
    assert site.join(host_key_fingerprint=site.key, ansible_port=2222).rc == 0
    assert site.known.read_text().startswith("[npu-01.example]:2222 ")


def test_a_host_that_does_not_answer_is_told_of(site: Site) -> None:
    stub(site.folder / "bin", "ssh-keyscan", "exit 1")
    played = site.join(host_key_fingerprint=site.key)
    assert played.rc != 0
    assert "no key: it does not answer" in played.output


def test_a_host_without_an_address_is_known_by_its_name(site: Site) -> None:
    assert site.join("", host_key_fingerprint=site.key).rc == 0
    assert site.known.read_text().startswith("npu-01 ")
