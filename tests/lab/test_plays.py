"""What the plays promise: nothing twice, nothing half, nothing lost."""

from __future__ import annotations

import time

import pytest
from testinfra.host import Host

from lab import STATE, WEIGHTS, Play, Played, chat, listener


def test_a_second_run_changes_nothing_and_is_quick(service: Host, play: Play) -> None:
    again = play("deploy.yml")
    assert (again.rc, again.changed) == (0, 0), again.failures
    # 15 s is what an idle machine must reach; CI's may be busy.
    assert again.seconds < 30


def test_check_mode_on_a_deployed_host(service: Host, play: Play) -> None:
    before = service.check_output(STATE)
    checked = play("deploy.yml", check=True)
    assert (checked.rc, checked.changed) == (0, 0), checked.failures
    assert service.check_output(STATE) == before


def test_a_foreign_listener_on_the_port_is_refused_by_name(service: Host, play: Play) -> None:
    # On IPv6 alone, so that it can be bound beside our own service.
    with listener(service, "AF_INET6", "IPPROTO_IPV6", "IPV6_V6ONLY", "::") as pid:
        refused = play("deploy.yml")
    assert refused.rc != 0
    assert "[HOST_PORT]" in refused.failures
    assert f"pid {pid}: python3 -c" in refused.failures


def test_a_wrong_weights_path_is_refused(service: Host, play: Play) -> None:
    refused = play("deploy.yml", glm_ocr_weights_path="/opt/atomgit/weights/absent")
    assert refused.rc != 0
    assert "[HOST_WEIGHTS]" in refused.failures
    assert "/opt/atomgit/weights/absent" in refused.failures


def test_all_findings_come_at_once(service: Host, play: Play) -> None:
    refused = play(
        "deploy.yml",
        glm_ocr_weights_path="/opt/absent",
        glm_ocr_devices=["/dev/davinci0", "/dev/davinci6", "/dev/davinci7"],
        glm_ocr_driver_paths=["/usr/local/absent"],
    )
    assert refused.rc != 0
    assert "3 finding(s)" in refused.failures
    assert "/dev/davinci6, /dev/davinci7" in refused.failures


def test_an_inventory_that_does_not_hold_together_is_refused(service: Host, play: Play) -> None:
    refused = play("deploy.yml", glm_ocr_port=0, glm_ocr_max_model_len=200000)
    assert refused.rc != 0
    assert "glm_ocr_port" in refused.failures
    assert "glm_ocr_max_model_len" in refused.failures


@pytest.mark.parametrize(("python", "found"), [("/opt/python-3.7", "found 3.7"), ("/opt/absent", "/opt/absent")])
def test_a_host_without_a_new_enough_python_hears_it_first(python: str, found: str, service: Host, play: Play) -> None:
    service.check_output("printf '#!/bin/sh\\necho 3.7\\n' > /opt/python-3.7 && chmod +x /opt/python-3.7")
    try:
        refused = play("deploy.yml", ansible_python_interpreter=python)
    finally:
        service.check_output("rm /opt/python-3.7")
    assert refused.rc != 0
    assert "[HOST_PYTHON]" in refused.failures
    assert found in refused.failures


def test_a_truncated_weights_file_is_refused(service: Host, play: Play) -> None:
    copy = "/opt/atomgit/weights/truncated"
    service.check_output(f"cp -r {WEIGHTS} {copy} && truncate --size=-1 {copy}/model.safetensors")
    try:
        refused = play("deploy.yml", glm_ocr_weights_path=copy)
    finally:
        service.check_output(f"rm -r {copy}")
    assert refused.rc != 0
    assert "[WEIGHTS_DAMAGED]" in refused.failures


def test_a_flipped_byte_is_refused_before_the_swap(service: Host, play: Play) -> None:
    copy = "/opt/atomgit/weights/flipped"
    flip = (
        "import sys; f = open(sys.argv[1], 'r+b'); f.seek(-1000, 2); b = f.read(1)[0]; f.seek(-1, 1);"
        " f.write(bytes([b ^ 1]))"
    )
    service.check_output(f'cp -r {WEIGHTS} {copy} && python3 -c "{flip}" {copy}/model.safetensors')
    try:
        refused = play("deploy.yml", glm_ocr_weights_path=copy)
    finally:
        service.check_output(f"rm -r {copy}")
    assert refused.rc != 0
    assert "[WEIGHTS_ALTERED]" in refused.failures
    assert "model.safetensors" in refused.failures


def test_active_means_that_it_generates(deployed: Played, node: Host, url: str) -> None:
    node.check_output("systemctl restart --no-block glm-ocr")
    states = set()
    deadline = time.monotonic() + 300
    while (state := node.run("systemctl is-active glm-ocr").stdout.strip()) != "active":
        states.add(state)
        assert time.monotonic() < deadline, states
    assert chat(url, "OK", max_tokens=1).status_code == 200
    assert "activating" in states
