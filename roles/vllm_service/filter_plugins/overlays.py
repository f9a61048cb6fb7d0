"""Overlays: files of the controller that are mounted over files of the image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError


def overlay_files(overlays: Sequence[Mapping[str, str]], library_dir: str) -> list[dict[str, str]]:
    """``source`` and ``target`` of each overlay, and ``path`` on the host, which has the SHA-256 of the content in it.

    So a release that names the path moves with the content.  Raises ``AnsibleFilterError`` for an absent source.
    """
    files = []
    for overlay in overlays:
        source = Path(overlay["source"])
        try:
            digest = hashlib.sha256(source.read_bytes()).hexdigest()
        except OSError as error:
            raise AnsibleFilterError(
                f"vllm_service_overlays: expected a file of the controller at {source}; found {error.strerror}. "
                "Fix: correct source, which is best given from {{ inventory_dir }} on"
            ) from error
        path = f"{library_dir}/overlays/{digest}/{source.name}"
        files.append({"source": str(source), "target": overlay["target"], "path": path})
    return files


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"overlay_files": overlay_files}
