"""What the lab tests share: what a play did, requests from outside the node, the container's start time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from testinfra.host import Host

from rendering import PROJECT

NODE = "node1"
INVENTORY = PROJECT / "inventory" / "lab"


@dataclass(frozen=True)
class Played:
    """What a play did."""

    rc: int
    stdout: str
    changed: int
    failures: str
    seconds: float


Play = Callable[..., Played]


def container_start(node: Host, engine: str = "docker") -> str:
    """When the engine's container started; empty when there is none."""
    return str(node.run(f"{engine} container inspect --format '{{{{.State.StartedAt}}}}' glm-ocr").stdout.strip())


def chat(url: str, content: Any, max_tokens: int = 128) -> requests.Response:
    body = {
        "model": "glm-ocr",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def latest_report(name: str = NODE) -> Path:
    return PROJECT / "reports" / name / "latest"
