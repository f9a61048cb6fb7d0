"""Prometheus and its exporters as the roles bring them, on this machine, with a stand-in for systemd.

``systemctl`` starts what the drop-ins say, so that what runs is what the roles wrote.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from front import free_ports
from playing import HERE, Played, ansible_playbook, stub
from rendering import PROJECT

#: Where `.ci/bootstrap monitoring` puts them: nothing of them is installed, and nothing starts by itself.
PROGRAMS = PROJECT / ".venv" / "monitoring" / "usr" / "bin"
SECONDS = 120.0

SYSTEMCTL = """
import os, pathlib, signal, subprocess, sys
folder, verb, unit = pathlib.Path({folder!r}), sys.argv[1], sys.argv[-1].removesuffix(".service")
pid = folder / f"{{unit}}.pid"
if verb == "show":
    print(f"LoadState=loaded\\nActiveState={{'active' if pid.exists() else 'inactive'}}\\nUnitFileState=enabled")
elif verb in ("restart", "stop") and pid.exists():
    os.kill(int(pid.read_text()), signal.SIGTERM)
    pid.unlink()
elif verb == "reload":
    os.kill(int(pid.read_text()), signal.SIGHUP)
if verb in ("start", "restart"):
    lines = (folder / "units" / f"{{unit}}.service.d" / "glm-ocr.conf").read_text().splitlines()
    (command,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=/")]
    log = (folder / f"{{unit}}.log").open("ab")
    started = subprocess.Popen(command.split(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=1)
    pid.write_text(str(started.pid))
"""


def requirement() -> None:
    """What these tests need of the machine.  Raises ``RuntimeError``: without it nothing was shown."""
    if missing := [name for name in ("prometheus", "promtool") if not (PROGRAMS / name).exists()]:
        raise RuntimeError(f"expected {', '.join(missing)} in {PROGRAMS}. Fix: .ci/bootstrap monitoring")


class Monitoring:
    """``playbooks/monitoring.yml`` over ``hosts``, watched from another, ``monitor-01``; all are this machine.

    ``gateways`` are before them, and are no hosts of the play.
    """

    def __init__(
        self,
        folder: Path,
        hosts: dict[str, dict[str, Any]],
        gateways: dict[str, dict[str, Any]] | None = None,
        **variables: Any,
    ) -> None:
        self.folder = folder
        self.gateways = gateways or {}
        prometheus, prober, exporter = free_ports(3)
        self.url = f"http://127.0.0.1:{prometheus}"
        (folder / "systemctl.py").write_text(SYSTEMCTL.format(folder=str(folder)))
        stub(folder / "bin", "systemctl", f'exec {sys.executable} {folder}/systemctl.py "$@"')
        here = HERE | {"ansible_host": "127.0.0.1", "host_exporter_port": exporter}
        # By another port of SSH, which nobody uses here, each is a machine of its own and no second instance of one.
        self.hosts = {name: here | {"ansible_port": port} | host for port, (name, host) in enumerate(hosts.items(), 22)}
        self.variables: dict[str, Any] = {
            "__monitoring_user": "root",
            "__monitoring_units": str(folder / "units"),
            "__host_exporter_units": str(folder / "units"),
            "host_exporter_bind_address": "127.0.0.1",
            "host_exporter_program": str(PROGRAMS / "prometheus-node-exporter"),
            "host_exporter_textfile_dir": str(folder / "textfiles"),
            "monitoring_dir": str(folder / "etc"),
            "monitoring_data_dir": str(folder / "data"),
            "monitoring_programs_dir": str(PROGRAMS),
            "monitoring_listen_address": f"127.0.0.1:{prometheus}",
            "monitoring_prober_address": f"127.0.0.1:{prober}",
            "monitoring_interval_seconds": 1,
        } | variables

    def play(self, *options: str) -> Played:
        groups = {"ascend910": {"hosts": self.hosts}, "monitoring": {"hosts": {"monitor-01": HERE}}}
        if self.gateways:
            groups["gateway"] = {"hosts": self.gateways}
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(groups))
        if not (self.folder / "group_vars").exists():
            (self.folder / "group_vars").symlink_to(PROJECT / "inventory" / "group_vars")
        (self.folder / "units").mkdir(exist_ok=True)
        return ansible_playbook(
            "playbooks/monitoring.yml",
            # One host at a time: all are this machine, with one of each unit.
            "--forks=1",
            *("-i", str(self.folder / "hosts.yml"), "-e", json.dumps(self.variables), *options),
            PATH=f"{self.folder}/bin:{os.environ['PATH']}",
            ANSIBLE_HOME=str(self.folder / "ansible"),
            ANSIBLE_REMOTE_TEMP=str(self.folder / "remote"),
        )

    def hasten(self) -> None:
        """Alerts wait a second, and rates are of ten: nobody has minutes here.  What is compared stays as it is."""
        for path in (self.folder / "etc" / "rules").glob("[1-9]_*.yml"):
            text = re.sub(r"\bfor: \w+", "for: 1s", path.read_text())
            path.write_text(re.sub(r"\[(5|10)m\]", "[10s]", text))
        os.kill(int((self.folder / "prometheus.pid").read_text()), signal.SIGHUP)
        # Rules are what a reload takes last. Alertmanagers are looked up anew, and what fires before that is not sent.
        comes(lambda: {rule["duration"] for rule in self.alerting_rules()} <= {0, 1}, "the shortened rules")
        comes(lambda: self.ask("alertmanagers")["activeAlertmanagers"], "the Alertmanager")

    def alerting_rules(self) -> list[dict[str, Any]]:
        groups = self.ask("rules", type="alert")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def stop(self) -> None:
        for path in self.folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
            print(path.with_suffix(".log").read_text())

    def ask(self, path: str, **query: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=SECONDS) as reply:
            return json.load(reply)["data"]

    def samples(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def comes(condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` says once it says something."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {SECONDS:.0f} s")


@contextmanager
def alertmanager() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the alerts that it was sent so far."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.extend(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def promtool(*arguments: str | Path, folder: Path = PROJECT) -> tuple[int, str]:
    """Its exit status and what it says."""
    done = subprocess.run([PROGRAMS / "promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
