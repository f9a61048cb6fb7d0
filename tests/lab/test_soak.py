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

import pytest
import requests
from testinfra.host import Host

import ocr_lines
from guard_inputs import BAD, CHAT
from lab import API_PROCESS, ENGINE_PROCESS, Play, Played, anonymous_memory, deploy_guarded, engine_pid
from ledger import COMPLETE
from rendering import PROJECT
from soak import BAD_OF_HUNDRED, Soaked, saturation, soak

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("restored")]

HOUR = 3600.0
SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
#: Of the saturation, measured before, that is kept up.
SHARE, CLOSED_WORKERS, SATURATION_SECONDS, WORKERS = 0.8, 32, 20.0, 64
#: Percent that the memory of each may grow in an hour. The engine's process is vLLM's own, and of another version than
#: production's: its limit is for a leak that an operator would meet within days.
GROWTH_PERCENT = {"the client": 1.0, "the front": 1.0, "the API process with the guard": 1.0, "the engine process": 5.0}
#: By which share the p99 of an hour's last sixth may be above the first's.
SLOWER = 0.2
#: Of minutes: 3 % in the run, for the allocator moves by more than a percent an hour, and twice the p99, for that is of
#: some hundred requests.
SHORT_GROWTH_PERCENT, SHORT_SLOWER = dict.fromkeys(GROWTH_PERCENT, 3.0 * HOUR / SECONDS), 1.0


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
        self.bad = [bad for bad in BAD if bad.path == CHAT]
        rng.shuffle(self.bad)  # those that take long to refuse are side by side

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

    def send(self, number: int) -> str:
        reply = self.post(self.bodies[number % len(self.bodies)])
        if reply.status_code != 200:
            return f"expected 200; found {reply.status_code} {reply.text[:200]}"
        ended = reply.json()["choices"][0]["finish_reason"]
        return "" if ended in COMPLETE else f"expected a complete reply; found finish_reason {ended}"

    def send_bad(self, number: int) -> str:
        bad = self.bad[number // 100 % len(self.bad)]
        reply = self.post(bad.body)
        return (
            "" if reply.status_code == bad.status else f"{bad.name}: expected {bad.status}; found {reply.status_code}"
        )


class Memory:
    """Bytes of anonymous memory of this process, the front, and the engine's two, which must be the same all along."""

    def __init__(self, node: Host) -> None:
        self.node = node
        main = node.check_output("systemctl show --property=MainPID --value glm-ocr-front")
        self.pids = {
            "the front": [main, *node.check_output(f"ps -o pid= --ppid {main}").split()],
            "the API process with the guard": [str(engine_pid(node, API_PROCESS))],
            "the engine process": [str(engine_pid(node, ENGINE_PROCESS))],
        }

    def __call__(self) -> dict[str, float]:
        own = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["RssAnon"]
        told = anonymous_memory(self.node, [pid for pids in self.pids.values() for pid in pids])
        if set(told) != set(itertools.chain(*self.pids.values())):
            raise RuntimeError(f"expected the processes from the start, {self.pids}; found {sorted(told)}")
        return {"the client": 1024.0 * int(own.split()[0])} | {
            name: float(sum(told[pid] for pid in pids)) for name, pids in self.pids.items()
        }


def test_nothing_is_lost_and_nothing_grows(key: str, node: Host, url: str) -> None:
    client = Client(url, key)
    ceiling = saturation(client.send, CLOSED_WORKERS, SATURATION_SECONDS)
    found = soak(client.send, client.send_bad, Memory(node), SHARE * ceiling, SECONDS, WORKERS)
    told = page(found, ceiling)
    print(told)
    if target := os.environ.get("SOAK_PAGE"):
        (PROJECT / target).write_text(told)
    growth, slower = (GROWTH_PERCENT, SLOWER) if SECONDS >= HOUR else (SHORT_GROWTH_PERCENT, SHORT_SLOWER)
    assert found.problems(growth, slower) == []


def page(found: Soaked, ceiling: float) -> str:
    """docs/soak.md: what the last run measured, beside what is asked of an hour."""
    rows = [
        ("saturation", f"{ceiling:.2f} requests/s", ""),
        (f"good requests, at {SHARE:.0%} of that", len(found.good()), ""),
        (f"bad requests, {BAD_OF_HUNDRED} in 100 of all", found.bad, ""),
        ("good requests lost", len(found.lost), "0"),
        ("bad requests not refused", len(found.passed), "0"),
        ("p99 of the first sixth", milliseconds(found.p99(0, 1 / 6)), ""),
        ("p99 of the last sixth", milliseconds(found.p99(5 / 6, 1)), f"at most {SLOWER:.0%} more"),
        *(
            (
                f"memory of {name}",
                f"{found.memory[name][-1][1] / 1e6:.1f} MB, {percent:+.2f} % an hour",
                f"at most {GROWTH_PERCENT[name]:+.0f} % an hour",
            )
            for name, percent in found.growth().items()
        ),
    ]
    lines = [
        "# Soak",
        "",
        "Written by `make soak`; do not edit. Front, request guard and the lab's CPU engine on one machine with the",
        f"client, half of the requests with a picture. Saturation is what {CLOSED_WORKERS} clients reach that send the",
        "next request when they have a reply. Latency counts from when a request was due. Memory is anonymous memory",
        "(RssAnon) at the end; its growth is Theil and Sen's slope over the samples after the first sixth.",
        "",
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores, {found.seconds:.0f} s.",
        "",
        "| what | measured | wanted of an hour |",
        "|---|---|---|",
        *(f"| {name} | {value} | {wanted} |" for name, value, wanted in rows),
        "",
    ]
    if found.seconds < HOUR:
        lines += [
            "These are not the figures of an hour. In a run as short as this memory may grow by 3 %, and p99 double.",
            "",
        ]
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    return "too few requests" if seconds is None else f"{1000 * seconds:.0f} ms"
