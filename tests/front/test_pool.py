"""The gateway before three instances: what is drained, killed, cut off and reloaded costs no request."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import fleet as fleets
import gateway_pool
from fleet import INTERNAL_KEY, NAMES, fleet, load
from front import KEYS, SECONDS, Front, answer
from ledger import Ledger
from rendering import PROJECT

#: Any authority does: nothing here speaks TLS.
DISTRIBUTION_CA = "/etc/ssl/certs/ca-certificates.crt"


def refused(books: list[Ledger]) -> int:
    return sum(book.refused for book in books)


def none_lost(books: list[Ledger]) -> None:
    assert [book.lost for book in books] == [[]] * len(books)


def test_a_rolling_restart_refuses_and_loses_nothing() -> None:
    with fleet() as (gateway, instances), load(gateway) as books:
        for name, instance in instances.items():
            drained = gateway.pool(name, "drained")
            assert (drained["in_flight"], drained["serves"], drained["changed"]) == (0, False, True)
            assert drained["others"] == [other for other in NAMES if other != name]
            begun = len(instance.begun)
            instance.kill()
            time.sleep(0.5)
            instance.start()
            assert len(instance.begun) == begun, "a drained instance got a request"
            assert gateway.pool(name, "ready")["serves"]
            gateway.until(lambda instance=instance, begun=begun: len(instance.begun) > begun)  # type: ignore[misc]
    none_lost(books)
    assert refused(books) == 0


def test_a_drain_waits_for_what_is_in_flight_and_no_longer_than_it_may() -> None:
    with fleet() as (gateway, instances), gateway.connect() as connection:
        connection.sendall(gateway.post(b'{"hold":true}'))
        gateway.until(lambda: any(instance.begun for instance in instances.values()))
        (name,) = [name for name, instance in instances.items() if instance.begun]
        bounded = gateway.pool(name, "drained", timeout=0.5)
        assert (bounded["in_flight"], bounded["serves"]) == (1, False)
        assert 0.5 <= bounded["seconds"] < 5
        instances[name].release.set()
        assert gateway.pool(name, "drained")["in_flight"] == 0
        assert answer(connection).status == 200


def test_an_instance_that_is_killed_costs_no_more_than_what_it_had_begun() -> None:
    with fleet() as (gateway, instances), load(gateway) as books:
        gateway.until(lambda: all(instance.begun for instance in instances.values()))
        instances["npu-01"].kill()
        gateway.until(lambda: not gateway.pool("npu-01")["serves"])
        told = refused(books)
        assert told <= len(books)
        begun = len(instances["npu-02"].begun)
        gateway.until(lambda: len(instances["npu-02"].begun) > begun + 5)
        assert refused(books) == told, "requests still go to it"
        instances["npu-01"].start()
        gateway.until(lambda: gateway.pool("npu-01")["serves"])
    none_lost(books)


def test_an_instance_that_is_cut_off_gets_no_more_requests_and_none_is_lost() -> None:
    with fleet() as (gateway, instances), load(gateway) as books:
        gateway.until(lambda: all(instance.begun for instance in instances.values()))
        instances["npu-01"].cut()
        gateway.until(lambda: not gateway.pool("npu-01")["serves"])
        waiting = gateway.pool("npu-01")["in_flight"]
        begun = len(instances["npu-02"].begun)
        if waiting < len(books):
            gateway.until(lambda: len(instances["npu-02"].begun) > begun + 5)
        assert gateway.pool("npu-01")["in_flight"] <= waiting
        instances["npu-01"].heal()
        gateway.until(lambda: gateway.pool("npu-01")["serves"])
    none_lost(books)
    # They had been sent: they were waited for, and nobody else was given them.
    assert refused(books) == 0


def test_a_front_whose_engine_is_closed_has_its_requests_served_by_others() -> None:
    body = json.dumps({"pad": "x" * 1_000_000}).encode()
    # Never looked at again within the test, so that all depends on the second attempt.
    with fleet(gateway_check_interval_seconds=100, ocr_front_body_limit_mib=2) as (gateway, instances):
        instances["npu-01"].closed = True
        instances["npu-02"].closed = True
        for _ in range(6):
            assert gateway.ask(gateway.post(body)).status == 200
        assert instances["npu-03"].begun == [body] * 6
        assert not instances["npu-01"].begun + instances["npu-02"].begun
        instances["npu-03"].closed = True
        told = gateway.ask(gateway.post(body))
        assert (told.status, told.headers["retry-after"]) == (503, "7")


def test_without_the_second_attempt_a_closed_front_is_told_of_and_a_closed_port_is_not() -> None:
    with fleet(gateway_check_interval_seconds=100, gateway_retry_503_enabled=False) as (gateway, instances):
        instances["npu-01"].closed = True
        statuses = [gateway.ask(gateway.post(b"{}")).status for _ in range(6)]
        assert {200, 503} == set(statuses)
        instances["npu-01"].kill()
        assert [gateway.ask(gateway.post(b"{}")).status for _ in range(6)] == [200] * 6
        instances["npu-01"].start()


def test_a_request_that_an_engine_has_begun_is_nobody_elses() -> None:
    with fleet() as (gateway, instances):
        for instance in instances.values():
            instance.breaks = True
        assert gateway.ask(gateway.post(b'{"only":"once"}')).status == 502
        assert sum(len(instance.begun) for instance in instances.values()) == 1


def test_errors_alone_do_not_empty_the_pool() -> None:
    """A request that no engine survives: the instances are asked, and say that they serve."""
    with fleet() as (gateway, instances):
        for instance in instances.values():
            instance.breaks = True
        for _ in range(30):
            assert gateway.ask(gateway.post(b"{}")).status == 502
        for instance in instances.values():
            instance.breaks = False
        assert gateway.ask(gateway.post(b"{}")).status == 200
        gateway.until(lambda: all(gateway.pool(name)["serves"] for name in NAMES))


def test_requests_that_fail_have_an_instance_looked_at_before_its_turn() -> None:
    with fleet(gateway_check_interval_seconds=100) as (gateway, instances):
        gateway.until(lambda: all("L7OK" in gateway.pool(name)["status"] for name in NAMES))
        instances["npu-01"].kill()
        gateway.until(lambda: gateway.ask(gateway.post(b"{}")).status == 200 and not gateway.pool("npu-01")["serves"])
        instances["npu-01"].start()


def test_a_reload_and_a_start_lose_nothing_and_keep_what_was_drained() -> None:
    with fleet() as (gateway, instances):
        with load(gateway) as books:
            gateway.pool("npu-02", "drained")
            begun = len(instances["npu-02"].begun)
            for _ in range(3):
                gateway.reload()
                assert not gateway.pool("npu-02")["serves"]
        none_lost(books)
        assert refused(books) == 0
        assert len(instances["npu-02"].begun) == begun
        gateway.end()
        gateway.start()
        assert not gateway.pool("npu-02")["serves"]
        assert gateway.pool("npu-02", "ready")["serves"]
        gateway.reload()
        assert gateway.pool("npu-02")["serves"]


def test_after_a_reload_one_that_was_not_asked_yet_can_be_told_from_one_that_serves() -> None:
    with fleet(gateway_check_interval_seconds=3) as (gateway, instances):
        instances["npu-03"].kill()
        gateway.reload()
        # Until then it counts as up: playbooks/gateway.yml waits for that.
        gateway.until(lambda: "INI" not in gateway.pool("npu-03")["status"])
        assert not gateway.pool("npu-03")["serves"]
        instances["npu-03"].start()


def test_what_was_drained_while_it_was_down_comes_back_when_it_is_up() -> None:
    with fleet() as (gateway, instances):
        instances["npu-02"].kill()
        gateway.until(lambda: not gateway.pool("npu-02")["serves"])
        gateway.pool("npu-02", "drained")
        gateway.reload()
        gateway.pool("npu-02", "ready", timeout=0.5)
        gateway.until(lambda: not gateway.pool("npu-02")["serves"])
        instances["npu-02"].start()
        assert gateway.pool("npu-02", "ready")["serves"]


def test_one_that_leaves_is_not_asked_and_the_pool_may_change_around_it() -> None:
    with fleet() as (gateway, instances):
        gateway.pool("npu-03", "removed")
        new = fleets.Instance()
        new.start()
        try:
            gateway.instances = {"npu-00": new, **instances}
            gateway.reload()
            assert "MAINT" in gateway.pool("npu-03")["status"]
            assert gateway.pool("npu-03")["others"] == ["npu-00", "npu-01", "npu-02"]
            gateway.instances = {name: one for name, one in gateway.instances.items() if name != "npu-03"}
            gateway.reload()
            assert not gateway.pool("npu-03")["member"]
            assert not gateway.pool("npu-03", "drained")["changed"]
        finally:
            new.kill()


def test_a_host_that_left_and_comes_back_serves() -> None:
    with fleet() as (gateway, _):
        gateway.pool("npu-03", "removed")
        left = gateway.instances.pop("npu-03")
        gateway.reload()
        gateway.instances["npu-03"] = left
        gateway.reload()
        gateway.until(lambda: gateway.pool("npu-03")["serves"])


def test_what_was_drained_is_asked_where_and_how_the_configuration_says() -> None:
    moved = fleets.Instance()
    moved.start()
    try:
        with fleet() as (gateway, instances):
            gateway.pool("npu-02", "drained")
            gateway.instances["npu-02"] = moved
            gateway.reload()
            gateway.until(lambda: gateway.pool("npu-02")["status"] == "DRAIN L7OK 200")
            instances["npu-02"].kill()
            assert gateway.column("npu-02", "srv_port") == str(moved.port)
            assert gateway.pool("npu-02", "ready")["serves"]
            instances["npu-02"].start()
            gateway.pool("npu-02", "drained")
            gateway.given["gateway_instances_ca"] = gateway.given["__gateway_ca"] = DISTRIBUTION_CA
            gateway.reload()
            assert (gateway.column("npu-02", "srv_use_ssl"), gateway.pool("npu-02")["found"]) == ("1", "drained")
    finally:
        moved.kill()


def test_what_is_decided_while_haproxy_is_down_holds_when_it_is_up() -> None:
    with fleet() as (gateway, _):
        gateway.pool("npu-01", "drained")
        gateway.end()
        ready = gateway.pool("npu-01", "ready")
        drained = gateway.pool("npu-02", "drained")
        for told in (ready, drained):
            assert (told["runs"], told["member"], told["changed"], told["in_flight"]) == (False, True, True, 0)
        assert not gateway.pool("npu-02", "drained")["changed"]
        assert not gateway.pool("npu-04", "drained")["member"]
        gateway.start()
        gateway.until(lambda: gateway.pool("npu-01")["serves"])
        assert "DRAIN" in gateway.pool("npu-02")["status"]


def test_a_haproxy_that_starts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def unit_state(service: str) -> str:
        asked.set()
        return "activating"

    with fleet() as (gateway, _), ThreadPoolExecutor() as beside:
        gateway.pool("npu-01", "drained")
        gateway.end()
        monkeypatch.setattr(gateway_pool, "unit_state", unit_state)
        told = beside.submit(gateway.pool, "npu-01", "ready")
        assert asked.wait(SECONDS)
        # systemd does it again, not the role.
        monkeypatch.setattr(gateway, "write", lambda: Front.write(gateway))
        gateway.start()
        assert (told.result()["runs"], told.result()["serves"]) == (True, True)


def test_a_haproxy_that_never_comes_up_is_told_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_pool, "START_SECONDS", 0.5)
    with fleet() as (gateway, _):
        gateway.pool("npu-01", "drained")
        gateway.end()
        monkeypatch.setattr(gateway_pool, "unit_state", lambda _: "activating")
        assert not gateway.pool("npu-01", "ready")["runs"]
        monkeypatch.setattr(gateway_pool, "unit_state", lambda _: "active")
        with pytest.raises(gateway_pool.Problem, match=r"expected an answer within 0.5 s.*is active"):
            gateway.pool("npu-01", "ready")
        monkeypatch.undo()
        gateway.start()
        gateway.until(lambda: gateway.pool("npu-01")["serves"])


def test_of_two_that_are_drained_at_once_one_stays_when_one_must(monkeypatch: pytest.MonkeyPatch) -> None:
    look, both = gateway_pool.look, threading.Barrier(2)

    def looks_together(options: dict[str, Any]) -> gateway_pool.Pool:
        pool = look(options)
        # Without a lock both have looked before one is ordered; with one the other never comes.
        with suppress(threading.BrokenBarrierError):
            both.wait(1)
        return pool

    with fleet() as (gateway, _), ThreadPoolExecutor() as beside:
        gateway.pool("npu-03", "drained")
        monkeypatch.setattr(gateway_pool, "look", looks_together)
        asked = [beside.submit(gateway.pool, name, "drained", min_others=1) for name in ("npu-01", "npu-02")]
        assert sorted(told.result()["bare"] for told in asked) == [False, True]
        assert sorted(told.result()["serves"] for told in asked) == [False, True]


def test_an_order_that_nobody_heard_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order = gateway_pool.order
    given: list[str] = []
    written: list[str] = []

    def heard_the_second_time(path: str, command: str) -> None:
        written.append(Path(gateway.pool_at["states"]).read_text())
        given.append(command)
        if len(given) > 1:
            order(path, command)

    with fleet() as (gateway, _):
        monkeypatch.setattr(gateway_pool, "order", heard_the_second_time)
        assert not gateway.pool("npu-01", "drained")["serves"]
        assert given == ["set server engine/npu-01 state drain"] * 2
        assert " npu-01 " in written[0], "a HAProxy that starts before the order would not know"
        monkeypatch.setattr(gateway_pool, "order", lambda *_: None)
        with pytest.raises(gateway_pool.Problem, match="expected npu-02 drained, found it ready"):
            gateway.pool("npu-02", "drained", timeout=0.5)


def test_a_drain_that_is_undone_while_it_waits_is_ordered_again() -> None:
    with fleet() as (gateway, instances), gateway.connect() as connection, ThreadPoolExecutor() as beside:
        connection.sendall(gateway.post(b'{"hold":true}'))
        gateway.until(lambda: any(instance.begun for instance in instances.values()))
        (name,) = [name for name, instance in instances.items() if instance.begun]
        told = beside.submit(gateway.pool, name, "drained")
        gateway.until(lambda: gateway.pool(name)["found"] == "drained")
        gateway_pool.order(gateway.pool_at["socket"], f"set server engine/{name} state ready")
        gateway.until(lambda: gateway.pool(name)["found"] == "drained")
        instances[name].release.set()
        assert (told.result()["in_flight"], told.result()["serves"], told.result()["found"]) == (0, False, "ready")
        assert answer(connection).status == 200


def test_the_instance_with_the_fewest_requests_gets_the_next() -> None:
    with fleet() as (gateway, instances), gateway.connect() as first, gateway.connect() as second:
        # One after the other: two threads of HAProxy may each find the same one free at the same moment.
        for number, connection in enumerate((first, second), 1):
            connection.sendall(gateway.post(b'{"hold":true}'))
            gateway.until(lambda number=number: sum(len(one.begun) for one in instances.values()) == number)  # type: ignore[misc]
        (free,) = [name for name, instance in instances.items() if not instance.begun]
        for _ in range(5):
            assert gateway.ask(gateway.post(b"{}")).status == 200
            # The client has its reply a moment before HAProxy has counted it as complete.
            gateway.until(lambda: gateway.pool(free)["in_flight"] == 0)
        assert len(instances[free].begun) == 5
        for instance in instances.values():
            instance.release.set()
        assert [answer(connection).status for connection in (first, second)] == [200, 200]


def test_a_full_instance_is_asked_for_its_health_all_the_same() -> None:
    with fleets.before_a_front(8, gateway_instance_connections=6) as (gateway, engine), ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in range(8)]
        for client in clients:
            client.sendall(gateway.post(b'{"hold":true}'))
        gateway.until(lambda: gateway.pool("npu-01")["in_flight"] == 6)

        def asked() -> int:
            return [path for path, *_ in engine.requests].count("/health")

        before = asked()
        gateway.until(lambda: asked() > before + 3)
        pool = gateway.pool("npu-01")
        assert (pool["serves"], pool["in_flight"]) == (True, 6)
        engine.release.set()
        assert [answer(client).status for client in clients] == [200] * 8


def test_what_finds_no_room_waits_for_it_and_is_then_told_to_come_back() -> None:
    limits = {"gateway_instance_connections": 1, "gateway_queue_timeout_seconds": 2, "ocr_front_retry_after_seconds": 9}
    with fleet(**limits) as (gateway, instances), ExitStack() as stack:
        held = [stack.enter_context(gateway.connect()) for _ in NAMES]
        for client in held:
            client.sendall(gateway.post(b'{"hold":true}'))
        gateway.until(lambda: all(len(instance.begun) == 1 for instance in instances.values()))
        started = time.monotonic()
        told = gateway.ask(gateway.post(b"{}"))
        assert (told.status, told.headers["retry-after"]) == (503, "9")
        assert time.monotonic() - started >= 2
        assert all(gateway.pool(name)["serves"] for name in NAMES)
        with gateway.connect() as waiting:
            waiting.sendall(gateway.post(b"{}"))
            gateway.until(lambda: gateway.waiting() == 1)
            for instance in instances.values():
                instance.release.set()
            assert [answer(client).status for client in (*held, waiting)] == [200] * 4
        assert gateway.finished().count("end=sQ") == 1


@pytest.mark.parametrize("drained", [False, True], ids=["fell out", "drained"])
def test_one_that_comes_back_gets_its_share_little_by_little(drained: bool) -> None:
    with fleet(gateway_slow_start_seconds=6) as (gateway, instances):
        assert gateway.weight("npu-01") == 100
        if drained:
            gateway.pool("npu-01", "drained")
        instances["npu-01"].kill()
        gateway.until(lambda: "DOWN" in gateway.pool("npu-01")["status"])
        instances["npu-01"].start()
        if drained:
            gateway.until(lambda: "L7OK" in gateway.pool("npu-01")["status"])
        assert gateway.pool("npu-01", "ready")["serves"]
        assert gateway.weight("npu-01") < 50
        gateway.until(lambda: gateway.weight("npu-01") == 100)


def test_a_chunk_arrives_before_the_reply_ends() -> None:
    with fleet() as (gateway, instances), gateway.connect() as connection:
        connection.sendall(gateway.post(b'{"stream":true}'))
        received = b""
        while b"first" not in received:
            received += connection.recv(4096)
        assert b"last" not in received
        for instance in instances.values():
            instance.release.set()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(4096)


def test_a_gateway_whose_connections_are_all_taken_keeps_its_address() -> None:
    shared = {"gateway_virtual_address": "192.0.2.100/24", "gateway_virtual_interface": "lo"}
    with fleet(ocr_front_max_connections=4, **shared) as (gateway, _), ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(gateway.connect())
            client.sendall(gateway.post(b"{}"))
            assert answer(client).status == 200
        with gateway.connect() as further:
            further.sendall(gateway.post(b"{}"))
            # As keepalived asks it.
            program = PROJECT / "roles" / "gateway" / "files" / "gateway_alive.py"
            asked = subprocess.run([sys.executable, program, gateway.run / "alive.sock"], check=False)
            assert asked.returncode == 0
            stack.close()
            assert answer(further).status == 200


def test_the_gateway_tells_of_its_pool_whoever_may_ask_and_of_no_engine() -> None:
    may = {"ocr_front_metrics_enabled": True, "ocr_front_metrics_sources": ["127.0.0.0/8"]}
    with fleet(**may) as (gateway, instances):
        instances["npu-01"].kill()
        gateway.until(lambda: not gateway.pool("npu-01")["serves"])
        told = gateway.ask(gateway.head("/metrics/front"))
        lines = told.body.decode().splitlines()
        assert told.status == 200
        # As the rules have them.
        assert 'haproxy_backend_active_servers{proxy="engine"} 2' in lines
        up = [line for line in lines if line.startswith("haproxy_server_status{") and 'state="UP"' in line]
        assert len(up) == len(NAMES)
        assert gateway.ask(gateway.head("/metrics/front", None)).status == 401
        assert gateway.ask(gateway.head("/metrics")).status == 404
        instances["npu-01"].start()


def test_clients_have_keys_of_the_gateways_and_instances_one_of_their_own() -> None:
    with fleet() as (gateway, instances):
        assert gateway.ask(gateway.post(b"{}", None)).status == 401
        assert gateway.ask(gateway.post(b"{}", INTERNAL_KEY)).status == 401
        served = gateway.ask(gateway.post(b"{}", "alice"))
        assert served.status == 200
        (headers,) = [header for instance in instances.values() for header in instance.headers]
        assert headers["authorization"] == f"Bearer {INTERNAL_KEY}"
        assert headers["x-request-id"] == served.headers["x-request-id"]
        written = (gateway.folder / "haproxy.cfg").read_text() + gateway.finished()
    assert not [key for key in (*KEYS.values(), INTERNAL_KEY) if key in written]
    assert "key=alice" in written


def test_a_client_keeps_its_connection_over_instances() -> None:
    with fleet() as (gateway, instances), gateway.connect() as connection:
        for _ in range(9):
            connection.sendall(gateway.post(b"{}"))
            assert answer(connection).status == 200
        assert all(instance.begun for instance in instances.values())


def test_when_nobody_serves_clients_are_told_to_come_back_at_once() -> None:
    with fleet(ocr_front_retry_after_seconds=9) as (gateway, instances):
        for instance in instances.values():
            instance.kill()
        gateway.until(lambda: not any(gateway.pool(name)["serves"] for name in NAMES))
        told = gateway.ask(gateway.post(b"{}"))
        assert (told.status, told.headers["retry-after"]) == (503, "9")
        for instance in instances.values():
            instance.start()
