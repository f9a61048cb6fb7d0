"""What runs on every host, as data and as one table for the console."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

COLUMNS = ("HOST", "STATE", "SINCE (UTC)", "RESTARTS", "RUNS", "WANTED", "LAST GOOD", "VALIDATED")
#: Lines of the history that the table shows; the data has all that the host told.
HISTORY = 3
WIDTH = 120
#: Seconds without a round of the watchdog after which it counts as silent: two rounds at their slowest.
SILENT_SECONDS = 900
#: What a state of the watchdog that needs somebody means: the finding, with what was expected and what to do.
WATCHDOG_FINDINGS = {
    "gave-up": {
        "id": "WATCHDOG_GAVE_UP",
        "expected": "a service that a restart brings back",
        "fix": "mend the cause (ansible-playbook playbooks/logs.yml), then ansible-playbook playbooks/restart.yml",
    },
    "blind": {
        "id": "WATCHDOG_BLIND",
        "expected": "a service that can be told busy from hung",
        "fix": "`journalctl -u 'glm-ocr*-watchdog'` says what it answers; ansible-playbook deploy.yml mends both",
    },
    "silent": {
        "id": "WATCHDOG_SILENT",
        "expected": f"a round of the watchdog within {SILENT_SECONDS} s",
        "fix": "`systemctl status 'glm-ocr*-watchdog.timer'` says why; ansible-playbook deploy.yml starts it",
    },
}
#: As systemd prints times with TZ=UTC: "Mon 2026-01-02 03:04:05 UTC".
SYSTEMD_TIME = re.compile(r"\w+ (\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.\d+)? UTC")


def service_status(published: Mapping[str, Mapping[str, Any]], run: str, reports: str) -> dict[str, Any]:
    """The report of files/schemas/status.schema.json.

    ``published`` has what role vllm_service published for every host of the play, nothing for one that left it;
    ``reports`` is the controller's folder of validation reports.
    """
    hosts = [host_status(host, status, last_validation(Path(reports, host))) for host, status in published.items()]
    return {"schema_version": "1.0", "run": run, "hosts": hosts}


def host_status(host: str, status: Mapping[str, Any], validation: dict[str, Any] | None) -> dict[str, Any]:
    """What is known of one host: None is what could not be told, an empty text is none."""
    told, wanted = status.get("described") or {}, status.get("wanted")
    engine_problem = told.get("engine_problem")
    running = None if engine_problem else told.get("running")
    problems = [
        status.get("problem") if status else "it left the play: its own message stands above",
        engine_problem and f"what runs cannot be told: {engine_problem}",
        watchdog_problem(told.get("watchdog") or {}),
    ]
    return {
        "host": host,
        "asked": bool(told),
        "problems": [problem for problem in problems if problem],
        "service": service(told["service"]) if told else None,
        "installed": told.get("installed"),
        "running": running,
        "image_id": None if engine_problem else told.get("image_id"),
        "wanted": wanted,
        "runs_wanted": None if running is None or wanted is None else running == wanted,
        "last_good": told.get("last_good"),
        "kept": [kept(release) for release in told.get("releases", [])],
        "history": told.get("history", []),
        "last_validation": validation,
        "watchdog": watchdog(told.get("watchdog") or {}),
    }


def watchdog(known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the watchdog's last round left; None without a watchdog."""
    if not known:
        return None
    return {
        "state": known["name"],
        "found": known["found"],
        "since": known.get("since") or None,
        "restarts": known.get("restarts_total"),
        "age_seconds": known["age"],
    }


def watchdog_problem(known: Mapping[str, Any]) -> str | None:
    """The finding that what the watchdog knows, or that it knows nothing new, is."""
    if not known:
        return None
    states = {"hung": "gave-up", "unknown": "blind"}
    silent = known["age"] > SILENT_SECONDS
    finding = WATCHDOG_FINDINGS.get("silent" if silent else states.get(known["name"], known["name"]))
    if finding is None:
        return None
    found = f"none for {known['age']:.0f} s" if silent else known["found"]
    return f"[{finding['id']}] expected {finding['expected']}; found {found}. Fix: {finding['fix']}"


def service(properties: Mapping[str, str]) -> dict[str, Any]:
    """What systemd says of the unit; what it did not say is None."""
    since = SYSTEMD_TIME.fullmatch(properties.get("StateChangeTimestamp", ""))
    restarts = properties.get("NRestarts", "")
    return {
        "load_state": properties.get("LoadState") or None,
        "active_state": properties.get("ActiveState") or None,
        "sub_state": properties.get("SubState") or None,
        "unit_file_state": properties.get("UnitFileState") or None,
        "since": f"{since[1]}T{since[2]}Z" if since else None,
        "restarts": int(restarts) if restarts.isdigit() else None,
    }


def kept(release: Mapping[str, Any]) -> dict[str, Any]:
    good_at = release["good_at"]
    return {
        "id": release["id"],
        "good_at": good_at and datetime.fromtimestamp(good_at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{name: release["record"].get(name) for name in ("image", "image_id", "staged_at", "staged_by")},
    }


def last_validation(folder: Path) -> dict[str, Any] | None:
    """What the newest report in ``folder`` says; None when there is none that can be read."""
    try:
        report = json.loads((folder / "latest" / "report.json").read_text(encoding="utf-8"))
        told = {name: report[name] for name in ("verdict", "run", "finished_at")}
        return told | {"stages": list(report["stages"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def status_table(report: Mapping[str, Any]) -> str:
    """A line for every host, and below it what does not fit into one."""
    rows = [COLUMNS, *(cells(host) for host in report["hosts"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    table = [head]
    for line, host in zip(lines, report["hosts"], strict=True):
        details = (f"{name:10}{text}" for name, text in below(host))
        table += [line, *(" " * (widths[0] + 2) + detail for detail in details)]
    return "\n".join(table)


def cells(host: Mapping[str, Any]) -> tuple[str, ...]:
    validation, unit, running = host["last_validation"], host["service"] or {}, host["running"]
    return (
        host["host"],
        state(unit) if host["asked"] else "NOT ASKED",
        moment(unit.get("since")),
        shown(unit.get("restarts"), "0"),
        shown(running, "nothing"),
        "as it runs" if host["runs_wanted"] else shown(host["wanted"], "none"),
        "as it runs" if running and running == host["last_good"] else shown(host["last_good"], "none"),
        f"{validation['verdict']} {moment(validation['finished_at'])}" if validation else "never from here",
    )


def shown(value: str | int | None, nothing: str) -> str:
    return "?" if value is None else str(value or nothing)


def state(unit: Mapping[str, Any]) -> str:
    if unit["load_state"] == "not-found":
        return "not installed"
    if unit["active_state"] is None:
        return "unknown"
    enabled = "" if unit["unit_file_state"] == "enabled" else f", {unit['unit_file_state']}"
    return f"{unit['active_state']} ({unit['sub_state']}){enabled}"


def below(host: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The named lines below a host's own."""
    lines = []
    for problem in host["problems"]:
        lines += [("problem" if at == 0 else "", text) for at, text in enumerate(wrapped(problem))]
    if host["image_id"]:
        lines.append(("image", host["image_id"]))
    if host["installed"] and host["installed"] != host["running"]:
        lines.append(("installed", host["installed"]))
    if watched := host["watchdog"]:
        since, restarts = moment(watched["since"]), shown(watched["restarts"], "0")
        lines.append(("watchdog", f"{watched['state']} since {since}, restarts: {restarts}"))
    if host["last_validation"]:
        lines.append(("validated", ", ".join(host["last_validation"]["stages"])))
    for release in host["kept"]:
        good = f"good {moment(release['good_at'])}" if release["good_at"] else "never found good"
        lines.append(("kept", f"{release['id']}  {good}  {release['image'] or ''}".rstrip()))
    for entry in host["history"][-HISTORY:]:
        told = [moment(entry["at"]), *(str(entry[name]) for name in ("action", "release", "result"))]
        lines.append(("history", "  ".join(told) + f"  by {entry['by']}"))
    return lines


def wrapped(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False)]


def moment(at: str | None) -> str:
    return at[:19].replace("T", " ") if at else "?"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"service_status": service_status, "status_table": status_table}
