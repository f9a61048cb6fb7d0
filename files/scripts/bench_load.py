"""When requests are due, and which concurrency saturates a service."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

SATURATED = 0.95  # of the highest throughput seen: more concurrency then buys under 5 %


def offsets(count: int, rate: float, distribution: str, seed: int) -> list[float]:
    """Seconds after the start at which each of ``count`` requests is due, ``rate`` per second on average.

    ``constant``: one every 1/rate. ``poisson``: independent exponential gaps of mean 1/rate. The first is due at 0.
    """
    if distribution == "constant":
        return [index / rate for index in range(count)]
    rng = random.Random(seed)
    return [0.0, *accumulate(rng.expovariate(rate) for _ in range(count - 1))]


def saturation(levels: Sequence[tuple[int, float | None]]) -> int | None:
    """The smallest concurrency that reaches 95 % of the highest throughput of ``(concurrency, throughput)`` levels.

    None when only the last level does (throughput still rises where the sweep ends), or nothing was measured.
    """
    measured = [(concurrency, throughput) for concurrency, throughput in levels if throughput]
    if not measured:
        return None
    limit = SATURATED * max(throughput for _, throughput in measured)
    first = next(concurrency for concurrency, throughput in measured if throughput >= limit)
    return first if first != measured[-1][0] else None
