#!/usr/bin/env python3
"""One round of the watchdog: tells a service that works from one that hangs, and restarts the one that hangs.

    watchdog.py --service glm-ocr --engine docker --releases /var/lib/glm-ocr/releases --label glm-ocr.release \
        --state /var/lib/glm-ocr/watchdog.json --lock /run/lock/glm-ocr.deploy --canary-timeout 10 \
        --metrics-timeout 5 --rounds 4 --restarts 3 --window 3600 --textfile ""

A timer runs it.  A hung engine answers /health and /v1/models, so the canary is a generation of one token, asked where
readiness asks.  One that does not come is no proof: a busy engine has no room for it.  Then the engine's own count of
tokens tells, against the round before; it stands still in a hung engine.  What is seen is kept in the state file, from
round to round.  Exit 0, or 1 when an operator is needed: it gave up, it cannot tell, or a restart did not work.
Standard library and Python 3.7: it runs on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
from typing import Any, Dict, List, Optional, Tuple

import unix_http
import wait_ready

#: What may be known of the service.  RESTING: it is not judged; it starts, stops, is stopped, or a play works on it.
RESTING, HEALTHY, BUSY, SUSPECT = "resting", "healthy", "busy", "suspect"
#: HUNG: it is restarted now.  RESTARTED: until it is active again.  GAVE_UP: it hangs and was restarted often enough.
#: BLIND: neither canary nor metrics can tell.
HUNG, RESTARTED, GAVE_UP, BLIND = "hung", "restarted", "gave-up", "blind"
STATES = (HEALTHY, BUSY, SUSPECT, HUNG, RESTARTED, GAVE_UP, BLIND, RESTING)
#: Those that nobody but an operator ends.
NEEDS_OPERATOR = (HUNG, GAVE_UP, BLIND)
#: What the journal is told of a state, as sd-daemon(3) has it.
PRIORITY = dict.fromkeys(STATES, 5)
PRIORITY.update({SUSPECT: 4, RESTARTED: 4, HUNG: 3, GAVE_UP: 3, BLIND: 3})
#: Seconds after which the lock of a play counts as forgotten: no play holds a host for as long as this.
LOCK_SECONDS = 4 * 3600.0
#: Seconds that a command of the host may take.
COMMAND_SECONDS = 30.0
#: One line of each per engine (vLLM's metrics reference): vllm:generation_tokens_total{engine="0",model_name="x"} 7.0
TOKENS = re.compile(r"^vllm:(prompt|generation)_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)


# --- pure -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """``rounds`` without an answer and without a token are a hang; at most ``restarts`` in ``window`` seconds."""

    rounds: int
    restarts: int
    window: float


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a round saw.  ``answer`` is "" for a generation, else what came instead; ``tokens`` None: no metrics."""

    unit: str = "active"
    invocation: str = ""
    locked: bool = False
    answer: str = ""
    latency: Optional[float] = None
    tokens: Optional[float] = None
    #: Metrics came that do not count tokens, or it is not known where to ask.
    untold: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    """What is kept from round to round.  Times are of the monotonic clock of ``boot``, but for ``at`` and ``since``."""

    boot: str = ""
    name: str = RESTING
    found: str = "no round yet"
    since: str = ""
    at: str = ""
    failures: int = 0
    invocation: str = ""
    tokens: Optional[float] = None
    latency: Optional[float] = None
    locked_since: Optional[float] = None
    restarts: Tuple[float, ...] = ()
    restarts_total: int = 0


def decide(before: State, seen: Seen, limits: Limits, now: float) -> State:
    """The state after a round.  HUNG is the order to restart; its restart is counted already."""
    known = before if before.invocation == seen.invocation else None
    kept = dataclasses.replace(
        before,
        invocation=seen.invocation,
        tokens=seen.tokens if seen.tokens is not None or known is None else known.tokens,
        latency=seen.latency,
        failures=0,
        locked_since=(now if before.locked_since is None else before.locked_since) if seen.locked else None,
        restarts=tuple(at for at in before.restarts if now - at < limits.window),
    )

    def is_now(name: str, found: str, **changes: Any) -> State:
        return dataclasses.replace(kept, name=name, found=found, **changes)

    if seen.unit != "active":
        coming_back = before.name in (HUNG, RESTARTED) and seen.unit in ("activating", "deactivating")
        return is_now(RESTARTED if coming_back else RESTING, "the service is " + (seen.unit or "unknown"))
    if kept.locked_since is not None and now - kept.locked_since < LOCK_SECONDS:
        return is_now(RESTING, "a play holds the lock of this host")
    if not seen.answer:
        return is_now(HEALTHY, "it generates")
    if seen.untold or seen.answer.startswith("HTTP 4"):
        return is_now(BLIND, "it cannot be told: " + seen.answer)
    if known is not None and seen.tokens is not None and known.tokens is not None and seen.tokens != known.tokens:
        return is_now(BUSY, "no answer in time, but its tokens advance: " + seen.answer)
    failures = (known.failures if known else 0) + 1
    silent = f"{failures} rounds without an answer or a token: {seen.answer}"
    if known is not None and known.name == GAVE_UP:
        return is_now(GAVE_UP, known.found, failures=failures)
    if failures < limits.rounds:
        return is_now(SUSPECT, silent, failures=failures)
    if len(kept.restarts) >= limits.restarts:
        spent = f"restarted {len(kept.restarts)} times in {limits.window:.0f} s already"
        return is_now(GAVE_UP, f"{spent}; {silent}", failures=failures)
    return is_now(HUNG, silent, restarts=(*kept.restarts, now), restarts_total=kept.restarts_total + 1)


def tokens_of(metrics: str) -> Optional[float]:
    """All tokens of all engines, None when the metrics do not count both kinds."""
    counts: Dict[str, float] = {}
    for kind, value in TOKENS.findall(metrics):
        counts[kind] = counts.get(kind, 0.0) + float(value)
    return sum(counts.values()) if len(counts) == 2 else None


def textfile(service: str, state: State, at: float) -> str:
    """The state as node-exporter's textfile collector reads it."""
    numbers: List[Tuple[str, str, float]] = [
        ("consecutive_failures", "gauge", state.failures),
        ("restarts_total", "counter", state.restarts_total),
        ("restarts_in_window", "gauge", len(state.restarts)),
        ("last_round_timestamp_seconds", "gauge", round(at)),
    ]
    if state.latency is not None:
        numbers.append(("canary_seconds", "gauge", state.latency))
    lines = ["# TYPE glm_ocr_watchdog_state gauge"]
    lines += [
        f'glm_ocr_watchdog_state{{service="{service}",state="{name}"}} {int(name == state.name)}' for name in STATES
    ]
    for name, kind, value in numbers:
        lines.append(f"# TYPE glm_ocr_watchdog_{name} {kind}")
        lines.append(f'glm_ocr_watchdog_{name}{{service="{service}"}} {value}')
    return "\n".join([*lines, ""])


# --- edges ------------------------------------------------------------------------------------------------


def boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def load(path: str, boot_id: str) -> State:
    """The state of the round before; of another boot its clock means nothing, and all but the total is forgotten."""
    try:
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
        state = State(**dict(kept, restarts=tuple(kept["restarts"])))
    except FileNotFoundError:
        return State(boot=boot_id)
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"<4>the state in {path} cannot be read and begins anew: {error}", flush=True)
        return State(boot=boot_id)
    return state if state.boot == boot_id else State(boot=boot_id, restarts_total=state.restarts_total)


def write(path: str, text: str) -> None:
    """Replaces the file by a complete one that everybody may read."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".watchdog-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def run(command: List[str]) -> Tuple[bool, str]:
    """Whether the command ended well, and what it said."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.strip()


def unit_of(service: str) -> Dict[str, str]:
    shown = "--property=ActiveState,InvocationID,FragmentPath"
    _, output = run(["systemctl", "show", service, shown])
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


def release_of(unit_file: str, label: str) -> str:
    """The id of the release that the unit runs.  Raises ``OSError`` or ``ValueError``."""
    with open(unit_file, encoding="utf-8") as file:
        found = re.search(rf"--label {re.escape(label)}=(\S+)", file.read())
    if not found:
        raise ValueError(f"{unit_file} has no label {label}")
    return found.group(1)


def look(options: argparse.Namespace) -> Tuple[Seen, str]:
    """What there is to see of the service, and the id of its release.  Asks only one that should answer."""
    unit, locked = unit_of(options.service), os.path.exists(options.lock)
    # A lock that is there does not keep the canary away: it may be a forgotten one.
    if unit.get("ActiveState") != "active":
        return seen_of(unit, locked), ""
    try:
        release = release_of(unit.get("FragmentPath", ""), options.label)
        # Where this release listens: the inventory, or a rollback, may have moved on.
        with open(os.path.join(options.releases, release, "release.json"), encoding="utf-8") as file:
            record = json.load(file)
        url, socket_path, model = record["base_url"], record.get("socket", ""), record["served_model_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"what release is installed, and where it listens, is not known: {error}"
        return seen_of(unit, locked, answer=told, untold=True), ""
    started = time.monotonic()
    answer = wait_ready.generates(url, model, options.canary_timeout, socket_path)
    latency = None if answer else round(time.monotonic() - started, 3)
    tokens, untold = None, False
    try:
        with unix_http.ask(url, "/metrics", options.metrics_timeout, socket_path) as metrics:
            tokens = tokens_of(metrics.read().decode())
        untold = tokens is None
    except urllib.error.HTTPError:
        untold = True
    except (OSError, ValueError, http.client.HTTPException):
        # No metrics: as silent as the canary.
        pass
    if answer:
        # That took its time: a stop or a play may have begun meanwhile.
        unit, locked = unit_of(options.service), os.path.exists(options.lock)
    return seen_of(unit, locked, answer=answer, latency=latency, tokens=tokens, untold=untold), release


def seen_of(unit: Dict[str, str], locked: bool, **more: Any) -> Seen:
    return Seen(unit=unit.get("ActiveState", ""), invocation=unit.get("InvocationID", ""), locked=locked, **more)


def restart(options: argparse.Namespace) -> str:
    """Brings a hung service back.  Empty, or why that did not work.

    Its stop would wait for requests that a hung engine never completes.  A container that is gone is a crash to the
    unit, which comes back by itself, unless an operator stops it at this moment.
    """
    killed, told = run([options.engine, "kill", options.service])
    if killed:
        return ""
    restarted, also = run(["systemctl", "--no-block", "try-restart", options.service])
    return "" if restarted else f"{told}; {also}"


def note(options: argparse.Namespace, release: str, at: str) -> None:
    """For playbooks/status.yml, beside what plays did."""
    entry = {"at": at, "by": "watchdog", "action": "restart", "release": release, "result": "it hung"}
    try:
        with open(os.path.join(options.releases, "history.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        print(f"<4>the history is not told: {error}", flush=True)


def keep(options: argparse.Namespace, before: State, after: State) -> State:
    """Writes the state down, and tells the journal when it is another one."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    state = dataclasses.replace(after, at=at, since=at if after.name != before.name else before.since)
    write(options.state, json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    if options.textfile:
        try:
            write(options.textfile, textfile(options.service, state, time.time()))
        except OSError as error:
            # Of less weight than what this round is for.
            print(f"<4>monitoring is not told: {error}", flush=True)
    if state.name != before.name:
        print(f"<{PRIORITY[state.name]}>{options.service} is {state.name}: {state.found}", flush=True)
    return state


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", required=True, help="the unit, and its container")
    parser.add_argument("--engine", required=True, help="the command that runs containers")
    parser.add_argument("--releases", required=True, help="folder of the kept releases")
    parser.add_argument("--label", required=True, help="the label in the unit that has the release's id")
    parser.add_argument("--state", required=True, help="file that is kept from round to round")
    parser.add_argument("--lock", required=True, help="file that is there while a play works on the host")
    parser.add_argument("--canary-timeout", type=float, required=True, help="seconds for one token")
    parser.add_argument("--metrics-timeout", type=float, required=True, help="seconds for the metrics")
    parser.add_argument("--rounds", type=int, required=True, help="rounds without answer and token that are a hang")
    parser.add_argument("--restarts", type=int, required=True, help="restarts in a window, at most")
    parser.add_argument("--window", type=float, required=True, help="seconds of that window")
    parser.add_argument("--textfile", default="", help="file for node-exporter's textfile collector")
    options = parser.parse_args(argv)
    limits = Limits(options.rounds, options.restarts, options.window)
    before = load(options.state, boot())
    seen, release = look(options)
    state = keep(options, before, decide(before, seen, limits, time.monotonic()))
    if state.name == HUNG:
        # It is counted before it is done: a watchdog that ends here does not restart without end.
        problem = restart(options)
        if not problem:
            note(options, release, state.at)
            state = keep(options, state, dataclasses.replace(state, name=RESTARTED, found=f"it hung: {state.found}"))
        else:
            print(f"<3>{options.service} could not be restarted: {problem}", flush=True)
    return 1 if state.name in NEEDS_OPERATOR else 0


if __name__ == "__main__":
    sys.exit(main())
