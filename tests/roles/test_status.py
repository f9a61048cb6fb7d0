"""What runs, what should, and what cannot be told: as data, as a table, and through the playbook itself."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import service_status
import vllm_release
from playing import HERE, Played, play, stub
from rendering import PROJECT

SCHEMA = json.loads((PROJECT / "files" / "schemas" / "status.schema.json").read_text())
SHOWN = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "StateChangeTimestamp": "Fri 2026-01-02 03:04:05 UTC",
    "NRestarts": "2",
}
RECORD = {
    "image": "quay.io/ascend/vllm-ascend:v0.18.0rc1",
    "image_id": "sha256:0123",
    "staged_at": "2026-01-02T03:00:00Z",
    "staged_by": "root@controller",
}
HISTORY = [
    {
        "at": f"2026-01-0{day}T03:04:05Z",
        "by": "root@controller",
        "action": "deploy",
        "release": "bbbb",
        "result": "good",
    }
    for day in range(1, 6)
]
DESCRIBED: dict[str, Any] = {
    "installed": "aaaa",
    "running": "aaaa",
    "image_id": "sha256:0123",
    "last_good": "aaaa",
    "releases": [
        {"id": "aaaa", "good_at": 1767323045.5, "record": RECORD},
        {"id": "bbbb", "good_at": None, "record": {}},
    ],
    "history": HISTORY,
    "service": SHOWN,
    "engine_problem": "",
}
STATUS: dict[str, Any] = {"described": DESCRIBED, "wanted": "aaaa", "problem": None}


def report(tmp_path: Path, **hosts: dict[str, Any]) -> dict[str, Any]:
    told = service_status.service_status(hosts, "r1", str(tmp_path))
    jsonschema.Draft202012Validator(SCHEMA).validate(told)
    return told


def row(told: dict[str, Any], host: str) -> list[str]:
    (line,) = [line for line in service_status.status_table(told).splitlines() if line.startswith(f"{host} ")]
    return re.split(r"  +", line)


def test_a_host_that_runs_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "npu" / "latest").mkdir(parents=True)
    validated = {
        "verdict": "PASS",
        "run": "r0",
        "finished_at": "2026-01-02T04:05:06.789+00:00",
        "stages": {"ocr_smoke": None},
        "more": 1,
    }
    (tmp_path / "npu" / "latest" / "report.json").write_text(json.dumps(validated))
    told = report(tmp_path, npu=STATUS)
    (host,) = told["hosts"]
    assert host["runs_wanted"] is True
    assert (host["service"]["since"], host["service"]["restarts"]) == ("2026-01-02T03:04:05Z", 2)
    assert host["kept"][0] == {"id": "aaaa", "good_at": "2026-01-02T03:04:05Z", **RECORD}
    expected = {name: validated[name] for name in ("verdict", "run", "finished_at")}
    assert host["last_validation"] == expected | {"stages": ["ocr_smoke"]}
    # A verdict says what it is on: a deployment's is on the smoke alone.
    assert "validated ocr_smoke" in service_status.status_table(told)
    assert row(told, "npu") == [
        *("npu", "active (running)", "2026-01-02 03:04:05", "2", "aaaa", "as it runs", "as it runs"),
        "PASS 2026-01-02 04:05:06",
    ]


def test_the_table_as_it_is_read(tmp_path: Path) -> None:
    failed = {
        **DESCRIBED,
        "running": "",
        "image_id": "",
        "service": {**SHOWN, "ActiveState": "failed", "SubState": "failed"},
    }
    told = report(
        tmp_path,
        **{
            "npu-01": {**STATUS, "wanted": "cccc"},
            "npu-02": {**STATUS, "described": {**failed, "releases": [], "history": HISTORY[:1]}},
            "npu-03": {"described": None, "wanted": None, "problem": "no route to host"},
        },
    )
    assert service_status.status_table(told) == (
        """\
HOST    STATE             SINCE (UTC)          RESTARTS  RUNS     WANTED  LAST GOOD   VALIDATED
npu-01  active (running)  2026-01-02 03:04:05  2         aaaa     cccc    as it runs  never from here
        image     sha256:0123
        kept      aaaa  good 2026-01-02 03:04:05  quay.io/ascend/vllm-ascend:v0.18.0rc1
        kept      bbbb  never found good
        history   2026-01-03 03:04:05  deploy  bbbb  good  by root@controller
        history   2026-01-04 03:04:05  deploy  bbbb  good  by root@controller
        history   2026-01-05 03:04:05  deploy  bbbb  good  by root@controller
npu-02  failed (failed)   2026-01-02 03:04:05  2         nothing  aaaa    aaaa        never from here
        installed aaaa
        history   2026-01-01 03:04:05  deploy  bbbb  good  by root@controller
npu-03  NOT ASKED         ?                    ?         ?        ?       ?           never from here
        problem   no route to host"""
    )


def changed(**described: Any) -> dict[str, Any]:
    return {**STATUS, "described": {**DESCRIBED, **described}}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (changed(running=""), {"runs_wanted": False, "running": ""}),
        ({**STATUS, "wanted": "cccc"}, {"runs_wanted": False, "wanted": "cccc"}),
        ({**STATUS, "wanted": None, "problem": "no image"}, {"runs_wanted": None, "problems": ["no image"]}),
        (
            changed(running="", image_id="", engine_problem="no daemon"),
            {
                "running": None,
                "image_id": None,
                "runs_wanted": None,
                "problems": ["what runs cannot be told: no daemon"],
            },
        ),
        (changed(service={}), {"service": dict.fromkeys(service_status.service({}))}),
        ({}, {"asked": False, "service": None, "problems": ["it left the play: its own message stands above"]}),
        ({"described": None, "wanted": None, "problem": "gone"}, {"asked": False, "problems": ["gone"]}),
    ],
)
def test_what_is_not_known_is_null_and_what_differs_is_told(
    status: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (host,) = report(tmp_path, npu=status)["hosts"]
    assert {name: host[name] for name in expected} == expected


WATCHED = {"name": "healthy", "found": "it generates", "since": "2026-01-02T03:04:05Z", "restarts_total": 1, "age": 7.5}


@pytest.mark.parametrize(
    ("known", "finding"),
    [
        ({}, ""),
        ({"name": "busy"}, ""),
        ({"name": "suspect"}, ""),
        (
            {"name": "gave-up", "found": "4 rounds"},
            "[WATCHDOG_GAVE_UP] expected a service that a restart brings back; found 4",
        ),
        ({"name": "hung"}, "[WATCHDOG_GAVE_UP]"),
        ({"name": "blind"}, "[WATCHDOG_BLIND]"),
        ({"name": "unknown"}, "[WATCHDOG_BLIND]"),
        ({"age": 1000.0}, "[WATCHDOG_SILENT] expected a round of the watchdog within 900 s; found none for 1000 s"),
    ],
)
def test_what_the_watchdog_knows_is_told_and_is_a_finding_when_it_needs_somebody(
    known: dict[str, Any], finding: str, tmp_path: Path
) -> None:
    told = report(tmp_path, npu=changed(watchdog=WATCHED | known))
    (host,) = told["hosts"]
    assert host["watchdog"]["state"] == known.get("name", "healthy")
    assert [problem.startswith(finding) for problem in host["problems"]] == ([True] if finding else [])
    state = f"watchdog  {host['watchdog']['state']} since 2026-01-02 03:04:05, restarts: 1"
    assert state in service_status.status_table(told)


def test_a_host_without_a_watchdog_has_no_line_of_it(tmp_path: Path) -> None:
    told = report(tmp_path, npu=changed(watchdog={}))
    assert told["hosts"][0]["watchdog"] is None
    assert "watchdog" not in service_status.status_table(told)


def test_the_host_tells_what_the_watchdog_left(tmp_path: Path) -> None:
    timer, kept = tmp_path / "w.timer", tmp_path / "w.json"
    service = vllm_release_service("true")
    service.options |= {"watchdog_timer": str(timer), "watchdog_state": str(kept)}
    assert service.watchdog() == {}
    timer.touch()
    assert service.watchdog()["name"] == "unknown"
    kept.write_text(json.dumps(WATCHED))
    assert service.watchdog()["name"] == "healthy"
    assert service.watchdog()["age"] < 60


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ({"LoadState": "not-found", "ActiveState": "inactive", "SubState": "dead"}, "not installed"),
        ({}, "unknown"),
        (SHOWN | {"UnitFileState": "disabled"}, "active (running), disabled"),
        (SHOWN | {"ActiveState": "activating", "SubState": "auto-restart"}, "activating (auto-restart)"),
    ],
)
def test_the_state_of_the_unit_in_words(shown: dict[str, str], state: str, tmp_path: Path) -> None:
    assert row(report(tmp_path, npu=changed(service=shown)), "npu")[1] == state


@pytest.mark.parametrize("text", ["{", "[]", '{"verdict": "PASS"}'])
def test_a_validation_report_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "report.json").write_text(text)
    assert service_status.last_validation(tmp_path) is None


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo '[]'; echo 'Error response from daemon: No such container: glm-ocr' >&2; exit 1", ""),
        ("echo 'Error: no such container glm-ocr' >&2; exit 125", ""),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "Cannot connect to the Docker daemon"),
    ],
)
def test_no_container_is_told_from_no_answer(script: str, problem: str, tmp_path: Path) -> None:
    engine = stub(tmp_path, "engine", script)
    service = vllm_release_service(engine)
    assert service.container() == {}
    assert service.engine_problem == problem


def test_an_engine_that_is_not_installed_is_told(tmp_path: Path) -> None:
    service = vllm_release_service(str(tmp_path / "absent"))
    assert service.container() == {}
    assert "No such file" in service.engine_problem


def vllm_release_service(engine: str) -> vllm_release.Service:
    return vllm_release.Service(
        {
            "name": "glm-ocr",
            "label": "glm-ocr.release",
            "container_engine": engine,
            "store": "/s",
            "unit_file": "/u",
            "environment_file": "/e",
        }
    )


# --- the playbook -------------------------------------------------------------------------------------------


SYSTEMCTL = f"""[ "$TZ" = UTC ] || exit 1
{"; ".join(f"echo '{name}={value}'" for name, value in SHOWN.items())}"""
INSPECTED = json.dumps(
    [{"State": {"Running": True}, "Image": "sha256:0123", "Config": {"Labels": {"glm-ocr.release": "abcd"}}}]
)


@pytest.fixture(scope="module", params=[False, True], ids=["apply", "check"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Played, Path]:
    """One host serves, one has a dead engine, one does not answer, one has a bad inventory, one no weights."""
    folder = tmp_path_factory.mktemp("status")
    stub(folder / "bin", "systemctl", SYSTEMCTL)
    stub(folder / "bin", "docker", f"case $1 in image) echo sha256:0123 ;; *) echo '{INSPECTED}' ;; esac")
    stub(folder / "bin", "podman", "echo Cannot connect >&2; exit 125")
    header = json.dumps({"t": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text('{"architectures": ["GlmOcrForConditionalGeneration"]}')
    (folder / "weights" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with socket.socket() as bound:  # bound, so that nobody else takes it, and not listened on
        bound.bind(("127.0.0.1", 0))
        hosts = {
            "npu-01": {**HERE, "glm_ocr_weights_path": str(folder / "weights")},
            "npu-02": {**HERE, "glm_ocr_container_engine": "podman"},
            "npu-03": {"ansible_host": "127.0.0.1", "ansible_port": bound.getsockname()[1]},
            "npu-04": {**HERE, "glm_ocr_port": 0},
            "npu-05": {**HERE, "glm_ocr_weights_path": str(folder / "absent")},
        }
        played = play(folder, "playbooks/status.yml", hosts, *(["--check", "--diff"] if request.param else []))
    return played, folder / "reports"


def test_the_playbook_shows_every_host_and_changes_none(played: tuple[Played, Path]) -> None:
    play, _ = played
    for host in ("npu-01", "npu-02", "npu-03", "npu-04", "npu-05"):
        assert play.recap(host)["changed"] == 0
    assert re.search(r"^ +npu-01 +active \(running\) .* abcd +[0-9a-f]{16} +none ", play.output, re.MULTILINE)
    assert re.search(r"^ +npu-02 +active \(running\) .* \? +\? +none ", play.output, re.MULTILINE)
    assert re.search(r"^ +npu-03 +NOT ASKED", play.output, re.MULTILINE)
    assert re.search(r"^ +npu-04 +NOT ASKED.*\n +problem +it left the play", play.output, re.MULTILINE)


def test_only_hosts_that_cannot_be_asked_fail(played: tuple[Played, Path]) -> None:
    play, _ = played
    assert play.rc != 0
    assert [play.recap(f"npu-0{number}")["failed"] for number in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 0]
    assert "npu-03 could not be asked" in play.output


def test_the_report_follows_the_schema_and_is_not_written_in_check_mode(played: tuple[Played, Path]) -> None:
    play, reports = played
    files = [path for path in reports.rglob("*") if path.is_file()]
    if "Not written in check mode." in play.output:
        assert files == []
        return
    (file,) = files
    assert file.match("status/*/status.json")
    told = json.loads(file.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(told)
    serving, broken, unreachable, left, bare = told["hosts"]
    assert (serving["running"], serving["runs_wanted"], serving["problems"]) == ("abcd", False, [])
    assert serving["service"] == service_status.service(SHOWN)
    assert re.fullmatch("[0-9a-f]{16}", serving["wanted"])
    assert (broken["asked"], broken["wanted"], broken["running"]) == (True, None, None)
    assert len(broken["problems"]) == 2
    assert (unreachable["asked"], left["asked"]) == (False, False)
    assert (bare["running"], bare["wanted"]) == ("abcd", None)
    assert "[HOST_WEIGHTS]" in bare["problems"][0]
