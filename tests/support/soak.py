"""Load at a constant rate for a long time, bad requests among it, and what it shows: losses, latency, memory.

The load is open: a request is due at its time whatever the replies do, and its latency counts from then. What the
client keeps of a request is two numbers, so that its own memory tells whether it leaks.
"""

from __future__ import annotations

import statistics
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations

from bench_stats import percentile

#: Of a hundred requests, how many are bad.
BAD_OF_HUNDRED = 1
#: Seconds between two looks at the memory.
SAMPLE_SECONDS = 5.0

Send = Callable[[int], bool]


def percent_per_hour(samples: Sequence[tuple[float, float]]) -> float:
    """How fast (seconds, bytes) grow, in percent of their median an hour.

    By Theil and Sen's slope, the median of all slopes between two samples, which a single step or spike does not move.

    Raises ``ValueError`` for fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("a slope needs two samples")
    step = max(1, len(samples) // 200)
    thinned = samples[::step]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(thinned, 2) if t > s]
    return 100 * 3600 * statistics.median(slopes) / statistics.median(value for _, value in samples)


@dataclass
class Soaked:
    """``due`` (since the start) and ``latency`` of good requests, in seconds.

    ``lost`` and ``passed`` name requests that were not answered whole, and bad ones that were not refused; ``memory``
    has (seconds, bytes) of each process.
    """

    rate: float
    seconds: float
    due: array[float] = field(default_factory=lambda: array("d"))
    latency: array[float] = field(default_factory=lambda: array("d"))
    bad: int = 0
    lost: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def p99(self, first: float, last: float) -> float | None:
        """Of requests due between two shares (0 to 1) of the time, in seconds; None of fewer than 100."""
        begin, end = first * self.seconds, last * self.seconds
        return percentile(sorted(s for t, s in zip(self.due, self.latency, strict=True) if begin <= t < end), 99)

    def growth(self) -> dict[str, float]:
        """Percent an hour of each process, without the first sixth, in which caches fill."""
        return {
            name: percent_per_hour([sample for sample in samples if sample[0] >= self.seconds / 6])
            for name, samples in self.memory.items()
        }


def saturation(send: Send, workers: int, seconds: float) -> float:
    """Requests per second that ``workers`` get answered, each sending the next when it has its reply."""
    end, counts = time.monotonic() + seconds, [0] * workers

    def work(worker: int) -> None:
        while time.monotonic() < end:
            counts[worker] += send(counts[worker] * workers + worker)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    return sum(counts) / seconds


def soak(
    send: Send, send_bad: Send, memory: Callable[[], dict[str, float]], rate: float, seconds: float, workers: int
) -> Soaked:
    """Keeps up ``rate`` requests per second for ``seconds``; of a hundred, BAD_OF_HUNDRED go to ``send_bad``.

    ``send`` says whether the reply was whole, ``send_bad`` whether it was the refusal that was due; what they raise
    counts as no. ``memory`` tells the bytes of each process.
    """
    found, lock, over = Soaked(rate, seconds), threading.Lock(), threading.Event()
    started = time.monotonic()

    def one(number: int, due: float) -> None:
        is_bad = number % 100 < BAD_OF_HUNDRED
        try:
            kept, why = (send_bad if is_bad else send)(number), ""
        except Exception as error:  # whatever it is, the request is lost, and told with its reason
            kept, why = False, f": {error!r}"
        ended = time.monotonic() - started
        with lock:
            if is_bad:
                found.bad += 1
                found.passed += [] if kept else [f"bad request {number}{why}"]
            else:
                found.lost += [] if kept else [f"request {number}{why}"]
                found.due.append(due)
                found.latency.append(ended - due)

    def watch() -> None:
        while not over.is_set():
            at = time.monotonic() - started
            for name, size in memory().items():
                found.memory.setdefault(name, []).append((at, size))
            over.wait(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(workers) as pool:
        for number in range(int(rate * seconds)):
            due = number / rate
            if (early := due - (time.monotonic() - started)) > 0:
                over.wait(early)
            # The pool's queue is its memory: beyond what the workers can do, requests are late, and counted as such.
            pool.submit(one, number, due)
    over.set()
    watcher.join()
    return found
