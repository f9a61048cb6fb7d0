"""The gateway's configuration and unit: against goldens, and what may not be rendered."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from rendering import HostVariables

# A certificate of the instances' own.
TLS = {"glm_ocr_tls_certificate": "/srv/tls/npu.pem", "glm_ocr_tls_key": "/srv/tls/npu.key"}
GOLDEN = Path(__file__).parent / "golden"
INTERNAL = "i" * 64
INSTANCES = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": "n" * 32, "gateway": INTERNAL}}
SECURE = {
    "glm_ocr_tls_certificate": "/srv/tls/gw-01.pem",
    "glm_ocr_tls_key": "/srv/tls/gw-01.key",
    "__ocr_front_certificate_text": "given",
    "gateway_instances_ca": "/srv/tls/ca.pem",
    "gateway_retry_503_enabled": False,
}
# The second of two gateways that share an address.
SHARED = {
    "gateway_virtual_address": "192.0.2.100/24",
    "gateway_virtual_interface": "bond0",
    "gateway_peers": ["gw-02", "gw-01"],
}


def gateway(folder: Path, instances: dict[str, Any] | None = None, /, **overrides: Any) -> HostVariables:
    """gw-01 as the inventory's group has it, before two instances that ``instances`` holds for."""
    host = HostVariables(
        folder,
        "gateway",
        glm_ocr_keys={"validation": "v" * 32, "scanner-app": "s" * 64},
        __ocr_front_service="glm-ocr-gateway",
        __ocr_front_template="gateway.cfg.j2",
    )
    host.values["hostvars"] |= {"gw-02": {"ansible_host": "192.0.2.9"}, "gw-03": {"ansible_host": "gw-03.example"}}
    for name in ("npu-01", "npu-02"):
        host.values["hostvars"][name] |= INSTANCES if instances is None else instances
    host.values |= overrides
    # As the role hands it to the front's.
    host.values["__ocr_front_own_hosts"] = host.template("{{ __gateway_own_hosts }}")
    return host


@pytest.mark.parametrize(
    ("template", "variables", "golden"),
    [
        ("gateway.cfg.j2", {}, "gateway.haproxy.cfg"),
        ("gateway.cfg.j2", SECURE, "gateway.tls.haproxy.cfg"),
        ("glm-ocr-front.service.j2", {}, "gateway.service"),
        ("keepalived.conf.j2", SHARED, "gateway.keepalived.conf"),
        ("glm-ocr-gateway-address.service.j2", SHARED, "gateway-address.service"),
    ],
)
def test_golden(template: str, variables: dict[str, Any], golden: str, tmp_path: Path) -> None:
    rendered = gateway(tmp_path, **variables).template_file(template)
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / golden).write_text(rendered)
    assert rendered == (GOLDEN / golden).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


@pytest.mark.parametrize(("variables", "count"), [(SHARED, 1), ({}, 0)])
def test_a_shared_address_is_a_name_of_the_gateway_and_haproxy_answers_keepalived(
    variables: dict[str, Any], count: int, tmp_path: Path
) -> None:
    host = gateway(tmp_path, **variables)
    text = host.template_file("gateway.cfg.j2")
    assert text.count(" 192.0.2.100 ") == text.count("frontend alive") == count
    assert host.template("{{ __gateway_problems }}") == []


def test_the_instances_key_comes_from_them_and_is_in_no_configuration(tmp_path: Path) -> None:
    host = gateway(tmp_path)
    assert host.template("{{ gateway_instances_key }}").strip() == INTERNAL
    assert host.template("{{ __glm_ocr_problems + __ocr_front_problems + __gateway_problems }}") == []
    assert INTERNAL not in host.template_file("gateway.cfg.j2")


def test_one_key_can_be_changed_for_another_while_both_hold(tmp_path: Path) -> None:
    second = "j" * 64
    keys = {"glm_ocr_keys": {"validation": "n" * 32, "gateway": INTERNAL, "gateway-2": second, "gatewayed": "c" * 32}}
    host = gateway(tmp_path, INSTANCES | keys, gateway_key_name="gateway-2")
    assert host.template("{{ __gateway_problems }}") == []
    assert host.template("{{ gateway_instances_key }}").strip() == second
    host.values["gateway_key_name"] = "gateway"
    assert host.template("{{ gateway_instances_key }}").strip() == INTERNAL
    (tmp_path / "instance").mkdir()
    text = HostVariables(tmp_path / "instance", **INSTANCES | keys).template_file("haproxy.cfg.j2")
    exempt = re.findall(r"set-var\(txn.limit\) int\(100000\) if { var\(txn.key_name\) -m str (\S+) }", text)
    assert exempt == ["validation", "gateway", "gateway-2"]


def test_instances_without_keys_are_sent_none(tmp_path: Path) -> None:
    host = gateway(tmp_path, {})
    assert host.template("{{ __gateway_problems }}") == []
    assert "set-header authorization" not in host.template_file("gateway.cfg.j2")


def test_an_instance_does_not_count_what_its_gateway_sends(tmp_path: Path) -> None:
    rates = "{{ ocr_front_requests_per_10_seconds_of }}"
    assert HostVariables(tmp_path, **INSTANCES).template(rates) == {"validation": 100000, "gateway": 100000}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"ansible_host": "192.0.2.10"}, None),
        ({"ansible_host": "2001:db8::10"}, None),
        ({"ansible_host": "gw-01.example"}, "found gw-01.example"),
        ({}, "found a gateway without ansible_host"),
    ],
)
def test_an_instance_tells_its_gateways_by_their_addresses(
    line: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    host = HostVariables(tmp_path, **INSTANCES)
    host.values["groups"] = {"gateway": ["gw-01"]}
    host.values["hostvars"]["gw-01"] = line
    problems = host.template("{{ __ocr_front_problems }}")
    if found:
        (problem,) = problems
        assert found in problem
    else:
        assert problems == []
        assert f"!{{ src {line['ansible_host']} }}" in host.template_file("haproxy.cfg.j2")


def test_who_restarts_an_engine_knows_the_gateways(tmp_path: Path) -> None:
    host = HostVariables(tmp_path)
    assert host.template("{{ glm_ocr_gateways }}") == []
    host.values["groups"] = {"gateway": ["gw-01"]}
    assert host.template("{{ glm_ocr_gateways }}") == ["gw-01"]


@pytest.mark.parametrize(("peers", "share"), [([], 96), (["gw-01"], 96), (["gw-01", "gw-02"], 48)])
def test_gateways_share_the_connections_of_an_instance(peers: list[str], share: int, tmp_path: Path) -> None:
    text = gateway(tmp_path, gateway_peers=peers).template_file("gateway.cfg.j2")
    assert text.count(f" maxconn {share} tcp-ut 30s") == 1


def test_what_is_taken_for_an_instances_limit_is_the_default_of_its_role(tmp_path: Path) -> None:
    host = gateway(tmp_path, gateway_instance_connections=112)
    assert host.template("{{ __gateway_problems }}") == []
    # The gateway has another; the instances' is nowhere in the inventory.
    (tmp_path / "instance").mkdir()
    assert HostVariables(tmp_path / "instance").template("{{ ocr_front_max_connections }}") == 128
    host.values["gateway_instance_connections"] = 113
    first, second = host.template("{{ __gateway_problems }}")
    assert "npu-01: ocr_front_max_connections must be 129 or more" in first
    assert "npu-02" in second


@pytest.mark.parametrize(
    ("different", "overrides", "complaint"),
    [
        ({"glm_ocr_keys": {"validation": "n" * 32, "gateway": "o" * 64}}, {}, "npu-02 must know the key that is sent"),
        ({"glm_ocr_keys": {"validation": "n" * 32}}, {}, "npu-02 must know the key that is sent"),
        (TLS, {}, "npu-02 speaks TLS: gateway_instances_ca must name the authority"),
        (
            {"glm_ocr_tls_certificate": ""},
            {"gateway_instances_ca": "/srv/tls/ca.pem"},
            "npu-02 must have a certificate",
        ),
        (
            {"glm_ocr_bind_address": "127.0.0.1"},
            {},
            "npu-02: glm_ocr_bind_address must be one that the gateway reaches",
        ),
        ({"glm_ocr_bind_address": "::1"}, {}, "npu-02: glm_ocr_bind_address must be one that the gateway reaches"),
        ({"ansible_host": "npu-02.example"}, {}, "npu-02 must have an address for ansible_host, found a name"),
        ({"ocr_front_max_connections": 100}, {}, "npu-02: ocr_front_max_connections must be 112 or more"),
    ],
)
def test_an_instance_that_does_not_fit_is_named(
    different: dict[str, Any], overrides: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    host = gateway(tmp_path, INSTANCES | TLS if overrides else INSTANCES, **overrides)
    assert host.template("{{ __gateway_problems }}") == []
    host.values["hostvars"]["npu-02"] |= different
    (problem,) = host.template("{{ __gateway_problems }}")
    assert complaint in problem
    assert not [key for key in (INTERNAL, "o" * 64, "n" * 32) if key in problem]


def test_instances_with_addresses_of_either_family_fit(tmp_path: Path) -> None:
    host = gateway(tmp_path)
    host.values["hostvars"]["npu-02"]["ansible_host"] = "2001:db8::12"
    assert host.template("{{ __gateway_problems }}") == []
    assert "server npu-02 [2001:db8::12]:8000\n" in host.template_file("gateway.cfg.j2")
    del host.values["hostvars"]["npu-02"]["ansible_host"]
    (problem,) = host.template("{{ __gateway_problems }}")
    assert "npu-02 must have an address for ansible_host" in problem


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"gateway_instances": []}, "must name a host, found none"),
        ({"gateway_instances": ["npu-09"]}, "must be hosts of the inventory, found npu-09"),
        ({"gateway_instances": ["npu-01", "gw-01"]}, "a gateway is a host of its own, found gw-01"),
        ({"glm_ocr_exposure": "direct"}, "must be front, found direct"),
        ({"gateway_instances_key": ""}, "put a key named gateway into the glm_ocr_keys of the instances"),
        ({"gateway_instances_key": "short"}, "must be a key of 32 to 256"),
        (
            {"gateway_key_name": "scanner", "gateway_instances_key": INTERNAL},
            "gateway_key_name must be gateway, or that with a dash and more, found scanner",
        ),
        ({"gateway_check_path": "/health check"}, "found /health check"),
        (
            {"gateway_instance_connections": 1, "gateway_peers": ["gw-01", "gw-02"]},
            "have one for each gateway, found 1",
        ),
        ({"gateway_queue_timeout_seconds": "long"}, "gateway_queue_timeout_seconds must be 1 to 9999"),
        ({"gateway_check_interval_seconds": 0}, "gateway_check_interval_seconds must be 1 to 9999"),
        (
            SHARED | {"gateway_virtual_address": "192.0.2.100"},
            "the length of its network, such as 192.0.2.100/24, found",
        ),
        (
            SHARED | {"gateway_virtual_address": "192.0.2.9/24"},
            "gateway_virtual_address must be an address of its own, found that of gw-02",
        ),
        (SHARED | {"gateway_virtual_interface": ""}, "gateway_virtual_interface must name the interface"),
        (SHARED | {"glm_ocr_bind_address": "192.0.2.10"}, "must be 0.0.0.0 where gateways share an address"),
        (SHARED | {"gateway_virtual_router_id": 256}, "must be 1 to 255, found 256"),
        (SHARED | {"gateway_peers": ["gw-01"]}, "must be 2 to 100 hosts, gw-01 among them, found gw-01"),
        (SHARED | {"gateway_peers": ["gw-01", "gw-02", "gw-09"]}, "must be hosts of the inventory, found gw-09"),
        (SHARED | {"gateway_peers": ["gw-01", "gw-03"]}, "gw-03 must have an address of the same family"),
    ],
)
def test_what_cannot_be_rendered_is_named(overrides: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (problem,) = gateway(tmp_path, **overrides).template("{{ __gateway_problems }}")
    assert complaint in problem


def test_every_instance_of_a_host_asks_the_same_gateway(tmp_path: Path) -> None:
    asked = HostVariables(tmp_path, glm_ocr_instance=1).template("{{ __gateway_pool }}")
    assert asked["instance"] == "npu-01"
    socket = gateway_socket(asked["service"])
    assert (asked["service"], asked["socket"]) == ("glm-ocr-gateway", socket)


def gateway_socket(service: str) -> str:
    """As the gateway's own configuration has it."""
    (line,) = [one for one in (GOLDEN / "gateway.haproxy.cfg").read_text().splitlines() if "stats socket" in one]
    assert service in line
    return line.split()[2]
