"""Debian's Prometheus and exporters in a node with real systemd, before front and real vLLM; the rules as they are."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from testinfra.host import Host

from lab import INVENTORY, Play, Played, chat, deploy_guarded, prometheus
from rendering import PROJECT, ROLES

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

#: How long the longest wait of the alert, a scrape and an evaluation may take together.
SECONDS = 420


@dataclass(frozen=True)
class Watched:
    node: Host
    key: str
    first: Played
    second: Played

    def ask(self, path: str) -> Any:
        return json.loads(self.node.check_output(f"curl --silent --fail http://127.0.0.1:9090/api/v1/{path}"))["data"]

    def comes(self, firing: bool, alert: str) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            told = {one["labels"]["alertname"] for one in self.ask("alerts")["alerts"] if one["state"] == "firing"}
            if (alert in told) == firing:
                return
            time.sleep(5)
        pytest.fail(f"{alert} {'does not fire' if firing else 'goes on'} after {SECONDS} s")


@pytest.fixture(scope="module")
def watched(deployed: Played, node: Host, play: Play) -> Iterator[Watched]:
    sources = ["127.0.0.0/8", node.backend.hostname]
    choices: dict[str, Any] = {"ocr_front_metrics_enabled": True, "ocr_front_metrics_sources": sources}
    with prometheus(node):
        key = deploy_guarded(play, **choices)
        inventories = (INVENTORY, PROJECT / "tests" / "lab" / "monitoring.yml")
        choices |= {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": key}}
        first, second = (
            play("playbooks/monitoring.yml", inventories=inventories, limit="node1", **choices) for _ in range(2)
        )
        assert first.rc == 0, first.failures
        yield Watched(node, key, first, second)


def test_all_is_read_and_a_second_play_changes_nothing(watched: Watched) -> None:
    assert "Prometheus reads all targets" in watched.first.stdout
    assert (watched.second.rc, watched.second.changed) == (0, 0), watched.second.failures
    units = watched.ask("query?query=node_systemd_unit_state%7Bstate=%22active%22%7D")["result"]
    assert {one["metric"]["name"]: one["value"][1] for one in units}.items() >= {
        "glm-ocr.service": "1",
        "glm-ocr-front.service": "1",
    }.items()


def test_vllm_has_every_metric_that_rules_and_dashboard_name(watched: Watched, url: str) -> None:
    assert chat(url, "x", 4, watched.key).status_code == 200
    files = ROLES / "monitoring" / "files"
    texts = [path.read_text() for path in (*files.glob("rules/*.yml"), files / "dashboard.json")]
    named = {name for text in texts for name in re.findall(r"\bvllm:\w+|\bhttp_requests_total", text)}
    assert len(named) > 8
    deadline = time.monotonic() + 60
    while missing := named - set(watched.ask("label/__name__/values")):
        assert time.monotonic() < deadline, missing
        time.sleep(5)


def test_an_engine_that_is_stopped_is_told_and_so_is_its_return(watched: Watched) -> None:
    watched.node.check_output("systemctl stop glm-ocr")
    try:
        watched.comes(True, "GlmOcrEngineDown")
    finally:
        watched.node.check_output("systemctl start glm-ocr")
    watched.comes(False, "GlmOcrEngineDown")
