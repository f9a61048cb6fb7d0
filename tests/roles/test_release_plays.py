"""Restart, rollback, drain and the way back after a failure, as an operator sees them: through their plays, on a host
whose systemd and Docker are stand-ins."""

from __future__ import annotations

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
from fake_gateway import admin
from model_files import NANO, NANO_MANIFEST, flip, sha256
from playing import HERE, Played, play
from rendering import PROJECT

OLD, NEW = "a" * 16, "b" * 16


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

    def play(self, playbook: str, *options: str, hosts: Sequence[str] = ("npu-01",), **variables: Any) -> Played:
        given = {
            "__vllm_service_unit": str(self.folder / "unit"),
            "__vllm_service_environment_file": str(self.folder / "env"),
            "__deploy_lock_path": str(self.folder / "lock"),
            "glm_ocr_library_dir": str(self.folder / "lib"),
            "vllm_weights_manifest": str(NANO_MANIFEST),
            **variables,
        }
        return play(self.folder, playbook, dict.fromkeys(hosts, HERE), "-e", json.dumps(given), *options)

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


def test_one_host_alone_is_not_asked(host: Host) -> None:
    assert told_apart(host, hosts=["npu-01"]) == ""
    assert host.calls() == []


# --- the gateway ------------------------------------------------------------------------------------------


@contextmanager
def before_the_host(host: Host, *others: str, down: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A gateway on this machine, for a play's variables."""
    path = host.folder / "admin.sock"
    with admin(path, host.folder / "calls", ["npu-01", *others], down):
        yield {
            "glm_ocr_gateways": ["localhost"],
            "__gateway_socket": str(path),
            "__gateway_states": str(host.folder / "servers"),
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


def test_a_gateway_that_does_not_run_holds_nobody_up(host: Host) -> None:
    gone = {"glm_ocr_gateways": ["localhost"], "__gateway_socket": str(host.folder / "none")}
    played = host.play("playbooks/restart.yml", **gone)
    assert played.rc == 0
    assert "localhost does not run. Next: ansible-playbook playbooks/gateway.yml" in " ".join(played.output.split())


def test_a_drain_and_a_host_that_leaves_are_out_of_the_pool_first(host: Host) -> None:
    with before_the_host(host, "npu-02") as gateway:
        drained = host.play("playbooks/drain.yml", **gateway, vllm_service_drain_timeout_seconds=0)
        assert drained.rc == 0
        assert order_of(host) == ["gateway drain", "systemctl stop"]
        (host.folder / "calls").unlink()
        host.play("playbooks/offboard.yml", **gateway)
        assert order_of(host)[0] == "gateway maint"


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
