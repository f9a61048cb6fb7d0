"""What the request guard costs, as middleware and as a proxy: `make bench-guard` writes it into docs/request-guard.md.

Three arms, in processes of their own: the engine's stand-in, the same with the guard as middleware, and a proxy with
the guard before another stand-in.

- paced: ``CONCURRENCY`` clients, whose requests go to the three arms in turn, so that whatever else the machine does
  meets all of them.  Each is held for HOLD seconds, which makes the rate of all together the one that the seed's
  benchmark reached.  Latency is that of a request minus HOLD; added latency is the difference of the quantiles.
- saturated: ``CONCURRENCY`` clients, nothing held; the arms take turns of seconds, in random order.  For images the
  stand-in decodes them.

CPU of a request is the time that the arm's processes were on a core (/proc/PID/task/*/schedstat) over the requests
of a turn, the median over the turns.  The throughput of a process at its limit is the inverse, so the share lost to
the guard is 1 - CPU without it / CPU with it.  Requests over seconds of the clock are given too: they take in what
the client and others needed of the machine.
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
from pathlib import Path

import uvloop

import bench_workload
import guard_inputs

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
PAGE = PROJECT / "docs" / "request-guard.md"
BEGIN, END = "<!-- begin of the figures: make bench-guard -->", "<!-- end of the figures -->"
CONCURRENCY = 32
SEED_RATE = 25.14  # requests/s, the seed's throughput
HOLD = CONCURRENCY / SEED_RATE
A4 = (1654, 2339)  # pixels at 200 dpi
ARMS = {"none": "no guard", "guarded": "middleware", "proxy": "proxy"}
LIMIT_MS, LIMIT_LOSS = 1.0, 0.03


@dataclass
class Cell:
    """What one arm did under one load: ``latencies`` in seconds; for each turn requests/s and CPU seconds a request."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


Cells = dict[tuple[str, str, str], Cell]


@dataclass(frozen=True)
class Arm:
    """A port to ask, and the processes behind it."""

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
    """Seconds of each request, by port: to one after the other, between two moments of the clock."""
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


def request(body: bytes, **headers: float) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *(f"X-{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def serving(kind: str, engine: int = 0) -> Iterator[Arm]:
    """One of apps.py's servers."""
    command = [sys.executable, str(HERE / "apps.py"), kind, str(engine)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield Arm(int(process.stdout.readline()), (process.pid,))
        finally:
            process.terminate()


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def measure(turns: int) -> Cells:
    """By load (paced, saturated), kind of request and arm."""
    cells: Cells = defaultdict(Cell)
    with ExitStack() as stack:
        arms = {"none": stack.enter_context(serving("engine")), "guarded": stack.enter_context(serving("guarded"))}
        behind = stack.enter_context(serving("engine"))
        proxy = stack.enter_context(serving("proxy", behind.port))
        arms["proxy"] = Arm(proxy.port, proxy.processes + behind.processes)
        text, image = bodies()["text"], bodies()["image"]
        for turn in range(-1, turns):  # the first warms up
            kept = cells if turn >= 0 else defaultdict(Cell)
            take_turn(kept, "paced", "text", arms, request(text, Hold=HOLD), 8 * HOLD)
            take_turn(kept, "paced", "image", arms, request(image, Hold=HOLD), 8 * HOLD)
            for name in random.sample(list(arms), len(arms)):
                take_turn(kept, "saturated", "text", {name: arms[name]}, request(text), 0.5)
                take_turn(kept, "saturated", "image", {name: arms[name]}, request(image, Decode=1), 2.0)
            print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    return cells


def take_turn(cells: Cells, mode: str, kind: str, arms: Mapping[str, Arm], request: bytes, seconds: float) -> None:
    held = HOLD if mode == "paced" else 0.0
    cpu, began = [arm.cpu_seconds() for arm in arms.values()], time.perf_counter()
    found = uvloop.run(load([arm.port for arm in arms.values()], request, seconds, held))
    took = time.perf_counter() - began
    for (name, arm), before, latencies in zip(arms.items(), cpu, found, strict=True):
        cell = cells[mode, kind, name]
        cell.rates.append(len(latencies) / took)
        cell.cpu.append((arm.cpu_seconds() - before) / len(latencies))
        cell.latencies += [one - held for one in latencies]


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


def lost(cells: Cells, kind: str, arm: str) -> float:
    """Share of the throughput of a process at its limit."""
    without, with_it = (statistics.median(cells["saturated", kind, one].cpu) for one in ("none", arm))
    return 1 - without / with_it


def page(cells: Cells, checks: dict[str, float], loads: tuple[float, float]) -> str:
    sizes = {kind: len(body) for kind, body in bodies().items()}
    packages = [f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "pybase64", "aiohttp")]
    lines = [
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d}, Python {platform.python_version()}, {', '.join(packages)},",
        f"on {os.cpu_count()} cores ({platform.machine()}) that client, servers and others shared: 1-minute load",
        f"{loads[0]:.1f} before, {loads[1]:.1f} after. The text request has {sizes['text']} bytes, the image request",
        f"{sizes['image']:,}: a PNG of 1 MB, {A4[0]} by {A4[1]} pixels. The formulas are in `tests/bench_guard`.",
        "",
        f"One check alone, median of 200: text {checks['text'] * 1e3:.3f} ms, image {checks['image'] * 1e3:.3f} ms.",
        "",
        f"**Paced**: {CONCURRENCY} clients, their requests to the arms in turn, each held {HOLD:.2f} s, so about",
        f"{SEED_RATE:g} requests/s in all.",
        "",
        "| request | guard | turns | requests | p50 ms | p99 ms | added p50 | added p99 | CPU ms a request |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in sizes:
        for arm, name in ARMS.items():
            cell = cells["paced", kind, arm]
            figures = [quantile(cell.latencies, share) * 1e3 for share in (0.5, 0.99)]
            figures += [added(cells, kind, arm, share) for share in (0.5, 0.99)]
            figures.append(statistics.median(cell.cpu) * 1e3)
            counts = f"{len(cell.cpu)} | {len(cell.latencies)}"
            lines.append(f"| {kind} | {name} | {counts} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    lines += [
        "",
        f"**Saturated**: {CONCURRENCY} clients, nothing held. For text the stand-in only parses the request: the share",
        "is that of a server without an engine; for the image it decodes the picture, the least an API process does.",
        "",
        "| request | guard | turns | requests | requests/s, median | CPU ms a request | lost, by CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in sizes:
        for arm, name in ARMS.items():
            cell = cells["saturated", kind, arm]
            counts = f"{len(cell.cpu)} | {len(cell.latencies)}"
            medians = f"{statistics.median(cell.rates):.1f} | {statistics.median(cell.cpu) * 1e3:.3f}"
            lines.append(f"| {kind} | {name} | {counts} | {medians} | {lost(cells, kind, arm):.1%} |")
    return "\n".join([*lines, "", *verdicts(cells)])


def added(cells: Cells, kind: str, arm: str, share: float) -> float:
    """Milliseconds that a quantile of the paced latency is above the one without a guard."""
    bare, other = (quantile(cells["paced", kind, one].latencies, share) for one in ("none", arm))
    return (other - bare) * 1e3


def verdicts(cells: Cells) -> list[str]:
    lines = [
        f"Wanted: at most {LIMIT_MS:g} ms more at p50, at most {LIMIT_LOSS:.0%} of the throughput with the image.",
        "",
    ]
    for arm, name in list(ARMS.items())[1:]:
        more = {kind: added(cells, kind, arm, 0.5) for kind in ("text", "image")}
        share = lost(cells, "image", arm)
        held = max(more.values()) <= LIMIT_MS and share <= LIMIT_LOSS
        found = ", ".join(f"{kind} {value:.2f} ms" for kind, value in more.items())
        lines.append(f"- {name}: {found}, {share:.1%}: {'held' if held else 'not held'}.")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="What the request guard costs, as middleware and as a proxy.")
    parser.add_argument("--turns", type=int, default=6, help="turns of every arm in every load")
    parser.add_argument("--raw", type=Path, help="JSON of all latencies, rates and CPU seconds to write")
    arguments = parser.parse_args()
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
