"""The front, the request guard and the sandbox with real vLLM: who gets in, what gets through, and who sees a key."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from testinfra.host import Host

from guard_inputs import BAD, CHAT, GOOD, Bad
from lab import INVENTORY, WEIGHTS, Play, Played, chat, container_memory, container_start, latest_report
from ledger import ledger
from promptness import REFUSAL_SECONDS, promptly
from raw_requests import HOST, KEY, MODELS, RAW, head, tell
from rendering import PROJECT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

SOCKET = "/run/glm-ocr/engine.sock"
#: Somebody whom neither host nor image knows.
SANDBOX = {
    "vllm_service_sandbox": True,
    "vllm_service_sandbox_user": "10001:10001",
    "vllm_service_sandbox_memory": "12g",
}
#: How long a refusal may take, and by how much all of them together may make the engine grow.
GROWTH_BYTES = 100e6
#: uvicorn's lines, one a request.
SEEN = 'HTTP/1\\.[01]"|Invalid HTTP request'
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """A key of the validation and two of clients, new for each run."""
    return {name: secrets.token_hex(24) for name in ("validation", "alice", "bob")}


@pytest.fixture(scope="module")
def choices(keys: dict[str, str]) -> dict[str, Any]:
    """What the inventory of a guarded site says."""
    return {"glm_ocr_exposure": "front", "glm_ocr_keys": keys, "vllm_service_guard": True} | SANDBOX


@pytest.fixture(scope="module")
def guarded(deployed: Played, choices: dict[str, Any], play: Play) -> Played:
    result = play("deploy.yml", **choices)
    assert result.rc == 0, result.failures
    return result


def test_a_second_run_changes_nothing(guarded: Played, choices: dict[str, Any], node: Host, play: Play) -> None:
    before = container_start(node)
    again = play("deploy.yml", **choices)
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert container_start(node) == before
    checked = play("deploy.yml", check=True, **choices)
    assert (checked.rc, checked.changed) == (0, 0), checked.failures


def test_the_engine_has_no_network_and_all_stages_pass(
    guarded: Played, choices: dict[str, Any], node: Host, play: Play
) -> None:
    network = node.check_output("docker container inspect --format '{{.HostConfig.NetworkMode}}' glm-ocr")
    assert network == "none"
    assert "haproxy" in node.check_output("ss --listening --tcp --numeric --processes 'sport = :8000'")
    validated = play("validate.yml", **choices)
    report = json.loads((latest_report() / "report.json").read_text())
    assert {name: stage and stage["verdict"] for name, stage in report["stages"].items()} == dict.fromkeys(
        report["stages"], "PASS"
    )
    assert validated.rc == 0, validated.failures


def test_the_engine_is_in_its_sandbox(guarded: Played, node: Host) -> None:
    container = json.loads(node.check_output("docker container inspect glm-ocr"))[0]
    host = container["HostConfig"]
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
    assert (host["ReadonlyRootfs"], host["SecurityOpt"]) == (True, ["no-new-privileges"])
    # A node of the lab may have no such controllers: Docker says so, and leaves the limits out.
    can = json.loads(node.check_output("docker info --format '{{json .}}'"))
    limits = (12 << 30 if can["MemoryLimit"] else 0, 8192 if can["PidsLimit"] else None)
    assert (host["Memory"], host["PidsLimit"]) == limits
    assert set(host["Tmpfs"]) == {"/tmp", "/run", "/home/glm-ocr"}
    writable = [mount["Destination"] for mount in container["Mounts"] if mount["RW"]]
    assert sorted(writable) == ["/home/glm-ocr/.cache", "/run/glm-ocr"]
    # What the kernel says of every process in it: the first is docker's --init.
    pids = node.check_output("docker top glm-ocr -o pid").split()[1:]
    assert len(pids) > 2
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in node.check_output(f"cat /proc/{pid}/status").splitlines())
        assert status["Uid"].split() == ["10001"] * 4
        assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"].strip() == "1"
    for path in ("/usr/local/bin/x", "/root/x", "/etc/x"):
        assert "Read-only file system" in node.run(f"docker exec --user 0 glm-ocr touch {path}").stderr


def test_weights_that_the_engine_may_not_read_are_refused(
    guarded: Played, choices: dict[str, Any], node: Host, play: Play
) -> None:
    before = container_start(node)
    node.check_output(f"chmod 0600 {WEIGHTS}/config.json")
    try:
        refused = play("deploy.yml", **choices)
    finally:
        node.check_output(f"chmod 0644 {WEIGHTS}/config.json")
    assert refused.rc != 0
    assert "[PROBE_ACCESS]" in refused.failures
    assert f"{WEIGHTS}/config.json (mode 0600, owner 0:0)" in refused.failures
    assert container_start(node) == before


def test_no_key_no_inference(guarded: Played, node: Host, url: str, keys: dict[str, str]) -> None:
    """Every route of the engine's own list, and those that it does not list."""
    listed = json.loads(node.check_output(f"curl --silent --unix-socket {SOCKET} http://localhost/openapi.json"))
    unlisted = ["/invocations", "/ping", "/metrics", "/docs", "/openapi.json", "/v1/../v1/chat/completions"]
    routes = {path: [method for method in METHODS if method in item] for path, item in listed["paths"].items()}
    routes |= {path: ["get", "post"] for path in unlisted if path not in routes}
    assert len(routes) > 20
    body = {"model": "glm-ocr", "prompt": "OK", "messages": [{"role": "user", "content": "OK"}], "max_tokens": 1}
    for credentials in ({}, {"Authorization": "Bearer " + "x" * 48}, {"Authorization": keys["alice"]}):
        for path, methods in routes.items():
            for method in methods:
                reply = requests.request(method, url + path, json=body, headers=credentials, timeout=10)
                assert reply.status_code in (401, 404, 405), f"{method} {path}: {reply.status_code}"
    assert chat(url, "OK", max_tokens=1, key=keys["alice"]).status_code == 200


def send(url: str, bad: Bad, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return requests.post(url + bad.path, data=bad.body, headers=headers, timeout=30).status_code


def test_bad_input_is_refused_and_a_second_client_loses_nothing(
    guarded: Played, node: Host, url: str, keys: dict[str, str]
) -> None:
    assert len(BAD) >= 60
    before = container_memory(node)
    with ledger(url, keys["bob"]) as book:
        answers = {bad.name: (bad, *promptly(functools.partial(send, url, bad, keys["validation"]))) for bad in BAD}
    grown = container_memory(node) - before
    # The front has no route to what the guard would refuse by its path.
    wrong = {
        name: (bad.status, status)
        for name, (bad, status, _) in answers.items()
        if status != bad.status and (bad.path == CHAT or status != 404)
    }
    assert wrong == {}
    assert {name: seconds for name, (_, _, seconds) in answers.items() if seconds >= REFUSAL_SECONDS} == {}
    assert (book.lost, book.refused) == ([], 0)
    assert book.complete > 0
    assert grown < GROWTH_BYTES
    print(f"{len(BAD)} refused, the engine grew by {grown / 1e6:.0f} MB, {book.complete} requests beside them complete")


def seen_by_the_engine(node: Host) -> int:
    """Requests in the engine's own log, those that it could not read among them."""
    lines = node.run(f"journalctl --unit glm-ocr --output cat --no-pager --grep '{SEEN}'").stdout
    return len(lines.splitlines())


def test_of_all_raw_requests_the_engine_sees_nothing(
    guarded: Played, node: Host, url: str, keys: dict[str, str]
) -> None:
    address = (node.backend.hostname, 8000)
    behind = head(f"GET {MODELS} HTTP/1.1", HOST, KEY)
    before = seen_by_the_engine(node)
    wrong: dict[str, Any] = {}
    for raw in RAW:
        for text in [raw.text] if raw.cut else [raw.text, raw.text + behind]:
            sent = dataclasses.replace(raw, text=text).sent(f"{address[0]}:8000", keys["validation"])
            told, seconds = promptly(functools.partial(tell, address, sent, raw.cut))
            if len(told.answers) > 1 or told.answers[0] not in raw.statuses or not told.closed:
                wrong[raw.name] = (told.answers, told.closed)
            elif seconds >= REFUSAL_SECONDS:
                wrong[raw.name] = (told.answers, seconds)
    assert wrong == {}
    # What is written behind all of them: one that would have been seen is in the log before it.
    assert requests.get(url + MODELS, headers={"Authorization": f"Bearer {keys['alice']}"}, timeout=10).ok
    deadline = time.monotonic() + 30
    while (after := seen_by_the_engine(node)) == before:
        assert time.monotonic() < deadline, "the engine's log does not tell what it sees"
    assert after == before + 1


@pytest.mark.parametrize("name", ["the seed's", "an image", "plain Chinese", "marks to stop at"])
def test_good_input_is_answered(guarded: Played, url: str, keys: dict[str, str], name: str) -> None:
    (body,) = [body for known, path, body in GOOD if known == name and path == CHAT]
    headers = {"Authorization": f"Bearer {keys['alice']}", "Content-Type": "application/json"}
    reply = requests.post(url + CHAT, data=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text


def test_a_trickling_client_holds_nobody_up(guarded: Played, node: Host, url: str, keys: dict[str, str]) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {node.backend.hostname}:8000\r\nContent-Length: 100\r\n".encode()
    slow = [socket.create_connection((node.backend.hostname, 8000)) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(head)
        reply = chat(url, "OK", max_tokens=1, key=keys["alice"])
        assert reply.status_code == 200
        assert reply.elapsed.total_seconds() < 10
    finally:
        for connection in slow:
            connection.close()


def test_a_drain_completes_what_is_in_flight_and_tells_others_to_come_back(
    guarded: Played, choices: dict[str, Any], node: Host, play: Play, url: str, keys: dict[str, str]
) -> None:
    before = container_start(node)
    with ThreadPoolExecutor(32) as pool, ledger(url, keys["bob"]) as book:
        answers = [
            pool.submit(chat, url, f"long {number}", 3000, keys["alice"], ignore_eos=True) for number in range(32)
        ]
        time_until_running(node)
        restarted = play("playbooks/restart.yml", **choices)
    assert restarted.rc == 0, restarted.failures
    assert container_start(node) != before
    assert [answer.result().status_code for answer in answers] == [200] * 32
    assert book.lost == []
    # Refused is not lost: each was told when to come back, and did.
    assert book.retry_after
    assert set(book.retry_after) == {"10"}
    assert book.complete > 0


def time_until_running(node: Host) -> None:
    """Returns once the engine works on all that was sent to it, or has nothing left to wait for."""
    asked = f"curl --silent --unix-socket {SOCKET} http://localhost/metrics"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = node.check_output(asked).splitlines()
        if sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")) >= 16:
            return
    pytest.fail("the engine never had 16 requests at a time")


def test_a_killed_engine_leaves_no_stale_socket_and_a_killed_front_comes_back(
    guarded: Played, node: Host, url: str, keys: dict[str, str]
) -> None:
    before = container_start(node)
    node.check_output("kill -KILL $(systemctl show --property=MainPID --value glm-ocr-front)")
    answered(url, keys["alice"], 20)
    node.check_output("docker kill glm-ocr")
    answered(url, keys["alice"], 180)
    assert container_start(node) not in (before, "")


def answered(url: str, key: str, seconds: float) -> None:
    """Returns once a request is answered; asks less often than the key's rate allows."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < deadline:
        try:
            if chat(url, "OK", max_tokens=1, key=key).status_code == 200:
                return
        except requests.RequestException:
            pass
        pause.wait(0.2)
    pytest.fail(f"no answer within {seconds} s")


@pytest.fixture
def seen(guarded: Played, choices: dict[str, Any], node: Host, tmp_path: Path) -> dict[str, str]:
    """Whatever people get to see of a deployment: name to text."""
    (tmp_path / "site.json").write_text(json.dumps(choices))
    command = ["ansible-playbook", "-i", str(INVENTORY), "-l", "ascend910", "-vvv", "--diff"]
    texts = {}
    for playbook in ("deploy.yml", "playbooks/front_keys.yml", "playbooks/logs.yml"):
        done = subprocess.run(
            [*command, playbook, "-e", f"@{tmp_path / 'site.json'}"],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        texts[playbook] = done.stdout
    for command_line in (
        "journalctl --no-pager",
        "ps -eww -o args",
        "docker container inspect glm-ocr",
        "systemctl cat glm-ocr glm-ocr-front",
        "systemctl show glm-ocr glm-ocr-front",
        "cat /etc/glm-ocr/* /etc/glm-ocr-front/*",
        "cat /proc/[0-9]*/environ | tr '\\0' '\\n'",
        "grep -rh . /var/lib/glm-ocr",
    ):
        texts[command_line] = node.run(command_line).stdout
    bundle = max((PROJECT / "reports").glob("**/*.tar.gz"), key=lambda path: path.stat().st_mtime)
    texts["bundle"] = subprocess.check_output(["tar", "--extract", "--to-stdout", "--file", bundle]).decode(
        errors="replace"
    )
    texts["reports"] = "\n".join(
        path.read_text(errors="replace") for path in latest_report().resolve().rglob("*") if path.is_file()
    )
    return texts


def test_nobody_sees_a_key(seen: dict[str, str], keys: dict[str, str]) -> None:
    shown = {name: [owner for owner, key in keys.items() if key in text] for name, text in seen.items()}
    assert {name: owners for name, owners in shown.items() if owners} == {}
    # What was looked through is there, and says what it should.
    assert all(seen.values())
    assert "key=alice" in seen["journalctl --no-pager"]
