"""The watchdog tells busy from dead: the decision as a table, and a round against a real server on a Unix socket."""

from __future__ import annotations

import ast
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import watchdog
from playing import stub
from watchdog import BLIND, BUSY, GAVE_UP, HEALTHY, HUNG, RESTARTED, RESTING, SUSPECT, Limits, Seen, State

LIMITS = Limits(rounds=4, restarts=2, window=3600.0)
SILENT = "timed out"
#: Seconds from round to round.
PERIOD = 20.0


def states(*seen: Seen, before: State | None = None, limits: Limits = LIMITS) -> list[str]:
    """The states that follow one another, a round every PERIOD seconds."""
    return [state.name for state in rounds(*seen, before=before, limits=limits)]


def rounds(*seen: Seen, before: State | None = None, limits: Limits = LIMITS, start: float = 0.0) -> list[State]:
    """As the script goes on: a restart that was ordered has been done when the next round comes."""
    state, told = before or State(), []
    for number, what in enumerate(seen):
        state = watchdog.decide(state, what, limits, start + number * PERIOD)
        told.append(state)
        if state.name == HUNG:
            state = replace(state, name=RESTARTED)
    return told


def hung(tokens: float | None = 7.0, invocation: str = "") -> Seen:
    return Seen(answer=SILENT, tokens=tokens, invocation=invocation)


WELL = Seen(latency=0.1, tokens=7.0)


def test_a_service_that_generates_is_healthy() -> None:
    (state,) = rounds(WELL)
    assert (state.name, state.latency, state.failures) == (HEALTHY, 0.1, 0)


def test_a_busy_service_is_never_restarted() -> None:
    """An hour without an answer, and a token in every round."""
    busy = [Seen(answer=SILENT, tokens=8.0 + number) for number in range(180)]
    assert set(states(WELL, *busy)) == {HEALTHY, BUSY}


def test_a_token_now_and_then_is_enough() -> None:
    seen = [Seen(answer=SILENT, tokens=8.0 + number // 4) for number in range(180)]
    assert set(states(WELL, *seen)) == {HEALTHY, BUSY, SUSPECT}


def test_a_hang_is_one_after_its_rounds_and_not_before() -> None:
    told = rounds(WELL, *[hung()] * 4)
    assert [state.name for state in told] == [HEALTHY, SUSPECT, SUSPECT, SUSPECT, HUNG]
    assert (told[-1].restarts, told[-1].restarts_total) == ((4 * PERIOD,), 1)


def test_a_hang_under_load_is_one_a_round_later() -> None:
    """Tokens that came between the last answer and the hang are seen once."""
    assert states(WELL, *[hung(9.0)] * 5) == [HEALTHY, BUSY, SUSPECT, SUSPECT, SUSPECT, HUNG]


def test_an_api_process_that_hangs_too_has_no_metrics_and_is_hung() -> None:
    assert states(WELL, *[hung(None)] * 4)[-1] == HUNG


def test_metrics_that_come_back_are_compared_with_the_last_ones() -> None:
    assert states(WELL, hung(None), hung(None), hung(9.0)) == [HEALTHY, SUSPECT, SUSPECT, BUSY]
    assert states(WELL, hung(None), hung(None), hung(7.0), hung(7.0))[-1] == HUNG


def test_a_first_round_has_nothing_to_compare_with_and_counts() -> None:
    assert states(*[hung()] * 4) == [SUSPECT, SUSPECT, SUSPECT, HUNG]


def test_an_answer_ends_a_suspicion() -> None:
    assert states(*[hung()] * 3, WELL, *[hung()] * 3) == [*[SUSPECT] * 3, HEALTHY, *[SUSPECT] * 3]


def test_another_process_begins_anew_and_its_smaller_count_is_no_progress() -> None:
    again = [hung(0.0, "b")] * 4
    told = states(*[hung(90.0, "a")] * 3, *again)
    assert told == [*[SUSPECT] * 3, SUSPECT, SUSPECT, SUSPECT, HUNG]


@pytest.mark.parametrize("unit", ["activating", "deactivating", "inactive", "failed", ""])
def test_a_service_that_does_not_run_is_left_alone(unit: str) -> None:
    assert set(states(*[replace(hung(), unit=unit)] * 50)) == {RESTING}


def test_a_service_is_not_judged_while_a_play_works_on_it_but_for_a_forgotten_lock() -> None:
    locked = replace(hung(), locked=True)
    assert set(states(*[hung()] * 3, *[locked] * 100)[3:]) == {RESTING}
    forgotten = states(*[locked] * int(watchdog.LOCK_SECONDS / PERIOD + 8))
    assert forgotten[-1] != RESTING
    assert HUNG in forgotten


def test_two_plays_one_after_the_other_are_not_one_forgotten_lock() -> None:
    locked, half = replace(hung(), locked=True), int(watchdog.LOCK_SECONDS / PERIOD / 2) + 2
    assert HUNG not in states(*[locked] * half, WELL, *[locked] * half)


def test_a_restarted_service_is_waited_for() -> None:
    starting = [Seen(unit="deactivating"), *[Seen(unit="activating")] * 40]
    told = states(*[hung()] * 4, *starting, replace(WELL, invocation="b"))
    assert told == [SUSPECT, SUSPECT, SUSPECT, HUNG, *[RESTARTED] * 41, HEALTHY]


def flapping(times: int) -> list[Seen]:
    """It hangs, is restarted, and hangs again, each time as another process."""
    return [seen for number in range(times) for seen in [hung(7.0, str(number))] * 4]


def test_restarts_are_bounded_and_giving_up_lasts() -> None:
    told = states(*flapping(2), *[hung(7.0, "3")] * 600)
    assert told.count(HUNG) == LIMITS.restarts
    assert told[11] == GAVE_UP
    # Longer than the window: it hangs still, and nobody but an operator restarts it.
    assert set(told[11:]) == {GAVE_UP}


def test_who_gave_up_looks_on() -> None:
    gave_up = rounds(*flapping(3))[-1]
    assert gave_up.name == GAVE_UP
    assert states(WELL, before=replace(gave_up, invocation="")) == [HEALTHY]
    assert states(hung(9.0, "2"), before=gave_up) == [BUSY]
    assert states(Seen(unit="activating"), before=gave_up) == [RESTING]


def test_restarts_before_the_window_do_not_count() -> None:
    first = rounds(*flapping(2))[-1]
    later = rounds(*[hung(7.0, "9")] * 4, before=first, start=LIMITS.window + 10 * PERIOD)[-1]
    assert (later.name, len(later.restarts), later.restarts_total) == (HUNG, 1, 3)


def test_a_restart_that_did_not_work_is_tried_again_and_counted() -> None:
    told = rounds(*[hung()] * 12)
    # As the script leaves it then.
    failed = watchdog.decide(replace(told[3], name=HUNG), hung(), LIMITS, 99.0)
    assert (failed.name, failed.failures) == (SUSPECT, 1)
    assert [state.name for state in told].count(HUNG) == 2
    assert told[-1].name == GAVE_UP


@pytest.mark.parametrize("answer", ["HTTP 401: no key", "HTTP 404: no such model", "HTTP 429: later"])
def test_a_canary_that_is_refused_tells_nothing(answer: str) -> None:
    assert set(states(*[Seen(answer=answer, tokens=7.0)] * 10)) == {BLIND}


def test_metrics_without_tokens_tell_nothing() -> None:
    assert set(states(*[Seen(answer=SILENT, untold=True)] * 10)) == {BLIND}


def test_an_engine_that_answers_with_errors_alone_is_hung() -> None:
    assert states(*[Seen(answer="HTTP 500: EngineDeadError", tokens=7.0)] * 4)[-1] == HUNG


@pytest.mark.parametrize(
    ("metrics", "tokens"),
    [
        ('vllm:prompt_tokens_total{engine="0"} 5.0\nvllm:generation_tokens_total{engine="0"} 7.0\n', 12.0),
        (
            'vllm:prompt_tokens_total{engine="0"} 5.0\nvllm:prompt_tokens_total{engine="1"} 1e3\n'
            'vllm:generation_tokens_total{engine="0"} 0.0\n',
            1005.0,
        ),
        ('vllm:generation_tokens_total{engine="0"} 7.0\n', None),
        ('vllm:prompt_tokens_created{engine="0"} 7.0\n# vllm:prompt_tokens_total 1\n', None),
    ],
)
def test_tokens_are_counted_over_all_engines(metrics: str, tokens: float | None) -> None:
    assert watchdog.tokens_of(metrics) == tokens


def test_it_is_python_3_7() -> None:
    ast.parse(Path(watchdog.__file__).read_text(), feature_version=(3, 7))


# --- a round ------------------------------------------------------------------------------------------------

METRICS = "vllm:prompt_tokens_total 1.0\nvllm:generation_tokens_total 6.0\n"
GENERATED = json.dumps({"usage": {"completion_tokens": 1}})


class Node:
    """A host with one service behind a socket: ``generates`` and ``metrics`` say what the engine does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generates, self.metrics = True, METRICS
        (folder / "releases" / "abcd").mkdir(parents=True)
        self.record = {"base_url": "http://127.0.0.1:1", "socket": str(folder / "s"), "served_model_name": "glm-ocr"}
        self.recorded()
        (folder / "unit").write_text("ExecStart=docker run --label glm-ocr.release=abcd image\n")
        self.unit("active")
        self.does("docker", f"echo $@ >> {folder}/calls")

    def recorded(self) -> None:
        (self.folder / "releases" / "abcd" / "release.json").write_text(json.dumps(self.record))

    def does(self, command: str, script: str) -> None:
        stub(self.folder / "bin", command, script)

    def unit(self, state: str, invocation: str = "one") -> None:
        told = f"ActiveState={state}\\nInvocationID={invocation}\\nFragmentPath={self.folder}/unit\\n"
        self.does("systemctl", f"case $1 in show) printf '{told}' ;; *) echo $@ >> {self.folder}/calls ;; esac")

    def round(self, timeout: str = "0.05", **more: Any) -> int:
        given = {
            "service": "glm-ocr",
            "engine": str(self.folder / "bin" / "docker"),
            "releases": str(self.folder / "releases"),
            "label": "glm-ocr.release",
            "state": str(self.folder / "state.json"),
            "lock": str(self.folder / "lock"),
            "canary-timeout": timeout,
            "metrics-timeout": "5",
            "rounds": "2",
            "restarts": "1",
            "window": "3600",
            **more,
        }
        return watchdog.main([word for name, value in given.items() for word in (f"--{name}", value)])

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "state.json").read_text()))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    node, ended = Node(tmp_path), threading.Event()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")

    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "a socket has no address"

        def answer(self, text: str) -> None:
            self.send_response(200 if text else 500)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if node.generates:
                self.answer(GENERATED)
            else:
                ended.wait()

        def do_GET(self) -> None:
            self.answer(node.metrics)

        def log_message(self, *_: object) -> None:
            """Silent."""

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with Server(str(tmp_path / "s"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield node
        ended.set()
        server.shutdown()
        thread.join()


def test_a_round_asks_the_engine_at_its_socket_and_keeps_what_it_saw(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    assert node.round("5") == 0
    assert (node.state["name"], node.state["tokens"]) == (HEALTHY, 7.0)
    assert node.state["latency"] < 5
    assert capsys.readouterr().out == "<5>glm-ocr is healthy: it generates\n"
    node.round("5")
    assert capsys.readouterr().out == "", "a round that changes nothing is silent"


def test_a_hung_engine_is_killed_once_and_then_left_to_an_operator(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.generates = False
    assert [node.round(), node.round()] == [0, 0]
    assert node.calls == ["kill glm-ocr"]
    assert (node.state["name"], node.state["restarts_total"]) == (RESTARTED, 1)
    (entry,) = [json.loads(line) for line in (node.folder / "releases" / "history.jsonl").read_text().splitlines()]
    assert {**entry, "at": ""} == {
        "at": "",
        "by": "watchdog",
        "action": "restart",
        "release": "abcd",
        "result": "it hung",
    }
    node.unit("active", "two")
    assert [node.round(), node.round(), node.round()] == [0, 1, 1]
    assert node.state["name"] == GAVE_UP
    assert node.calls == ["kill glm-ocr"]
    assert "<3>glm-ocr is gave-up: restarted 1 times in 3600 s already" in capsys.readouterr().out


def test_a_busy_engine_is_left_alone(node: Node) -> None:
    node.generates = False
    for tokens in range(6):
        node.metrics = METRICS.replace("6.0", f"{tokens}.0")
        assert node.round() == 0
    assert (node.state["name"], node.calls) == (BUSY, [])


def test_a_container_engine_that_does_not_kill_leaves_it_to_systemd(node: Node) -> None:
    node.generates = False
    node.does("docker", "echo no daemon; exit 1")
    node.round()
    assert node.round() == 0
    assert node.calls == ["--no-block try-restart glm-ocr"]


def test_a_restart_that_does_not_work_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.generates = False
    node.does("docker", "echo no daemon; exit 1")
    node.does("systemctl", (node.folder / "bin" / "systemctl").read_text().replace("*) echo", "*) exit 5; echo"))
    node.round()
    assert node.round() == 1
    assert node.state["name"] == HUNG
    assert "<3>glm-ocr could not be restarted: no daemon; " in capsys.readouterr().out


@pytest.mark.parametrize("begin", ["stop", "play"])
def test_what_begins_while_a_round_waits_is_not_undone(begin: str, node: Node) -> None:
    """A stop or a play that comes between the first question and the restart."""
    node.generates = False
    node.round()
    node.unit("deactivating" if begin == "stop" else "active")
    (node.folder / "bin" / "systemctl").rename(node.folder / "next")
    node.unit("active")
    beginning = f"mv {node.folder}/next $0" if begin == "stop" else f"touch {node.folder}/lock"
    node.does("systemctl", f"{stripped(node.folder / 'bin' / 'systemctl')}\n{beginning}")
    assert node.round() == 0
    assert (node.state["name"], node.calls) == (RESTING, [])


def stripped(script: Path) -> str:
    return script.read_text().partition("\n")[2]


def test_a_stopped_service_is_not_asked(node: Node) -> None:
    node.unit("inactive")
    (node.folder / "s").unlink()
    assert [node.round(), node.round(), node.round()] == [0, 0, 0]
    assert (node.state["name"], node.calls) == (RESTING, [])


def broken_record(node: Node) -> None:
    (node.folder / "releases" / "abcd" / "release.json").write_text("{")


def other_unit(node: Node) -> None:
    (node.folder / "unit").write_text("ExecStart=sleep 1\n")


def no_metrics(node: Node) -> None:
    node.generates, node.metrics = False, ""


@pytest.mark.parametrize("damage", [broken_record, other_unit, no_metrics])
def test_what_cannot_be_told_is_said_and_restarts_nothing(damage: Callable[[Node], None], node: Node) -> None:
    damage(node)
    assert [node.round(), node.round(), node.round()] == [1, 1, 1]
    assert (node.state["name"], node.calls) == (BLIND, [])


def test_a_state_of_another_boot_keeps_its_total_alone(node: Node) -> None:
    node.generates = False
    node.round()
    kept = node.state | {"boot": "another", "restarts": [1e12], "restarts_total": 5, "failures": 3}
    (node.folder / "state.json").write_text(json.dumps(kept))
    node.round()
    assert (node.state["failures"], node.state["restarts"], node.state["restarts_total"]) == (1, [], 5)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "healthy"}', '{"restarts": [], "unknown": 1}'])
def test_a_state_that_cannot_be_read_begins_anew(text: str, node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    (node.folder / "state.json").write_text(text)
    assert node.round("5") == 0
    assert node.state["name"] == HEALTHY
    assert "begins anew" in capsys.readouterr().out


def test_monitoring_gets_the_state_and_a_round_that_cannot_tell_it_goes_on(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    target = node.folder / "glm-ocr.prom"
    node.generates = False
    node.round(textfile=str(target))
    lines = target.read_text().splitlines()
    assert 'glm_ocr_watchdog_state{service="glm-ocr",state="suspect"} 1' in lines
    assert sum(line.startswith("glm_ocr_watchdog_state{") for line in lines) == len(watchdog.STATES)
    assert 'glm_ocr_watchdog_consecutive_failures{service="glm-ocr"} 1' in lines
    assert not any("canary_seconds" in line for line in lines)
    assert not [path for path in node.folder.iterdir() if path.name.startswith(".")]
    assert node.round(textfile=str(node.folder / "absent" / "x.prom")) == 0
    assert "monitoring is not told" in capsys.readouterr().out
    assert node.calls == ["kill glm-ocr"]
