"""Prometheus as the playbook brings it, before HAProxy and an engine with vLLM's metrics: alerts fire and resolve."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import front as fronts
from drawn_dashboard import drawn
from monitored import Monitoring, alertmanager, comes
from playing import Played
from rendering import PROJECT

METRICS = (Path(__file__).parent / "engine.prom").read_text()
WATCHDOG = """\
glm_ocr_watchdog_state{service="glm-ocr",state="healthy"} 1
glm_ocr_watchdog_consecutive_failures{service="glm-ocr"} 0
glm_ocr_watchdog_restarts_total{service="glm-ocr"} 0
glm_ocr_watchdog_restarts_in_window{service="glm-ocr"} 0
glm_ocr_watchdog_last_round_timestamp_seconds{service="glm-ocr"} 99999999999
glm_ocr_watchdog_canary_seconds{service="glm-ocr"} 0.2
"""
DASHBOARD = json.loads((PROJECT / "roles" / "monitoring" / "files" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if "targets" in panel]
#: What nothing on this machine tells: no NPU, no certificate, and no systemd.
SILENT = re.compile("npu_chip|probe_ssl|node_systemd")


def ended(alert: dict[str, Any]) -> bool:
    return datetime.fromisoformat(alert["endsAt"]) <= datetime.now(timezone.utc)


@dataclass
class Watched:
    monitoring: Monitoring
    front: fronts.Front
    engine: fronts.Engine
    told: list[dict[str, Any]]
    first: Played
    second: Played

    def fires_and_resolves(self, name: str, undo: Callable[[], None]) -> dict[str, Any]:
        """The alert as the Alertmanager was told it; it was told its end too."""

        def told() -> list[dict[str, Any]]:
            return [alert for alert in self.told if alert["labels"]["alertname"] == name]

        try:
            comes(lambda: name in self.monitoring.firing(), f"{name} fires")
            alert = comes(told, f"{name} is told")[0]
        finally:
            undo()
        comes(lambda: name not in self.monitoring.firing(), f"{name} resolves")
        # The end of one that fires is in the future, in case no more is heard of it.
        comes(lambda: any(ended(one) for one in told()), f"the end of {name} is told")
        assert "<error" not in str(alert["annotations"])
        return dict(alert)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    fronts.requirement()
    with (
        fronts.running(ocr_front_metrics_enabled=True) as front,
        fronts.serving(front.socket) as engine,
        alertmanager() as (address, told),
        fronts.folder() as folder,
    ):
        engine.pages["/metrics"] = METRICS
        front.open()
        (folder / "textfiles").mkdir()
        (folder / "textfiles" / "glm-ocr-watchdog.prom").write_text(WATCHDOG)
        host = {
            "glm_ocr_exposure": "front",
            "glm_ocr_port": front.port,
            "glm_ocr_keys": dict(front.keys),
            "ocr_front_metrics_enabled": True,
        }
        monitoring = Monitoring(
            folder,
            {"npu-01": host},
            monitoring_alertmanagers=[address],
            monitoring_project_url="https://git.example.org/glm-ocr/",
        )
        try:
            first, second = monitoring.play(), monitoring.play()
            assert first.rc == 0
            monitoring.hasten()
            yield Watched(monitoring, front, engine, told, first, second)
        finally:
            monitoring.stop()


def test_a_second_play_changes_nothing(watched: Watched) -> None:
    assert "Prometheus reads all targets" in watched.first.output
    assert watched.second.rc == 0
    for host in ("npu-01", "monitor-01"):
        assert watched.first.recap(host)["changed"] > 0
        assert watched.second.recap(host)["changed"] == 0


def test_every_target_is_read(watched: Watched) -> None:
    jobs = {sample["metric"]["job"]: sample["value"][1] for sample in watched.monitoring.samples("up")}
    wanted = ("prometheus", "glm_ocr_engine", "glm_ocr_front", "glm_ocr_probe", "glm_ocr_host")
    assert jobs == dict.fromkeys(wanted, "1")
    assert watched.monitoring.samples("probe_success")[0]["value"][1] == "1"
    assert watched.monitoring.samples("probe_http_status_code")[0]["value"][1] == "401"


def test_no_key_is_in_what_prometheus_shows(watched: Watched) -> None:
    shown = watched.monitoring.ask("status/config")["yaml"] + json.dumps(watched.monitoring.ask("targets"))
    assert not [key for key in watched.front.keys.values() if key in shown]


def test_an_engine_that_goes_away_is_told_and_so_is_its_return(watched: Watched) -> None:
    watched.front.close()
    alert = watched.fires_and_resolves("GlmOcrEngineDown", watched.front.open)
    assert alert["labels"]["instance"] == "npu-01"
    assert alert["annotations"]["summary"].startswith("npu-01: the engine's metrics cannot be read")
    assert alert["annotations"]["runbook_url"] == (
        "https://git.example.org/glm-ocr/docs/runbooks/alerts.md#glmocrenginedown"
    )


def test_a_queue_that_grows_is_told_and_so_is_its_end(watched: Watched) -> None:
    def queue(requests: int) -> None:
        watched.engine.pages["/metrics"] = re.sub(r"(num_requests_waiting\S+) \S+", rf"\g<1> {requests}.0", METRICS)

    queue(40)
    alert = watched.fires_and_resolves("GlmOcrQueue", lambda: queue(0))
    assert alert["annotations"]["summary"] == "npu-01: 40 requests wait for the engine"


def test_requests_that_the_front_refuses_are_told(watched: Watched) -> None:
    """Not only counted by HAProxy: its exporter, the records and the rule agree on the names."""

    def refused() -> bool:
        for _ in range(5):
            assert watched.front.ask(watched.front.head("/v1/models", "x" * 40)).status == 401
        return "GlmOcrRefused" in watched.monitoring.firing()

    comes(refused, "GlmOcrRefused fires")
    comes(lambda: "GlmOcrRefused" not in watched.monitoring.firing(), "GlmOcrRefused resolves")


def test_no_rule_fails_and_every_record_is_there(watched: Watched) -> None:
    rules = [rule for group in watched.monitoring.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")} == {}
    for rule in rules:
        if rule["type"] == "recording":
            assert comes(partial(watched.monitoring.samples, rule["name"]), rule["name"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_prometheus_answers_every_query_of_the_dashboard(panel: dict[str, Any], watched: Watched) -> None:
    for target in panel["targets"]:
        expression = target["expr"].replace("$host", ".*")
        watched.monitoring.samples(expression)  # a query that is wrong is refused
        if not SILENT.search(expression) and panel["title"] != "Alerts":
            assert comes(partial(watched.monitoring.samples, expression), expression)


def test_every_panel_can_be_drawn(watched: Watched) -> None:
    page = drawn(DASHBOARD, watched.monitoring.ask, 30)
    if os.environ.get("DASHBOARD_PAGE"):
        Path(os.environ["DASHBOARD_PAGE"]).write_text(page)
    sections = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</section>", page))
    assert len(sections) == len(PANELS)
    for panel in PANELS:
        silent = panel["title"] == "Alerts" or all(SILENT.search(target["expr"]) for target in panel["targets"])
        assert ("no data" in sections[html.escape(panel["title"])]) <= silent, panel["title"]
