"""Load at a constant rate for a long time, bad requests among it, and what it shows: losses, latency, memory.

The load is open: a request is due at its time whatever the replies do, and its latency counts from then. What the
client keeps of the requests has its size from the start, so that its own memory tells whether it leaks.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bench_stats import percentile

#: Of a hundred requests, how many are bad.
BAD_OF_HUNDRED = 1
#: Of a run, in which caches fill: its memory does not count.
WARM_UP = 1 / 6
#: Samples for a slope.
SAMPLES = 20

#: Sends the request of a number; tells what was wrong with the reply, nothing if it was the one that was due.
Send = Callable[[int], str]


def is_bad(number: int) -> bool:
    return number % 100 < BAD_OF_HUNDRED


def percent_per_hour(samples: Sequence[tuple[float, float]]) -> float:
    """How fast (seconds, bytes) grow, in percent of their median an hour.

    By Theil and Sen's slope, the median of all slopes between two samples, which a single step or spike does not move.

    Raises ``ValueError`` for fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("a slope needs two samples")
    thinned = samples[:: max(1, len(samples) // 200)]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(thinned, 2) if t > s]
    return 100 * 3600 * statistics.median(slopes) / statistics.median(value for _, value in samples)


@dataclass
class Soaked:
    """``latency`` has the seconds of each request by its number, NaN for bad ones, and infinity for those not sent.

    ``lost`` and ``passed`` name requests that were not answered whole, and bad ones that were not refused; ``memory``
    has (seconds, bytes) of each process.
    """

    rate: float
    seconds: float
    latency: array[float] = field(init=False)
    bad: int = 0
    lost: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.latency = array("d", (math.inf for _ in range(int(self.rate * self.seconds))))

    def good(self, first: float = 0.0, last: float = 1.0) -> list[float]:
        """Ascending latencies of the good requests that were due between two shares (0 to 1) of the time."""
        total = len(self.latency)
        return sorted(one for one in self.latency[int(first * total) : int(last * total)] if not math.isnan(one))

    def p99(self, first: float, last: float) -> float | None:
        """In seconds, of ``good``; None of fewer than 100."""
        return percentile(self.good(first, last), 99)

    def growth(self) -> dict[str, float]:
        """Percent an hour of each process, after the warm-up."""
        return {
            name: percent_per_hour([sample for sample in samples if sample[0] >= WARM_UP * self.seconds])
            for name, samples in self.memory.items()
        }

    def problems(self, growth_percent: Mapping[str, float], slower: float) -> list[str]:
        """What is not as it should be.

        The memory of each process may grow by its ``growth_percent`` an hour, and the p99 of the last sixth be above
        the first's by the share ``slower``.
        """
        found = self.lost + self.passed
        if unsent := sum(map(math.isinf, self.latency)):
            found.append(f"{unsent} requests were not sent")
        if not self.bad:
            found.append("no bad request was sent")
        for name, samples in self.memory.items():
            if (kept := sum(at >= WARM_UP * self.seconds for at, _ in samples)) < SAMPLES:
                found.append(f"memory of {name}: expected {SAMPLES} samples after the warm-up; found {kept}")
            elif (percent := self.growth()[name]) > (limit := growth_percent[name]):
                found.append(f"memory of {name}: expected at most {limit:g} % an hour; found {percent:.2f} %")
        first, last = self.p99(0, 1 / 6), self.p99(5 / 6, 1)
        if first is None or last is None:
            found.append("too few requests for a p99")
        elif last > (1 + slower) * first:
            found.append(f"p99: expected at most {slower:.0%} more than {first:.3f} s; found {last:.3f} s")
        return found


def saturation(send: Send, workers: int, seconds: float) -> float:
    """Replies per second that ``workers`` get, each sending the next request when it has its reply.

    Those of the last three quarters of the time count: before, caches fill, and after it fewer than all are at work.

    Raises ``RuntimeError`` for a reply that is not whole.
    """
    began = time.monotonic()
    begin, end = began + seconds / 4, began + seconds

    def work(worker: int) -> int:
        counted = 0
        for number in itertools.count(worker, workers):
            if wrong := send(number):
                raise RuntimeError(wrong)
            if (now := time.monotonic()) >= end:
                break
            counted += now >= begin
        return counted

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, range(workers))) / (end - begin)


def soak(
    send: Send, send_bad: Send, memory: Callable[[], dict[str, float]], rate: float, seconds: float, workers: int
) -> Soaked:
    """Keeps up ``rate`` requests per second for ``seconds``; of a hundred, BAD_OF_HUNDRED go to ``send_bad``.

    ``memory`` tells the bytes of each process. What ``send`` raises is a loss; what ``memory`` raises ends the run.
    """
    found, lock, over = Soaked(rate, seconds), threading.Lock(), threading.Event()
    started = time.monotonic()

    def one(number: int, due: float) -> None:
        bad = is_bad(number)
        try:
            wrong = (send_bad if bad else send)(number)
        except Exception as error:  # whatever it is, the request is lost, and told with its reason
            wrong = repr(error)
        ended = time.monotonic() - started
        with lock:
            found.bad += bad
            found.latency[number] = math.nan if bad else ended - due
            if wrong:
                (found.passed if bad else found.lost).append(f"{'bad ' * bad}request {number}: {wrong}")

    def watch() -> None:
        try:
            while not over.is_set():
                at = time.monotonic() - started
                for name, size in memory().items():
                    found.memory.setdefault(name, []).append((at, size))
                # Three times as often as a slope needs.
                over.wait(seconds / (3 * SAMPLES))
        finally:
            over.set()

    with ThreadPoolExecutor(1) as watcher, ThreadPoolExecutor(workers) as pool:
        watched = watcher.submit(watch)
        for number in range(len(found.latency)):
            due = number / rate
            if over.wait(max(0.0, due - (time.monotonic() - started))):
                break
            # The pool's queue is its memory: beyond what the workers can do, requests are late, and counted as such.
            pool.submit(one, number, due)
        pool.shutdown()
        over.set()
        watched.result()
    return found
