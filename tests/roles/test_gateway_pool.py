"""What the gateway's module makes of HAProxy's answers: tables, the state file, and answers that are none."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

import gateway_pool
from rendering import PROJECT

STATES = (
    "1\n"
    "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_port\n"
    "4 engine 1 npu-01 192.0.2.11 2 0 8000\n"
    "4 engine 2 npu-02 192.0.2.12 0 8 8000\n"
    "5 other 1 npu-01 192.0.2.11 2 1 8000\n\n"
)
STATISTICS = (
    "# pxname,svname,scur,status,check_status,check_code,\n"
    "engine,npu-01,3,UP,L7OK,200,\n"
    "engine,npu-02,,DRAIN,L4CON,,\n"
    "engine,BACKEND,3,UP,,,\n\n"
)
CONFIGURATION = """\
frontend clients
    server no 192.0.2.1:1
backend engine
    server npu-01 192.0.2.11:8000
    # server npu-03 192.0.2.13:8000
    server npu-02 [2001:db8::2]:8002 sni str(npu-02)

backend other
    server npu-04 192.0.2.14:8000
"""


def answers(monkeypatch: pytest.MonkeyPatch, *given: str | OSError) -> None:
    left = list(given)

    def say(path: str, command: str) -> str:
        answer = left.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(gateway_pool, "say", say)
    monkeypatch.setattr(gateway_pool, "PAUSE_SECONDS", 0)


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What systemd says, one after the other, the last one for ever."""
    states = ["active"]
    monkeypatch.setattr(gateway_pool, "unit_state", lambda _: states.pop(0) if len(states) > 1 else states[0])
    return states


def test_the_pool_is_of_one_backend() -> None:
    pool = gateway_pool.servers(STATES, STATISTICS, "engine")
    assert [(server.serves, server.decided, server.in_flight, server.status) for server in pool.values()] == [
        (True, "ready", 3, "UP L7OK 200"),
        (False, "drained", 0, "DRAIN L4CON"),
    ]


@pytest.mark.parametrize(
    "passing",
    [
        [""],
        [STATES.rstrip()],
        [STATES, ""],
        [STATES, STATISTICS.replace("engine,npu-02", "engine,npu-03")],
        [ConnectionResetError(104, "reset")],
        [FileNotFoundError(2, "not yet")],
    ],
    ids=["nothing", "cut", "no statistics", "another process", "reset", "no socket"],
)
def test_an_answer_of_a_haproxy_that_is_replaced_is_asked_for_again(
    passing: list[Any], unit: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, *passing, STATES, STATISTICS)
    assert list(gateway_pool.ask("socket", "engine", "gateway") or {}) == ["npu-01", "npu-02"]


def test_one_that_reloads_is_asked_when_it_has(unit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers meanwhile may be replaced by what has read the file before."""
    unit[:] = ["reloading", "reloading", "active"]
    answers(monkeypatch, STATES, STATISTICS)
    assert gateway_pool.ask("socket", "engine", "gateway")
    assert unit == ["active"]


@pytest.mark.parametrize("state", ["inactive", "failed", "deactivating", ""])
def test_one_that_does_not_run_is_not_waited_for(state: str, unit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    unit[:] = [state]
    answers(monkeypatch, ConnectionRefusedError(111, "refused"))
    assert gateway_pool.ask("socket", "engine", "gateway") is None


def test_instances_and_ports_are_the_configurations_own() -> None:
    assert gateway_pool.ports(CONFIGURATION, "engine") == {"npu-01": 8000, "npu-02": 8002}
    assert gateway_pool.ports("", "engine") == {}


def test_the_configuration_as_it_is_rendered_is_understood() -> None:
    for name in ("gateway.haproxy.cfg", "gateway.tls.haproxy.cfg"):
        text = (PROJECT / "tests" / "templates" / "golden" / name).read_text()
        assert gateway_pool.ports(text, "engine") == {"npu-01": 8000, "npu-02": 8000}


def test_the_state_file_has_decisions_and_nothing_that_the_configuration_has() -> None:
    decided = {"npu-01": "drained", "npu-02": "ready", "npu-03": "removed", "npu-09": "drained"}
    known = {"npu-01": 8001, "npu-02": 8000, "npu-03": 8003}
    text = gateway_pool.kept(decided, known, "engine")
    lines = [line.split() for line in text.splitlines()[2:]]
    assert [(line[3], line[4], line[6], line[17], line[18]) for line in lines] == [
        ("npu-01", "-", "8", "-", "8001"),
        ("npu-03", "-", "1", "-", "8003"),
    ]
    assert {len(line) for line in lines} == {20}, "with TLS's column it would turn TLS on or off"
    assert [row["srv_name"] for row in gateway_pool.rows(text, "engine")] == ["npu-01", "npu-03"]


def test_an_order_that_is_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "No such server.\n")
    with pytest.raises(gateway_pool.Problem, match="`set server`: No such server"):
        gateway_pool.order("socket", "set server")


def test_systemd_is_asked_for_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 0, stdout="LoadState=loaded\nActiveState=activating\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    assert gateway_pool.unit_state("gateway") == "activating"
