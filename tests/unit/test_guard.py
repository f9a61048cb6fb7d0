"""The request guard: every bad request is refused with its status, every good one passes untouched."""

from __future__ import annotations

import asyncio
import http.client
import importlib
import io
import json
import random
import socket
import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

import accuracy_cases
import bench_workload
import chat_api
import eval_served
import guard_inputs
import smoke
import wait_ready
from asgi_server import served
from fake_service import Service
from guard_inputs import BAD, CHAT, GOOD, JPEG, PNG, Bad, chat, checker, data_url, drawn, limits, url
from request_guard.check import Checker
from request_guard.images import ImageError, size
from request_guard.limits import Limits, LimitsError, load_limits, load_special_tokens
from request_guard.middleware import Guard, Message, Receive, Scope, Send
from request_guard.refusal import ECHO, Refusal

CHECKER = checker()
#: Bytes and seconds that a check may take beside the body, whatever is in it.
MEMORY, SECONDS = 2**20, 1.0
#: The largest body of the guard that is served.
BODY = 2 * 2**20
WHOLE = (guard_inputs.header(), guard_inputs.PIXELS, guard_inputs.END)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_request_is_refused(bad: Bad) -> None:
    began = time.thread_time()
    with pytest.raises(Refusal) as caught:
        CHECKER.check(bad.path, bad.body)
    assert time.thread_time() - began < SECONDS
    error = json.loads(caught.value.body())["error"]
    assert (error["code"], error["param"]) == (bad.status, bad.param)
    assert "expected " in error["message"]
    assert "; found " in error["message"]
    assert "secret" not in error["message"]
    assert len(caught.value.found) <= ECHO


def test_the_bad_requests_are_many_and_differ() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize(("path", "body"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_a_good_request_passes(path: str, body: bytes) -> None:
    CHECKER.check(path, body)


def test_what_is_refused_is_only_the_fault() -> None:
    """Without the fault, the bad images and fields would pass: no other rule hides theirs."""
    for kind, image in (("png", PNG), ("jpeg", JPEG)):
        CHECKER.check(CHAT, chat(url(data_url(image, kind))))
    CHECKER.check(CHAT, chat(url(data_url(guard_inputs.png(*WHOLE)))))
    CHECKER.check(CHAT, chat(url(data_url(guard_inputs.jpeg_frame(), "jpeg"))))
    CHECKER.check(CHAT, guard_inputs.raw('"temperature": 1e0'))


def test_any_bytes_end_in_a_pass_or_a_refusal() -> None:
    rng = random.Random(5)
    seeds = [body for _, _, body in GOOD if len(body) < 5000] + [bad.body for bad in BAD if len(bad.body) < 5000]
    passed = 0
    for _ in range(20_000):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(body) + 1)
            body[at : at + rng.randrange(4)] = rng.choice(
                [b"", rng.randbytes(2), b'"', b"\\", b"{", b"]", b"\\u0022", b","]
            )
        if (status := verdict(rng.choice(list(CHECKER.routes)), bytes(body))) is None:
            passed += 1
            json.loads(bytes(body))
        assert status in (None, 400, 413, 422)
    assert passed > 100


def verdict(path: str, body: bytes) -> int | None:
    """The status of the refusal, None for a request that passes."""
    try:
        CHECKER.check(path, body)
    except Refusal as refusal:
        return int(json.loads(refusal.body())["error"]["code"])
    return None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_size_is_the_one_that_the_engine_would_take_memory_for(kind: str) -> None:
    """Whatever passes here and opens in Pillow has that size there, and one picture."""
    rng = random.Random(6)
    files = [drawn(kind), drawn(kind, 300, 200), drawn(kind, progressive=True, optimize=True, dpi=(72, 72))]
    agreed = 0
    for _ in range(5_000):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(min(len(data), 700))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            said = size(kind, bytes(data))
        except ImageError:
            continue
        try:
            with Image.open(io.BytesIO(data)) as image:
                assert (image.size, image.format, getattr(image, "n_frames", 1)) == (said, kind, 1)
                agreed += 1
        except (OSError, SyntaxError, ValueError):
            continue
    assert agreed > 500


def test_the_check_takes_little_memory_beside_the_body() -> None:
    image = guard_inputs.png(guard_inputs.header(), guard_inputs.chunk(b"IDAT", bytes(10 * 2**20)), guard_inputs.END)
    for body in (chat(url(data_url(image))), *(bad.body for bad in BAD if len(bad.body) > 2**20)):
        tracemalloc.start()
        verdict(CHAT, body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < len(body) + MEMORY  # base64 decoded is 3/4 of it


def test_fields_can_be_let_through_unchecked_but_not_special_tokens_or_depth() -> None:
    open_checker = checker(unchecked_fields=["tools"])
    open_checker.check(CHAT, chat(tools=[{"type": "function", "function": {"name": "a"}}]))
    deep: Any = "a"
    for _ in range(20):
        deep = [deep]
    for tools in ([{"name": "<|user|>"}], [{"<|user|>": 1}], deep, [data_url(PNG)]):
        with pytest.raises(Refusal):
            open_checker.check(CHAT, chat(tools=tools))
    with pytest.raises(Refusal):
        open_checker.check(CHAT, chat(tool_choice="required"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n": -1}, "n: expected a whole number from 0 up; found -1"),
        ({"n": True}, "n: expected a whole number from 0 up; found True"),
        ({"tokens": "8192"}, "tokens: expected a whole number from 0 up; found '8192'"),
        ({"image": 1}, "not known as a limit: image"),
        ({"unchecked_fields": "tools"}, "expected a list of names"),
    ],
)
def test_limits_that_cannot_be_used_are_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LimitsError, match=complaint):
        limits(**change)


def test_a_missing_limit_is_named() -> None:
    with pytest.raises(LimitsError, match="missing, or not known as a limit: body_bytes"):
        Limits.of({name: 1 for name in Limits.__dataclass_fields__ if name != "body_bytes"})


@pytest.mark.parametrize("content", [None, "", "[]", '{"added_tokens": []}', '{"added_tokens": [{"content": ""}]}'])
def test_a_tokenizer_without_special_tokens_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LimitsError, match=r"tokenizer\.json"):
        load_special_tokens(path)


# --- around an application ----------------------------------------------------------------------------------


@dataclass
class Engine:
    """An application that keeps what it is sent, and answers as the stand-in for the service does."""

    service: Service = field(default_factory=lambda: Service(0))
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["method"] == "POST":
            self.bodies.append(body)
        status, text = self.service.answer(scope["path"], json.loads(body or b"{}")) or (500, "")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text.encode()))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def guarded(engine: Engine) -> Iterator[str]:
    with served(Guard(engine, checker(body_bytes=BODY, body_seconds=1))) as address:
        yield address


def post(address: str, body: Any, path: str = CHAT, **headers: str) -> requests.Response:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return requests.post(address + path, data=body, headers=headers, timeout=10)


def code(response: requests.Response) -> int:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return int(error["code"])


def test_what_our_own_scripts_send_passes(
    guarded: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run for real through the guard, but for the benchmark, whose bodies are sent here."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    engine.service.override["text"] = (200, json.dumps({"usage": {"completion_tokens": 1}}))
    assert wait_ready.generates(guarded, "glm-ocr", 10) == ""
    del engine.service.override["text"]
    config = smoke.Config(guarded, "glm-ocr", 8192, tmp_path / "smoke.json", 3, 1, 0.1, 7, 10)
    assert smoke.run(config)["verdict"] == "PASS"
    case = accuracy_cases.Case("image", "Text Recognition:", Image.new("RGB", (28, 28)))
    arguments = Namespace(base_url=guarded, model_name="glm-ocr", max_tokens=64, top_k=20, timeout=10)
    engine.service.override["image"] = (200, json.dumps({"choices": [{"message": {"content": "a"}}]}))
    with pytest.raises(eval_served.ServiceError, match="no token ids"):  # a 200, of the stand-in
        eval_served.ask(arguments, case)  # type: ignore[arg-type]
    options = {"max_tokens": 128, "ignore_eos": True, "min_tokens": 128}

    def fetch(path: str, body: bytes) -> tuple[int | None, bytes]:
        response = post(guarded, body, path)
        assert response.status_code == 404  # the stand-in's own, which the guard let through
        assert "detail" in response.json()
        return response.status_code, response.content

    bodies = bench_workload.text_workload("glm-ocr", 128, 2, options, 1, fetch).bodies
    bodies += bench_workload.image_workload("glm-ocr", 280, 280, 2, options, 1).bodies
    sent = len(engine.bodies)
    for body in bodies:
        assert post(guarded, body).status_code == 200
    assert engine.bodies[sent:] == bodies
    page = chat_api.chat_request("glm-ocr", '请按下列JSON格式输出图中信息:\n{"a": ""}', data_url(PNG), max_tokens=4096)
    CHECKER.check(CHAT, json.dumps(page).encode())


def test_good_requests_reach_the_engine_byte_for_byte(guarded: str, engine: Engine) -> None:
    engine.service.answer = lambda path, request: (200, "{}")  # type: ignore[method-assign]
    for _, path, body in GOOD:
        for data in (body, iter([body[:7], body[7:]])):  # with a length, and in chunks
            assert post(guarded, data, path).status_code == 200
            assert engine.bodies.pop() == body
    assert engine.bodies == []


def test_bad_requests_do_not_reach_the_engine_and_good_ones_go_on(guarded: str, engine: Engine) -> None:
    for bad in BAD:
        assert code(post(guarded, bad.body, bad.path)) == (413 if len(bad.body) > BODY else bad.status), bad.name
    assert engine.bodies == []
    assert post(guarded, chat()).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "//invocations",
        "/%69nvocations",
        "/v1/../invocations",
        "/inference/v1/generate",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/V1/chat/completions",
        "/scale_elastic_ep",
        "/v1/load_lora_adapter",
    ],
)
def test_a_route_that_cannot_be_checked_is_refused(guarded: str, engine: Engine, path: str) -> None:
    with http_connection(guarded) as connection:  # requests would tidy the path up
        connection.request("POST", path, chat(), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 404
    assert engine.bodies == []


def http_connection(address: str) -> Any:
    return closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=10))


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "post"])
def test_another_method_is_refused(guarded: str, engine: Engine, method: str) -> None:
    with http_connection(guarded) as connection:
        connection.request(method, CHAT, chat(), {"Content-Type": "application/json"})
        assert connection.getresponse().status in (400, 404)  # a method in small letters is the server's to refuse
    assert engine.bodies == []


def test_reading_goes_on(guarded: str) -> None:
    assert requests.get(f"{guarded}/v1/models", timeout=10).json()["data"][0]["id"] == "glm-ocr"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "multipart/form-data; boundary=a"},
        {"Content_Type": ""},
        {"Content_Encoding": "gzip"},
    ],
)
def test_another_kind_of_body_is_refused(guarded: str, engine: Engine, headers: dict[str, str]) -> None:
    assert code(post(guarded, chat(), **headers)) == 415
    assert engine.bodies == []


def test_a_refusal_repeats_little(guarded: str) -> None:
    assert len(post(guarded, chat(), Content_Type="a" * 4000).content) < 500
    assert len(post(guarded, chat(**{"a" * 4000: 1})).content) < 1000  # the names of all fields are in it


def test_a_body_too_large_is_refused_and_the_connection_serves_on(guarded: str, engine: Engine) -> None:
    with requests.Session() as session:
        for body in (bytes(30 * 10**6), repeat(bytes(10**5), 300)):
            reply = session.post(guarded + CHAT, data=body, headers={"Content-Type": "application/json"}, timeout=10)
            assert code(reply) == 413
            assert session.post(guarded + CHAT, json=json.loads(chat()), timeout=10).status_code == 200
    assert len(engine.bodies) == 2


def test_a_body_that_does_not_come_is_not_waited_for(guarded: str, engine: Engine) -> None:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json", "Content-Length: 9"]
    head = "\r\n".join([*lines, "", "{"]).encode()
    with socket.create_connection(urlsplit(guarded).netloc.split(":"), timeout=10) as client:  # type: ignore[arg-type]
        client.sendall(head)
        reply = b"".join(iter(lambda: client.recv(4096), b""))
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"the body within 1 s; found 1 bytes" in reply
    assert engine.bodies == []


# --- by hand: what a server would hide ----------------------------------------------------------------------


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the application was called")


def call(guard: Guard, receive: Callable[[], Message], *, headers: Any = ()) -> list[Message]:
    """What the guard sends for a chat request that comes in these messages."""
    sent: list[Message] = []

    async def receive_one() -> Message:
        return receive()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    asyncio.run(guard(scope, receive_one, send))
    return sent


@pytest.mark.parametrize("length", [b"10", b"-1", b"1" * 5000, b"abc"])
def test_a_body_is_read_to_the_limit_only_whatever_its_length_says(length: bytes) -> None:
    piece, read = bytes(2**16), 0

    def receive() -> Message:
        nonlocal read
        read += len(piece)
        assert read < 2**22, "it reads on"
        return {"type": "http.request", "body": piece, "more_body": True}

    tracemalloc.start()
    sent = call(Guard(never, checker(body_bytes=2**20)), receive, headers=[(b"content-length", length)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sent[0]["status"] == 413
    assert read == 2**20 + len(piece)
    assert peak < 2**20


def test_a_length_beyond_the_limit_is_refused_unread() -> None:
    def receive() -> Message:
        raise AssertionError("read")

    assert call(Guard(never, CHECKER), receive, headers=[(b"content-length", b"30000000")])[0]["status"] == 413


def test_a_client_that_goes_while_it_sends_leaves_nothing() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert call(Guard(never, CHECKER), lambda: messages.pop(0)) == []


def test_a_stream_goes_out_as_it_comes_and_the_disconnect_comes_in() -> None:
    stream: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
        {"type": "http.response.body", "body": b"data: a\n\n", "more_body": True},
        {"type": "http.response.body", "body": b"data: b\n\n", "more_body": False},
    ]
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())
        for message in stream:
            await send(message)
        received.append(await receive())

    body = chat(stream=True)
    messages: list[Message] = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent = call(Guard(app, CHECKER), lambda: messages.pop(0))
    assert all(one is other for one, other in zip(sent, stream, strict=True))
    assert received == [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]


def test_a_websocket_is_closed_and_lifespan_goes_on() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        return {}

    async def send(message: Message) -> None:
        seen.append(message["type"])

    for kind in ("websocket", "lifespan"):
        asyncio.run(Guard(app, CHECKER)({"type": kind}, receive, send))
    assert seen == ["websocket.close", "lifespan"]


def test_the_engine_loads_it_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As vLLM does, from a class that takes the application alone; a wrong file ends the import."""
    path = tmp_path / "limits.json"
    monkeypatch.delitem(sys.modules, "request_guard.engine", raising=False)
    with pytest.raises(LimitsError, match="REQUEST_GUARD_LIMITS: expected the path of a file"):
        importlib.import_module("request_guard.engine")
    monkeypatch.setenv("REQUEST_GUARD_LIMITS", str(path))
    monkeypatch.setenv("REQUEST_GUARD_TOKENIZER", str(guard_inputs.TOKENIZER))
    with pytest.raises(LimitsError, match=r"limits\.json: expected a JSON file"):
        importlib.import_module("request_guard.engine")
    wanted = limits(n=7)
    path.write_text(json.dumps({name: getattr(wanted, name) for name in Limits.__dataclass_fields__}))
    guard = importlib.import_module("request_guard.engine").RequestGuard(never)
    assert guard.checker.limits == load_limits(path) == wanted
    assert isinstance(guard.checker, Checker)
    assert {"<|image|>", "[gMASK]", "<|user|>"} <= set(guard.checker.special_tokens)
