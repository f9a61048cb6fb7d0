"""What the playbook renders for hosts of each kind, what it refuses, and what it tells of hosts that are down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from front import free_ports
from monitored import Monitoring

FRONT: dict[str, Any] = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": "v" * 32, "prometheus": "p" * 32}}


def test_each_host_is_read_as_it_is_exposed_and_what_is_down_is_told(tmp_path: Path) -> None:
    port, npu = free_ports(2)
    tls = {"glm_ocr_tls_certificate": "/given", "glm_ocr_tls_key": "/given", "ocr_front_metrics_enabled": True}
    monitoring = Monitoring(
        tmp_path,
        {
            "npu-01": FRONT | tls | {"glm_ocr_port": port},
            # Another host, by its address.
            "npu-02": {
                "ansible_host": "localhost",
                "glm_ocr_exposure": "direct",
                "glm_ocr_port": port,
                "host_exporter_npu_port": npu,
            },
        },
        # One whose own metrics are read, and one whose port alone is asked, for which no key is needed.
        gateways={
            "gw-01": FRONT | {"ansible_host": "127.0.0.1", "glm_ocr_port": port, "ocr_front_metrics_enabled": True},
            "gw-02": {"ansible_host": "127.0.0.1", "glm_ocr_port": port, "glm_ocr_keys": {"validation": "w" * 32}},
        },
        monitoring_key_name="prometheus",
        monitoring_tls_names={"npu-01": "ocr.example.org"},
    )
    try:
        played = monitoring.play()
    finally:
        monitoring.stop()
    assert played.rc == 0
    assert "glm_ocr_engine of npu-01 cannot be read" in played.output
    assert "p" * 32 not in played.output
    configuration = yaml.safe_load((tmp_path / "etc" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    keys = str(tmp_path / "etc" / "keys" / "npu-01")
    assert Path(keys).read_text() == "p" * 32
    assert Path(keys).stat().st_mode & 0o777 == 0o640
    for name in ("glm_ocr_engine/npu-01", "glm_ocr_front/npu-01"):
        assert jobs[name]["scheme"] == "https"
        assert jobs[name]["authorization"] == {"credentials_file": keys}
        assert jobs[name]["tls_config"] == {"server_name": "ocr.example.org"}
    assert jobs["glm_ocr_engine/npu-02"]["scheme"] == "http"
    assert "authorization" not in jobs["glm_ocr_engine/npu-02"]
    assert "glm_ocr_front/npu-02" not in jobs
    assert [one["labels"]["instance"] for one in jobs["glm_ocr_npu"]["static_configs"]] == ["npu-02"]
    assert [name for name in jobs if "gw-0" in name] == [
        "glm_ocr_gateway/gw-01",
        "glm_ocr_probe/gw-01",
        "glm_ocr_probe/gw-02",
    ]
    gateway = jobs["glm_ocr_gateway/gw-01"]
    assert gateway["metrics_path"] == "/metrics/front"
    assert gateway["static_configs"][0]["labels"] == {
        "job": "glm_ocr_gateway",
        "instance": "gw-01",
        "exposure": "front",
    }
    assert (tmp_path / "etc" / "keys" / "gw-01").read_text() == "p" * 32
    assert [one["labels"]["instance"] for one in jobs["glm_ocr_host"]["static_configs"]] == ["npu-01", "npu-02"]
    modules = yaml.safe_load((tmp_path / "etc" / "blackbox.yml").read_text())["modules"]
    assert {name: module["http"]["valid_status_codes"] for name, module in modules.items()} == {
        "npu-01": [401],
        "npu-02": [200],
        "gw-01": [401],
        "gw-02": [401],
    }


def test_the_instances_of_a_host_share_its_exporter(tmp_path: Path) -> None:
    here = {"glm_ocr_exposure": "direct", "ansible_port": 2222, "glm_ocr_devices": []}
    lines = {
        f"npu-01-{n}": here | {"glm_ocr_instance": n, "glm_ocr_port": port} for n, port in enumerate(free_ports(2))
    }
    monitoring = Monitoring(tmp_path, lines)
    try:
        first, second = monitoring.play(), monitoring.play("-l", "npu-01-1")
    finally:
        monitoring.stop()
    assert (first.rc, second.rc) == (0, 0)
    # Whichever line brings it, it tells of the units of both.
    (unit,) = (tmp_path / "units").glob("prometheus-node-exporter.service.d/*")
    assert "unit-include=(glm-ocr|glm-ocr-1).*[.](service|timer)" in unit.read_text()
    assert second.recap("npu-01-1")["changed"] == 0
    configuration = yaml.safe_load((tmp_path / "etc" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"] for job in configuration["scrape_configs"]}
    assert {"glm_ocr_engine/npu-01-0", "glm_ocr_engine/npu-01-1"} <= set(jobs)
    assert [one["labels"]["instance"] for one in jobs["glm_ocr_host"]] == ["npu-01-0"]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"monitoring_key_name": "nobody"}, "npu-01: glm_ocr_keys must have the key that monitoring_key_name names"),
        ({"monitoring_hosts": []}, "monitoring_hosts must name a host to watch, found none"),
        ({"monitoring_hosts": ["npu-09"]}, "monitoring_hosts: the inventory has no host npu-09"),
        ({"monitoring_gateways": ["gw-09"]}, "monitoring_gateways: the inventory has no host gw-09"),
        ({"monitoring_objectives": {"npu_celsius": "hot"}}, "monitoring_objectives must have request_seconds"),
        ({"monitoring_objectives": {"npu_celsius": "hot"}}, "npu_celsius in monitoring_objectives must be a number"),
    ],
)
def test_what_does_not_hold_together_is_refused(variables: dict[str, Any], told: str, tmp_path: Path) -> None:
    monitoring = Monitoring(tmp_path, {"npu-01": FRONT}, **variables)
    try:
        played = monitoring.play("-l", "monitoring")
    finally:
        monitoring.stop()
    assert played.rc != 0
    assert told in " ".join(played.output.split())
    assert not (tmp_path / "etc").exists()
