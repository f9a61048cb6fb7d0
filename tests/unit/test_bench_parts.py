"""The benchmark's parts on known input: replies cut anywhere, percentiles, schedules, metrics."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest

import bench_load
import bench_server
import bench_stats
import bench_workload
from bench_client import Exchange, Run
from bench_reply import CONTENT_CHUNK, ProtocolError, Reply
from scheduled_mock import event, framed

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = (
    HEAD
    + event({"role": "assistant", "content": ""}, usage=0)
    + event({"content": "文字"}, usage=1)
    + event({"content": 'a "quote" \\ {x} \n'}, usage=3)
    + event({"reasoning_content": "hm"}, usage=4)
    + event({"content": "0\r\n\r\n"}, usage=6)
    + event({}, "length", usage=6)
    + framed(json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}}))
    + framed("[DONE]")
    + b"0\r\n\r\n"
)


def said(reply: Reply) -> tuple[Any, ...]:
    """What does not depend on how the bytes were cut."""
    return (
        reply.complete,
        reply.status,
        reply.chunks,
        reply.tokens,
        reply.prompt_tokens,
        reply.finish_reason,
        reply.error,
    )


def fed(*reads: bytes) -> Reply:
    """The reply after these reads, at times 1, 2, 3..."""
    reply = Reply()
    reply.feed_all(list(reads), [float(time) for time in range(1, len(reads) + 1)])
    return reply


def test_every_cut_gives_the_same_reply() -> None:
    whole = fed(STREAM)
    assert said(whole) == (True, 200, 4, 6, 9, "length", None)
    assert list(whole.gap_tokens) == [2, 1, 2]
    for at in range(1, len(STREAM)):
        assert said(fed(STREAM[:at], STREAM[at:])) == said(whole), at
    for size in (1, 3, 7):
        pieces = fed(*(STREAM[at : at + size] for at in range(0, len(STREAM), size)))
        assert said(pieces) == said(whole)
        assert list(pieces.gap_tokens) == [2, 1, 2]


def test_event_has_the_time_of_the_read_that_completed_it() -> None:
    first = event({"content": "x"})
    reply = fed(HEAD, first[:9], first[9:], event({"content": "y"}), event({"content": "z"}))
    assert (reply.first, reply.last, list(reply.gaps)) == (3, 5, [1, 1])


@pytest.mark.parametrize(("per_chunk", "usage", "tpot", "itl"), [(1, True, 2, 2), (4, True, 2, 2), (1, False, 2, 2)])
def test_definitions_to_the_digit(per_chunk: int, usage: bool, tpot: float, itl: float) -> None:
    """Sent at 10, role chunk and first content at 15, then a chunk every 2 s a token: TTFT 5, TPOT 2."""
    exchange = Exchange(0, 9.0)
    exchange.sent = 10.0
    exchange.reply.feed(HEAD + event({"role": "assistant", "content": ""}, usage=0 if usage else None), 15.0)
    for done in range(per_chunk, 17, per_chunk):
        chunk = event({"content": "x"}, usage=done if usage else None)
        exchange.reply.feed(chunk, 15.0 + 2.0 * (done - per_chunk))
    exchange.reply.feed(event({}, "length") + framed("[DONE]") + b"0\r\n\r\n", 99.0)
    exchange.judge()
    last = 15.0 + 2.0 * (16 - per_chunk)
    assert exchange.error is None
    assert bench_stats.times_of(exchange) == {
        "ttft": 5, "ttft_sched": 6, "tpot": tpot, "e2e": last - 10, "e2e_sched": last - 9
    }  # fmt: skip
    assert list(bench_stats.token_gaps(exchange)) == [itl] * (16 - per_chunk)


def load_of(seconds: list[float], concurrency: int) -> Run:
    """A closed loop whose requests take these times, each on the place that is free first."""
    free, run = [0.0] * concurrency, Run(0.0)
    for number, taken in enumerate(seconds):
        place = free.index(min(free))
        exchange = Exchange(number, free[place])
        exchange.sent = free[place]
        exchange.done = free[place] = free[place] + taken
        run.exchanges.append(exchange)
    return run


def test_a_short_disturbance_does_not_move_the_median_of_blocks() -> None:
    """100 requests of 1 s, two at a time: 2 a second; then with ten of them stalled, and with all of them slower."""

    def blocks(seconds: list[float], concurrency: int = 2) -> dict[str, Any]:
        run = load_of(seconds, concurrency)
        return dict(bench_stats.blocks(run.exchanges, run, concurrency) or {})

    quiet = blocks([1.0] * 100)
    assert quiet == {"requests": 8, "requests_per_second": [2.0] * 10, "median_requests_per_second": 2.0}
    stalled = blocks([1.0] * 40 + [9.0] * 10 + [1.0] * 50)
    assert stalled["median_requests_per_second"] == 2.0
    assert min(stalled["requests_per_second"]) < 0.5
    assert blocks([1.25] * 100)["median_requests_per_second"] == 1.6
    assert blocks([1.0] * 40) == {}, "too short"
    assert blocks([1.0] * 100, 100) == {}, "nothing but run-in"


def stream(*events: bytes) -> list[bytes]:
    """A stream with these events between its head and its end, one read each."""
    first = HEAD + event({"role": "assistant", "content": ""}, usage=0)
    last = event({}, "length") + framed('{"choices": [], "usage": {"completion_tokens": 99}}') + framed("[DONE]")
    return [first, *events, last + b"0\r\n\r\n"]


@pytest.mark.parametrize("usage", [True, False])
def test_short_cuts_say_what_the_general_path_says(usage: bool) -> None:
    """Any mixture of common and odd events, in reads of any number of them, against bytes fed one by one."""
    rng = random.Random(2)
    texts = ["token ", "文字", '"', "\\", '"}', "{}", "", "\n\n\r\n", '{"content":"', "x" * 1500]
    for _ in range(60):
        events, done = [], 0
        for _ in range(rng.randint(1, 30)):
            text = "token " if rng.random() < 0.8 else rng.choice(texts)
            done += 1 if rng.random() < 0.9 else rng.choice([0, 4])
            delta = {"reasoning": text} if rng.random() < 0.05 else {"content": text}
            events.append(event(delta, usage=done if usage and rng.random() < 0.98 else None))
        reads = stream(*events)
        cuts = sorted(rng.sample(range(len(reads)), min(rng.choice([0, 3, 30]), len(reads))))
        reads = [b"".join(reads[i:j]) for i, j in pairwise([0, *cuts, len(reads)]) if i < j]
        slow = Reply()
        for time, read in enumerate(reads, 1):
            for at in range(len(read)):
                slow.feed(read[at : at + 1], time)
        quick = fed(*reads)
        assert said(quick) == said(slow)
        for name in ("first", "first_tokens", "last", "tokens_at_last", "gaps", "gap_tokens"):
            assert getattr(quick, name) == getattr(slow, name), name


@pytest.mark.parametrize("burst", [True, False])
def test_short_cut_is_taken(monkeypatch: pytest.MonkeyPatch, burst: bool) -> None:
    """Else the comparison with the peers is of another parser."""
    reads = stream(*(event({"content": "token "}, usage=number) for number in range(1, 60)))
    looked_at = []
    content = Reply._content

    def counting(self: Reply, time: float, counted: int | None) -> None:
        looked_at.append(counted)
        content(self, time, counted)

    monkeypatch.setattr(Reply, "_content", counting)
    assert fed(*([b"".join(reads)] if burst else reads)).chunks == 59
    assert len(looked_at) == 1, "the first; the others were counted"


def test_common_shape_takes_the_short_path() -> None:
    """Else the benchmark of section 1 is of another parser."""
    for text in ("token ", "文字", 'a "quote" \\', "{}"):
        for usage in (None, 3):
            assert CONTENT_CHUNK.fullmatch(event({"content": text}, usage=usage))
    for other in (
        event({"content": ""}),
        event({"content": "x"}, "stop"),
        event({"role": "assistant", "content": "x"}),
    ):
        assert not CONTENT_CHUNK.match(other)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        HEAD + b"zz\r\n",
        HEAD + b"1\r\nabc\r\n",
        HEAD + framed("{"),
        HEAD + framed("[]"),
        HEAD + framed('{"choices": 5}'),
        HEAD + framed('{"choices": [], "usage": {"completion_tokens": "x"}}'),
        STREAM + b"x",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"x" * 70000,
    ],
)
def test_what_is_no_reply_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        fed(data)


def test_line_ends_of_a_proxy_and_comments() -> None:
    body = b': ping\r\n\r\ndata: {"choices": [{"delta": {"content": "x"}}]}\r\n\r\ndata: [DONE]\r\n\r\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    for at in range(len(body)):
        assert said(fed(head + body[:at], body[at:]))[:3] == (True, 200, 1)


def test_percentiles_need_their_samples() -> None:
    values = [float(value) for value in range(1, 101)]
    assert bench_stats.percentile(values, 99) == pytest.approx(99.01)
    assert bench_stats.percentile(values[:99], 99) is None
    assert bench_stats.percentile(values[:10], 90) == pytest.approx(9.1)
    assert bench_stats.percentile(values[:9], 90) is None
    assert bench_stats.percentile([], 50) is None
    assert bench_stats.percentile(values[:98], 99, failed=2) is None
    assert bench_stats.percentile(values[:98], 50, failed=2) == pytest.approx(50.5)


def test_distribution_without_samples_is_null() -> None:
    figures = bench_stats.distribution([], failed=3)
    assert (figures.pop("n"), figures.pop("failed")) == (0, 3)
    assert set(figures.values()) == {None}
    assert bench_stats.distribution([0.0, 0.0])["std"] == 0


def test_bootstrap_interval_holds_the_mean() -> None:
    rng = random.Random(1)
    values = [rng.gauss(10, 2) for _ in range(400)]
    interval = bench_stats.bootstrap_mean(values)
    assert interval is not None
    # 1.96 standard errors of 0.1 on either side.
    assert interval[1] - interval[0] == pytest.approx(0.39, rel=0.25)
    assert sum(interval) / 2 == pytest.approx(fmean(values), abs=0.02)
    assert bench_stats.bootstrap_mean([1.0]) is None


def run_of(*spans: tuple[float, float]) -> Run:
    """Requests that were under way from ... to."""
    run = Run(started=0.0)
    for index, (sent, done) in enumerate(spans):
        exchange = Exchange(index, sent)
        exchange.sent, exchange.done = sent, done
        run.exchanges.append(exchange)
    return run


def test_inflight_peak_is_exact() -> None:
    assert bench_stats.inflight_peak(run_of((0, 1), (1, 2), (2, 3)).exchanges) == 1, "one ends as the next begins"
    assert bench_stats.inflight_peak(run_of((0, 3), (1, 2), (1.5, 4)).exchanges) == 3


def test_little_s_law_sees_a_lost_request() -> None:
    run = run_of((0, 2), (0, 2), (2, 4))
    run.inflight_area = 6.0
    assert bench_stats.littles_law(run) == 0
    run.exchanges.pop()
    assert bench_stats.littles_law(run) == pytest.approx(1 / 3, abs=1e-6)


def test_gap_without_token_adds_to_the_next() -> None:
    exchange = Exchange(0, 0.0)
    exchange.reply.gaps.extend([1.0, 2.0, 4.0])
    exchange.reply.gap_tokens.extend([1, 0, 3])
    assert list(bench_stats.token_gaps(exchange)) == [1.0, 2.0, 2.0, 2.0]


def test_arrivals() -> None:
    assert bench_load.offsets(4, 2.0, "constant", 0) == [0, 0.5, 1.0, 1.5]
    poisson = bench_load.offsets(4000, 20.0, "poisson", 0)
    assert poisson[-1] == pytest.approx(200, rel=0.05)
    gaps = [later - earlier for earlier, later in pairwise(poisson)]
    # Of an exponential distribution the standard deviation is the mean.
    assert bench_stats.distribution(gaps)["std"] == pytest.approx(50, rel=0.05)
    assert poisson == bench_load.offsets(4000, 20.0, "poisson", 0) != bench_load.offsets(4000, 20.0, "poisson", 1)


def test_saturation_is_where_more_buys_nothing() -> None:
    assert bench_load.saturation([(1, 10.0), (2, 19.0), (4, 20.0), (8, 19.0)]) == 2
    assert bench_load.saturation([(1, 10.0), (2, 20.0)]) is None, "still rising"
    assert bench_load.saturation([(1, 10.0), (2, None)]) is None
    assert bench_load.saturation([]) is None


def test_metrics_of_a_restarted_server_are_not_negative() -> None:
    before = bench_server.parse(
        'vllm:generation_tokens_total{engine="0"} 50.0\nvllm:generation_tokens_total{engine="1"} 5.0\n'
    )
    after = bench_server.parse('vllm:generation_tokens_total{engine="0"} 20.0\n')
    assert before == {"generation_tokens_total": 55.0}
    found = bench_server.comparison(before, after)
    assert found is not None
    assert found["added"]["generation_tokens_total"] is None
    assert bench_server.parse("<html>") is None
    assert bench_server.comparison(None, after) is None


@pytest.mark.parametrize("per_word", [1, 2, 3])
def test_prompt_length_is_found_when_there_is_one(per_word: int) -> None:
    words = [str(number % 10) for number in range(1000)]
    text, _ = bench_workload.fit(words, 7 + per_word * 40, 128, lambda text: 7 + per_word * len(text.split()))
    assert text is not None
    assert len(text.split()) == 40
    assert bench_workload.fit(words, 5, 128, lambda text: 7 + len(text.split()))[0] is None
