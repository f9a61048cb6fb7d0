"""Faults of the engine, the unit and the controller, provoked for real: rows of docs/failure-modes.md."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from testinfra.host import Host

from lab import (
    API_PROCESS,
    BACK_SECONDS,
    ENGINE_PROCESS,
    Controller,
    Play,
    Played,
    chat,
    container_start,
    engine_pid,
    extra_flags,
    release,
)
from ledger import ledger

pytestmark = pytest.mark.usefixtures("restored")


def wait_active(node: Host) -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while node.run("systemctl is-active glm-ocr").stdout.strip() != "active":
        assert time.monotonic() < deadline, "the service did not come back"


@pytest.mark.parametrize("process", [API_PROCESS, ENGINE_PROCESS])
def test_a_killed_engine_leaves_nothing_behind_and_serves_again(
    process: str, deployed: Played, node: Host, url: str
) -> None:
    before = container_start(node)
    old = set(node.check_output("docker top glm-ocr -eo pid").split()[1:])
    with ledger(url) as book:
        node.check_output(f"kill -9 {engine_pid(node, process)}")
        deadline = time.monotonic() + BACK_SECONDS
        while container_start(node) in ("", before):
            assert time.monotonic() < deadline
        left = old & set(node.check_output("ps -eo pid").split())
        wait_active(node)
    assert left == set()
    assert book.lost == []
    assert chat(url, "OK", max_tokens=1).status_code == 200


def test_requests_in_flight_complete_when_the_service_restarts(deployed: Played, play: Play, url: str) -> None:
    tokens = 4000
    body = {
        "model": "glm-ocr",
        "messages": [{"role": "user", "content": "OK"}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }

    def long_request(_: int) -> requests.Response:
        return requests.post(f"{url}/v1/chat/completions", json=body, timeout=200)

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(long_request, number) for number in range(4)]
        running = 0.0
        while running < 4:
            metrics = requests.get(f"{url}/metrics", timeout=10).text
            running = sum(
                float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")
            )
            assert not all(answer.done() for answer in answers), "the requests were not long enough"
        restarted = play("playbooks/restart.yml")
        replies = [answer.result() for answer in answers]
    assert restarted.rc == 0, restarted.failures
    assert [reply.status_code for reply in replies] == [200] * 4
    assert [reply.json()["choices"][0]["finish_reason"] for reply in replies] == ["length"] * 4
    assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [tokens] * 4


def test_sigterm_reaches_the_engine_and_it_ends_in_time(deployed: Played, node: Host) -> None:
    start = time.monotonic()
    node.check_output("systemctl stop glm-ocr")
    seconds = time.monotonic() - start
    result = node.check_output("systemctl show glm-ocr --property=Result")
    journal = node.check_output("journalctl --unit glm-ocr --lines 30 --no-pager --output=cat")
    node.check_output("systemctl start glm-ocr")
    assert seconds < 30  # idle: nothing to complete
    assert result == "Result=success"
    assert "Application shutdown complete" in journal


def test_a_hand_edited_file_is_found_and_mended(deployed: Played, node: Host, play: Play) -> None:
    before = container_start(node)
    node.check_output("echo HCCL_BUFFSIZE=1 >> /etc/glm-ocr/glm-ocr.env")
    mended = play("deploy.yml")
    assert mended.rc == 0, mended.failures
    assert mended.changed > 0
    assert "HCCL_BUFFSIZE=1\n" not in node.file("/etc/glm-ocr/glm-ocr.env").content_string
    assert container_start(node) != before


def test_a_restart_that_an_earlier_run_owed_is_made_up_for(deployed: Played, node: Host, play: Play) -> None:
    """As after a play that died between writing the files and restarting: right files, old process."""
    before = container_start(node)
    node.check_output("touch /etc/glm-ocr/glm-ocr.env")
    mended = play("deploy.yml")
    assert mended.rc == 0, mended.failures
    assert container_start(node) != before


def test_a_start_limit_that_was_hit_does_not_stop_a_deploy(deployed: Played, node: Host, play: Play) -> None:
    folder = "/run/systemd/system/glm-ocr.service.d"
    node.check_output(
        f"systemctl stop glm-ocr && mkdir -p {folder} && printf '[Service]\\nRestart=no\\nExecStartPre=/bin/false\\n'"
        f" > {folder}/fail.conf && systemctl daemon-reload"
    )
    try:
        for _ in range(6):
            node.run("systemctl start glm-ocr")
        # Not its Result, which stays that of the start before.
        journal = node.check_output("journalctl --unit glm-ocr --lines 5 --output cat --no-pager")
        assert "Start request repeated too quickly" in journal
    finally:
        node.check_output(f"rm -r {folder} && systemctl daemon-reload")
    assert play("deploy.yml").rc == 0


def test_a_foreign_container_of_our_name_is_refused(deployed: Played, node: Host, play: Play) -> None:
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    node.check_output(f"systemctl stop glm-ocr && docker create --name glm-ocr {image} true")
    try:
        refused = play("deploy.yml")
        kept = node.run("docker container inspect glm-ocr").rc
    finally:
        node.check_output("docker rm glm-ocr && systemctl start glm-ocr")
    assert refused.rc != 0
    assert "[HOST_CONTAINER]" in refused.failures
    assert kept == 0


#: Names of tasks in the order in which they run.
POINTS = [
    "deploy_lock : Acquire",
    "vllm_image : Inspect",
    "vllm_service : Stage",
    "vllm_service : Activate | Run",
    "ocr_smoke : Smoke",
    "vllm_service : Accept",
]


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(POINTS)), ids=[point.replace(" ", "") for point in POINTS])
def test_a_killed_controller_is_no_harm(number: int, deployed: Played, node: Host, play: Play) -> None:
    # Each point starts from another release, so that there is something to do.
    wanted = extra_flags(max_num_seqs=16 + number)
    controller = Controller("-e", json.dumps({"vllm_service_extra_flags": wanted}))
    controller.reaches(POINTS[number])
    controller.kill()
    rerun = play("deploy.yml", vllm_service_extra_flags=wanted)
    assert rerun.rc == 0, rerun.failures
    again = play("deploy.yml", vllm_service_extra_flags=wanted)
    assert (again.rc, again.changed) == (0, 0), again.failures


def test_a_second_controller_stops_at_once(deployed: Played, node: Host, play: Play) -> None:
    first = Controller()
    try:
        first.reaches("vllm_image : ")
        os.killpg(first.process.pid, signal.SIGSTOP)
        second = play("deploy.yml")
    finally:
        os.killpg(first.process.pid, signal.SIGCONT)
        first.process.communicate()
    assert second.rc != 0
    assert "[HOST_LOCKED]" in second.failures
    assert first.process.returncode == 0


def test_rollback_goes_to_the_release_before_and_back(deployed: Played, node: Host, play: Play) -> None:
    old = release(node)
    assert play("deploy.yml", vllm_service_extra_flags=extra_flags(max_num_seqs=8)).rc == 0
    new = release(node)
    assert new != old
    back = play("playbooks/rollback.yml")
    assert back.rc == 0, back.failures
    assert release(node) == old
    refused = play("playbooks/rollback.yml", vllm_service_rollback_to="0000000000000000")
    assert refused.rc != 0
    assert new in refused.failures
    assert release(node) == old
