"""What gets in, what the engine sees of it, and what happens when keys change, the engine drains, a reply streams."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import vllm_idle
from front import KEYS, SECONDS, Engine, Front, answer, folder, running, serving
from promptness import REFUSAL_SECONDS, promptly


def test_a_request_with_a_key_is_served_and_the_engine_sees_no_key(open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    body = b'{"model":"glm-ocr"}'
    sent = front.post(
        body,
        X_Request_Id="mine",
        X_Forwarded_For="10.0.0.1",
        X_Data_Parallel_Rank="3",
        Cookie="a=b",
        Connection="x-request-id",
        User_Agent="client/1",
    )
    reply = front.ask(sent)
    path, headers, received = engine.requests[-1]
    assert reply.status == 200
    assert (path, received) == ("/v1/chat/completions", body)
    assert set(headers) == {"host", "content-type", "content-length", "user-agent", "x-request-id", "connection"}
    assert KEYS["alice"] not in str(headers)
    assert headers["x-request-id"] == reply.headers["x-request-id"] != "mine"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_gets_in(scheme: str, key: str, open_front: tuple[Front, Engine]) -> None:
    front, _ = open_front
    for path in ("/v1/models", "/health", "/metrics"):
        assert front.ask(front.head(path, None, Authorization=f"{scheme} {KEYS[key]}")).status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST", "npu-01", "npu-01:{port}", "localhost:{port}"])
def test_the_hosts_names_are_known(host: str, open_front: tuple[Front, Engine]) -> None:
    front, _ = open_front
    assert front.ask(front.head("/v1/models", Host=host.format(port=front.port))).status == 200


def test_a_body_up_to_the_limit_arrives_whole(open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    body = b"a" * 2**20
    assert json.loads(front.ask(front.post(body)).body)["received"] == 2**20
    assert engine.requests[-1][2] == body


def test_a_client_that_asks_first_is_told_to_go_on(open_front: tuple[Front, Engine]) -> None:
    front, _ = open_front
    request = front.post(b"{}", Expect="100-continue")
    with front.connect() as connection:
        connection.sendall(request[:-2])
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(request[-2:])
        assert answer(connection).status == 200


def test_a_connection_is_kept_for_the_next_request(open_front: tuple[Front, Engine]) -> None:
    front, _ = open_front
    with front.connect() as connection:
        for _ in range(3):
            connection.sendall(front.head("/v1/models"))
            assert answer(connection).status == 200


def test_a_chunk_arrives_before_the_reply_ends(open_front: tuple[Front, Engine]) -> None:
    front, engine = open_front
    with front.connect() as connection:
        connection.sendall(front.post(b'{"stream":true}'))
        received = b""
        while b"first" not in received:
            received += connection.recv(4096)
        assert b"last" not in received
        engine.release.set()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(4096)
    engine.release.clear()
    assert b"last" in received


def test_a_reply_may_take_longer_than_a_client_may(hasty_front: tuple[Front, Engine]) -> None:
    """The client's second is for its own request, not for the engine's answer."""
    front, engine = hasty_front
    timer = threading.Timer(2.5, engine.release.set)
    timer.start()
    assert front.ask(front.post(b'{"hold":true}')).status == 200
    timer.join()


def test_metrics_are_for_the_configured_sources_alone() -> None:
    with (
        running(ocr_front_metrics_sources=["127.0.0.2"]) as front,
        serving(front.socket),
    ):
        front.open()
        assert front.ask(front.head("/metrics")).status == 404
        with socket.create_connection(("127.0.0.1", front.port), SECONDS, ("127.0.0.2", 0)) as connection:
            connection.sendall(front.head("/metrics"))
            assert answer(connection).status == 200
            connection.sendall(front.head("/metrics", None))
            assert answer(connection).status == 401


def test_the_fronts_own_metrics_are_for_whom_the_engines_are() -> None:
    with running(ocr_front_metrics_enabled=True) as front, serving(front.socket):
        for key, status in (("alice", 200), (None, 401)):
            assert front.ask(front.head("/metrics/front", key)).status == status
        assert front.ask(front.head("/metrics/front", "alice", "POST", Content_Length="0")).status == 405
        told = front.ask(front.head("/metrics/front")).body.decode()
        assert 'haproxy_frontend_http_responses_total{proxy="front",code="4xx"} 2' in told
    with running(ocr_front_metrics_enabled=True, ocr_front_metrics_sources=["127.0.0.2"]) as front:
        assert front.ask(front.head("/metrics/front")).status == 404
    with running() as front:
        assert front.ask(front.head("/metrics/front")).status == 404


def test_a_key_that_sends_too_much_is_told_when_to_come_back_and_others_are_served() -> None:
    with (
        running(ocr_front_requests_per_10_seconds=5, ocr_front_requests_per_10_seconds_of={"bob": 8}) as front,
        serving(front.socket),
    ):
        front.open()
        alice = [front.ask(front.head("/v1/models")) for _ in range(7)]
        assert [reply.status for reply in alice] == [200] * 5 + [429] * 2
        assert alice[-1].headers["retry-after"] == "10"
        assert [front.ask(front.head("/v1/models", "bob")).status for _ in range(9)] == [200] * 8 + [429]
        assert front.ask(front.head("/v1/models", "validation")).status == 200


def test_while_the_engine_starts_and_drains_clients_are_told_to_come_back() -> None:
    """The socket is absent, then not open yet; then closed to new requests while one in flight completes."""
    with running(ocr_front_retry_after_seconds=7) as front:
        assert_come_back(front)
        with serving(front.socket) as engine:
            assert_come_back(front)
            front.open()
            assert front.ask(front.head("/v1/models")).status == 200
            with front.connect() as kept, front.connect() as flying:
                kept.sendall(front.head("/v1/models"))
                assert answer(kept).status == 200
                flying.sendall(front.post(b'{"hold":true}'))
                taken(engine, 3)
                front.close()
                assert_come_back(front)
                kept.sendall(front.head("/v1/models"))
                assert answer(kept).status == 503, "a kept connection gets around the drain"
                engine.release.set()
                assert answer(flying).status == 200
            front.open()
            assert front.ask(front.head("/v1/models")).status == 200
            assert vllm_idle.ask("https://npu-01:8000", 5, str(front.socket))[1].startswith("its metrics do not tell")
        assert vllm_idle.wait("https://npu-01:8000", 5, str(front.socket)) == (True, "nothing listens")


def test_keys_change_by_a_reload_and_no_request_is_lost() -> None:
    """alice is taken off and carol added while alice's request is in flight and bob's come without a pause."""
    with running() as front, serving(front.socket) as engine:
        front.open()
        stop = threading.Event()

        def ask_all_the_time() -> list[int]:
            statuses = []
            while not stop.is_set():
                statuses.append(front.ask(front.head("/v1/models", "bob")).status)
            return statuses

        with front.connect() as flying, ThreadPoolExecutor(2) as pool:
            flying.sendall(front.post(b'{"hold":true}'))
            taken(engine, 1)
            asking = [pool.submit(ask_all_the_time) for _ in range(2)]
            carol = "c" * 64
            del front.keys["alice"]
            front.keys["carol"] = carol
            assert front.reload()
            assert front.ask(front.head("/v1/models", None, Authorization=f"Bearer {carol}")).status == 200
            assert front.ask(front.head("/v1/models", "alice")).status == 401
            stop.set()
            statuses = [status for future in asking for status in future.result(SECONDS)]
            engine.release.set()
            assert answer(flying).status == 200
        assert set(statuses) <= {200, 429}
        assert statuses[0] == 200


def test_a_reload_that_does_not_happen_is_told_and_what_runs_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy accepts the configuration, and finds out only then that its port is another's."""
    monkeypatch.setattr("haproxy_reload.SECONDS", 1.0)
    with running() as front, serving(front.socket):
        front.open()
        own = front.ports[0]
        front.keys["carol"] = "c" * 64
        # Held to the end: on a slow machine HAProxy may still try.
        with socket.create_server(("127.0.0.1", 0)) as taken:
            front.ports[0] = taken.getsockname()[1]
            assert not front.reload()
            front.ports[0] = own
            assert front.ask(front.head("/v1/models")).status == 200
            assert front.ask(front.head("/v1/models", "c" * 64)).status == 401
            assert front.reload()
            assert front.ask(front.head("/v1/models", "c" * 64)).status == 200


def test_a_front_that_is_stopped_completes_what_is_in_flight() -> None:
    with running() as front, serving(front.socket) as engine:
        front.open()
        with front.connect() as flying:
            flying.sendall(front.post(b'{"hold":true}'))
            taken(engine, 1)
            front.begin_to_stop()
            engine.release.set()
            assert answer(flying).status == 200
        assert front.ended() == 0


def test_the_files_and_the_log_have_names_and_no_key() -> None:
    with folder() as path:
        front = Front(path)
        front.start()
        with serving(front.socket):
            front.open()
            served = front.ask(front.post(b"{}", Cookie="secret=1"))
            front.ask(front.head(f"/v1/models?api_key={KEYS['bob']}", "bob"))
            front.ask(front.head("/v1/models", "x" * 40))
        log = front.finished()
        front.stop()
        written = "".join(file.read_text() for file in (path / "haproxy.cfg", *path.glob("keys-*.map")))
    assert not [key for key in (*KEYS.values(), "x" * 40, "secret=1") if key in log + written]
    assert re.search(
        rf"^client=\S+ key=alice id={served.headers['x-request-id']} method=POST .* status=200 ", log, re.M
    )
    assert "key=bob" not in log, "refused before its key was looked at"
    assert re.search(r" key=- .* path=/v1/models status=401 ", log)


def test_connections_take_the_memory_of_what_they_send() -> None:
    """The buffers are as large as the largest request; untouched, they are no memory."""
    with running(ocr_front_connections_per_source=128) as front, serving(front.socket):
        front.open()
        assert front.ask(front.head("/v1/models")).status == 200
        before = front.memory()
        opened = [front.connect() for _ in range(100)]
        for connection in opened:
            connection.sendall(front.head("/v1/models"))
            assert answer(connection).status == 200
            connection.sendall(front.post(b"{}" * 500, Content_Length="2000"))
        assert front.memory() - before < 50 * 2**20
        for connection in opened:
            connection.close()


def test_the_memory_of_large_bodies_is_given_back() -> None:
    """Small requests between them take every buffer once; each would stay as large as the largest that it held."""
    large, small = 16 * 2**20, 20
    with running() as front, serving(front.socket):
        front.open()
        assert front.ask(front.head("/v1/models")).status == 200
        before = front.memory()
        for _ in range(5):
            assert front.ask(front.post(b"a" * large)).status == 200
            held = [front.connect() for _ in range(small)]
            for connection in held:
                connection.sendall(front.post(b"{}" * 500, Content_Length="2000"))
            assert front.ask(front.post(b"a" * large)).status == 200
            for connection in held:
                connection.close()
        deadline = time.monotonic() + SECONDS
        while front.memory() - before > large / 2:
            assert time.monotonic() < deadline, f"{front.memory() - before} bytes more than before"
            time.sleep(0.1)


def test_with_a_certificate_the_port_speaks_nothing_else(tmp_path: Path) -> None:
    with folder() as path:
        authority = certificate(path)
        front = Front(
            path,
            glm_ocr_tls_certificate="given",
            glm_ocr_tls_key="given",
            __ocr_front_certificate=str(path / "tls.pem"),
        )
        try:
            front.start()
            with serving(front.socket):
                front.open()
                trusting = ssl.create_default_context(cadata=authority)
                trusting.set_alpn_protocols(["h2", "http/1.1"])
                assert front.ask(front.head("/v1/models", Host=f"npu-01:{front.port}"), tls=trusting).status == 200
                assert front.ask(front.head("/v1/models", None), tls=trusting).status == 401
                with front.connect(tls=trusting) as connection:
                    assert isinstance(connection, ssl.SSLSocket)
                    assert connection.selected_alpn_protocol() == "http/1.1"
                assert refuses_plain(front)
                old = ssl.create_default_context(cadata=authority)
                old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
                assert front.ask(front.head("/v1/models"), tls=old).status == 200
                local = front.ports[1]
                assert front.ask(front.head("/v1/models", Host=f"127.0.0.1:{local}"), local).status == 200
                assert front.ask(front.head("/v1/models", None, Host=f"127.0.0.1:{local}"), local).status == 401
        finally:
            front.stop()


def test_a_configuration_that_is_not_accepted_stops_nothing() -> None:
    with running() as front, serving(front.socket):
        front.open()
        front.variables = {"ocr_front_metrics_sources": ["300.0.0.1"]}
        with pytest.raises(Exception, match="non-zero exit status"):
            front.reload()
        assert front.ask(front.head("/v1/models")).status == 200


def assert_come_back(front: Front) -> None:
    reply, seconds = promptly(lambda: front.ask(front.head("/v1/models")))
    assert seconds < REFUSAL_SECONDS
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert reply.error["code"] == 503


def taken(engine: Engine, requests: int) -> None:
    for _ in range(requests):
        assert engine.taken.acquire(timeout=SECONDS)


def refuses_plain(front: Front) -> bool:
    with front.connect() as connection:
        connection.sendall(front.head("/v1/models"))
        try:
            return b"HTTP" not in connection.recv(4096)
        except ConnectionResetError:
            return True


def certificate(path: Path) -> str:
    """Writes ``tls.pem`` for npu-01; the authority it is signed by, as PEM."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("CA of the test", "npu-01")]
    now = datetime.now(timezone.utc)
    signed = [
        x509.CertificateBuilder()
        .subject_name(names[i])
        .issuer_name(names[0])
        .public_key(keys[i].public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=i == 0, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("npu-01")]), critical=False)
        .sign(keys[0], hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        for i in range(2)
    ]
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (path / "tls.pem").write_bytes(signed[1] + private)
    (path / "tls.pem").chmod(0o644)
    return signed[0].decode()
