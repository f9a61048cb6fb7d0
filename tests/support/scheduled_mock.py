"""A chat completion server whose replies follow a known schedule, and which notes when it really sent them.

The oracle of the benchmark's tests: what it measured is compared with ``ScheduledMock.log``. The peers' comparison
has a faster one in C, ``tests/bench_peers/mock.c``.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

METRICS = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
vllm:num_requests_running{{engine="0",model_name="glm-ocr"}} 0.0
vllm:generation_tokens_total{{engine="0",model_name="glm-ocr"}} {tokens}.0
vllm:request_success_total{{engine="0",finished_reason="length",model_name="glm-ocr"}} {requests}.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="glm-ocr"}} {requests}.0
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="glm-ocr"}} {seconds}
vllm:time_to_first_token_seconds_count{{engine="0",model_name="glm-ocr"}} {requests}.0
"""


@dataclass
class Sent:
    """One reply as it was sent; times are ``time.perf_counter()`` seconds, ``writes`` of the content events."""

    read_at: float
    tokens: int
    writes: list[float] = field(default_factory=list)


@dataclass
class ScheduledMock:
    """The schedule, and what became of it.

    ``faults[i]`` replaces reply ``i`` (from 0): ``refuse`` (closed unanswered), ``cut`` (closed in the middle),
    ``hang`` (never ends), ``abort`` (finish_reason abort), ``empty``, ``error`` (an error event), ``json`` (no
    stream), or an HTTP status. ``fault`` is that of every reply ``faults`` does not name.
    """

    ttft: float = 0.0
    itl: float = 0.0
    tokens: int | None = None  # None: the request's max_tokens
    tokens_per_chunk: int = 1
    text: str = "字"
    fragment: int | None = None  # bytes per write
    chunk_usage: bool = True  # honour continuous_usage_stats
    usage: bool = True
    close_after_reply: bool = False
    plain: bool = False  # a request for no stream is answered at once with ``text``
    words: bool = True  # /tokenize answers: one token a word and 10 of the template
    stall: tuple[float, float] | None = None  # from, to: seconds after the first request without a write
    fault: str | int | None = None
    faults: dict[int, str | int] = field(default_factory=dict)
    url: str = ""
    log: list[Sent] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head.split("\r\n"))}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head.split()[1]
        if path != "/v1/chat/completions":
            status, answer = self._answer(path, body)
            writer.write(plain(status, answer))
            await writer.drain()
            return True
        index, request = len(self.requests), json.loads(body)
        self.requests.append(request)
        self.keys.append(headers.get("authorization"))
        fault = self.faults.get(index, self.fault)
        if isinstance(fault, int):
            writer.write(plain(fault, json.dumps({"error": {"message": f"status {fault}"}})))
            await writer.drain()
            return True
        if fault == "json":
            writer.write(plain(200, "{}"))
            await writer.drain()
            return True
        if self.plain and not request.get("stream"):
            message = {"message": {"content": self.text}, "finish_reason": "stop"}
            writer.write(plain(200, json.dumps({"choices": [message]})))
            await writer.drain()
            return True
        return fault != "refuse" and await self._stream(request, fault, reader, writer)

    def _answer(self, path: str, body: bytes) -> tuple[int, str]:
        done = [sent for sent in self.log if sent.writes]
        seconds = sum(sent.writes[0] - sent.read_at for sent in done)
        if path == "/metrics":
            tokens = sum(sent.tokens for sent in done)
            return 200, METRICS.format(tokens=tokens, requests=len(done), seconds=seconds)
        if path == "/tokenize" and self.words:
            return 200, json.dumps({"count": 10 + len(json.loads(body)["messages"][0]["content"].split())})
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "glm-ocr", "max_model_len": 8192}]})
        return (200, json.dumps({"version": "0.18.0"})) if path == "/version" else (404, "{}")

    async def _stream(
        self, request: dict[str, Any], fault: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        sent = Sent(time.perf_counter(), self.tokens or request["max_tokens"])
        self.log.append(sent)
        per_chunk = self.chunk_usage and request["stream_options"].get("continuous_usage_stats")
        connection = "close" if self.close_after_reply else "keep-alive"
        head = (
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            f"connection: {connection}\r\ntransfer-encoding: chunked\r\n\r\n"
        ).encode()
        out = head + event({"role": "assistant", "content": ""}, usage=0 if per_chunk else None)
        done = 0
        while done < sent.tokens and fault != "empty":
            due = sent.read_at + self.ttft + (done // self.tokens_per_chunk) * self.itl
            if self.stall and self.stall[0] <= (time.perf_counter() - self.log[0].read_at) < self.stall[1]:
                due = max(due, self.log[0].read_at + self.stall[1])
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            step = min(self.tokens_per_chunk, sent.tokens - done)
            done += step
            out += event({"content": self.text * step}, usage=done if per_chunk else None)
            sent.writes.append(time.perf_counter())
            await self._write(writer, out)
            out = b""
            if fault == "cut":
                return False
            if fault == "hang":
                await reader.read(1)
                return False
        reason = "abort" if fault == "abort" else "length"
        if fault == "error":
            out += framed('{"error": {"message": "engine died", "code": 500}}')
        out += event({}, reason, usage=done if per_chunk else None)
        if self.usage:
            out += framed(json.dumps({"choices": [], "usage": {"prompt_tokens": 128, "completion_tokens": done}}))
        await self._write(writer, out + framed("[DONE]") + b"0\r\n\r\n")
        return not self.close_after_reply

    async def _write(self, writer: asyncio.StreamWriter, out: bytes) -> None:
        size = self.fragment or len(out)
        for at in range(0, len(out), size):
            writer.write(out[at : at + size])
            await writer.drain()
            if self.fragment:
                await asyncio.sleep(0)


def plain(status: int, body: str) -> bytes:
    """A reply that is no stream."""
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    )


def event(delta: dict[str, str], reason: str | None = None, *, usage: int | None = None) -> bytes:
    """A chunk of a chat completion as vLLM writes it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    chunk: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "glm-ocr"}
    chunk["choices"] = [choice]
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 128, "total_tokens": 128 + usage, "completion_tokens": usage}
    return framed(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))


def framed(data: str) -> bytes:
    """One server-sent event in one HTTP chunk."""
    body = f"data: {data}\n\n".encode()
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


@contextmanager
def served(mock: ScheduledMock) -> Iterator[ScheduledMock]:
    """The mock, listening on a free loopback port in a thread of its own."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(mock.serve, "127.0.0.1", 0)
        mock.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"
        started.set()
        await stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    started.wait()
    try:
        yield mock
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
