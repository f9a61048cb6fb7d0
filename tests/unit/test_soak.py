"""The soak's arithmetic, and that a loss, a refusal that did not come, a leak and a slowdown are seen."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

import soak
from soak import Soaked, percent_per_hour

SECONDS = 3600.0


def test_a_leak_is_a_slope_and_a_spike_is_none() -> None:
    flat = [(float(second), 1e8) for second in range(0, 3600, 5)]
    assert percent_per_hour(flat) == 0
    spike = [(at, size * 3 if at == 1000 else size) for at, size in flat]
    assert percent_per_hour(spike) == 0
    leak = [(at, size + 1e6 * at / 3600) for at, size in flat]
    assert percent_per_hour(leak) == pytest.approx(1.0, rel=0.01)
    with pytest.raises(ValueError, match="two samples"):
        percent_per_hour(flat[:1])


def fine() -> Soaked:
    """An hour at one request a second in which nothing is wrong; memory grows only while caches fill."""
    found = Soaked(rate=1, seconds=SECONDS)
    for number in range(len(found.latency)):
        found.bad += soak.is_bad(number)
        found.latency[number] = math.nan if soak.is_bad(number) else 0.1
    found.memory["engine"] = [(float(at), 1e8 + (5e7 if at >= 590 else 0)) for at in range(0, 3600, 10)]
    return found


def lose(found: Soaked) -> None:
    found.lost.append("request 7: 502")


def let_pass(found: Soaked) -> None:
    found.passed.append("bad request 0: 200")


def leak(found: Soaked) -> None:
    found.memory["engine"] = [(at, size * (1 + 0.02 * at / SECONDS)) for at, size in found.memory["engine"]]


def look_away(found: Soaked) -> None:
    del found.memory["engine"][70:]


def slow_down(found: Soaked) -> None:
    for number in range(3000, 3600):
        found.latency[number] *= 1.3


def stop_early(found: Soaked) -> None:
    found.latency[3599] = math.inf


def send_no_bad(found: Soaked) -> None:
    found.bad = 0


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda found: None, []),
        (lose, ["request 7: 502"]),
        (let_pass, ["bad request 0: 200"]),
        (leak, ["memory of engine: expected at most 1 % an hour; found 1.9"]),
        (look_away, ["memory of engine: expected 20 samples"]),
        (slow_down, ["p99: expected at most 20% more than 0.100 s; found 0.130 s"]),
        (stop_early, ["1 requests were not sent"]),
        (send_no_bad, ["no bad request"]),
    ],
)
def test_what_is_not_as_it_should_be_is_told(spoil: Callable[[Soaked], None], told: list[str]) -> None:
    found = fine()
    spoil(found)
    problems = found.problems(growth_percent={"engine": 1.0}, slower=0.2)
    assert len(problems) == len(told), problems
    assert all(problem.startswith(begin) for problem, begin in zip(problems, told, strict=True)), problems


def test_a_p99_needs_a_hundred_requests() -> None:
    assert Soaked(rate=1, seconds=99).p99(0, 1) is None
    assert Soaked(rate=1, seconds=600).problems({}, 0.2)[-1] != "too few requests for a p99"
    assert Soaked(rate=1, seconds=594).problems({}, 0.2)[-1] == "too few requests for a p99"


@pytest.mark.parametrize(
    ("send", "send_bad", "lost", "passed"),
    [
        (lambda number: "", lambda number: "", [], []),
        (lambda number: "502" if number == 7 else "", lambda number: "", ["request 7: 502"], []),
        (lambda number: str(1 // (number - 7))[:0], lambda number: "", ["request 7: ZeroDivisionError"], []),
        (lambda number: "", lambda number: "200", [], ["bad request 0: 200", "bad request 100: 200"]),
    ],
)
def test_every_request_is_accounted_for(
    send: Callable[[int], str], send_bad: Callable[[int], str], lost: list[str], passed: list[str]
) -> None:
    found = soak.soak(send, send_bad, lambda: {"client": 1.0}, rate=400, seconds=0.5, workers=4)
    assert (len(found.good()), found.bad) == (198, 2)
    assert max(found.good()) < math.inf
    assert [line.partition("(")[0] for line in found.lost] == lost
    assert found.passed == passed
    assert found.memory["client"]


def test_memory_that_cannot_be_told_ends_the_run() -> None:
    def memory() -> dict[str, float]:
        raise KeyError("4711")

    with pytest.raises(KeyError, match="4711"):
        soak.soak(lambda number: "", lambda number: "", memory, rate=1, seconds=600, workers=1)


def test_a_stall_counts_from_when_a_request_was_due() -> None:
    stalled, lock = threading.Event(), threading.Lock()

    def send(number: int) -> str:
        with lock:
            if number == 10:
                stalled.wait(0.3)
        return ""

    found = soak.soak(send, lambda number: "", lambda: {}, rate=100, seconds=0.5, workers=1)
    late = found.latency[11:]
    assert max(late) > 0.2
    assert sum(latency > 0.05 for latency in late) > 10


def test_saturation_counts_whole_replies() -> None:
    turn = threading.Semaphore(1)

    def send(number: int) -> str:
        """One at a time, a hundredth of a second each: whatever the workers, at most a hundred a second."""
        with turn:
            threading.Event().wait(0.01)
        return ""

    assert 20 < soak.saturation(send, 4, 0.4) <= 105
    with pytest.raises(RuntimeError, match="502"):
        soak.saturation(lambda number: "502", 2, 0.05)
