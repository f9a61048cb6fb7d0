"""An image as files: an OCI layout (github.com/opencontainers/image-spec, image-layout.md) that older engines load too.

Besides the layout's index there is the `manifest.json` of `docker save`, so that one archive of the folder is loaded by
Docker with and without containerd's store, and by podman.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

from ansible.module_utils.image_registry import sha256


class LayoutError(Exception):
    """The image cannot be laid out."""


def platform_digest(index: bytes, architecture: str) -> str:
    """Digest of the manifest for Linux on this architecture."""
    there = {
        entry.get("platform", {}).get("architecture", "unknown"): str(entry["digest"])
        for entry in json.loads(index)["manifests"]
        if entry.get("platform", {}).get("os") == "linux"
    }
    if architecture not in there:
        raise LayoutError(
            f"the image is for {', '.join(sorted(there))}, found site_bundle_architecture '{architecture}':"
            " name one of these"
        )
    return there[architecture]


def is_index(manifest: bytes) -> bool:
    return "manifests" in json.loads(manifest)


def blob_path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def blobs(manifest: bytes) -> List[Dict[str, Any]]:
    """Digest and size of configuration and layers; a layer that comes twice is one."""
    content = json.loads(manifest)
    listed = {str(entry["digest"]): int(entry["size"]) for entry in [content["config"], *content["layers"]]}
    return [{"digest": digest, "size": size} for digest, size in listed.items()]


def small_files(image: str, manifest: bytes) -> Dict[str, bytes]:
    """Everything but the blobs of configuration and layers."""
    content = json.loads(manifest)
    described = {
        "mediaType": content.get("mediaType", "application/vnd.oci.image.manifest.v1+json"),
        "digest": sha256(manifest),
        "size": len(manifest),
        # What containerd names it, and what podman and others do.
        "annotations": {"io.containerd.image.name": image, "org.opencontainers.image.ref.name": image},
    }
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [described]}
    saved = {
        "Config": blob_path(content["config"]["digest"]),
        "RepoTags": [image],
        "Layers": [blob_path(layer["digest"]) for layer in content["layers"]],
    }
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(index, indent=1).encode(),
        "manifest.json": json.dumps([saved], indent=1).encode(),
        blob_path(sha256(manifest)): manifest,
    }


def write(folder: Path, files: Dict[str, bytes]) -> bool:
    """Whether any of them was another, or not there."""
    changed = False
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            changed = True
    return changed


def prune(folder: Path, digests: List[str]) -> bool:
    """Take away blobs of an image that was here before; whether there were any."""
    kept = {name for digest in digests for name in (digest.split(":")[1], digest.split(":")[1] + ".partial")}
    others = [path for path in (folder / "blobs" / "sha256").glob("*") if path.name not in kept]
    for path in others:
        path.unlink()
    return bool(others)
