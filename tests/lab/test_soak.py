"""Minutes of load on front, guard and engine, with `make soak` an hour: nothing is lost, grows or slows down."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from testinfra.host import Host

import ocr_lines
from guard_inputs import BAD, CHAT
from lab import Play, Played, anonymous_memory, container_memory, deploy_guarded
from ledger import COMPLETE
from rendering import PROJECT
from soak import SAMPLE_SECONDS, Soaked, saturation, soak

pytestmark = [pytest.mark.long, pytest.mark.nightly, pytest.mark.soak, pytest.mark.usefixtures("restored")]

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
#: Of the saturation, measured before, that is kept up.
SHARE, WORKERS, SATURATION_SECONDS = 0.8, 64, 20.0
#: Asked of an hour: percent that memory may grow, by which share the last sixth's p99 may be above the first's.
GROWTH_PERCENT, SLOWER = 1.0, 0.2
#: Minutes are too short for a percent an hour: that is less than what the allocator moves.
SHORT_GROWTH_PERCENT_OF_RUN = 3.0
REFUSED = [bad for bad in BAD if bad.path == CHAT]


@pytest.fixture(scope="module")
def key(deployed: Played, play: Play) -> str:
    return deploy_guarded(play)


class Client:
    """Sends lines of text as pictures and as questions in turn; a session a thread."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url + CHAT
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.local = threading.local()
        rng = random.Random(1)
        self.bodies = list(itertools.chain.from_iterable(self.pair(rng) for _ in range(50)))

    @staticmethod
    def pair(rng: random.Random) -> Iterator[bytes]:
        text = ocr_lines.readable_text(rng)
        picture = ocr_lines.data_url(ocr_lines.render(text, "dejavu-sans-mono"))
        image = {"type": "image_url", "image_url": {"url": picture}}
        for content in ([image, {"type": "text", "text": "Text Recognition:"}], text):
            message = {"role": "user", "content": content}
            yield json.dumps({"model": "glm-ocr", "messages": [message], "max_tokens": 16, "temperature": 0}).encode()

    def post(self, body: bytes) -> requests.Response:
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        reply: requests.Response = self.local.session.post(self.url, data=body, headers=self.headers, timeout=60)
        return reply

    def send(self, number: int) -> bool:
        reply = self.post(self.bodies[number % len(self.bodies)])
        return reply.status_code == 200 and reply.json()["choices"][0]["finish_reason"] in COMPLETE

    def send_bad(self, number: int) -> bool:
        bad = REFUSED[number // 100 % len(REFUSED)]
        return self.post(bad.body).status_code == bad.status


def memory(node: Host) -> dict[str, float]:
    """Bytes of anonymous memory of this process, the front, and the engine with its guard."""
    main = node.check_output("systemctl show --property=MainPID --value glm-ocr-front")
    workers = node.check_output(f"ps -o pid= --ppid {main}").split()
    own = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["RssAnon"]
    return {
        "client": 1024 * float(own.split()[0]),
        "front": anonymous_memory(node, [main, *workers]),
        "engine and guard": container_memory(node),
    }


def test_nothing_is_lost_and_nothing_grows(key: str, node: Host, url: str) -> None:
    client = Client(url, key)
    ceiling = saturation(client.send, 32, SATURATION_SECONDS)
    found = soak(client.send, client.send_bad, lambda: memory(node), SHARE * ceiling, SECONDS, WORKERS)
    figures = summary(found, ceiling)
    print(json.dumps(figures, indent=2))
    if target := os.environ.get("SOAK_PAGE"):
        (PROJECT / target).write_text(page(figures))
    assert found.bad > 0
    assert found.passed == []
    assert found.lost == []
    assert len(found.latency) + found.bad == int(found.rate * SECONDS)
    assert set(found.memory) == {"client", "front", "engine and guard"}
    assert min(map(len, found.memory.values())) > SECONDS / SAMPLE_SECONDS / 2
    limit = GROWTH_PERCENT if SECONDS >= 3600 else SHORT_GROWTH_PERCENT_OF_RUN * 3600 / SECONDS
    assert {name: percent for name, percent in figures["memory_percent_per_hour"].items() if percent > limit} == {}
    first, last = figures["p99_first_sixth_ms"], figures["p99_last_sixth_ms"]
    assert None not in (first, last), "too few requests for a p99"
    # The slowest few of minutes say nothing.
    assert last <= (1 + SLOWER) * first or SECONDS < 3600


def summary(found: Soaked, ceiling: float) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "saturation_requests_per_second": round(ceiling, 2),
        "requests": len(found.latency),
        "bad_requests": found.bad,
        "lost": len(found.lost),
        "not_refused": len(found.passed),
        "p99_first_sixth_ms": milliseconds(found.p99(0, 1 / 6)),
        "p99_last_sixth_ms": milliseconds(found.p99(5 / 6, 1)),
        "memory_mb": {name: round(samples[-1][1] / 1e6, 1) for name, samples in found.memory.items()},
        "memory_percent_per_hour": {name: round(percent, 2) for name, percent in found.growth().items()},
    }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def page(figures: dict[str, Any]) -> str:
    """docs/soak.md: what the last long run measured."""
    rows = [
        ("duration", f"{figures['seconds']:.0f} s"),
        ("saturation, 32 clients in a closed loop", f"{figures['saturation_requests_per_second']} requests/s"),
        (f"good requests, at {SHARE:.0%} of that", figures["requests"]),
        ("bad requests among them", figures["bad_requests"]),
        ("lost", figures["lost"]),
        ("bad ones that were not refused", figures["not_refused"]),
        ("p99 of the first sixth, from when a request was due", f"{figures['p99_first_sixth_ms']} ms"),
        ("p99 of the last sixth", f"{figures['p99_last_sixth_ms']} ms"),
        *(
            (f"memory of {name}", f"{figures['memory_mb'][name]} MB, {percent:+.2f} % an hour")
            for name, percent in figures["memory_percent_per_hour"].items()
        ),
    ]
    return "\n".join(
        [
            "# Soak",
            "",
            "Written by `make soak`; do not edit. Front, request guard and the lab's CPU engine on one machine with",
            "the client, half of the requests with a picture. Memory is anonymous memory; its growth is Theil and",
            "Sen's slope over all samples but those of the first sixth.",
            "",
            f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores.",
            "",
            "| what | measured |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )
