"""Faults of the engine, the unit and the controller, provoked for real: rows of docs/failure-modes.md."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from testinfra.host import Host

from lab import Play, Played, container_start

pytestmark = pytest.mark.usefixtures("restored")


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
