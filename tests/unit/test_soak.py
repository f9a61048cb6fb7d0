"""The soak's arithmetic, and that a loss, a refusal that did not come and a leak are seen."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import soak
from soak import Soaked, percent_per_hour


def test_a_leak_is_a_slope_and_a_spike_is_none() -> None:
    flat = [(float(second), 1e8) for second in range(0, 3600, 5)]
    assert percent_per_hour(flat) == 0
    spike = [(at, size * 3 if at == 1000 else size) for at, size in flat]
    assert percent_per_hour(spike) == 0
    leak = [(at, size + 1e6 * at / 3600) for at, size in flat]
    assert percent_per_hour(leak) == pytest.approx(1.0, rel=0.01)
    with pytest.raises(ValueError, match="two samples"):
        percent_per_hour(flat[:1])


def test_what_slows_down_shows_in_the_last_part() -> None:
    found = Soaked(rate=1, seconds=600)
    assert found.p99(0, 1) is None
    for second in range(600):
        found.due.append(second)
        found.latency.append(0.1 if second < 500 else 0.2)
    assert (found.p99(0, 1 / 6), found.p99(5 / 6, 1)) == (0.1, 0.2)


def test_growth_leaves_out_the_time_in_which_caches_fill() -> None:
    found = Soaked(rate=1, seconds=600)
    found.memory["engine"] = [(float(at), 1e8 + (5e7 if at >= 90 else 0)) for at in range(0, 600, 5)]
    assert found.growth() == {"engine": 0.0}


@pytest.mark.parametrize(
    ("send", "send_bad", "lost", "passed"),
    [
        (lambda number: True, lambda number: True, 0, 0),
        (lambda number: number != 7, lambda number: True, 1, 0),
        (lambda number: 1 // (number - 7) is not None, lambda number: True, 1, 0),
        (lambda number: True, lambda number: False, 0, 2),
    ],
)
def test_every_request_is_accounted_for(
    send: Callable[[int], bool], send_bad: Callable[[int], bool], lost: int, passed: int
) -> None:
    found = soak.soak(send, send_bad, lambda: {"client": 1.0}, rate=400, seconds=0.5, workers=4)
    assert (len(found.due), found.bad) == (198, 2)
    assert (len(found.lost), len(found.passed)) == (lost, passed)
    assert found.memory["client"]


def test_a_stall_counts_from_when_a_request_was_due() -> None:
    stalled, lock = threading.Event(), threading.Lock()

    def send(number: int) -> bool:
        with lock:
            if number == 10:
                stalled.wait(0.3)
        return True

    found = soak.soak(send, lambda number: True, lambda: {}, rate=100, seconds=0.5, workers=1)
    late = [latency for due, latency in zip(found.due, found.latency, strict=True) if due > 0.1]
    assert max(late) > 0.2
    assert sum(latency > 0.05 for latency in late) > 10


def test_saturation_counts_whole_replies() -> None:
    assert soak.saturation(lambda number: False, 2, 0.05) == 0
    assert soak.saturation(lambda number: True, 2, 0.05) > 0
