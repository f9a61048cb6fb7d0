"""The same bad requests to a guarded service and to one exposed directly: `make exposure-table` writes the page."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests
from testinfra.host import Host

import lab
from guard_inputs import BAD, Bad, chat
from lab import Play, Played, deploy_guarded
from raw_requests import CHAT, CLOSED, HOST, KEY, RAW, Raw, Told, head, tell
from rendering import PROJECT
from vllm_idle import in_flight

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

SOCKET = "/run/glm-ocr/engine.sock"
RAW_GROUP, KEYLESS, ASKED, ENDS = (
    "Requests that are no HTTP, or not what the service takes",
    "Without a key",
    "What a request asks of the model",
    "What may be the engine's end",
)
#: Seconds that an answer may take; that the engine has to come to rest behind it, before it is restarted.
SECONDS = {RAW_GROUP: 5.0, KEYLESS: 30.0, ASKED: 30.0, ENDS: 30.0}
REST_SECONDS = 30.0
TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)
GENERATE = b'{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 16%s}}'


def post(name: str, path: str, body: bytes, *headers: str) -> Raw:
    given = ("Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close")
    return Raw(name, head(f"POST {path} HTTP/1.1", HOST, *headers, *given) + body.decode("latin-1"), frozenset())


def of(bad: Bad) -> Raw:
    return post(bad.name, bad.path, bad.body, KEY)


def inputs() -> dict[str, list[Raw]]:
    """Each under what it tries; what may be the engine's end comes last."""
    generate = "/inference/v1/generate"
    far = b', "min_tokens": 8, "stop_token_ids": [2147483647]'
    many = [bad for bad in BAD if bad.name.startswith("n=200000")]
    return {
        RAW_GROUP: RAW,
        KEYLESS: [
            post("chat", CHAT, chat()),
            post("/invocations", "/invocations", chat()),
            post(generate, generate, GENERATE % b""),
            post("/tokenize", "/tokenize", b'{"prompt": "1 2"}'),
        ],
        ASKED: [of(bad) for bad in BAD if bad not in many],
        ENDS: [
            *map(of, many),
            post(f"{generate} without a key, min_tokens", generate, GENERATE % b', "min_tokens": 8'),
            post(f"{generate} without a key, min_tokens, a token that does not exist", generate, GENERATE % far),
        ],
    }


@dataclass
class Row:
    """What an input got; ``serves`` is whether the engine came to rest and served others behind it."""

    group: str
    name: str
    front: Told
    direct: Told
    inferred: bool
    serves: bool


def engine_tokens(metrics: str) -> float:
    """The tokens that the engine read and wrote in its life."""
    return sum(float(value) for value in TOKENS.findall(metrics))


def rest(url: str, tokens: float) -> tuple[float, bool]:
    """The engine's tokens, ``tokens`` when it does not tell, and whether nothing is in flight, which is waited for."""
    end = time.monotonic() + REST_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(requests.RequestException):
            metrics = requests.get(f"{url}/metrics", timeout=REST_SECONDS).text
            tokens = engine_tokens(metrics)
            if in_flight(metrics)[0] == 0:
                return tokens, True
        time.sleep(0.1)
    return tokens, False


def serves(url: str) -> bool:
    try:
        return lab.chat(url, "OK", max_tokens=1).status_code == 200
    except requests.RequestException:
        return False


def told(node: Host, key: str, group: str, raw: Raw, until_closed: bool) -> Told:
    address = (node.backend.hostname, 8000)
    return tell(address, raw.sent(f"{address[0]}:8000", key), raw.cut, SECONDS[group], until_closed)


def measured(node: Host, url: str, front: dict[tuple[str, str], Told]) -> Iterator[Row]:
    """Each input to the engine itself, which is restarted when it does not serve any more."""
    for group, raws in inputs().items():
        for raw in raws:
            before, _ = rest(url, 0)
            direct = told(node, secrets.token_hex(24), group, raw, until_closed=False)
            after, rested = rest(url, before)
            row = Row(group, raw.name, front[group, raw.name], direct, after != before, rested and serves(url))
            if not row.serves:
                node.check_output("systemctl reset-failed glm-ocr; systemctl restart glm-ocr")
            yield row


def test_what_the_front_refuses_and_what_gets_through_without_it(
    deployed: Played, play: Play, node: Host, url: str
) -> None:
    key = deploy_guarded(play)
    asked = f"curl --silent --unix-socket {SOCKET} http://localhost/metrics"
    before = engine_tokens(node.check_output(asked))
    front = {
        (group, raw.name): told(node, key, group, raw, until_closed=True)
        for group, raws in inputs().items()
        for raw in raws
    }
    assert engine_tokens(node.check_output(asked)) == before > 0
    answers = {name: got.answers for name, got in front.items()}
    assert {name: got for name, got in answers.items() if got[0] != CLOSED and not 400 <= got[0] < 500} == {}

    direct = play("deploy.yml")
    assert direct.rc == 0, direct.failures
    rows = []
    for row in measured(node, url, front):
        rows.append(row)
        print(row, flush=True)
    if target := os.environ.get("EXPOSURE_PAGE"):
        (PROJECT / target).write_text(page(rows, requests.get(f"{url}/version", timeout=30).json()["version"]))
    # The last one of the list was the end of the engine, or not: the next test finds one that serves.
    assert serves(url)
    # The front was not tried with what would be refused anyway.
    assert any(row.inferred for row in rows)


def cells(told: Told) -> str:
    status = "none" if told.answers[0] == CLOSED else str(told.answers[0])
    return f"{status} | {told.seconds:.2f}"


def page(rows: list[Row], version: str) -> str:
    """docs/exposure.md: what the last run measured, with an engine of that version."""
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    passed = [row for row in rows if row.inferred]
    ended = [row for row in rows if not row.serves]
    lines = [
        "# What gets in, with the front and without",
        "",
        "Written by `make exposure-table`; do not edit. Every request was sent twice, in the lab: to a service with",
        "`glm_ocr_exposure: front` and `vllm_service_guard`, and to one with `direct`, the default, without a key.",
        "An answer is its status and the seconds until it came; none where the connection ended without one, or",
        f"nothing came for {SECONDS[ASKED]:.0f} s, {SECONDS[RAW_GROUP]:.0f} s in the first table.",
        "Inferred: the engine's counts of tokens moved. Ended: behind it the engine did not come to rest within",
        f"{REST_SECONDS:.0f} s, or did not answer a good request, and was restarted. The model is the lab's, on a CPU:",
        f"on an NPU seconds are others. The lab's engine is vLLM {version}; the deployed 0.18.0 lets more through,",
        "inference at `/inference/v1/generate` among it.",
        "",
        f"{today}: of {len(rows)} requests none was served through the front. With `direct` the engine inferred for"
        f" {len(passed)}, and {len(ended)} ended it.",
    ]
    columns = "| request | front | s | direct | s | inferred | engine |"
    for group in dict.fromkeys(row.group for row in rows):
        lines += [
            "",
            f"## {group}",
            "",
            columns,
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row.group == group:
                name = row.name.replace("|", "\\|").replace("<", "&lt;")
                tail = f"{'yes' if row.inferred else 'no'} | {'serves' if row.serves else 'ended'}"
                lines.append(f"| {name} | {cells(row.front)} | {cells(row.direct)} | {tail} |")
    return "\n".join([*lines, ""])
