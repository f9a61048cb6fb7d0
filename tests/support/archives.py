"""Image archives as `docker save` writes them, small and made to measure."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile

from testinfra.host import Host


def tar(files: dict[str, bytes]) -> bytes:
    """An archive with these files, the same bytes every time."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def image_archive(tag: str, layer: bytes, recorded: bytes | None = None, architecture: str = "amd64") -> bytes:
    """An image of one layer; ``recorded`` is the layer that its configuration speaks of, when it is another."""
    configuration = {
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(recorded or layer).hexdigest()}"]},
    }
    text = json.dumps(configuration).encode()
    name = f"{hashlib.sha256(text).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]
    return tar({name: text, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()})


def load(node: Host, archive: bytes) -> tuple[int, str]:
    """Exit status and output of `docker load` on the node."""
    encoded = base64.b64encode(archive).decode()
    done = node.run(f"echo {encoded} | base64 --decode | docker load 2>&1")
    return done.rc, done.stdout
