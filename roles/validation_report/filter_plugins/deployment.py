"""What runs on a host, told from the container engine's own description of the container."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def deployment(
    inspected: Sequence[Mapping[str, Any]], host: str, image_name: str, image_id: str, container_engine: str
) -> dict[str, Any]:
    """The deployment record of files/schemas/report.schema.json, from `inspect` output of Docker or podman.

    ``image_name`` is what the inventory names, ``image_id`` what that means on the host, empty when it is not there:
    what runs may be another image.  ``inspected`` is empty when no container runs: what is not known is None or empty
    then.  Secrets are still in it; merge_report.py hides them.
    """
    container = inspected[0] if inspected else {}
    configuration = container.get("Config") or {}
    labels = configuration.get("Labels") or {}
    return {
        "host": host,
        "image": {"name": image_name, "id": identity(container.get("Image")), "wanted_id": identity(image_id)},
        "container_engine": container_engine,
        "container_started_at": (container.get("State") or {}).get("StartedAt"),
        "release": labels.get("glm-ocr.release"),
        "accelerator": labels.get("glm-ocr.accelerator") or accelerators(container),
        "command": configuration.get("Cmd") or [],
        "environment": dict(sorted(pair.split("=", 1) for pair in configuration.get("Env") or [] if "=" in pair)),
    }


def identity(image_id: str | None) -> str | None:
    """An image's id as Docker writes it; podman leaves sha256: out."""
    return f"sha256:{image_id.removeprefix('sha256:')}" if image_id else None


def accelerators(container: Mapping[str, Any]) -> str:
    """The NPU device nodes the container was given."""
    devices = [device["PathOnHost"] for device in (container.get("HostConfig") or {}).get("Devices") or []]
    cards = sorted(path for path in devices if path.removeprefix("/dev/davinci").isdigit())
    return f"Ascend NPU {', '.join(cards)}" if cards else "unknown: the container was given no NPU device"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"deployment": deployment}
