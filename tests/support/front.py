"""The front as it is deployed, HAProxy itself, before a small real server on a Unix socket."""

from __future__ import annotations

import grp
import http.client
import json
import os
import random
import re
import select
import signal
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import engine_socket
import haproxy_reload
from rendering import HostVariables

#: The program and the user of the distribution's package, as in the unit.
PROGRAM = "/usr/sbin/haproxy"
USER = "haproxy"
SECONDS = 20.0
KEYS = {"validation": "v" * 32, "alice": "alice." + "a" * 32, "bob": "bob/" + "b" * 32}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])


@dataclass
class Engine:
    """What it was sent; a request with ``hold`` or ``stream`` in its body is not complete before ``release``.

    What it answers is of no weight but for the paths of ``pages``.
    """

    socket: Path
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    taken: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Event = field(default_factory=threading.Event)
    pages: dict[str, str] = field(default_factory=dict)


@contextmanager
def serving(path: Path) -> Iterator[Engine]:
    """An engine at ``path``, which it makes for root alone, as a container does."""
    engine = Engine(path)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            engine.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            engine.taken.release()
            if b"stream" in body:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"5\r\nfirst\r\n")
                assert engine.release.wait(SECONDS)
                self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")
                return
            if b"hold" in body:
                assert engine.release.wait(SECONDS)
            page = engine.pages.get(self.path)
            answer = (page or json.dumps({"path": self.path, "received": len(body)})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """A client that goes away is the tests' own doing."""

    before = os.umask(0o077)
    server = Server(str(path), Handler)
    os.umask(before)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield engine
    finally:
        engine.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
        path.unlink()


class Front:
    """HAProxy with the project's configuration in ``folder``, on a free port of 127.0.0.1."""

    group, template = "ascend910", "haproxy.cfg.j2"

    def __init__(self, folder: Path, **variables: Any) -> None:
        self.folder = folder
        self.variables = variables
        self.keys: dict[str, str] = dict(KEYS)
        self.ports = free_ports(2)
        self.socket = folder / "engine.sock"
        self.log = folder / "log"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.settimeout(SECONDS)
        self._notified.bind(str(folder / "notify"))
        (folder / "notify").chmod(0o666)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def host(self) -> str:
        """As a client has it in its Host header."""
        return f"127.0.0.1:{self.port}"

    def write(self) -> str:
        """The front's files; returns its unit."""
        """The files, as the role puts them on a host."""
        inventory = Path(tempfile.mkdtemp(dir=self.folder))
        host = HostVariables(
            inventory,
            self.group,
            glm_ocr_exposure="front",
            glm_ocr_bind_address="127.0.0.1",
            glm_ocr_port=self.ports[0],
            glm_ocr_local_port=self.ports[1],
            glm_ocr_keys=self.keys,
            glm_ocr_engine_socket=str(self.socket),
            __ocr_front_dir=str(self.folder),
            __ocr_front_template=self.template,
            **self.variables,
        )
        assert host.template("{{ __glm_ocr_problems + __ocr_front_problems }}") == []
        for name, text in (
            (Path(str(host.template("{{ __ocr_front_keys }}"))).name, str(host.template("{{ __ocr_front_key_map }}"))),
            ("haproxy.cfg", host.template_file(self.template)),
        ):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o644)
        return str(host.template_file("glm-ocr-front.service.j2"))

    def start(self) -> None:
        unit = self.write()
        environment = dict(re.findall(r"^Environment=(\w+)=(\S+)$", unit, re.MULTILINE))
        with self.log.open("wb") as log:
            # As the unit does; for root, so that the socket's permissions count.
            self._process = subprocess.Popen(
                [PROGRAM, "-Ws", "-f", str(self.folder / "haproxy.cfg")],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment | {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(self.folder / "notify")},
                user=USER,
                group=USER,
                extra_groups=[],
            )
        self._ready()

    def reload(self) -> bool:
        """As ExecReload does: checked, then taken over by a new process; whether it was."""
        assert self._process
        self.write()
        subprocess.run([PROGRAM, "-c", "-q", "-f", str(self.folder / "haproxy.cfg")], check=True)
        if not haproxy_reload.reload(self._process.pid):
            return False
        self._ready()
        return True

    def begin_to_stop(self) -> None:
        """The unit's KillSignal, to the main process alone."""
        self._signal(signal.SIGUSR1, b"STOPPING=1")

    def ended(self) -> int:
        """The exit status, once it has ended by itself."""
        assert self._process
        return self._process.wait(SECONDS)

    def end(self) -> None:
        """At once; it can be started again."""
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(SECONDS)

    def finished(self) -> str:
        """Its log once it has ended by itself: a reply arrives before its line is written."""
        self.begin_to_stop()
        assert self.ended() == 0
        return self.log.read_text()

    def stop(self) -> None:
        """For good."""
        self.end()
        self._notified.close()

    def _signal(self, number: int, acknowledgement: bytes) -> None:
        """Sent until it is acknowledged: the main process executes itself anew after a start, and loses one then."""
        assert self._process
        for _ in range(int(SECONDS)):
            self._process.send_signal(number)
            if select.select([self._notified], [], [], 1)[0]:
                assert acknowledgement in self._notified.recv(4096)
                return
        raise AssertionError(f"no {acknowledgement!r} from HAProxy")

    def _ready(self) -> None:
        assert self._process
        while b"READY=1" not in self._notified.recv(4096):
            assert self._process.poll() is None, self.log.read_text()

    def processes(self) -> tuple[int, ...]:
        """HAProxy's: the main one and its workers."""
        assert self._process
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return (self._process.pid, *map(int, children))

    def memory(self) -> int:
        """Bytes resident of HAProxy's processes."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.processes()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def open(self) -> None:
        """What the engine's unit does once a generation succeeded."""
        assert engine_socket.open_to(str(self.socket), USER) == 0

    def close(self) -> None:
        """What the engine's unit does before it stops."""
        assert engine_socket.close(str(self.socket)) == 0

    # --- clients ------------------------------------------------------------------------------------------

    def connect(self, port: int | None = None, tls: ssl.SSLContext | None = None) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port or self.port), timeout=SECONDS)
        return tls.wrap_socket(connection, server_hostname="npu-01") if tls else connection

    def head(self, target: str, key: str | None = "alice", method: str = "GET", **headers: str) -> bytes:
        """A request up to the end of its headers; ``key`` is a name in ``KEYS``."""
        given = {"Host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if key:
            given["Authorization"] = f"Bearer {KEYS.get(key, key)}"
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def post(self, body: bytes, key: str | None = "alice", **headers: str) -> bytes:
        given = {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
        return self.head("/v1/chat/completions", key, "POST", **given) + body

    def ask(self, request: bytes, port: int | None = None, tls: ssl.SSLContext | None = None) -> Answer:
        with self.connect(port, tls) as connection:
            connection.sendall(request)
            return answer(connection)


def answer(connection: socket.socket) -> Answer:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())


def free_ports(number: int) -> list[int]:
    """Free ones, held together so that they differ.

    Below those that the kernel gives to clients: one that nobody listens on for a moment is not taken by a connection
    of a test beside it.
    """
    clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    held: list[socket.socket] = []
    for port in random.sample(range(clients - 10000, clients), 1000):
        with suppress(OSError):
            held.append(socket.create_server(("127.0.0.1", port)))
        if len(held) == number:
            break
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def requirement() -> None:
    """What these tests need of the machine.  Raises ``RuntimeError``: without it nothing of the front was shown."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root, to run HAProxy as its own user")
    if not Path(PROGRAM).exists():
        missing.append("HAProxy: apt-get install -y haproxy")
    else:
        try:
            grp.getgrnam(USER)
        except KeyError:
            missing.append(f"the group {USER} of HAProxy's package")
    if missing:
        raise RuntimeError("tests/front: expected " + "; ".join(missing))


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder that HAProxy's user may look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def running(**variables: Any) -> Iterator[Front]:
    with folder() as path:
        front = Front(path, **variables)
        try:
            front.start()
            yield front
        finally:
            front.stop()
