"""What front and guard cost beside exposure direct: `make bench-guard` writes it into docs/request-guard.md.

Five arms (ARMS), in processes of their own: the engine's stand-in alone, with the guard as middleware, behind HAProxy
with the configuration that is deployed, behind it with the guard; and a proxy with the guard before a stand-in.

- paced: ``CONCURRENCY`` clients, whose requests go to the arms in turn, so that whatever else the machine does
  meets all of them.  Each is held for HOLD seconds, which makes the rate of all together the one that the seed's
  benchmark reached.  Latency is that of a request minus HOLD; added latency is the difference of two arms' medians.
- saturated: ``CONCURRENCY`` clients, nothing held; the arms take turns of seconds, in random order.  For images the
  stand-in decodes them.  Throughput is the replies of a turn over its seconds; what is lost is 1 - with it / without
  it, of the two arms' figures of one turn, the median over the turns.

CPU of a request is the time that the arm's processes were on a core (/proc/PID/task/*/schedstat) over the requests
of a turn, the median over the turns.  The throughput of a machine at its limit is the inverse, so the share lost by CPU
is 1 - CPU without it / CPU with it.  It does not depend on what the client and others needed of the machine meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import uvloop

import bench_workload
import front
import guard_inputs

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
PAGE = PROJECT / "docs" / "request-guard.md"
BEGIN, END = "<!-- begin of the figures: make bench-guard -->", "<!-- end of the figures -->"
CONCURRENCY = 32
SEED_RATE = 25.14  # requests/s, the seed's throughput
HOLD = CONCURRENCY / SEED_RATE
A4 = (1654, 2339)  # pixels at 200 dpi
ARMS = {
    "direct": "direct",
    "guarded": "direct, guard",
    "front": "front",
    "fronted": "front, guard",
    "proxy": "direct, guard as a proxy",
}
#: What is added: the arm that has it, the one that has not, and whether the limits are for it.
ADDED = {
    "guard": ("guarded", "direct", True),
    "guard behind the front": ("fronted", "front", True),
    "guard as a proxy": ("proxy", "direct", True),
    "front": ("front", "direct", False),
    "front and guard": ("fronted", "direct", False),
}
#: Wanted of a guard.
LIMIT_MS, LIMIT_LOSS = 1.0, 0.03


@dataclass
class Cell:
    """What one arm did under one load, by turn: ``latencies`` in seconds, requests/s, and CPU seconds a request."""

    latencies: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


Cells = dict[tuple[str, str, str], Cell]


@dataclass(frozen=True)
class Arm:
    """A port to ask, or a socket that the front asks, and the processes behind it."""

    port: int
    processes: tuple[int, ...]

    def cpu_seconds(self) -> float:
        files = [path for pid in self.processes for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return sum(int(path.read_text().split()[0]) for path in files) / 1e9


@cache
def bodies() -> dict[str, bytes]:
    """A text, and a page as our benchmark draws it, filled up to 1 MB."""
    page = bench_workload.padded(bench_workload.page(*A4, random.Random(1)), 1_000_000)
    return {
        "text": guard_inputs.chat("请用一句话介绍 GLM-OCR 模型。", temperature=0),
        "image": guard_inputs.chat(guard_inputs.url(guard_inputs.data_url(page)), temperature=0),
    }


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
    """Seconds from the first byte sent to the last one received.  Raises ``RuntimeError`` for anything but 200."""
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"expected 200; found {head!r}")
    await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
    return time.perf_counter() - began


async def client(ports: Sequence[int], request: bytes, begin: float, end: float) -> list[list[float]]:
    """Seconds of each request, by port: to one port after the other, between two moments of the clock."""
    await asyncio.sleep(begin - time.perf_counter())
    connections = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
    seconds: list[list[float]] = [[] for _ in ports]
    turn = random.randrange(len(ports))
    while time.perf_counter() < end:
        seconds[turn].append(await exchange(*connections[turn], request))
        turn = (turn + 1) % len(ports)
    for _, writer in connections:
        writer.close()
    return seconds


async def load(ports: Sequence[int], request: bytes, seconds: float, spread: float) -> list[list[float]]:
    """The latencies by port, of ``CONCURRENCY`` clients that begin within ``spread`` seconds."""
    now = time.perf_counter()
    clients = [client(ports, request, now + spread * n / CONCURRENCY, now + seconds) for n in range(CONCURRENCY)]
    found = await asyncio.gather(*clients)
    return [[one for each in found for one in each[at]] for at in range(len(ports))]


def request(body: bytes, hold: float = 0.0, decode: bool = False) -> bytes:
    """With all that the front wants; the others do not look at it."""
    headers = {
        "Host": "localhost",
        "Authorization": f"Bearer {front.KEYS['validation']}",  # whose rate is not limited
        "User-Agent": json.dumps({"hold": hold, "decode": decode}),
        "Content-Type": "application/json",
        "Content-Length": len(body),
    }
    lines = [f"POST {guard_inputs.CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def serving(kind: str, *options: str) -> Iterator[Arm]:
    """One of apps.py's servers."""
    command = [sys.executable, str(HERE / "apps.py"), kind, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield Arm(int(process.stdout.readline()), (process.pid,))
        finally:
            process.terminate()


@contextmanager
def fronted(kind: str) -> Iterator[Arm]:
    """HAProxy as it is deployed before one of apps.py's servers, on a Unix socket as the engine is."""
    with front.folder() as folder:
        haproxy = front.Front(folder)
        with serving(kind, "--socket", str(haproxy.socket)) as behind:
            try:
                haproxy.start()
                haproxy.open()
                yield Arm(haproxy.port, haproxy.processes() + behind.processes)
            finally:
                haproxy.stop()


@contextmanager
def proxied() -> Iterator[Arm]:
    with serving("engine") as behind, serving("proxy", "--engine", str(behind.port)) as proxy:
        yield Arm(proxy.port, proxy.processes + behind.processes)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def measure(turns: int) -> Cells:
    """By load (paced, saturated), kind of request and arm."""
    cells: Cells = defaultdict(Cell)
    with ExitStack() as stack:
        arms = {
            "direct": stack.enter_context(serving("engine")),
            "guarded": stack.enter_context(serving("guarded")),
            "front": stack.enter_context(fronted("engine")),
            "fronted": stack.enter_context(fronted("guarded")),
            "proxy": stack.enter_context(proxied()),
        }
        text, image = bodies()["text"], bodies()["image"]
        for turn in range(-1, turns):  # the first warms up
            kept = cells if turn >= 0 else defaultdict(Cell)
            take_turn(kept, "paced", "text", arms, request(text, HOLD), 8 * HOLD)
            take_turn(kept, "paced", "image", arms, request(image, HOLD), 8 * HOLD)
            for name in random.sample(list(arms), len(arms)):
                take_turn(kept, "saturated", "text", {name: arms[name]}, request(text), 0.5)
                take_turn(kept, "saturated", "image", {name: arms[name]}, request(image, decode=True), 2.0)
            print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    return cells


def take_turn(cells: Cells, mode: str, kind: str, arms: Mapping[str, Arm], request: bytes, seconds: float) -> None:
    held = HOLD if mode == "paced" else 0.0
    cpu, began = [arm.cpu_seconds() for arm in arms.values()], time.perf_counter()
    found = uvloop.run(load([arm.port for arm in arms.values()], request, seconds, held))
    took = time.perf_counter() - began
    if min(map(min, found)) < held:
        raise RuntimeError(f"expected every reply after {held:.2f} s; found {min(map(min, found)):.2f} s")
    for (name, arm), before, latencies in zip(arms.items(), cpu, found, strict=True):
        cell = cells[mode, kind, name]
        cell.rates.append(len(latencies) / took)
        cell.cpu.append((arm.cpu_seconds() - before) / len(latencies))
        cell.latencies.append([one - held for one in latencies])


def alone(rounds: int = 200) -> dict[str, float]:
    """Seconds of one check, the median, without any server."""
    checker = guard_inputs.checker()
    found = {}
    for kind, body in bodies().items():
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            checker.check(guard_inputs.CHAT, body)
            took.append(time.perf_counter() - began)
        found[kind] = statistics.median(took)
    return found


def p50(latencies: Sequence[float]) -> float:
    return quantile(latencies, 0.5) * 1e3


def added(cells: Cells, kind: str, arm: str, beside: str) -> tuple[float, list[float]]:
    """Milliseconds that an arm's p50 is above that of another: of all requests, and in each turn."""
    one, other = (cells["paced", kind, name].latencies for name in (arm, beside))
    turns = [p50(a) - p50(b) for a, b in zip(one, other, strict=True)]
    return p50(list(chain(*one))) - p50(list(chain(*other))), turns


def lost(cells: Cells, kind: str, arm: str, beside: str) -> list[float]:
    """Share of the throughput that an arm has less than another, in each turn."""
    one, other = (cells["saturated", kind, name].rates for name in (arm, beside))
    return [1 - a / b for a, b in zip(one, other, strict=True)]


def lost_by_cpu(cells: Cells, kind: str, arm: str, beside: str) -> float:
    with_it, without = (statistics.median(cells["saturated", kind, name].cpu) for name in (arm, beside))
    return 1 - without / with_it


def page(cells: Cells, checks: dict[str, float], loads: tuple[float, float]) -> str:
    sizes = {kind: len(body) for kind, body in bodies().items()}
    packages = [f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "pybase64", "aiohttp")]
    haproxy = subprocess.check_output([front.PROGRAM, "-v"], text=True).split()[2]
    lines = [
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d}, Python {platform.python_version()}, {', '.join(packages)},",
        f"HAProxy {haproxy}, on {os.cpu_count()} cores ({platform.machine()}) that client, servers and others shared:",
        f"1-minute load {loads[0]:.1f} before, {loads[1]:.1f} after. The text request has {sizes['text']} bytes, the",
        f"image request {sizes['image']:,}: a PNG of 1 MB, {A4[0]} by {A4[1]} pixels.",
        "",
        f"| {CONCURRENCY} clients; added | p50 ms, text | p50 ms, image | throughput lost, image | by CPU | wanted |",
        "|---|---|---|---|---|---|",
        *(summary(cells, what) for what in ADDED),
        "",
        "In brackets the lowest and the highest of the turns. Added p50 is the arm's median latency minus the other's.",
        "Throughput lost is 1 - requests/s with it / requests/s without it, the median of the turns; by CPU it is",
        "1 - CPU a request without it / CPU a request with it, of all processes of the arm. Wanted of a guard: at most",
        f"{LIMIT_MS:g} ms more at p50, and at most {LIMIT_LOSS:.0%} of the throughput, by CPU.",
        "",
        f"**Paced**: {CONCURRENCY} clients, their requests to the arms in turn, each held {HOLD:.2f} s, so about",
        f"{SEED_RATE:g} requests/s in all. Latency is without the {HOLD:.2f} s.",
        "",
        "| request | arm | turns | requests | p50 ms | p99 ms | CPU ms a request |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in sizes:
        for arm, name in ARMS.items():
            cell = cells["paced", kind, arm]
            latencies = list(chain(*cell.latencies))
            figures = (p50(latencies), quantile(latencies, 0.99) * 1e3, statistics.median(cell.cpu) * 1e3)
            counts = f"{len(cell.cpu)} | {len(latencies)}"
            lines.append(f"| {kind} | {name} | {counts} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    lines += [
        "",
        f"**Saturated**: {CONCURRENCY} clients, nothing held, one arm at a time, each turn in another order. For text",
        "the stand-in only parses the request, as no engine does; for the image it decodes the picture, the least that",
        "an API process does.",
        "",
        "| request | arm | turns | requests | requests/s, median | CPU ms a request, median |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sizes:
        for arm, name in ARMS.items():
            cell = cells["saturated", kind, arm]
            counts = f"{len(cell.cpu)} | {sum(map(len, cell.latencies))}"
            medians = f"{statistics.median(cell.rates):.1f} | {statistics.median(cell.cpu) * 1e3:.3f}"
            lines.append(f"| {kind} | {name} | {counts} | {medians} |")
    lines += [
        "",
        f"One check alone, median of 200: text {checks['text'] * 1e3:.3f} ms, image {checks['image'] * 1e3:.3f} ms.",
    ]
    return "\n".join(lines)


def summary(cells: Cells, what: str) -> str:
    """A row of what one of ADDED costs."""
    arm, beside, judged = ADDED[what]
    more = {kind: added(cells, kind, arm, beside) for kind in ("text", "image")}
    shares, share = lost(cells, "image", arm, beside), lost_by_cpu(cells, "image", arm, beside)
    held = max(value for value, _ in more.values()) <= LIMIT_MS and share <= LIMIT_LOSS
    figures = [
        *(f"{value:.2f} ({min(turns):.2f} to {max(turns):.2f})" for value, turns in more.values()),
        f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})",
        f"{share:.1%}",
        {True: "held", False: "not held"}[held] if judged else "",
    ]
    return f"| {what} | {' | '.join(figures)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="What front and guard cost beside exposure direct.")
    parser.add_argument("--turns", type=int, default=8, help="turns of every arm in every load")
    parser.add_argument("--raw", type=Path, help="JSON of all latencies, rates and CPU seconds to write")
    arguments = parser.parse_args()
    front.requirement()
    checks, before = alone(), os.getloadavg()[0]
    cells = measure(arguments.turns)
    figures = page(cells, checks, (before, os.getloadavg()[0]))
    if arguments.raw:
        raw = {" ".join(key): [cell.latencies, cell.rates, cell.cpu] for key, cell in cells.items()}
        arguments.raw.write_text(json.dumps(raw))
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{figures}\n{END}{tail}")
    print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
