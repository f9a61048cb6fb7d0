"""Restart, rollback, drain and the way back after a failure, as an operator sees them: through their plays, on a host
whose systemd and Docker are stand-ins."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.releases import Store
from ansible.module_utils.weights_manifest import fingerprint, list_files

import fake_host
from fake_gateway import admin, configuration
from model_files import NANO, NANO_MANIFEST, flip, sha256
from playing import HERE, Played, play, stub
from rendering import PROJECT

OLD, NEW = "a" * 16, "b" * 16
#: As ssh writes a public key: the lengths of its parts before them.
SSH_KEY = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32


class Host:
    """This machine as a host that serves ``NEW``, with ``OLD`` found good before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("systemctl", "docker", "journalctl"):
            shutil.copyfile(fake_host.__file__, folder / "bin" / name)
            (folder / "bin" / name).chmod(0o755)
        self.weights = folder / "weights"
        shutil.copytree(NANO, self.weights)
        # The smoke's script is there already: only root could give it to root.
        scripts = folder / "lib" / "scripts"
        shutil.copytree(PROJECT / "files" / "scripts", scripts, ignore=shutil.ignore_patterns("__pycache__"))
        self.store = Store(str(folder / "state" / "releases"))
        for at, release in enumerate((OLD, NEW)):
            self.stage(release, base_url=f"http://127.0.0.1:1/{release}")
            self.store.mark_good(release)
            os.utime(self.store.path(release, "good"), (at + 1, at + 1))
        self.install(NEW)
        fake_host.CONTAINER, fake_host.HOST = folder / "container.json", folder
        fake_host.run_container(NEW)

    def stage(self, release: str, **record: Any) -> None:
        known = {
            "image_id": "sha256:0",
            "weights_path": str(self.weights),
            "weights_fingerprint": sha256(NANO_MANIFEST),
            "base_url": "http://127.0.0.1:1",
            "served_model_name": f"model-of-{release}",
            "max_model_len": 8192,
            "wait_ready": ["true"],
        }
        unit = f"ExecStart=docker run --label glm-ocr.release={release} image\n"
        self.store.stage(release, unit, "A=1\n", {**known, **record})

    def install(self, release: str) -> None:
        kept = self.store.get(release)
        assert kept is not None
        for path, text, mode in (("unit", kept.unit, 0o644), ("env", kept.environment, 0o640)):
            (self.folder / path).write_text(text)
            (self.folder / path).chmod(mode)

    @property
    def inner(self) -> dict[str, Any]:
        return {
            "__vllm_service_unit": str(self.folder / "unit"),
            "__vllm_service_environment_file": str(self.folder / "env"),
            "__deploy_lock_path": str(self.folder / "lock"),
            "glm_ocr_library_dir": str(self.folder / "lib"),
            "vllm_weights_manifest": str(NANO_MANIFEST),
        }

    def play(
        self,
        playbook: str,
        *options: str,
        hosts: Sequence[str] = ("npu-01",),
        gateways: dict[str, dict[str, Any]] | None = None,
        **variables: Any,
    ) -> Played:
        given = json.dumps(self.inner | variables)
        return play(self.folder, playbook, dict.fromkeys(hosts, HERE), "-e", given, *options, gateways=gateways)

    def rescued(self, *block: dict[str, Any], check: bool = False, **variables: Any) -> Played:
        """A deployment that fails in ``block``, and puts the last good release back."""
        rescue = [{"ansible.builtin.import_role": {"name": "vllm_service", "tasks_from": "restore"}}]
        tasks = [{"block": list(block), "rescue": rescue}]
        roles = ["glm_ocr"]
        path = self.folder / "deployment.yml"
        path.write_text(yaml.safe_dump([{"hosts": "ascend910", "gather_facts": False, "roles": roles, "tasks": tasks}]))
        return self.play(str(path), *(["--check"] if check else []), **variables)

    def running(self) -> str:
        return fake_host.running()

    def calls(self, *words: str) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [call for call in calls if call.startswith(" ".join(words))]

    def results(self) -> dict[str, str]:
        """What the smokes left: name to verdict."""
        return {path.name: path.read_text() for path in (self.folder / "state" / "reports").rglob("*.json")}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


PULL_FAILS = {"name": "Pull", "ansible.builtin.fail": {"msg": "no route to the registry"}}


def activate(release: str) -> dict[str, Any]:
    """As a deployment: runs a kept release and sees it read."""
    chosen = f"{{{{ {{'id': '{release}', 'record': lookup('file', __vllm_service_store ~ '/{release}/release.json')"
    return {
        "name": "Run",
        "ansible.builtin.include_role": {"name": "vllm_service", "tasks_from": "run"},
        "vars": {"__vllm_service_chosen": chosen + " | from_json} }}", "__vllm_service_action": "deploy"},
    }


# --- restart and drain ------------------------------------------------------------------------------------


def test_a_restart_is_of_the_installed_release_and_proven_by_its_own_record(host: Host) -> None:
    played = host.play("playbooks/restart.yml", glm_ocr_port=9999, glm_ocr_served_model_name="moved-on")
    assert played.rc == 0
    assert host.calls("systemctl reset-failed glm-ocr")
    assert len(host.calls("systemctl restart glm-ocr")) == 1
    (smoke,) = host.calls("docker run")
    assert f"--base-url=http://127.0.0.1:1/{NEW} --model=model-of-{NEW} " in smoke
    assert host.results() == {f"ocr_smoke.{NEW}.json": "PASS"}


def test_a_restart_that_fails_shows_the_journal(host: Host) -> None:
    (host.folder / "bad").write_text(NEW)
    played = host.play("playbooks/restart.yml")
    assert played.rc != 0
    assert "the engine's last words" in played.output


@pytest.mark.parametrize("playbook", ["playbooks/restart.yml", "playbooks/rollback.yml"])
def test_what_runs_is_kept_when_the_weights_on_the_host_are_others(playbook: str, host: Host) -> None:
    flip(host.weights / "model.safetensors")
    played = host.play(playbook)
    assert played.rc != 0
    assert "was not seen to hold the weights that the release was deployed with" in played.output
    assert "[WEIGHTS_ALTERED]" in played.output
    assert host.running() == NEW
    assert host.calls("systemctl restart") == []


def test_a_restart_needs_a_release_that_is_kept(host: Host) -> None:
    shutil.rmtree(host.store.path(NEW))
    played = host.play("playbooks/restart.yml")
    assert played.rc != 0
    assert f"expected an installed release that is kept on the host, found {NEW}" in " ".join(played.output.split())
    assert host.calls("systemctl restart") == []


def test_a_drain_asks_where_the_installed_release_listens(host: Host) -> None:
    """Nothing listens where the inventory says now: that would count as idle."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        shutil.rmtree(host.store.path(NEW))
        host.stage(NEW, base_url=f"http://127.0.0.1:{server.server_port}")
        asked = host.play("playbooks/drain.yml", "--check", glm_ocr_port=1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert asked.rc == 0
    assert "Requests are still in flight" in asked.output
    assert "HTTP Error 501" in asked.output, "it was asked, and knows no metrics"


def test_a_rollback_passes_a_variant_by(host: Host) -> None:
    """One that a comparison left, because what came before it did not come back."""
    tried = "c" * 16
    host.stage(tried)
    host.store.mark_good(tried, trial=True)
    host.stage("d" * 16)
    host.install("d" * 16)
    assert host.play("playbooks/rollback.yml").rc == 0
    assert host.running() == NEW


# --- the front --------------------------------------------------------------------------------------------

FRONT: dict[str, Any] = {"glm_ocr_exposure": "front", "glm_ocr_keys": {"validation": "v" * 32}}


@pytest.mark.parametrize(
    ("sockets", "expected"),
    [
        ({OLD: "", NEW: "/run/glm-ocr/engine.sock"}, ["stop glm-ocr-front", "restart glm-ocr"]),
        ({OLD: "/run/glm-ocr/engine.sock", NEW: ""}, ["restart glm-ocr", "start glm-ocr-front"]),
        ({OLD: "", NEW: ""}, ["restart glm-ocr"]),
    ],
)
def test_the_port_is_handed_over_between_engine_and_front(
    sockets: dict[str, str], expected: list[str], host: Host
) -> None:
    """A rollback to a release of the other exposure: whoever has the port leaves it first."""
    (host.folder / "front.service").touch()
    for release, path in sockets.items():
        shutil.rmtree(host.store.path(release))
        host.stage(release, socket=path)
        host.store.mark_good(release)
    os.utime(host.store.path(OLD, "good"), (1, 1))
    # What the stand-in for systemctl says of any unit: that it runs when the container does.
    (host.folder / "stopped").write_text("glm-ocr-front" if sockets[OLD] else "")
    played = host.play("playbooks/rollback.yml", __ocr_front_unit=str(host.folder / "front.service"), **FRONT)
    assert played.rc == 0
    verbs = ("restart", "start", "stop")
    asked = [call.split()[1:] for call in host.calls("systemctl") if call.split()[1] in verbs]
    assert [" ".join(call).removesuffix(".service") for call in asked] == expected


def behind_the_front(host: Host, *releases: str) -> dict[str, Any]:
    """Stages them anew, good, with a socket; the variables that name the front's unit."""
    (host.folder / "front.service").touch()
    for at, release in enumerate(releases):
        shutil.rmtree(host.store.path(release))
        host.stage(release, socket="/run/glm-ocr/engine.sock")
        host.store.mark_good(release)
        os.utime(host.store.path(release, "good"), (at + 3, at + 3))
    return {"__ocr_front_unit": str(host.folder / "front.service")}


def test_a_release_behind_the_front_is_asked_where_the_front_is_now(host: Host) -> None:
    """A port that moved moved the front, which is one for all releases, and not what the release remembers."""
    unit = behind_the_front(host, OLD, NEW)
    played = host.play("playbooks/rollback.yml", glm_ocr_port=9999, **unit, **FRONT)
    assert played.rc == 0
    (smoke,) = host.calls("docker run")
    assert f"--base-url=http://127.0.0.1:9999 --model=model-of-{OLD} " in smoke


@pytest.mark.parametrize("playbook", ["playbooks/restart.yml", "playbooks/rollback.yml"])
def test_no_release_is_run_behind_a_front_that_the_inventory_has_no_key_for(playbook: str, host: Host) -> None:
    unit = behind_the_front(host, OLD, NEW)
    played = host.play(playbook, **unit)
    assert played.rc != 0
    assert "expected glm_ocr_exposure front, found direct" in " ".join(played.output.split())
    assert host.running() == NEW
    assert host.calls("systemctl restart") == []


def test_a_change_to_direct_that_fails_puts_the_front_back_and_claims_no_more(host: Host) -> None:
    unit = behind_the_front(host, NEW)
    (host.folder / "bad").write_text(OLD)
    (host.folder / "stopped").write_text("glm-ocr-front")
    played = host.rescued(activate(OLD), **unit)
    assert played.rc != 0
    told = " ".join(played.output.split())
    assert f"Release {NEW} was put back; it answers; it was not asked to read" in told
    assert "Putting release" not in told
    assert host.running() == NEW
    assert host.calls("docker run") == [], "without a key every answer is a 401"
    assert host.calls("systemctl start glm-ocr") == ["systemctl start glm-ocr-front"]


def test_a_rollback_to_direct_that_fails_asks_the_restored_one_where_the_front_is(host: Host) -> None:
    """What is said and asked of the restored release is its own, not that of the one that was chosen."""
    unit = behind_the_front(host, NEW)
    (host.folder / "bad").write_text(OLD)
    played = host.play("playbooks/rollback.yml", glm_ocr_port=9999, **unit, **FRONT)
    assert played.rc != 0
    assert f"Release {NEW} was put back; it answers and reads its known image." in " ".join(played.output.split())
    (smoke,) = host.calls("docker run")
    assert f"--base-url=http://127.0.0.1:9999 --model=model-of-{NEW} " in smoke


def test_a_drain_closes_the_engine_to_the_front_first(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    shutil.rmtree(host.store.path(NEW))
    host.stage(NEW, socket=str(path))
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        path.chmod(0o660)
        played = host.play("playbooks/drain.yml", glm_ocr_engine_socket=str(path), vllm_service_drain_timeout_seconds=0)
    assert played.rc == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(host.calls("systemctl stop glm-ocr")) == 1


# --- the rollout ------------------------------------------------------------------------------------------


def told_apart(host: Host, hosts: Sequence[str] = ("npu-01", "npu-02"), **variables: Any) -> str:
    """The hosts whose engine would go on as it is, as the deployment tells them apart."""
    _, look, _ = yaml.safe_load((PROJECT / "playbooks" / "deploy.yml").read_text())
    told = {"ansible.builtin.debug": {"msg": "settled: {{ groups.glm_ocr_settled | default([]) | join(' ') }}."}}
    tell = {"hosts": "ascend910", "gather_facts": False, "tasks": [{**told, "run_once": True}]}
    path = host.folder / "look.yml"
    path.write_text(yaml.safe_dump([look, tell]))
    given = {"__vllm_service_release": NEW, "vllm_weights_fingerprint": "of the preflight", **variables}
    played = host.play(str(path), hosts=hosts, **given)
    assert played.rc == 0
    assert played.recap("npu-01")["changed"] == 0
    assert not [call for call in host.calls("systemctl") if not call.startswith("systemctl show")]
    (settled,) = re.findall(r"settled: (.*?)\.", played.output)
    return " ".join(sorted(settled.split()))


def edit(host: Host) -> None:
    with (host.folder / "env").open("a") as file:
        file.write("B=2\n")


def owe(host: Host) -> None:
    os.utime(host.folder / "env", (4e9, 4e9))


def end(host: Host) -> None:
    (host.folder / "container.json").unlink()


def prove_another(host: Host) -> None:
    os.utime(host.store.path(OLD, "good"), (9, 9))


def nothing(_: Host) -> None:
    pass


def test_hosts_whose_engine_goes_on_as_it_is_go_at_once(host: Host) -> None:
    assert told_apart(host) == "npu-01 npu-02"


@pytest.mark.parametrize(
    ("befell", "wanted"),
    [
        (edit, {}),
        (owe, {}),
        (end, {}),
        (prove_another, {}),
        (nothing, {"__vllm_service_release": OLD}),
        (nothing, {"__vllm_service_release": "c" * 16}),
        (nothing, {"vllm_image_pull": "always"}),
        (nothing, {"vllm_image_expected_digest": "sha256:" + "d" * 64}),
    ],
)
def test_a_host_whose_engine_would_restart_is_not_among_those_that_go_at_once(
    befell: Callable[[Host], None], wanted: dict[str, str], host: Host
) -> None:
    befell(host)
    assert told_apart(host, **wanted) == ""


@pytest.mark.parametrize(
    ("wanted", "compared", "settled"),
    [
        (FRONT, 0, "npu-01 npu-02"),
        # Restarted or reloaded, or at a port that no gateway knows, on all hosts at once.
        (FRONT, 1, ""),
        # Nothing is asked where the engine has the port.
        ({}, 1, "npu-01 npu-02"),
    ],
)
def test_a_host_whose_front_would_change_is_not_among_them_either(
    wanted: dict[str, Any], compared: int, settled: str, host: Host
) -> None:
    stub(host.folder / "bin", "sha256sum", f"cat > /dev/null; exit {compared}")
    assert told_apart(host, **wanted) == settled


def test_one_host_alone_is_not_asked(host: Host) -> None:
    assert told_apart(host, hosts=["npu-01"]) == ""
    assert host.calls() == []


# --- the gateway ------------------------------------------------------------------------------------------


@contextmanager
def before_the_host(host: Host, *others: str, down: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A gateway on this machine, for a play's variables."""
    path = host.folder / "admin.sock"
    with admin(path, host.folder / "calls", ["npu-01", *others], down):
        yield gateway_at(host, str(path), "npu-01", *others)


def gateway_at(host: Host, socket: str, *instances: str) -> dict[str, Any]:
    return {
        "glm_ocr_gateways": ["localhost"],
        "__gateway_socket": socket,
        "__gateway_states": str(host.folder / "servers"),
        "__gateway_config": str(configuration(host.folder / "haproxy.cfg", instances)),
        "gateway_return_timeout_seconds": 1,
    }


def order_of(host: Host) -> list[str]:
    """What befell pool and engine, in order."""
    known = ("gateway", "systemctl restart", "systemctl stop", "docker run")
    return [" ".join(call.split()[:2]) for call in host.calls() if call.startswith(known)]


@pytest.mark.parametrize("playbook", ["playbooks/restart.yml", "playbooks/rollback.yml"])
def test_a_host_is_out_of_the_pool_from_before_its_restart_until_it_was_seen_to_read(playbook: str, host: Host) -> None:
    with before_the_host(host, "npu-02") as gateway:
        played = host.play(playbook, **gateway)
    assert played.rc == 0
    assert "npu-01 has no request in flight" in " ".join(played.output.split())
    assert order_of(host) == ["gateway drain", "systemctl restart", "docker run", "gateway ready"]


def test_the_release_that_was_put_back_is_back_in_the_pool(host: Host) -> None:
    (host.folder / "blind").write_text(OLD)
    with before_the_host(host, "npu-02") as gateway:
        played = host.play("playbooks/rollback.yml", **gateway)
    assert played.rc != 0
    assert f"Release {NEW} was put back" in played.output
    run, back = ["systemctl restart", "docker run"], ["gateway ready"]
    assert order_of(host) == ["gateway drain", *run, *run, *back]


def test_a_host_that_does_not_read_stays_out_of_the_pool(host: Host) -> None:
    (host.folder / "blind").write_text(NEW)
    with before_the_host(host, "npu-02") as gateway:
        played = host.play("playbooks/restart.yml", **gateway)
    assert played.rc != 0
    assert order_of(host) == ["gateway drain", "systemctl restart", "docker run"]
    assert " 8" in (host.folder / "servers").read_text(), "a reload would forget it"


@pytest.mark.parametrize("others", [[], ["npu-02"]])
def test_the_last_instance_is_not_drained_unless_a_gap_is_wanted(others: list[str], host: Host) -> None:
    with before_the_host(host, *others, down=others) as gateway:
        refused = host.play("playbooks/restart.yml", **gateway)
        assert refused.rc != 0
        assert "npu-01 was not taken out of the pool" in " ".join(refused.output.split())
        assert order_of(host) == []
        assert host.play("playbooks/restart.yml", **gateway, gateway_min_others=0).rc == 0
    assert order_of(host)[0] == "gateway drain"


def test_one_that_is_down_at_the_gateway_may_be_restarted_whoever_else_is(host: Host) -> None:
    """And the play is red: the engine reads, and the gateway does not reach it."""
    with before_the_host(host, down=["npu-01"]) as gateway:
        played = host.play("playbooks/restart.yml", **gateway)
    assert played.rc != 0
    assert "expected npu-01 up at localhost within 1 s, found DOWN L7OK 200" in " ".join(played.output.split())
    assert order_of(host) == ["gateway drain", "systemctl restart", "docker run", "gateway ready"]


def test_a_gateway_that_does_not_run_holds_nobody_up_and_has_the_host_back_when_it_does(host: Host) -> None:
    gone = gateway_at(host, str(host.folder / "none"), "npu-01")
    (host.folder / "stopped").write_text("glm-ocr-gateway")
    played = host.play("playbooks/restart.yml", **gone)
    assert played.rc == 0
    told = " ".join(played.output.split())
    assert "localhost: does not run, and does not send npu-01 requests when it does" in told
    assert "localhost does not run. It sends npu-01 requests once it does." in told
    assert "ansible-playbook playbooks/gateway.yml -l localhost" in told
    assert " npu-01 " not in (host.folder / "servers").read_text()
    drained = host.play("playbooks/drain.yml", **gone, vllm_service_drain_timeout_seconds=0)
    assert drained.rc == 0
    assert " npu-01 - 2 8 " in (host.folder / "servers").read_text()


def test_a_gateway_that_was_never_brought_is_told_of(host: Host) -> None:
    gone = gateway_at(host, str(host.folder / "none")) | {"__gateway_states": str(host.folder / "none" / "servers")}
    (host.folder / "stopped").write_text("glm-ocr-gateway")
    played = host.play("playbooks/restart.yml", **gone)
    assert played.rc == 0
    told = " ".join(played.output.split())
    assert "localhost does not know npu-01. Next: ansible-playbook playbooks/gateway.yml -l localhost" in told


@pytest.mark.parametrize("before", ["ready", "maint"])
@pytest.mark.parametrize("lost", [False, True], ids=["one does not obey", "one is lost"])
def test_a_host_is_as_it_was_at_all_gateways_when_one_of_them_does_not_take_it_out(
    before: str, lost: bool, host: Host
) -> None:
    """Both answer at first: the second one fails when the first was told."""
    calls, names = host.folder / "calls", ["npu-01", "npu-02"]
    nodes: dict[str, dict[str, Any]] = {"gw-01": HERE, "gw-02": HERE}
    if lost:
        connection = f"{{{{ 'ssh' if 'gateway drain' in lookup('file', '{calls}', errors='ignore') else 'local' }}}}"
        nodes["gw-02"] = HERE | {"ansible_connection": connection, "ansible_host": "127.0.0.1", "ansible_port": 1}
    with (
        admin(host.folder / "gw-01.sock", calls, names) as first,
        admin(host.folder / "gw-02.sock", calls, names, deaf=True) as second,
    ):
        first["npu-01"] = second["npu-01"] = 1 if before == "maint" else 0
        # Of the gateway that is asked.
        given = gateway_at(host, f"{host.folder}/{{{{ item.item | default(item) }}}}.sock", *names)
        given["__gateway_states"] = f"{host.folder}/{{{{ item.item | default(item) }}}}.servers"
        played = host.play("playbooks/restart.yml", gateways=nodes, **given | {"glm_ocr_gateways": list(nodes)})
        assert (first, second["npu-01"]) == ({"npu-01": 1 if before == "maint" else 0, "npu-02": 0}, first["npu-01"])
    assert played.rc != 0
    assert order_of(host) == ["gateway drain", f"gateway {before}"]
    told = " ".join(played.output.split())
    assert "npu-01 was not taken out of the pool" in told
    assert ("found gw-02 unreachable;" if lost else "Permission denied;") in told
    assert ("It may be out of the pool of gw-02, which did not take that back" in told) == lost
    assert host.running() == NEW
    kept = [(host.folder / f"{name}.servers").read_text() for name in nodes if not (lost and name == "gw-02")]
    assert all((" npu-01 - 2 1 " in text) == (before == "maint") for text in kept)


def test_hosts_are_drained_one_after_the_other_while_another_serves(host: Host) -> None:
    hosts = {"npu-01": HERE, "npu-02": HERE}
    with before_the_host(host, "npu-02", "npu-03") as gateway:
        given = {**host.inner, **gateway, "vllm_service_drain_timeout_seconds": 0}
        options = ("-e", json.dumps(given))
        assert play(host.folder, "playbooks/drain.yml", hosts, *options, gateways={"localhost": HERE}).rc == 0
        assert order_of(host) == ["gateway drain", "systemctl stop"] * 2


def test_hosts_that_are_drained_together_leave_one_that_serves(host: Host) -> None:
    hosts = {"npu-01": HERE, "npu-02": HERE}
    with before_the_host(host, "npu-02") as gateway:
        given = {**host.inner, **gateway, "vllm_service_drain_timeout_seconds": 0, "glm_ocr_rollout_batches": [2]}
        options = ("-e", json.dumps(given))
        played = play(host.folder, "playbooks/drain.yml", hosts, *options, gateways={"localhost": HERE})
    assert played.rc != 0
    assert "found localhost with fewer; npu-0" in " ".join(played.output.split())
    assert order_of(host).count("gateway drain") == 1


def test_a_drain_and_a_host_that_leaves_are_out_of_the_pool_first(host: Host) -> None:
    with before_the_host(host, "npu-02") as gateway:
        drained = host.play("playbooks/drain.yml", **gateway, vllm_service_drain_timeout_seconds=0)
        assert drained.rc == 0
        assert order_of(host) == ["gateway drain", "systemctl stop"]
        (host.folder / "calls").unlink()
        host.play("playbooks/offboard.yml", **gateway)
        assert order_of(host)[0] == "gateway maint"


@pytest.mark.parametrize("limit", [(), ("-l", "npu-01,npu-02")])
def test_hosts_leave_one_by_one(limit: tuple[str, ...], host: Host) -> None:
    hosts = {"npu-01": HERE, "npu-02": HERE}
    with before_the_host(host, "npu-02", "npu-03") as gateway:
        played = play(host.folder, "playbooks/offboard.yml", hosts, "-e", json.dumps(host.inner | gateway), *limit)
    assert played.rc != 0
    told = " ".join(played.output.split())
    assert f"expected one host that leaves, found npu-01, npu-02 with -l {limit[1] if limit else 'left out'};" in told
    assert "Fix: ansible-playbook playbooks/offboard.yml -l npu-01" in told
    assert order_of(host) == []


def test_a_host_that_another_controller_works_on_does_not_leave(host: Host) -> None:
    other = {"who": "someone", "since": "now", "machine": "elsewhere", "pid": 1, "started": "1"}
    (host.folder / "lock").write_text(json.dumps(other))
    with before_the_host(host, "npu-02") as gateway:
        played = host.play("playbooks/offboard.yml", **gateway)
    assert "[HOST_LOCKED]" in played.output
    assert order_of(host) == []


@pytest.mark.parametrize("limit", ["npu-01", "npu-01,npu-02,gateway"])
def test_a_new_host_comes_alone_and_with_its_gateways(limit: str, host: Host) -> None:
    gateways = {"gw-01": HERE}
    hosts = {"npu-01": HERE, "npu-02": HERE}
    played = play(host.folder, "playbooks/onboard.yml", hosts, "-l", limit, gateways=gateways)
    assert played.rc != 0
    told = " ".join(played.output.split())
    assert f"with -l {limit}; nothing was changed" in told
    assert "ansible-playbook playbooks/onboard.yml -l npu-01,gateway" in told
    assert "TASK [host_key" not in played.output


def test_a_new_host_that_is_named_with_its_gateways_is_asked_for_its_key(host: Host) -> None:
    hosts, known = {"npu-01": HERE, "npu-02": HERE}, f"host_key_known_hosts={host.folder}/none"
    limit = ("-l", "npu-01,gateway", "-e", known)
    played = play(host.folder, "playbooks/onboard.yml", hosts, *limit, gateways={"gw-01": HERE})
    assert "expected a key of npu-01 in" in " ".join(played.output.split())


@pytest.mark.parametrize(
    ("known", "valid"), [(0, True), (1, True), (1, False)], ids=["in the pool", "left before", "not valid"]
)
def test_a_host_that_the_gateways_know_gets_into_the_pool_once_it_was_validated(
    known: int, valid: bool, host: Host
) -> None:
    """The real onboarding; of the deployment what it ends with, and of validation and gateways that they were."""
    folder = host.folder / "playbooks"
    folder.mkdir()
    shutil.copy(PROJECT / "playbooks" / "onboard.yml", folder)
    plays = yaml.safe_load((PROJECT / "playbooks" / "deploy.yml").read_text())
    deployment = plays[-1]
    reads = {"name": "Read", "ansible.builtin.set_fact": {"vllm_service_reads": True}}
    end = deployment["tasks"][-1]["always"][-1]
    for name, group, tasks in (
        ("deploy", "ascend910", [reads, end]),
        ("validate", "ascend910", [said(host, "validated", valid)]),
        ("gateway", "gateway", [said(host, "brought")]),
    ):
        part = {"hosts": group, "gather_facts": False, "roles": ["glm_ocr"], "tasks": tasks}
        (folder / f"{name}.yml").write_text(yaml.safe_dump([part]))
    (host.folder / "known_hosts").write_text(f"npu-01.example ssh-ed25519 {base64.b64encode(SSH_KEY).decode()}\n")
    with admin(host.folder / "admin.sock", host.folder / "calls", ["npu-01", "npu-02"]) as states:
        states["npu-01"] = known
        given = host.inner | gateway_at(host, str(host.folder / "admin.sock"), "npu-01", "npu-02")
        given |= {"glm_ocr_gateways": ["gw-01"], "host_key_known_hosts": str(host.folder / "known_hosts")}
        options = ("-l", "npu-01,gateway", "-e", json.dumps(given))
        hosts = {"npu-01": HERE | {"ansible_host": "npu-01.example"}}
        gateways = {"gw-01": HERE | {"glm_ocr_keys": FRONT["glm_ocr_keys"]}}
        played = play(host.folder, str(folder / "onboard.yml"), hosts, *options, gateways=gateways)
    assert (played.rc == 0) == valid
    later = ["gateway brought", "gateway ready"] if valid else []
    assert order_of(host) == ["gateway drain", "gateway validated", *later]


def said(host: Host, what: str, well: bool = True) -> dict[str, Any]:
    """A task that leaves a line among the calls."""
    script = f"echo gateway {what} >> {host.folder}/calls; exit {0 if well else 1}"
    return {"name": what, "ansible.builtin.command": {"argv": ["sh", "-c", script]}}


def test_in_check_mode_the_pool_stays_as_it_is(host: Host) -> None:
    with before_the_host(host, "npu-02") as gateway:
        assert host.play("playbooks/rollback.yml", "--check", **gateway).rc == 0
    assert order_of(host) == []


# --- the weights of a release -----------------------------------------------------------------------------


@pytest.mark.parametrize(("replaced", "rc"), [(False, 0), (True, 2)])
def test_weights_are_known_by_names_sizes_and_times_when_the_manifest_has_moved_on(
    replaced: bool, rc: int, host: Host
) -> None:
    shutil.rmtree(host.store.path(NEW))
    host.stage(NEW, weights_files=fingerprint(list_files(host.weights)[0]))
    if replaced:
        os.utime(host.weights / "model.safetensors", (1, 1))
    assert host.play("playbooks/restart.yml", vllm_weights_manifest="").rc == rc


# --- the way back -----------------------------------------------------------------------------------------


def test_nothing_is_put_back_when_nothing_was_touched(host: Host) -> None:
    played = host.rescued(PULL_FAILS)
    assert "no route to the registry" in played.output
    assert f"glm-ocr was not touched: release {NEW} stays." in played.output
    assert host.calls("systemctl restart") == []


def test_a_service_whose_kept_releases_are_out_of_sight_is_not_touched(host: Host) -> None:
    """Their folder was moved in the inventory, or its disk is not mounted: what runs is nobody's first try."""
    shutil.rmtree(host.store.folder)
    played = host.rescued(PULL_FAILS)
    assert played.rc != 0
    assert f"glm-ocr was not touched: release {NEW} stays." in played.output
    assert host.running() == NEW
    assert host.calls("systemctl stop") == []


def test_a_first_release_that_never_read_is_put_out_of_service(host: Host) -> None:
    """Started by a play that died before the proof: kept, and never good."""
    for release in (OLD, NEW):
        Path(host.store.path(release, "good")).unlink()
    played = host.rescued(PULL_FAILS)
    assert "no earlier good release to go back to" in played.output


def test_a_release_that_a_killed_restore_left_running_is_put_out_of_service(host: Host) -> None:
    """Killed after the files of the last good release were there, and before it was restarted."""
    fake_host.run_container("c" * 16)
    played = host.rescued(PULL_FAILS)
    assert f"Release {NEW} was put back" in played.output
    assert host.running() == NEW


@pytest.mark.parametrize("file", ["bad", "blind"])
def test_the_last_good_release_that_failed_itself_is_not_called_untouched(file: str, host: Host) -> None:
    """A restart was owed, because the environment was edited by hand."""
    with (host.folder / "env").open("a") as environment:
        environment.write("B=2\n")
    (host.folder / file).write_text(NEW)
    played = host.rescued(activate(NEW))
    assert played.rc != 0
    assert "not touched" not in played.output
    assert f"Release {NEW} is the last good one itself, and this play restarted it: " in played.output
    assert OLD in played.output.rpartition("any other kept release")[2]
    assert len(host.calls("systemctl restart")) == 1


def test_what_the_failing_release_read_is_kept_beside_what_the_restored_one_read(host: Host) -> None:
    (host.folder / "blind").write_text(OLD)
    played = host.play("playbooks/rollback.yml")
    assert played.rc != 0
    assert f"Release {NEW} was put back" in played.output
    assert "was not seen to hold" not in played.output
    assert f"ocr_smoke.{OLD}.json has it all" in played.output
    assert host.results() == {f"ocr_smoke.{OLD}.json": "FAIL", f"ocr_smoke.{NEW}.json": "PASS"}
    assert host.running() == NEW


def test_a_restore_on_other_weights_says_so(host: Host) -> None:
    flip(host.weights / "model.safetensors")
    (host.folder / "bad").write_text(OLD)
    played = host.rescued(activate(OLD))
    assert f"Release {NEW} was put back" in played.output
    assert "was not seen to hold the weights that the release was deployed with" in played.output


def test_in_check_mode_the_cause_is_what_is_told_last(host: Host) -> None:
    fake_host.run_container("c" * 16)
    played = host.rescued(PULL_FAILS, check=True)
    assert "Check mode: nothing was changed" in played.output
    assert "no route to the registry" in played.output.rpartition("TASK")[2]
    assert host.running() == "c" * 16
