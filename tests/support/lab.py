"""What the lab tests share: what a play did, requests from outside the node, the container's start time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from testinfra.host import Host

from rendering import PROJECT

NODE = "node1"
INVENTORY = PROJECT / "inventory" / "lab"
WEIGHTS = "/opt/atomgit/weights/GLM-OCR-bf16"
#: Hash over everything a deployment writes on the host.
STATE = (
    "find /etc/glm-ocr /etc/systemd/system /usr/local/lib/glm-ocr -type f -exec sha256sum {} + 2>/dev/null | sort"
    " | sha256sum; docker images --no-trunc --quiet | sort"
)


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


@contextmanager
def listener(node: Host, family: str, level: str, option: str, address: str) -> Iterator[str]:
    """A foreign process that listens on the service's port with one socket option set; yields its pid."""
    code = (
        f"import socket,signal; s=socket.socket(socket.{family}); s.setsockopt(socket.{level}, socket.{option}, 1);"
        f" s.bind(('{address}', 8000)); s.listen(); print(1, flush=True); signal.pause()"
    )
    node.check_output("rm -f /run/listener.ready")
    pid = node.check_output(
        f'nohup python3 -c "{code}" > /run/listener.ready 2>&1 & echo $!; until [ -s /run/listener.ready ]; do :; done'
    )
    try:
        yield pid
    finally:
        node.check_output(f"kill {pid}")
