"""The load generator: many streaming requests over plain HTTP, kept-alive connections, one thread.

An epoll loop of its own, standard library only. What it does while requests are under way is read, stamp and send;
replies are parsed when no socket is ready (or when too much waits), so that parsing one does not delay the stamp of
another. Linux only. Times are ``time.perf_counter()``, taken right after the read.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from api_key import api_key
from bench_reply import ProtocolError, Reply

READ_BYTES = 65536
BACKLOG_BYTES = 16 << 20  # of replies waiting to be parsed
IDLE_SECONDS = 2.0  # then a connection is replaced: uvicorn closes it after 5, and a request must not race that
TICK_SECONDS = 0.2  # how often time limits and progress are looked at, at least
LAG_SAMPLE_SECONDS = 0.005
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"

clock = time.perf_counter


class TargetError(Exception):
    """A URL that cannot be measured; the text says why and what to do."""


@dataclass(frozen=True)
class Target:
    """Where requests go: plain HTTP, one resolved address."""

    host: str
    path: str
    family: int
    address: tuple[str, int]

    @property
    def root(self) -> str:
        """The service without a path, for people."""
        return f"http://{self.host}"


def connect(url: str) -> tuple[Target, socket.socket]:
    """The target of a chat-completions URL, at the first of its addresses that accepts a connection, and that one.

    Raises ``TargetError`` for a URL that is not plain HTTP, and when nothing listens.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise TargetError(f"--url {url!r} is no URL ({error})") from error
    if parts.scheme != "http" or not host:
        raise TargetError(
            f"--url {url!r} is not plain http; measure the service itself, such as http://localhost:8000/v1/chat/completions"
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii() or not path.isprintable() or " " in path:
        raise TargetError(f"--url {url!r} has characters that must be percent-encoded")
    causes = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TargetError(f"no address for {host} ({error})") from error
    for family, _, _, _, address in found:
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.settimeout(10)
        try:
            opened.connect(address)
        except OSError as error:
            opened.close()
            causes.append(f"{address[0]}: {error}")
        else:
            target = Target(parts.netloc.rpartition("@")[2], path, family, (str(address[0]), int(address[1])))
            return target, opened
    raise TargetError(f"no connection to {url} ({'; '.join(causes)})")


def encode(target: Target, body: bytes | None, path: str | None = None) -> bytes:
    """A whole request, ready to be sent as often as wanted: POST with a JSON ``body``, GET without.

    The key of a guarded service is taken from the environment, see ``api_key.py``.
    """
    lines = [f"{'GET' if body is None else 'POST'} {path or target.path} HTTP/1.1", f"Host: {target.host}"]
    if key := api_key():
        lines.append(f"Authorization: Bearer {key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Exchange:
    """One request and what came back.

    ``scheduled`` is when it should have been sent: its place in the schedule, or in a closed loop the moment a slot
    was free. ``error`` is None for a success, else one of the kinds in ``judge`` or ``fail``; ``detail`` says more.
    """

    __slots__ = ("detail", "done", "error", "index", "reads", "reply", "scheduled", "sent", "stamps")

    def __init__(self, index: int, scheduled: float) -> None:
        self.index = index
        self.scheduled = scheduled
        self.sent: float | None = None
        self.done: float | None = None
        self.error: str | None = None
        self.detail = ""
        self.reply = Reply()
        self.reads: list[bytes] = []
        self.stamps: list[float] = []

    def parse(self) -> None:
        """Feed what was read so far.  Raises ``ProtocolError``."""
        reads, stamps = self.reads, self.stamps
        self.reads, self.stamps = [], []
        self.reply.feed_all(reads, stamps)

    def judge(self) -> None:
        """Decide whether a complete stream is a success: anything an OCR user would not accept is none."""
        reply = self.reply
        if reply.status != 200:
            self.error = f"http_{reply.status}"
        elif not reply.stream:
            self.error = "not_a_stream"
        elif reply.error is not None:
            self.error, self.detail = "server_error", reply.error
        elif reply.finish_reason is None:
            self.error, self.detail = "incomplete", "the stream ended without a finish_reason"
        elif reply.finish_reason not in ("stop", "length", "tool_calls"):
            # A server that stops answers 200 with finish_reason abort and half a text.
            self.error, self.detail = "aborted", f"finish_reason is {reply.finish_reason}"
        elif reply.first is None:
            self.error, self.detail = "empty", "the stream had no text"

    def explain(self) -> str:
        """What is known of a failure: ``detail``, else the server's own words."""
        if self.detail or not self.error:
            return self.detail
        from chat_api import server_message  # requests takes 0.1 s to load, and only a failure needs it

        return server_message(self.reply.body.decode("utf-8", "replace"))


class _Connection:
    __slots__ = ("connecting", "exchange", "fd", "idle_since", "out", "recv", "refused", "sock", "streaming", "watched")

    def __init__(self, target: Target, opened: socket.socket | None = None) -> None:
        self.sock = opened or socket.socket(target.family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Loopback refuses at once, and then forgets that it did.
        refused = self.sock.connect_ex(target.address) if opened is None else 0
        self.refused = 0 if refused == errno.EINPROGRESS else refused
        self.fd = self.sock.fileno()
        self.recv = self.sock.recv
        self.exchange: Exchange | None = None
        self.out = memoryview(b"")
        self.connecting = self.watched = True  # a connection is made when it can be written to
        self.streaming = False
        self.idle_since = clock()


@dataclass
class Run:
    """What a load did: ``exchanges`` in order of sending, and the client's own health."""

    started: float
    exchanges: list[Exchange] = field(default_factory=list)
    finished: float = 0.0
    inflight_area: float = 0.0  # request-seconds, counted while it ran
    loop_lags: array[float] = field(default_factory=lambda: array("d"))  # seconds, sampled
    cpu_seconds: float = 0.0
    connections_opened: int = 0
    interrupted: bool = False


class Client:
    """Connections to one target, ``opened`` the first, reused over successive loads; ``timeout`` in s, per request."""

    def __init__(self, target: Target, opened: socket.socket, timeout: float) -> None:
        self.target = target
        self._timeout = timeout
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._backlog: deque[Exchange] = deque()
        self._backlog_bytes = 0
        self._inflight = 0
        self._changed = 0.0
        self._idle.append(self._open(opened))

    def close(self) -> None:
        """Close every connection."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._epoll.close()

    def fetch(self, path: str, body: bytes | None = None) -> tuple[int | None, bytes]:
        """Status and body of one small request beside the load; (None, b"") without a complete reply."""
        run = self.run([encode(self.target, body, path)], 1, 1)
        reply = run.exchanges[0].reply
        return (reply.status, reply.body) if reply.complete else (None, b"")

    def run(
        self,
        requests: Sequence[bytes],
        count: int,
        concurrency: int,
        offsets: Sequence[float] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Run:
        """Send ``count`` requests, taking ``requests`` in turn, at most ``concurrency`` at a time.

        Closed loop without ``offsets``; with them, request ``i`` is due ``offsets[i]`` seconds after the start,
        whatever became of those before. ``progress`` gets the number of finished requests now and then.
        """
        missing = max(min(concurrency, count) - len(self._idle), 0) if offsets is None else 0
        self._idle += [self._open() for _ in range(missing)]
        cpu = time.process_time()
        run = Run(started=clock(), connections_opened=missing)
        self._changed = run.started
        slots = deque([run.started] * min(concurrency, count))  # when each free slot became free
        try:
            self._loop(run, requests, count, slots, offsets, progress)
        except KeyboardInterrupt:
            run.interrupted = True
            for connection in list(self._connections.values()):
                if connection.exchange:
                    self._fail(run, connection, slots, "interrupted", "stopped by the user")
        run.finished = max((exchange.done or 0.0 for exchange in run.exchanges), default=clock())
        while self._backlog:
            self._settle()
        run.cpu_seconds = time.process_time() - cpu
        return run

    def _loop(
        self,
        run: Run,
        requests: Sequence[bytes],
        count: int,
        slots: deque[float],
        offsets: Sequence[float] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        sent = 0
        connections, poll, backlog = self._connections, self._epoll.poll, self._backlog
        now = pass_began = run.started
        tick = min(TICK_SECONDS, self._timeout / 2)
        next_tick, next_sample = now + tick, now + LAG_SAMPLE_SECONDS
        while True:
            while sent < count and slots:
                due = None if offsets is None else run.started + offsets[sent]
                if due is not None and due > now:
                    break
                freed = slots.popleft()
                self._send(run, requests[sent % len(requests)], sent, freed if due is None else due, slots)
                sent += 1
            if sent == count and not self._inflight:
                break

            now = clock()
            if now >= next_sample:  # the pass in progress at the sampling time: what a byte arriving then waits for
                run.loop_lags.append(now - pass_began)
                next_sample = now + LAG_SAMPLE_SECONDS
            if now >= next_tick:
                next_tick = now + tick
                self._expire(run, slots, now)
                if progress:
                    progress(sent - self._inflight)
            while self._backlog_bytes > BACKLOG_BYTES:
                self._settle()
            if backlog:
                events = poll(0)
                if not events:
                    self._settle()
            elif offsets is not None and sent < count and slots:
                # epoll waits in whole milliseconds; select, on the epoll itself, does not.
                wait = min(run.started + offsets[sent], next_tick) - now
                select.select([self._epoll], [], [], max(wait, 0.0))
                events = poll(0)
            else:
                events = poll(max(next_tick - now, 0.0))
            now = pass_began = clock()

            for fd, mask in events:
                connection = connections.get(fd)
                if connection is None:  # dropped earlier in this pass
                    continue
                if mask & ~select.EPOLLIN and not self._writable(run, connection, slots, mask):
                    continue
                if not mask & select.EPOLLIN:
                    continue
                try:
                    data = connection.recv(READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._lost(run, connection, slots, str(error))
                    continue
                now = clock()
                exchange = connection.exchange
                if not data or exchange is None:
                    self._lost(run, connection, slots, "the server closed the connection")
                    continue
                exchange.reads.append(data)
                exchange.stamps.append(now)
                if not connection.streaming and data.startswith(b"HTTP/1.1 200"):
                    head = data[:2048].lower()
                    connection.streaming = (
                        b"\r\ntransfer-encoding: chunked\r\n" in head and b"\r\nconnection: close" not in head
                    )
                if connection.streaming:
                    # A read that cannot hold the end waits to be parsed; a doubtful one is parsed now.
                    if data.endswith(STREAM_END):
                        self._finish(run, connection, slots, now, parsed=False)
                        continue
                    if len(data) >= len(STREAM_END) and not data.endswith(b"\r\n\r\n"):
                        continue
                try:
                    exchange.parse()
                except ProtocolError as error:
                    self._fail(run, connection, slots, "malformed", str(error))
                    continue
                if exchange.reply.complete:
                    self._finish(run, connection, slots, now, parsed=True)

    def _open(self, opened: socket.socket | None = None) -> _Connection:
        connection = _Connection(self.target, opened)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLOUT)
        return connection

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.fd]
        if connection in self._idle:
            self._idle.remove(connection)
        connection.sock.close()

    def _send(self, run: Run, request: bytes, index: int, scheduled: float, slots: deque[float]) -> None:
        exchange = Exchange(index, scheduled)
        run.exchanges.append(exchange)
        connection = self._free(run)
        connection.exchange = exchange
        connection.out = memoryview(request)
        connection.streaming = False
        now = clock()
        run.inflight_area += self._inflight * (now - self._changed)
        self._changed = now
        self._inflight += 1
        if connection.connecting:
            return
        exchange.sent = now
        self._write(run, connection, slots)

    def _free(self, run: Run) -> _Connection:
        oldest = clock() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since >= oldest:
                return connection
            self._drop(connection)
        run.connections_opened += 1
        return self._open()

    def _write(self, run: Run, connection: _Connection, slots: deque[float]) -> None:
        try:
            done = connection.sock.send(connection.out)
        except BlockingIOError:
            done = 0
        except OSError as error:
            self._lost(run, connection, slots, str(error))
            return
        connection.out = connection.out[done:]
        self._watch_output(connection, bool(connection.out))

    def _watch_output(self, connection: _Connection, wanted: bool) -> None:
        if wanted != connection.watched:
            connection.watched = wanted
            self._epoll.modify(connection.fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def _writable(self, run: Run, connection: _Connection, slots: deque[float], mask: int) -> bool:
        """Handle everything but input; False when the connection is gone."""
        if connection.connecting and mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
            if code := connection.refused or connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._lost(run, connection, slots, os.strerror(code), "unreachable")
                return False
            connection.connecting = False
            connection.idle_since = clock()
            self._watch_output(connection, bool(connection.out))
            if connection.exchange:
                connection.exchange.sent = connection.idle_since
        if mask & (select.EPOLLERR | select.EPOLLHUP) and not mask & select.EPOLLIN:
            self._lost(run, connection, slots, "the server closed the connection")
            return False
        if connection.out:
            self._write(run, connection, slots)
        return connection.fd in self._connections

    def _finish(self, run: Run, connection: _Connection, slots: deque[float], now: float, *, parsed: bool) -> None:
        exchange = connection.exchange
        assert exchange is not None
        self._release(run, exchange, slots, now)
        self._backlog.append(exchange)
        self._backlog_bytes += sum(map(len, exchange.reads))
        connection.exchange = None
        if connection.out or (parsed and not exchange.reply.reusable):
            self._drop(connection)
        else:
            connection.idle_since = now
            self._idle.append(connection)

    def _release(self, run: Run, exchange: Exchange, slots: deque[float], now: float) -> None:
        exchange.done = now
        slots.append(now)
        run.inflight_area += self._inflight * (now - self._changed)
        self._changed = now
        self._inflight -= 1

    def _lost(
        self, run: Run, connection: _Connection, slots: deque[float], cause: str, kind: str = "disconnected"
    ) -> None:
        exchange = connection.exchange
        if exchange is None:
            self._drop(connection)
            return
        try:
            exchange.parse()
            exchange.reply.close()
        except ProtocolError as error:
            kind, cause = "malformed", str(error)
        if exchange.reply.complete:  # a reply that ends with the connection
            self._finish(run, connection, slots, exchange.reply.last or clock(), parsed=True)
        else:
            self._fail(run, connection, slots, "unreachable" if connection.connecting else kind, cause)

    def _fail(self, run: Run, connection: _Connection, slots: deque[float], kind: str, detail: str) -> None:
        exchange = connection.exchange
        assert exchange is not None
        exchange.error, exchange.detail = kind, detail
        self._release(run, exchange, slots, clock())
        connection.exchange = None
        self._drop(connection)

    def _expire(self, run: Run, slots: deque[float], now: float) -> None:
        for connection in list(self._connections.values()):
            exchange = connection.exchange
            if exchange and now - (exchange.sent or exchange.scheduled) > self._timeout:
                self._fail(run, connection, slots, "timeout", f"no complete reply within {self._timeout:g} s")

    def _settle(self) -> None:
        """Parse one finished reply."""
        exchange = self._backlog.popleft()
        self._backlog_bytes -= sum(map(len, exchange.reads))
        try:
            exchange.parse()
        except ProtocolError as error:
            exchange.error, exchange.detail = "malformed", str(error)
        else:
            if exchange.reply.complete:
                exchange.judge()
            else:
                exchange.error, exchange.detail = "malformed", "the framing did not end where the stream did"
