"""Every command of the runbooks, typed as it stands there, at a site like the one they tell of."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from testinfra.host import Host

from lab import ENGINE, GATEWAYS, INVENTORY, Play, Played, extra_flags, lab_node, node_named, prometheus
from model_files import NANO
from rendering import PROJECT
from runbooks import CONTROLLER, GATEWAY, HOST, MONITOR, RUNBOOKS, Command, commands

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("restored")]

SITE = (INVENTORY, GATEWAYS, PROJECT / "tests" / "lab" / "runbooks.yml")
#: Where the pages have a site's files, and where its vaults are.
BUNDLE, MODEL, UNPACKED = (Path("/srv") / name for name in ("bundle", "GLM-OCR-bf16", "glm-ocr"))
#: Where a baseline is promoted to: beside the inventory that has the host.
BASELINES = PROJECT / "tests" / "lab" / "baselines"
VAULTS = [PROJECT / "inventory" / "group_vars" / group / "keys.yml" for group in ("ascend910_front", "gateway")]
#: What the lab has not got.
NOT_RUN = {
    "modelscope": "fetches from the internet",
    "cosign": "is in no package registry that the lab has; tests/lab/test_image.py makes such signatures itself",
    "vllm_weights_source=modelscope": "fetches from the internet; tests/lab has it fetch from a folder",
    "lspci": "the lab's nodes have no PCI bus",
    "ssh -L": "opens a session for a person",
    "chronyd": "the lab's nodes have this machine's clock, and no service that sets it",
    "systemd-timesyncd": "as chronyd",
    "timedatectl set-ntp": "as chronyd",
}
#: The verbs in an order in which an operator could need them.
STORY = (
    "deploy status preflight logs front_keys weights_manifest gateway watchdog monitoring HOSTS validate ci_validate"
    " compare baseline_promote restart drain rollback bundle unbundle weights_fetch stop remove BARE onboard offboard"
).split()
SMALL = "runbook-small:1"
#: What the placeholders stand for; by command what comes before it and after it on the host.
VALUES = {"IMAGE": ENGINE["glm_ocr_image"], "TARGET": "/usr/local/bin/vllm"}
STAGED: dict[str, tuple[dict[str, str], str, str]] = {
    "docker rename glm-ocr NEW_NAME": (
        {"NEW_NAME": "runbook-renamed"},
        f"docker create --name glm-ocr --entrypoint true {ENGINE['glm_ocr_image']}",
        "docker rm runbook-renamed",
    ),
    "docker stop CONTAINER": (
        {"CONTAINER": "runbook-stopped"},
        f"docker run --detach --name runbook-stopped --init --entrypoint sleep {ENGINE['glm_ocr_image']} 900",
        "docker rm runbook-stopped",
    ),
    "kill PID": (
        {"PID": "$(cat /run/runbook.pid)"},
        "nohup sleep 900 > /dev/null 2>&1 & echo $! > /run/runbook.pid",
        "",
    ),
    "cat /run/lock/glm-ocr.deploy": ({}, "touch /run/lock/glm-ocr.deploy", "rm /run/lock/glm-ocr.deploy"),
    "docker rmi IMAGE": ({"IMAGE": SMALL}, f"tar -c --files-from=/dev/null | docker import - {SMALL}", ""),
    "docker load -i ARCHIVE": (
        {"ARCHIVE": "/tmp/archive.tar"},
        f"tar -c --files-from=/dev/null | docker import - {SMALL} && docker save --output /tmp/archive.tar {SMALL}",
        f"rm /tmp/archive.tar; docker rmi {SMALL}",
    ),
}
#: Before one of the controller's: a release to go back from.
CHANGED = json.dumps({"vllm_service_extra_flags": extra_flags(max_num_seqs=24)})
#: The exit statuses of what is right and not 0.
STATUS = {
    # The site has no certificate, and says so.
    "openssl s_client -connect npu-01:8000": {1},
    # It has gateways, and says that they are to be named too.
    "ansible-playbook playbooks/onboard.yml -l npu-01": {2},
    # The lab's model is another one, in one file.
    "head inventory/manifests/GLM-OCR-bf16.sha256": {1},
    "cat /opt/atomgit/weights/GLM-OCR-bf16/model.safetensors.index.json": {1},
    # Of the lab's npu-smi nobody has recorded it.
    "npu-smi info -t health -i 0": {2},
    # Between its rounds the watchdog is not active.
    "systemctl status glm-ocr-watchdog.timer glm-ocr-watchdog.service": {0, 3},
}


@dataclass
class Site:
    """``ran`` has the commands that were typed; ``wrong`` what came of those that did not end as they should."""

    hosts: dict[str, Host]
    keys: Path
    fingerprint: str
    ran: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)

    def type(self, command: Command) -> None:
        self.ran.add(command.text)
        if any(word in command.text for word in NOT_RUN):
            return
        started = time.monotonic()
        status, said = self.controller(command) if command.where == CONTROLLER else self.host(command)
        print(f"{time.monotonic() - started:6.1f} s  {command.page}, {command.where}: {command.text}", flush=True)
        if status not in STATUS.get(command.text, {0}):
            self.wrong[command.text] = f"{command.page}: exit status {status}: {said[-3000:]}"

    def controller(self, command: Command) -> tuple[int, str]:
        program, text = command.words[0], command.text
        text = text.replace("SHA256:" + 43 * "0", self.fingerprint).replace("KEY", str(self.keys / "bundle.pub"))
        if program == "ansible-vault":
            # It opens no editor without a terminal.
            text = f"script --quiet --return --command {shlex.quote(text)} /dev/null"
        folder = PROJECT
        if program in ("sha256sum", "base64", "openssl"):
            folder = BUNDLE
        elif program in ("python3", ".venv/bin/pip"):
            folder = UNPACKED
        return self.run(text, folder)

    def run(self, text: str, folder: Path = PROJECT) -> tuple[int, str]:
        environment = {
            **os.environ,
            "ANSIBLE_INVENTORY": ",".join(map(str, SITE)),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.keys / "password"),
            "RUNBOOK_KEYS": str(self.keys),
            "EDITOR": str(self.keys / "editor"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def host(self, command: Command) -> tuple[int, str]:
        values, before, after = STAGED.get(command.text, ({}, "", ""))
        text = command.text
        for name, value in (VALUES | values).items():
            text = text.replace(name, value)
        host = self.hosts[command.where]
        if before:
            host.check_output(before)
        done = host.run(f"{text} < /dev/null")
        if after:
            host.check_output(after)
        return done.rc, done.stdout + done.stderr


@pytest.fixture
def site(deployed: Played, play: Play, node: Host, tmp_path: Path) -> Iterator[Site]:
    for path in (BUNDLE, MODEL, UNPACKED, BASELINES, *VAULTS):
        assert not path.exists(), f"{path} is somebody's"
    gateway = node_named("gw1")
    try:
        for playbook in ("playbooks/lab.yml", "tests/lab/gateway_node.yml"):
            up = play(playbook, inventories=SITE[:2], limit="all")
            assert up.rc == 0, up.failures
        with prometheus(node), prometheus(gateway):
            node.check_output(f"cp /etc/hosts /etc/hosts.before; echo {node.backend.hostname} npu-01 >> /etc/hosts")
            shutil.copytree(NANO, MODEL)
            fingerprint = node.check_output("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
            keys_of_a_site(tmp_path)
            yield Site({HOST: node, GATEWAY: gateway, MONITOR: gateway}, tmp_path, fingerprint)
    finally:
        node.run("mv /etc/hosts.before /etc/hosts")
        for name in ("gw1", "gw2"):
            lab_node("remove", name)
        for path in (BUNDLE, MODEL, UNPACKED, BASELINES):
            shutil.rmtree(path, ignore_errors=True)
        for path in VAULTS:
            path.unlink(missing_ok=True)


def keys_of_a_site(folder: Path) -> None:
    """The vault's password, a pair that signs the bundle, and an editor that types the keys of hosts and gateway."""
    private, public = folder / "bundle.pem", folder / "bundle.pub"
    make = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(private)]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    (folder / "password").write_text(os.urandom(16).hex())
    keys = {name: os.urandom(24).hex() for name in ("validation", "gateway", "scanner")}
    (folder / "keys").write_text(json.dumps({"glm_ocr_keys": keys}))
    (folder / "editor").write_text(f'#!/bin/sh\ncp {folder}/keys "$1"\n')
    (folder / "editor").chmod(0o755)


def test_every_command_of_every_runbook_runs(site: Site) -> None:
    pages = {path.stem: commands(path) for path in sorted(RUNBOOKS.glob("*.md"))}
    assert {*STORY, "findings", "alerts"} == {*pages, "HOSTS", "BARE"}
    everything = list(itertools.chain.from_iterable(pages.values()))
    vaults = [command for command in everything if command.words[0] == "ansible-vault"]
    for command in vaults:
        site.type(command)
    for step in STORY:
        if step == "HOSTS":
            elsewhere = (one for one in everything if one.where != CONTROLLER or one.words[0] == "ansible")
            typed = [one for one in elsewhere if "rename" not in one.text]
        elif step == "BARE":
            typed = [one for one in everything if "rename" in one.text]
        else:
            before(step, site)
            blocks = [one for one in pages[step] if one.in_block]
            known = {one.text for one in blocks}
            said = [one for one in everything if one.playbook == step and not one.in_block and one.text not in known]
            by_hand = [one for one in pages[step] if one.where == CONTROLLER and not one.playbook and one not in vaults]
            # What a page has one do by hand comes before its play, but for the bundle's, which makes what is looked at.
            typed = blocks + said + by_hand if step == "bundle" else by_hand + blocks + said
        for command in dict.fromkeys(typed):
            if command.in_block or command.text not in site.ran:
                site.type(command)
    for command in everything:
        if command.text not in site.ran and command.where == CONTROLLER and not command.playbook:
            site.type(command)
    left_out = {command.text for command in everything} - site.ran
    wrong = [f"{text}\n{said}" for text, said in site.wrong.items()]
    assert not wrong + sorted(left_out), "\n\n".join([*wrong, f"left out: {sorted(left_out)}"])


def before(step: str, site: Site) -> None:
    if step == "rollback":
        status, said = site.run(f"ansible-playbook deploy.yml -l npu-01 -e '{CHANGED}'")
        assert status == 0, said
