"""The gateway as it is deployed, HAProxy itself, before instances that can be killed, cut off and closed."""

from __future__ import annotations

import json
import shutil
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import front as fronts
import gateway_pool
from ledger import Ledger, ledger

#: What the gateway sends the instances; no client has it.
INTERNAL_KEY = "i" * 48
NAMES = ("npu-01", "npu-02", "npu-03")
REPLY = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": "OK"}}]}).encode()


class Instance:
    """A front and an engine in one, on a port of its own that it keeps over a restart.

    ``begun`` has the bodies of the requests that its engine took.  ``closed``: it answers 503 as a front does whose
    engine is closed.  ``deaf``: it accepts connections and says nothing.  ``breaks``: it takes a request and resets.
    """

    def __init__(self) -> None:
        self.port = fronts.free_ports(1)[0]
        self.begun: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.closed = self.deaf = self.breaks = False
        self.seconds = 0.05
        self.healed, self.release = threading.Event(), threading.Event()
        self._open: set[socket.socket] = set()

    def start(self) -> None:
        instance = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                instance._open.add(self.connection)

            def finish(self) -> None:
                instance._open.discard(self.connection)
                super().finish()

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if instance.deaf:
                    instance.healed.wait()
                if self.headers.get("authorization") != f"Bearer {INTERNAL_KEY}" or self.headers["host"] != "localhost":
                    self.reply(401, b"{}")
                elif instance.closed:
                    self.reply(503, b"{}", ("Retry-After", "7"))
                elif self.path == "/health":
                    self.reply(200, b"")
                else:
                    self.engine(body)

            do_POST = do_GET

            def engine(self, body: bytes) -> None:
                instance.begun.append(body)
                instance.headers.append({name.lower(): value for name, value in self.headers.items()})
                if instance.breaks:
                    reset(self.connection)
                elif b'"stream"' in body:
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self.wfile.write(b"5\r\nfirst\r\n")
                    instance.release.wait(fronts.SECONDS)
                    self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")
                else:
                    if b'"hold"' in body:
                        instance.release.wait(fronts.SECONDS)
                    time.sleep(instance.seconds)
                    self.reply(200, REPLY)

            def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for name, value in (("Content-Length", str(len(body))), *headers):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silent."""

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128
            # A connection that was reset is the tests' own doing.
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                """As above."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def kill(self) -> None:
        """As a host that is switched off and whose router says so: all connections are reset, none is accepted."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self._open):
            reset(connection)

    def cut(self) -> None:
        self.healed.clear()
        self.deaf = True

    def heal(self) -> None:
        self.deaf = False
        self.healed.set()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Not close alone: the handler's files hold the descriptor. The other side may have ended it before.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
    connection.close()


class Gateway(fronts.Front):
    group, template = "gateway", "gateway.cfg.j2"

    def __init__(self, folder: Path, instances: Mapping[str, Instance | fronts.Front], **variables: Any) -> None:
        super().__init__(folder, **variables)
        self.run = folder / "run"
        self.run.mkdir()
        shutil.chown(self.run, fronts.USER, fronts.USER)
        self.instances: dict[str, Instance | fronts.Front] = dict(instances)
        (folder / "var").mkdir()
        self.pool_at = {
            "socket": str(self.run / "admin.sock"),
            "states": str(folder / "var" / "servers"),
            "configuration": str(folder / "haproxy.cfg"),
            "service": "glm-ocr-gateway",
            "backend": "engine",
        }
        self.given = variables

    def write(self) -> str:
        """As the role does before a start or a reload."""
        key = self.folder / "instances.key"
        key.write_text(f"instances {INTERNAL_KEY}\n")
        key.chmod(0o644)
        self.variables = {
            "gateway_instances": list(self.instances),
            "hostvars": {
                name: {"ansible_host": "127.0.0.1", "glm_ocr_port": instance.port}
                for name, instance in self.instances.items()
            },
            "gateway_instances_key": INTERNAL_KEY,
            "gateway_check_interval_seconds": 1,
            "gateway_check_timeout_seconds": 1,
            "gateway_slow_start_seconds": 1,
            "__gateway_socket": self.pool_at["socket"],
            "__gateway_alive_socket": str(self.run / "alive.sock"),
            "__gateway_states": self.pool_at["states"],
            "__gateway_key": str(key),
            **self.given,
        }
        unit = super().write()
        self.pool(state="kept")
        return unit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pool(
        self, instance: str = "", state: str = "described", timeout: float = fronts.SECONDS, min_others: int = 0
    ) -> dict[str, Any]:
        """What the module does on the gateway, and tells."""
        asked = {"instance": instance, "state": state, "timeout": timeout, "min_others": min_others}
        return gateway_pool.run(self.pool_at | asked, False)

    def column(self, instance: str, name: str) -> str:
        """Of HAProxy's state of it."""
        (row,) = [
            row
            for row in gateway_pool.rows(gateway_pool.say(self.pool_at["socket"], "show servers state"), "engine")
            if row["srv_name"] == instance
        ]
        return row[name]

    def weight(self, instance: str) -> int:
        return self._counted("weight", instance)

    def waiting(self) -> int:
        """Requests that no instance has room for."""
        return self._counted("qcur", "BACKEND")

    def _counted(self, name: str, of: str) -> int:
        rows = [row.split(",") for row in gateway_pool.say(self.pool_at["socket"], "show stat").splitlines()]
        (row,) = [row for row in rows if row[:2] == ["engine", of]]
        return int(row[rows[0].index(name)])

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + fronts.SECONDS
        while not condition():
            assert time.monotonic() < end, [self.pool(name) for name in self.instances]
            time.sleep(0.05)


@contextmanager
def fleet(**variables: Any) -> Iterator[tuple[Gateway, dict[str, Instance]]]:
    """A gateway before three instances that are up."""
    with fronts.folder() as path, ExitStack() as stack:
        instances = {name: Instance() for name in NAMES}
        for instance in instances.values():
            instance.start()
            stack.callback(instance.kill)
            stack.callback(instance.release.set)
            stack.callback(instance.heal)
        gateway = Gateway(path, instances, **variables)
        stack.callback(gateway.stop)
        gateway.start()
        yield gateway, instances


@contextmanager
def before_a_front(connections: int, **variables: Any) -> Iterator[tuple[Gateway, fronts.Engine]]:
    """A gateway before one instance, npu-01: a front as it is deployed, with so many connections, and its engine."""
    with fronts.folder() as before, fronts.folder() as behind, ExitStack() as stack:
        front = fronts.Front(behind, ocr_front_max_connections=connections)
        stack.callback(front.stop)
        front.keys["gateway"] = INTERNAL_KEY
        front.start()
        engine = stack.enter_context(fronts.serving(front.socket))
        front.open()
        gateway = Gateway(before, {"npu-01": front}, **variables)
        stack.callback(gateway.stop)
        gateway.start()
        yield gateway, engine


@contextmanager
def load(gateway: Gateway, senders: int = 6) -> Iterator[list[Ledger]]:
    """Clients that send one request after the other, as long as the block runs and until each was served after it."""
    with ExitStack() as stack:
        books = [stack.enter_context(ledger(gateway.url, fronts.KEYS["validation"])) for _ in range(senders)]
        yield books
        served = [book.complete for book in books]
        gateway.until(lambda: all(book.complete > before for book, before in zip(books, served, strict=True)))
