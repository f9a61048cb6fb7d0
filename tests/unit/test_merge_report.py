"""merge_report.py: the verdict, and a report that cannot flatter."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import merge_report

SCHEMAS = merge_report.SCHEMAS
REPORT_SCHEMA = json.loads((SCHEMAS / "report.schema.json").read_text())
DEPLOYMENT: dict[str, Any] = {
    "host": "npu-01",
    "image": {"name": "quay.io/ascend/vllm-ascend:v0.18.0rc1", "id": "sha256:0123"},
    "container_engine": "docker",
    "accelerator": "Ascend 910B2",
    "command": ["vllm", "serve", "/weights", "--port", "8000", "--api-key", "s3cret", "--api-key=s3cret"],
    "environment": {"OMP_NUM_THREADS": 1, "VLLM_API_KEY": "s3cret", "HF_TOKEN": "s3cret"},
}


def check(identity: str, verdict: str = "PASS") -> dict[str, Any]:
    entry = {
        "id": identity,
        "verdict": verdict,
        "expected": "HTTP 200",
        "found": "HTTP 200",
        "latency_ms": 12.5,
        "http_status": 200,
    }
    return entry if verdict == "PASS" else entry | {"found": "HTTP 500", "response_body": "<b>", "fix": "Look."}


def smoke_stage(verdict: str = "PASS", read: str = "ORDER 4821 PAGE") -> dict[str, Any]:
    sample = {"expected": "ORDER 4821 PAGE", "found": read, "cer": 0.0, "latency_ms": 80.0, "finish_reason": "stop"}
    checks = [check(name) for name in ("health", "models", "text")]
    return {
        "schema_version": "1.0",
        "stage": "ocr_smoke",
        "verdict": verdict,
        "started_at": "2026-01-02T03:04:05.678+00:00",
        "finished_at": "2026-01-02T03:04:09+00:00",
        "arguments": {"seed": 7, "max_cer": 0.1},
        "engine": {"vllm": "0.18.0", "torch-npu": None},
        "checks": [*checks, check("image", verdict) | {"samples": [sample]}],
    }


def other_stage(verdict: str = "PASS") -> dict[str, Any]:
    keep = ("schema_version", "started_at", "finished_at")
    times = {key: value for key, value in smoke_stage().items() if key in keep}
    return {**times, "stage": "ocr_bench", "verdict": verdict, "latency_ms": None}


class Run:
    """One merge from the command line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.output = folder / "host" / "20260102T030405Z"
        (folder / "stages").mkdir()
        self.put("deployment", DEPLOYMENT, "")

    def put(self, name: str, data: object, under: str = "stages") -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        (self.folder / under / f"{name}.json").write_text(text)

    def merge(self, *more: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Exit status, last line and report.json."""
        places = ["--stages", str(self.folder / "stages"), "--deployment", str(self.folder / "deployment.json")]
        status = merge_report.main([*places, "--output", str(self.output), *more])
        last_line = json.loads(self.capsys.readouterr().out.splitlines()[-1])
        report = json.loads((self.output / "report.json").read_text())
        jsonschema.Draft202012Validator(REPORT_SCHEMA).validate(report)
        assert last_line["verdict"] == report["verdict"]
        assert sorted(path.name for path in self.output.iterdir()) == ["report.html", "report.json"]
        return status, last_line, report

    @property
    def page(self) -> str:
        return (self.output / "report.html").read_text()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, capsys)


def test_pass(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    status, last_line, report = run.merge()
    assert status == 0
    assert last_line == {
        "host": "npu-01",
        "run": "20260102T030405Z",
        "verdict": "PASS",
        "report": str(run.output / "report.html"),
    }
    assert report["problems"] == []
    assert report["stages"]["ocr_smoke"] == smoke_stage()
    assert report["started_at"] == "2026-01-02T03:04:05.678+00:00"
    assert report["engine_note"] == "Accelerator: Ascend 910B2."
    assert 'class="banner"' not in run.page


@pytest.mark.parametrize(
    ("smoke", "bench", "verdict"),
    [
        ("PASS", "PASS", "PASS"),
        ("PASS", "FAIL", "FAIL"),
        ("FAIL", "PASS", "FAIL"),
        ("FAIL", "ERROR", "ERROR"),
        ("ERROR", "FAIL", "ERROR"),
    ],
)
def test_the_worst_stage_decides(run: Run, smoke: str, bench: str, verdict: str) -> None:
    run.put("ocr_smoke", smoke_stage(smoke))
    run.put("ocr_bench", other_stage(bench))  # not expected, and it counts all the same
    status, _, report = run.merge("--run", "r1")
    assert (status, report["verdict"], report["run"]) == ({"PASS": 0, "FAIL": 1, "ERROR": 2}[verdict], verdict, "r1")


def without(stage: dict[str, Any], *path: str | int) -> dict[str, Any]:
    changed = copy.deepcopy(stage)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


UNUSABLE: dict[str, object] = {
    "missing": None,
    "empty": "",
    "cut": json.dumps(smoke_stage())[:-20],
    "not an object": [],
    "NaN": json.dumps(smoke_stage() | {"x": float("nan")}),
    "no verdict": without(smoke_stage(), "verdict"),
    "unknown verdict": smoke_stage() | {"verdict": "OK"},
    "another version": smoke_stage() | {"schema_version": "2.0"},
    "another stage": smoke_stage() | {"stage": "ocr_bench"},
    "local time": smoke_stage() | {"started_at": "2026-01-02T03:04:05+08:00"},
    "no checks": smoke_stage() | {"checks": []},
    "no image check": without(smoke_stage(), "checks", 3),
    "no samples": without(smoke_stage(), "checks", 3, "samples"),
    "passes over a failed check": smoke_stage() | {"checks": smoke_stage("FAIL")["checks"]},
    "failure without a fix": without(smoke_stage("FAIL"), "checks", 3, "fix"),
}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_stage_is_an_error(run: Run, content: object) -> None:
    if content is not None:
        run.put("ocr_smoke", content)
    status, _, report = run.merge("--expected", "ocr_smoke")
    assert status == 2
    assert report["verdict"] == "ERROR"
    assert report["stages"] == {"ocr_smoke": None}
    assert len(report["problems"]) == 1
    assert "ocr_smoke.json" in report["problems"][0]


def test_missing_among_several(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    _, _, report = run.merge("--expected", "ocr_smoke, ocr_bench,ocr_accuracy")
    assert report["verdict"] == "ERROR"
    assert [problem.split(":")[0] for problem in report["problems"]] == ["ocr_bench.json", "ocr_accuracy.json"]


def test_nothing_validated_is_no_pass(run: Run) -> None:
    _, _, report = run.merge("--expected", "")
    assert (report["verdict"], report["stages"], report["started_at"]) == ("ERROR", {}, None)


@pytest.mark.parametrize("content", ["", "{}", json.dumps(DEPLOYMENT | {"accelerator": ""})])
def test_unusable_deployment_is_an_error(run: Run, content: str) -> None:
    run.put("ocr_smoke", smoke_stage())
    run.put("deployment", content, "")
    status, last_line, report = run.merge()
    assert (status, report["verdict"], report["deployment"], last_line["host"]) == (2, "ERROR", None, None)
    assert "deployment.json" in report["problems"][0]


def test_lab_engine_is_said_loudly(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    run.put("deployment", DEPLOYMENT | {"accelerator": "none (CPU lab engine)"}, "")
    _, _, report = run.merge()
    assert "no NPU was involved" in report["engine_note"]
    assert 'class="banner"' in run.page


def test_secrets_are_hidden(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    _, _, report = run.merge()
    assert "s3cret" not in json.dumps(report) + run.page
    assert report["deployment"]["environment"]["OMP_NUM_THREADS"] == 1
    assert report["deployment"]["command"][:5] == DEPLOYMENT["command"][:5]


def test_page_is_self_contained_and_well_formed(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage("FAIL", read="ORDER 4B21 PAGE</script><b>"))
    run.put("ocr_bench", other_stage())
    run.merge()
    page = run.page
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page)
    assert '<mark class="missing">8</mark>' in page
    assert '<mark class="wrong">B</mark>' in page
    assert "</script><b>" not in page
    assert page.index("<h1") < page.index("<h2")

    class Balance(HTMLParser):
        """Every opened element is closed in order."""

        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_differences_are_marked() -> None:
    expected, found = merge_report.compared("AB\nC", "AB CD")
    assert expected == [("AB C", False)]
    assert found == [("AB C", False), ("D", True)]
    assert merge_report.compared("A", "") == ([("A", True)], [])


def test_broken_template_still_gives_a_verdict(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    template = run.folder / "broken.j2"
    template.write_text("{{ nothing.here }}")
    places = ["--stages", str(run.folder / "stages"), "--deployment", str(run.folder / "deployment.json")]
    assert merge_report.main([*places, "--output", str(run.output), "--template", str(template)]) == 2
    captured = run.capsys.readouterr()
    assert "no complete report" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["verdict"] == "ERROR"


def test_schemas_are_valid() -> None:
    for path in SCHEMAS.glob("*.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_the_deployment_comes_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, capsys)
    run.put("ocr_smoke", smoke_stage())
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(DEPLOYMENT | {"host": "npu-02"})))
    status, last_line, _ = run.merge("--deployment", "-")
    assert (status, last_line["host"]) == (0, "npu-02")
