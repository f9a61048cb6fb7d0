"""The role on this machine, with HAProxy itself and a stand-in for systemd that does what the unit says."""

from __future__ import annotations

import base64
import grp
import json
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_gateway import admin
from front import KEYS, USER, running, serving
from playing import HERE, Played, installed_scripts, play, stub
from rendering import PROJECT

ENGINE = PROJECT / "tests" / "support" / "running_engine.py"
#: As ssh writes a public key: the lengths of its parts before them.
SSH_KEY = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32

#: Runs the shell lines of the installed unit that go with a verb; ``active`` is there while it "runs", ``calls`` has
#: the verbs, and with ``broken`` they fail.
SYSTEMCTL = """
import pathlib, subprocess, sys
folder, verb = pathlib.Path({folder!r}), sys.argv[1]
active = folder / "active"
if verb == "show":
    state = "active" if active.exists() else "inactive"
    print(f"LoadState=loaded\\nActiveState={{state}}\\nUnitFileState=enabled")
elif verb == "is-active":
    sys.exit(0 if active.exists() else 3)
elif verb in ("start", "restart", "reload"):
    print(verb, file=(folder / "calls").open("a"))
    if (folder / "broken").exists():
        sys.exit("broken")
    active.touch()
    wanted = "ExecReload=/bin/sh -c " if verb == "reload" else "ExecStartPost=/bin/sh -c "
    for line in (folder / "front.service").read_text().splitlines():
        if line.startswith(wanted):
            subprocess.run(["/bin/sh", "-c", line.removeprefix(wanted).strip("'")], check=True)
elif verb == "stop":
    active.unlink()
"""


class Host:
    """This machine as a host with a front."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "systemctl.py").write_text(SYSTEMCTL.format(folder=str(folder)))
        stub(folder / "bin", "journalctl", "echo the cause is here")
        stub(folder / "bin", "systemctl", f'exec {sys.executable} {folder}/systemctl.py "$@"')
        self.variables: dict[str, Any] = HERE | {"glm_ocr_exposure": "front", "glm_ocr_keys": dict(KEYS)}
        # Further hosts, this machine too.
        self.others: dict[str, dict[str, Any]] = {}

    def play(self, *options: str, playbook: str = "playbooks/front_keys.yml") -> Played:
        inner = {
            "__ocr_front_dir": str(self.folder / "etc"),
            "__ocr_front_unit": str(self.folder / "front.service"),
            "__ocr_front_loaded": str(self.folder / "loaded"),
            "__ocr_front_started": str(self.folder / "started"),
            "__deploy_lock_path": str(self.folder / "lock"),
        }
        return play(self.folder, playbook, {"npu-01": self.variables} | self.others, "-e", json.dumps(inner), *options)

    def enter(self, entry: str, *more: dict[str, Any]) -> Played:
        """Another entry point of the role, and ``more`` tasks behind it."""
        tasks = [
            {"ansible.builtin.import_role": {"name": "glm_ocr"}},
            {"ansible.builtin.import_role": {"name": "ocr_front"}, "when": False},
            {"ansible.builtin.include_role": {"name": "ocr_front", "tasks_from": entry}},
            *more,
        ]
        path = self.folder / f"{entry}.yml"
        path.write_text(yaml.safe_dump([{"hosts": "ascend910", "gather_facts": False, "tasks": tasks}]))
        played = self.play(playbook=str(path))
        assert played.rc == 0
        return played

    def start(self) -> None:
        self.enter("start")

    def settled(self) -> bool:
        """Whether a deployment would leave the front as it is, as the rollout is told."""
        played = self.enter("settled", {"ansible.builtin.debug": {"msg": "settled: {{ ocr_front_settled }}."}})
        assert played.recap("npu-01")["changed"] == 0
        (said,) = re.findall(r"settled: (True|False)\.", played.output)
        return bool(said == "True")

    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().split() if calls.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_check_mode_on_a_fresh_host_writes_nothing(host: Host) -> None:
    assert host.play("--check", "--diff").rc == 0
    assert not [name for name in ("etc", "front.service", "calls") if (host.folder / name).exists()]


def test_keys_are_rotated_by_a_reload_that_is_never_forgotten(host: Host) -> None:
    first = host.play("-vvv", "--diff")
    assert first.rc == 0
    assert host.calls() == [], "its port may still be the engine's"
    host.start()
    again = host.play()
    assert (again.rc, again.recap("npu-01")["changed"]) == (0, 0)
    assert host.calls() == ["start"]

    modes = {
        path.name: (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) for path in (host.folder / "etc").iterdir()
    }
    assert len(modes) == 3
    assert set(modes.values()) == {(0o640, grp.getgrnam(USER).gr_gid)}
    assert stat.S_IMODE((host.folder / "etc").stat().st_mode) == 0o750

    host.variables["glm_ocr_keys"] = KEYS | {"carol": "c" * 40}
    (host.folder / "broken").touch()
    failed = host.play()
    assert failed.rc != 0
    assert "found: Unable to reload service glm-ocr-front" in failed.output
    assert "the cause is here" in failed.output
    (host.folder / "broken").unlink()
    owed = host.play("-vvv", "--diff")
    assert (owed.rc, owed.recap("npu-01")["changed"]) == (0, 1)
    assert host.calls() == ["start", "reload", "reload"]
    assert host.play().recap("npu-01")["changed"] == 0

    shown = [key for key in (*KEYS.values(), "c" * 40) if key in first.output + owed.output]
    assert shown == []


def test_the_switch_shows_what_it_hides(host: Host) -> None:
    """So that the test above can fail: off, the digests are in the diff."""
    host.variables["glm_ocr_no_log"] = False
    assert " alice\n" in host.play("--diff").output


def test_another_unit_is_a_restart(host: Host) -> None:
    assert host.play().rc == 0
    host.start()
    host.variables["ocr_front_stop_timeout_seconds"] = 30
    assert host.play().rc == 0
    assert host.calls() == ["start", "restart"]


def run_another_unit(host: Host) -> None:
    (host.folder / "front.service").write_text("[Unit]\n")
    (host.folder / "started").unlink()


def damage_the_keys(host: Host) -> None:
    for path in (host.folder / "etc").glob("keys-*.map"):
        path.write_text("")


def owe_a_restart(host: Host) -> None:
    host.variables["ocr_front_stop_timeout_seconds"] = 30
    (host.folder / "broken").touch()
    assert host.play().rc != 0


def end(host: Host) -> None:
    """With its unit its folder of /run goes."""
    for name in ("started", "loaded"):
        (host.folder / name).unlink()


def want(**variables: Any) -> Callable[[Host], None]:
    return lambda host: host.variables.update(variables)


@pytest.mark.parametrize(
    "befell",
    [
        want(ocr_front_body_limit_mib=17),
        want(glm_ocr_port=8001),
        want(glm_ocr_keys=KEYS | {"carol": "c" * 40}),
        run_another_unit,
        damage_the_keys,
        owe_a_restart,
        end,
    ],
)
def test_a_front_that_a_deployment_would_change_is_not_settled(befell: Callable[[Host], None], host: Host) -> None:
    assert not host.settled(), "there is none yet"
    assert host.play().rc == 0
    assert not host.settled(), "it does not run yet"
    host.start()
    assert host.settled()
    befell(host)
    before = host.calls()
    assert not host.settled()
    assert host.calls() == before


def test_one_that_cannot_follow_stops_the_others_before_they_are_touched(host: Host) -> None:
    host.others = {"npu-02": dict(host.variables)}
    host.variables["ocr_front_program"] = "/bin/true"
    played = host.play()
    assert played.rc != 0
    assert "expected HAProxy 2.4 or newer at /bin/true" in " ".join(played.output.split())
    assert not (host.folder / "etc").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"glm_ocr_keys": {}}, "glm_ocr_keys must name a key"),
        ({"glm_ocr_keys": {"validation": "short-and-secret"}}, "validation in glm_ocr_keys must be a key of 32 to 256"),
        ({"glm_ocr_exposure": "direct", "glm_ocr_keys": {}}, "expected glm_ocr_exposure front, found direct"),
        ({"ocr_front_program": "/bin/true"}, "expected HAProxy 2.4 or newer at /bin/true"),
        ({"ocr_front_metrics_sources": ["300.0.0.1"]}, "failed to validate"),
        # A file without a certificate in it.
        ({"glm_ocr_tls_certificate": __file__, "glm_ocr_tls_key": __file__}, "failed to validate"),
    ],
)
def test_what_would_not_guard_is_refused(change: dict[str, Any], complaint: str, host: Host) -> None:
    assert host.play().rc == 0
    host.start()
    before = (host.folder / "etc" / "haproxy.cfg").read_text()
    host.variables |= change
    played = host.play("-vvv")
    assert played.rc != 0
    assert complaint in " ".join(played.output.replace("\\\n", "").split())
    assert "short-and-secret" not in played.output
    assert (host.folder / "etc" / "haproxy.cfg").read_text() == before
    # What it names is still there: a start would read what runs.
    (keys,) = re.findall(r"map_str\((.*?)\)", before)
    assert " alice\n" in Path(keys).read_text()
    assert host.calls() == ["start"]


def validated(folder: Path, port: int, keys: dict[str, str], *options: str) -> Played:
    """The smoke through the front at ``port``, with the docker of a stand-in."""
    stub(folder / "bin", "docker", f'exec {sys.executable} {ENGINE} {folder} "$@"')
    (folder / "serving").touch()
    variables = HERE | {
        "glm_ocr_exposure": "front",
        "glm_ocr_keys": keys,
        "glm_ocr_bind_address": "127.0.0.1",
        "glm_ocr_port": port,
        "glm_ocr_library_dir": installed_scripts(folder),
    }
    return play(folder, "validate.yml", {"npu-01": variables}, "--tags=ocr_smoke", *options)


def test_the_validation_goes_through_the_front_and_nothing_shows_its_key(tmp_path: Path) -> None:
    with running() as front, serving(front.socket) as engine:
        front.open()
        played = validated(tmp_path, front.port, dict(KEYS), "-vvv", "--diff")
        log = front.finished()
    # The stand-in reads nothing: what counts is that it was asked, by the key's name.
    assert played.rc != 0
    assert {path for path, *_ in engine.requests} >= {"/health", "/v1/models", "/v1/chat/completions"}
    assert "key=validation" in log
    assert "status=401" not in log
    reports = "".join(path.read_text() for path in (tmp_path / "reports").rglob("*.json"))
    everything = played.output + log + reports + (tmp_path / "calls.jsonl").read_text()
    assert "ocr_smoke" in reports
    assert KEYS["validation"] not in everything


def test_a_validation_with_a_key_that_is_not_known_says_so(tmp_path: Path) -> None:
    with running() as front, serving(front.socket) as engine:
        front.open()
        played = validated(tmp_path, front.port, {"validation": "n" * 32})
    assert played.rc != 0
    assert "HTTP 401" in "".join(path.read_text() for path in (tmp_path / "reports").rglob("ocr_smoke.json"))
    assert not engine.requests


def gateway_here(host: Host) -> dict[str, str]:
    """Where the host has the files of a gateway."""
    # The same tasks remove a shared address, which is not there.
    etc, unit = (
        f"{host.folder}/{{{{ '{name}' if __ocr_front_service == 'glm-ocr-gateway' else 'none' }}}}"
        for name in ("etc", "front.service")
    )
    return {
        "__gateway_dir": str(host.folder / "etc"),
        "__gateway_socket": str(host.folder / "admin.sock"),
        "__gateway_states_dir": str(host.folder / "var"),
        "__ocr_front_dir": etc,
        "__ocr_front_unit": unit,
        "__ocr_front_loaded": str(host.folder / "loaded"),
        "__ocr_front_started": str(host.folder / "started"),
        "__deploy_lock_path": str(host.folder / "lock"),
    }


def test_a_gateway_is_brought_with_the_keys_of_its_instances_and_then_left_alone(host: Host) -> None:
    internal = "i" * 48
    keys = {"validation": "n" * 32, "gateway": internal}
    instances = {"npu-01": host.variables | {"ansible_host": "192.0.2.11", "glm_ocr_keys": keys}}
    inner = gateway_here(host)

    def bring(*options: str) -> Played:
        gateways = {"gw-01": host.variables}
        more = ("-e", json.dumps(inner), *options)
        return play(host.folder, "playbooks/gateway.yml", instances, *more, gateways=gateways)

    down = ["npu-02", "npu-02-1"]
    with admin(host.folder / "admin.sock", host.folder / "orders", ["npu-01", "npu-02", "npu-02-1"], down) as states:
        first = bring("-vvv", "--diff")
        assert first.rc == 0
        assert "All instances serve." in first.output
        assert host.calls() == ["start"]
        assert "RuntimeDirectory=glm-ocr-gateway\n" in (host.folder / "front.service").read_text()
        key = host.folder / "etc" / "instances.key"
        assert (key.read_text(), stat.S_IMODE(key.stat().st_mode)) == (f"instances {internal}\n", 0o640)
        assert not [secret for secret in (internal, *KEYS.values()) if secret in first.output]
        again = bring()
        assert (again.rc, again.recap("gw-01")["changed"]) == (0, 0)

        instances["npu-02"] = {**HERE, "ansible_host": "192.0.2.12"}
        instances["npu-02-1"] = instances["npu-02"] | {"glm_ocr_instance": 1}
        second = bring()
        assert second.rc == 0
        assert "npu-02 (DOWN L7OK 200)" in second.output
        assert "npu-01 (" not in second.output
        assert host.calls() == ["start", "reload"]
        configuration = (host.folder / "etc" / "haproxy.cfg").read_text()
        assert "server npu-02 192.0.2.12:8000" in configuration
        assert "server npu-02-1 192.0.2.12:8001" in configuration

        # What would be a restart can be seen before it is one.
        down.append("npu-01")
        host.variables["ocr_front_max_connections"] = 600
        looked = bring("--check", "--diff")
        assert looked.rc == 0
        assert "\n+LimitNOFILE=2224\n" in looked.output
        assert host.calls() == ["start", "reload"]

        empty = bring()
        assert empty.rc != 0
        complaint = (
            "expected an instance that serves behind gw-01, found npu-01 (DOWN L7OK 200), npu-02 (DOWN L7OK 200),"
        )
        assert complaint in " ".join(empty.output.split())
        assert host.calls() == ["start", "reload", "restart"]

        # Drained, one of them taken out of the inventory since.
        down.clear()
        states.update({"npu-01": 8, "npu-09": 8})
        instances["npu-01"]["glm_ocr_port"] = 8005
        assert bring().rc == 0
    (drained,) = (host.folder / "var" / "servers").read_text().splitlines()[2:]
    assert " npu-01 - 2 8 " in drained
    assert drained.endswith(" 8005 -")


def test_the_only_instance_joins_a_gateway_that_knows_it(host: Host) -> None:
    """The real onboarding and gateway; of deployment and validation nothing."""
    folder = host.folder / "playbooks"
    folder.mkdir()
    for name in ("onboard", "gateway"):
        shutil.copy(PROJECT / "playbooks" / f"{name}.yml", folder)
    for name in ("deploy", "validate"):
        (folder / f"{name}.yml").write_text(yaml.safe_dump([{"hosts": "ascend910", "gather_facts": False}]))
    (host.folder / "known_hosts").write_text(f"192.0.2.11 ssh-ed25519 {base64.b64encode(SSH_KEY).decode()}\n")
    # It was brought before.
    (host.folder / "var").mkdir()
    given = gateway_here(host) | {"host_key_known_hosts": str(host.folder / "known_hosts")}
    instances = {"npu-01": HERE | {"ansible_host": "192.0.2.11"}}
    gateways = {"gw-01": host.variables | {"ansible_host": "192.0.2.10"}}
    with admin(host.folder / "admin.sock", host.folder / "orders", ["npu-01"]) as states:
        states["npu-01"] = 8
        options = ("-l", "npu-01,gateway", "-e", json.dumps(given))
        played = play(host.folder, str(folder / "onboard.yml"), instances, *options, gateways=gateways)
        assert played.rc == 0
        assert "These instances do not serve:" in played.output
        assert states == {"npu-01": 0}
        assert (host.folder / "orders").read_text() == "gateway ready npu-01\n"


def test_a_pool_that_cannot_be_rendered_stops_before_the_lock(host: Host) -> None:
    played = play(host.folder, "playbooks/gateway.yml", {"gw-01": HERE}, gateways={"gw-01": host.variables})
    assert played.rc != 0
    assert "a gateway is a host of its own, found gw-01" in " ".join(played.output.split())
    assert host.calls() == []
