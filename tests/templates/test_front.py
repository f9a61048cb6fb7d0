"""The front's configuration and unit, and the engine's behind it: against goldens, and what may not be rendered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

import vllm_release
from rendering import HostVariables, deploy_task
from unit_file import exec_start, serve_command

GOLDEN = Path(__file__).parent / "golden"
KEYS = {"validation": "v" * 32, "scanner-app": "s" * 64}
FRONT: dict[str, Any] = {"glm_ocr_exposure": "front", "glm_ocr_keys": KEYS}
TLS = {
    "glm_ocr_tls_certificate": "/srv/tls/npu-01.pem",
    "glm_ocr_tls_key": "/srv/tls/npu-01.key",
    "__ocr_front_certificate_text": "given",
}


@pytest.mark.parametrize(
    ("template", "variables", "golden"),
    [
        ("haproxy.cfg.j2", {}, "front.haproxy.cfg"),
        ("haproxy.cfg.j2", TLS, "front.tls.haproxy.cfg"),
        ("glm-ocr-front.service.j2", {}, "front.service"),
        ("glm-ocr.service.j2", {}, "docker.front.service"),
        ("glm-ocr.service.j2", {"glm_ocr_container_engine": "podman"}, "podman.front.service"),
    ],
)
def test_golden(template: str, variables: dict[str, Any], golden: str, tmp_path: Path) -> None:
    rendered = HostVariables(tmp_path, **FRONT | variables).template_file(template)
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / golden).write_text(rendered)
    assert rendered == (GOLDEN / golden).read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_the_engine_has_a_socket_and_no_network(tmp_path: Path) -> None:
    unit = HostVariables(tmp_path, **FRONT).template_file("glm-ocr.service.j2")
    words = exec_start(unit)
    assert words[words.index("--network") + 1] == "none"
    assert "/run/glm-ocr:/run/glm-ocr" in words
    serve = serve_command(unit)
    assert serve[serve.index("--uds") + 1] == "/run/glm-ocr/engine.sock"
    assert not {"--host", "--port"} & set(serve)


def test_the_probe_is_asked_about_the_command_of_the_unit(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, **FRONT)
    asked = host.template(deploy_task("vllm_probe")["vars"]["vllm_probe_serve_arguments"])
    assert ["vllm", "serve", *asked] == serve_command(host.template_file("glm-ocr.service.j2"))


def test_the_exposure_is_part_of_the_release_and_the_keys_are_not(tmp_path: Path) -> None:
    releases = []
    for folder, variables in (("a", {}), ("b", FRONT), ("c", FRONT | {"glm_ocr_keys": {"validation": "w" * 40}})):
        (tmp_path / folder).mkdir()
        releases.append(HostVariables(tmp_path / folder, **variables).template("{{ __vllm_service_release }}"))
    assert releases[0] != releases[1] == releases[2]


def test_the_map_has_digests_and_names_and_no_key(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, **FRONT)
    text = host.template("{{ __ocr_front_key_map }}")
    lines = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert lines == {hashlib.sha256(key.encode()).hexdigest(): name for name, key in KEYS.items()}
    for rendered in (text, host.template_file("haproxy.cfg.j2"), host.template_file("glm-ocr-front.service.j2")):
        assert not [key for key in KEYS.values() if key in rendered]


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"glm_ocr_bind_address": "10.0.0.1"}, "http://10.0.0.1:8000"),
        (TLS, "http://127.0.0.1:8100"),
        (TLS | {"glm_ocr_bind_address": "10.0.0.1"}, "http://127.0.0.1:8100"),
        ({"glm_ocr_bind_address": "::"}, "http://[::1]:8000"),
    ],
)
def test_the_host_reaches_the_front_and_the_front_knows_the_name(
    variables: dict[str, Any], url: str, tmp_path: Path
) -> None:
    host = HostVariables(tmp_path, **FRONT | variables)
    assert host.template("{{ glm_ocr_base_url }}") == url
    (names,) = [line for line in host.template_file("haproxy.cfg.j2").splitlines() if "acl our_host" in line]
    assert url.removeprefix("http://") in names.split()
    assert host.template("{{ __glm_ocr_problems + __vllm_service_problems + __ocr_front_problems }}") == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"glm_ocr_keys": {}}, "glm_ocr_keys must name a key for glm_ocr_exposure front, found none"),
        ({"glm_ocr_keys": {"validation": "v" * 31}}, "validation in glm_ocr_keys must be a key of 32 to 256"),
        ({"glm_ocr_keys": {"validation": ""}}, "validation in glm_ocr_keys must be a key of 32 to 256"),
        ({"glm_ocr_keys": KEYS | {"a": "b" * 31 + " "}}, "a in glm_ocr_keys must be a key of 32 to 256"),
        (
            {"glm_ocr_keys": KEYS | {"a b": "b" * 32}},
            "a name is of letters, digits, . _ and -, at most 63 of them, found a b",
        ),
        ({"glm_ocr_keys": KEYS | {"other": "s" * 64}}, "must be different keys, found one under two names"),
        (
            {"glm_ocr_keys": {"other": "s" * 64}},
            "glm_ocr_validation_key_name must be a name in glm_ocr_keys, found validation",
        ),
        ({"glm_ocr_tls_certificate": "/a"}, "must both be given or both be empty, found one"),
        (TLS | {"glm_ocr_local_port": 8000}, "another than glm_ocr_port, found 8000"),
        ({"glm_ocr_exposure": "direct"}, "glm_ocr_keys has no effect with glm_ocr_exposure direct"),
    ],
)
def test_keys_that_guard_nothing_are_refused_and_not_shown(
    overrides: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    host = HostVariables(tmp_path, **FRONT | overrides)
    (problem,) = host.template("{{ __glm_ocr_problems }}")
    assert complaint in problem
    assert not [key for key in host.values["glm_ocr_keys"].values() if key and key in problem]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"vllm_service_extra_flags": {"uds": "/tmp/a"}}, "uds is for glm_ocr_exposure front to set"),
        ({"vllm_service_extra_flags": {"api-key": "x"}}, "put keys into glm_ocr_keys"),
        ({"vllm_service_extra_environment": {"VLLM_API_KEY": "x"}}, "put keys into glm_ocr_keys"),
        ({"ocr_front_routes": {"/v1/models?x": "GET"}}, "found /v1/models?x"),
        ({"ocr_front_routes": {"/v1/models": "DELETE"}}, "/v1/models in ocr_front_routes must be GET or POST"),
        ({"ocr_front_routes": {"/metrics": "GET"}}, "/metrics is for ocr_front_metrics_sources"),
        ({"ocr_front_metrics_sources": ["monitor"]}, "addresses or networks, found monitor"),
        ({"ocr_front_hosts": ["ocr.example:8000"]}, "without a port, an IPv6 one in brackets, found ocr.example:8000"),
        ({"ocr_front_hosts": ["a b"]}, "found a b"),
        ({"ocr_front_body_limit_mib": 65}, "ocr_front_body_limit_mib must be 1 to 64, found 65"),
        ({"ocr_front_max_connections": 0}, "ocr_front_max_connections must be 1 to 9999999"),
        (
            {"ocr_front_requests_per_10_seconds_of": {"bob": "many"}},
            "bob in ocr_front_requests_per_10_seconds_of must be",
        ),
    ],
)
def test_what_cannot_be_rendered_is_named(overrides: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    problems = HostVariables(tmp_path, **FRONT | overrides).template(
        "{{ __vllm_service_problems + __ocr_front_problems }}"
    )
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize("template", ["glm-ocr-front.service.j2", "glm-ocr.service.j2"])
def test_systemd_accepts_the_units(template: str, tmp_path: Path) -> None:
    unit = HostVariables(tmp_path, **FRONT, glm_ocr_container_engine="podman").template_file(template)
    # The programs need not be on this machine.
    for program in ("/usr/sbin/haproxy", "/usr/bin/podman"):
        unit = unit.replace(program, "/bin/true")
    assert vllm_release.verify(unit, "glm-ocr-x.service") == []


def test_hosts_of_the_inventorys_group_have_a_front_and_a_guard(tmp_path: Path) -> None:
    host = HostVariables(tmp_path, "ascend910_front", glm_ocr_keys=KEYS)
    unit = host.template_file("glm-ocr.service.j2")
    assert "--middleware" in serve_command(unit)
    assert "--uds" in serve_command(unit)
    assert host.template("{{ __ocr_front_problems }}") == []
    assert host.template("{{ __vllm_service_problems }}") == []
