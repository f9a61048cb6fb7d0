"""merge_report.py: the verdict, and a report that cannot flatter."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import baseline
import eval_accuracy
import merge_report
import report_files
import report_page
import report_plots
import stage_results
from html_page import checked_page
from rendering import ROLES
from stage_results import DEPLOYMENT, smoke_stage

SCHEMAS = report_files.SCHEMAS
REPORT_SCHEMA = json.loads((SCHEMAS / "report.schema.json").read_text())
FILES = ["report.html", "report.json", "report.md", "report.zh.html"]
STAGES = ",".join(merge_report.STAGE_SCHEMAS)
HOSTILE = "</script><b>|x| \u202e字 `*_[]"


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

    def arguments(self, *more: str) -> list[str]:
        places = ["--stages", str(self.folder / "stages"), "--deployment", str(self.folder / "deployment.json")]
        return [*places, "--output", str(self.output), *more]

    def merge(self, *more: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Exit status, last line and report.json."""
        status = merge_report.main(self.arguments(*more))
        captured = self.capsys.readouterr()
        assert captured.err == ""
        last_line = json.loads(captured.out.splitlines()[-1])
        report = json.loads((self.output / "report.json").read_text())
        jsonschema.Draft202012Validator(REPORT_SCHEMA).validate(report)
        assert last_line["verdict"] == report["verdict"]
        assert sorted(path.name for path in self.output.iterdir() if path.is_file()) == FILES
        return status, last_line, report

    @property
    def page(self) -> str:
        return self.text("report.html")

    def text(self, name: str) -> str:
        return (self.output / name).read_text()


@pytest.fixture(scope="module")
def folder_of_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage's result and the pictures, made once."""
    folder = tmp_path_factory.mktemp("made") / "stages"
    stage_results.every_stage(folder)
    return folder


@pytest.fixture
def made(folder_of_stages: Path) -> dict[str, dict[str, Any]]:
    """Every stage's result."""
    return {name: stage_results.result(folder_of_stages / f"{name}.json") for name in merge_report.STAGE_SCHEMAS}


@pytest.fixture
def full(run: Run, folder_of_stages: Path) -> Run:
    """A run with every stage."""
    (run.folder / "stages").rmdir()
    shutil.copytree(folder_of_stages, run.folder / "stages")
    return run


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
def test_the_worst_stage_decides(
    run: Run, made: dict[str, dict[str, Any]], smoke: str, bench: str, verdict: str
) -> None:
    run.put("ocr_smoke", smoke_stage(smoke))
    run.put("ocr_bench", made["ocr_bench"] | {"verdict": bench})  # not expected, and it counts all the same
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
    "infinity by its size": json.dumps(smoke_stage()).replace("12.5", "1e999"),
    "half a surrogate pair": json.dumps(smoke_stage(read="\ud800")),
    "too deep": "[" * 100_000,
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


@pytest.mark.parametrize("wanted", ["sha256:fedcba9876543210", None])
def test_a_service_of_another_image_than_the_named_one_is_no_pass(run: Run, wanted: str | None) -> None:
    image = DEPLOYMENT["image"]
    run.put("ocr_smoke", smoke_stage())
    run.put("deployment", DEPLOYMENT | {"image": image | {"wanted_id": image["id"]}}, "")
    assert run.merge()[2]["problems"] == []
    run.put("deployment", DEPLOYMENT | {"image": image | {"wanted_id": wanted}}, "")
    status, _, report = run.merge()
    assert (status, report["verdict"]) == (2, "ERROR")
    (problem,) = report["problems"]
    assert image["id"] in problem
    assert (wanted or "no image on the host") in problem


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


Broken = Callable[[dict[str, Any]], object]
BROKEN: dict[str, tuple[str, Broken]] = {
    "benchmark without phases": ("ocr_bench", lambda stage: stage.pop("phases")),
    "benchmark that passes over no success": (
        "ocr_bench",
        lambda stage: stage["phases"][0]["counts"].update(ok=0),
    ),
    "benchmark with a percentile of its own": (
        "ocr_bench",
        lambda stage: stage["phases"][0]["latency_ms"]["e2e"].update(p42=1.0),
    ),
    "accuracy that passes unmeasured": ("ocr_accuracy", lambda stage: stage.update(layers=None)),
    "accuracy without a noise floor": ("ocr_accuracy", lambda stage: stage["positions"].pop("noise_floor")),
    "served path without samples": ("served_accuracy", lambda stage: stage.pop("samples")),
    "served path that is the device": ("served_accuracy", lambda stage: stage.update(stage="ocr_accuracy")),
    "quality without kinds": ("ocr_quality", lambda stage: stage.update(kinds=[])),
    "quality with a reading and a problem": (
        "ocr_quality",
        lambda stage: stage["kinds"][0]["samples"][0].update(problem="HTTP 500"),
    ),
}


@pytest.mark.parametrize(("name", "breaking"), BROKEN.values(), ids=BROKEN)
def test_each_stage_is_held_to_its_own_schema(full: Run, made: dict[str, Any], name: str, breaking: Broken) -> None:
    breaking(made[name])
    full.put(name, made[name])
    status, _, report = full.merge("--expected", STAGES)
    assert (status, report["stages"][name]) == (2, None)
    assert [problem.split(":")[0] for problem in report["problems"]] == [f"{name}.json"]
    assert "No usable result: see the problems above." in section(full.page, name)


def test_a_file_that_is_no_stage_is_not_passed_over(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage())
    run.put("readings", {})
    _, _, report = run.merge()
    assert report["verdict"] == "ERROR"
    assert report["problems"][0].startswith("readings.json: expected one of the stages ocr_smoke, ocr_bench,")


def section(page: str, name: str) -> str:
    """A stage's part of the page."""
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def test_a_full_run(full: Run) -> None:
    status, _, report = full.merge("--expected", STAGES)
    assert (status, list(report["stages"])) == (0, list(merge_report.STAGE_SCHEMAS))
    for name in report_page.LANGUAGES.values():
        text = full.text(name)
        checked_page(text)
        assert text.index("<h1") < text.index("<h2")
        plots = {stage: section(text, stage).count("<svg") for stage in report["stages"]}
        assert plots == {"ocr_smoke": 0, "ocr_bench": 4, "ocr_accuracy": 2, "served_accuracy": 1, "ocr_quality": 1}
        assert section(text, "ocr_quality").count("data:image/png;base64,") == 12
    assert 'lang="zh-CN"' in full.text("report.zh.html")
    assert "结论" in full.text("report.zh.html")
    assert "served_accuracy | PASS" in full.text("report.md")


def test_no_figure_without_unit_and_n(full: Run) -> None:
    _, _, report = full.merge("--expected", STAGES)
    assert {figure["stage"] for figure in report["key_figures"]} == set(merge_report.STAGE_SCHEMAS)
    tiles = re.findall(r'<div class="tile[ "].*?</div>', full.page, re.DOTALL)
    assert len(tiles) == len(report["key_figures"]) > 15
    assert all(re.search(r"n = \d+ \w", tile) for tile in tiles)
    # A kind without a limit must not look as if its error had been accepted.
    unjudged = [kind["kind"] for kind in report["stages"]["ocr_quality"]["kinds"] if kind["threshold"] is None]
    assert [tile.count("not judged") for tile in tiles].count(1) == len(unjudged) > 0
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", full.page, re.DOTALL):
        assert re.search(r"\bn\b|\d+ (of \d+ )?layers|\d: \d", caption), caption
    by_id = {figure["id"]: figure for figure in report["key_figures"]}
    bench = report["stages"]["ocr_bench"]
    assert by_id["ocr_bench.latency_mean"]["value"] == bench["headline"]["latency_mean_ms"]
    assert by_id["ocr_bench.latency_mean"]["n"] == bench["headline"]["latency_samples"]
    assert by_id["ocr_bench.latency_p99"]["value"] is None, "five samples have no p99"
    assert by_id["ocr_bench.requests_per_second"]["value"] == bench["headline"]["requests_per_second"]
    assert by_id["ocr_accuracy.noise_layers"]["value"] == pytest.approx(1.01)
    assert by_id["ocr_accuracy.noise_layers"]["n"] == len(stage_results.LAYERS) - 2
    assert by_id["ocr_quality.table"] | {"value": 0} == by_id["ocr_quality.table"]


def test_the_saturation_is_marked(full: Run, made: dict[str, Any]) -> None:
    bench = made["ocr_bench"]
    bench["sweep"]["saturation_concurrency"] = 2
    full.put("ocr_bench", bench)
    full.merge()
    assert ">saturation: 2</text>" in section(full.page, "ocr_bench")
    bench["sweep"]["saturation_concurrency"] = None
    full.put("ocr_bench", bench)
    full.merge()
    assert ">saturation" not in section(full.page, "ocr_bench")
    assert "No saturation up to the last level" in section(full.page, "ocr_bench")


def test_what_failed_comes_first(full: Run) -> None:
    full.put("ocr_accuracy", stage_results.ocr_accuracy("text.9"))
    _, _, report = full.merge()
    assert report["verdict"] == "FAIL"
    first = full.page[full.page.index("What did not hold") : full.page.index("Key figures")]
    assert "noise_layers" in first
    assert "in text.9" in first
    assert "Highest: text.9" in section(full.page, "ocr_accuracy")
    assert "- **ocr_accuracy: noise_layers** FAIL: 5.05 in text.9" in full.text("report.md")


def test_stages_that_measured_nothing_are_shown(full: Run, made: dict[str, Any]) -> None:
    """What a script writes when it could not measure: nulls and empty lists everywhere."""
    check = {"id": "service", "verdict": "ERROR", "expected": "a reply", "found": "no connection", "fix": "Start it."}
    error = {"verdict": "ERROR", "checks": [check]}
    empty = dict.fromkeys(made["ocr_bench"]["headline"])
    none: dict[str, Any] = {"workload": None, "headline": empty, "warmup": None, "phases": [], "sweep": None}
    full.put("ocr_bench", made["ocr_bench"] | error | none)
    nothing = dict.fromkeys(("note", "prompts", "table", "layers", "positions", "resources"))
    full.put("ocr_accuracy", made["ocr_accuracy"] | error | nothing)
    full.put("served_accuracy", made["served_accuracy"] | error | {"samples": None, "positions": None})
    full.put("ocr_quality", made["ocr_quality"] | error | {"kinds": [], "metrics": {}})
    _, _, report = full.merge("--expected", STAGES)
    assert (report["verdict"], report["problems"]) == ("ERROR", [])
    assert {figure["stage"] for figure in report["key_figures"]} == {"ocr_smoke"}
    for name in report_page.LANGUAGES.values():
        checked_page(full.text(name))


def poisoned(value: Any, key: str = "") -> Any:
    """The same with markup in every free text."""
    if isinstance(value, dict):
        return {name: poisoned(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, key) for inner in value]
    free = ("expected", "found", "fix", "drawn", "prompt", "served", "metric", "picture", "name", "command", "language")
    return value + HOSTILE if isinstance(value, str) and key in free else value


def test_hostile_texts_stay_texts(full: Run, made: dict[str, Any]) -> None:
    made["ocr_accuracy"] = stage_results.ocr_accuracy("text.9")
    for name in ("ocr_smoke", "ocr_accuracy", "served_accuracy", "ocr_quality"):
        full.put(name, poisoned(made[name]))
    made["ocr_bench"]["env"] |= {"npu": HOSTILE}
    made["ocr_bench"]["engine"] |= {HOSTILE: HOSTILE}
    full.put("ocr_bench", made["ocr_bench"])
    deployment = poisoned(DEPLOYMENT) | {"host": HOSTILE, "accelerator": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    full.put("deployment", deployment, "")
    _, _, report = full.merge("--run", HOSTILE)
    assert report["problems"] == []
    for name in report_page.LANGUAGES.values():
        text = full.text(name)
        checked_page(text)
        assert "<b>|x|" not in text
        assert "&lt;b&gt;|x|" in text
    markdown = full.text("report.md")
    assert "<b>" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ocr")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 4}
    assert r"\`\*\_\[\]" in markdown


def test_pictures_are_bounded_and_stay_inside(full: Run, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quality = made["ocr_quality"]
    outside = full.folder / "outside.png"
    shutil.copy(full.folder / "stages" / quality["kinds"][0]["samples"][0]["picture"], outside)
    (full.folder / "stages" / "text.png").write_text("text")
    names = ["../outside.png", str(outside), "absent.png", "text.png", "a\0b"]
    samples = [sample for kind in quality["kinds"] for sample in kind["samples"]]
    for sample, name in zip(samples, names, strict=False):
        sample["picture"] = name
    shown = report_page.pictures(quality, full.folder / "stages")
    assert {name: shown.absent[name].split(" (")[0] for name in names[:4]} == {
        "../outside.png": "outside the stages' folder",
        str(outside): "outside the stages' folder",
        "absent.png": "not beside the result",
        "text.png": "no PNG",
    }
    assert "a\0b" in shown.absent
    assert len(shown.found) == 12 - len(names)
    full.put("ocr_quality", quality)
    monkeypatch.setattr(report_page, "PICTURE_BYTES", 4000)
    full.merge()
    page = section(full.page, "ocr_quality")
    assert "left out to keep the page small" in page
    assert 0 < sum(len(found) for found in re.findall(r"base64,([^\"]+)", page)) <= 4000 * 4 / 3 + 8 * 12


def test_marked_differences_reach_the_page(run: Run) -> None:
    run.put("ocr_smoke", smoke_stage("FAIL", read="ORDER 4B21 PAGE"))
    run.merge()
    assert '<mark class="missing">8</mark>' in run.page
    assert '<mark class="wrong">B</mark>' in run.page


def test_differences_are_marked() -> None:
    expected, found = report_page.compared("AB\nC", "AB CD")
    assert expected == [("AB C", False)]
    assert found == [("AB C", False), ("D", True)]
    assert report_page.compared("A", "") == ([("A", True)], [])
    assert report_page.compared("a:\n  b", "a:\n b") == ([("a: b", False)], [("a: b", False)])
    indented, _ = report_page.compared("a:\n  b", "a:\n b", spaces=True)
    assert [span for span in indented if span.differs] == [(" ", True)]


def test_long_texts_are_cut() -> None:
    expected, found = report_page.compared("A" * 5000, "B " * 50_000)
    assert expected[-1] == (" … (+1000)", False)
    assert found[-1].text.startswith(" … (+")
    assert sum(len(span.text) for span in found) < 4100


def test_a_command_is_shown_flag_by_flag() -> None:
    command = ["vllm", "serve", "/weights", "--port", "8000", "--flag", '--json={"a b": 1}']
    assert report_page.flag_lines(command) == ["vllm serve /weights", "--port 8000", "--flag", "'--json={\"a b\": 1}'"]


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


def test_latest_is_moved_to_the_run_also_to_one_that_came_to_nothing(run: Run) -> None:
    latest = run.output.parent / "latest"
    latest.parent.mkdir()
    latest.symlink_to("an-earlier-run")
    run.put("ocr_smoke", smoke_stage())
    assert run.merge("--latest", str(latest))[0] == 0
    assert latest.readlink() == Path(run.output.name)
    assert (latest / "report.json").exists()
    latest.unlink()
    assert merge_report.main([*run.arguments("--latest", str(latest)), "--template", "absent"]) == 2
    assert latest.readlink() == Path(run.output.name)


class Host:
    """Runs of one host, one after the other."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.output.parent

    def merge(self, day: int, stage: dict[str, Any], **deployment: Any) -> dict[str, Any]:
        """The report of a run with a benchmark on that day."""
        self.run.output = self.folder / f"2026010{day}T030405Z"
        self.run.put("ocr_smoke", smoke_stage() | {"started_at": f"2026-01-0{day}T03:04:05Z"})
        self.run.put("ocr_bench", stage | {"started_at": f"2026-01-0{day}T03:05:05Z"})
        self.run.put("deployment", DEPLOYMENT | deployment, "")
        return self.run.merge("--history", str(self.folder))[2]


def with_latency(bench: dict[str, Any], milliseconds: float) -> dict[str, Any]:
    """The same benchmark with another mean latency."""
    changed = copy.deepcopy(bench)
    changed["phases"][0]["latency_ms"]["e2e"]["mean"] = milliseconds
    return changed


def test_history_compares_what_can_be_compared(run: Run, made: dict[str, Any]) -> None:
    host, bench = Host(run), made["ocr_bench"]
    first = host.merge(1, with_latency(bench, 10.0))
    assert first["history"] == {"runs": [], "older": 0, "skipped": []}
    assert "No earlier run of this host." in run.page
    host.merge(2, with_latency(bench, 30.0))
    other_load = with_latency(bench, 99.0)
    other_load["workload"]["max_tokens"] = 9
    host.merge(3, other_load)
    host.merge(4, with_latency(bench, 99.0), accelerator="none (CPU lab engine)")
    host.merge(5, with_latency(bench, 99.0), host="another")
    host.merge(7, with_latency(bench, 99.0))  # later
    (host.folder / "broken").mkdir()
    (host.folder / "broken" / "report.json").write_text("{}")
    (host.folder / "latest").symlink_to("20260102T030405Z")
    report = host.merge(6, with_latency(bench, 25.0))
    history = report["history"]
    latency = [run["figures"].get("ocr_bench.latency_mean", {}).get("value") for run in history["runs"]]
    assert latency == [10.0, 30.0, None, None]
    assert [run["run"] for run in history["runs"]] == [f"2026010{day}T030405Z" for day in (1, 2, 3, 4)]
    assert [entry.split(":")[0] for entry in history["skipped"]] == [
        "20260105T030405Z/report.json", "broken/report.json"
    ]  # fmt: skip
    figure = next(entry for entry in report["key_figures"] if entry["id"] == "ocr_bench.latency_mean")
    assert report_page.earlier(report, figure) == {"median": 20.0, "runs": 2, "change": 0.25}
    assert "2 earlier: median 20 ms (+25.0 %)" in " ".join(run.page.split())
    assert "20260102T030405Z: 30 ms, n = 5" in run.page
    checked_page(run.page)


def test_history_is_bounded(run: Run, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report_figures.HISTORY_RUNS", 2)
    host = Host(run)
    for day in (1, 2, 3):
        host.merge(day, made["ocr_bench"])
    history = host.merge(4, made["ocr_bench"])["history"]
    assert ([one["run"] for one in history["runs"]], history["older"]) == (["20260102T030405Z", "20260103T030405Z"], 1)


def test_every_text_is_translated(full: Run, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts in the templates and plots, and those that reach them by a name, are the keys of the Chinese file."""
    messages = report_page.chinese()
    asked: set[str] = set()

    class Recording(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

    monkeypatch.setattr(report_page, "chinese", lambda: Recording(messages))
    full.merge("--expected", STAGES)
    promoted = baseline.promote([full.merge("--run", str(run))[2] for run in range(5)], "g", ())
    full.put("baseline", promoted, "")
    full.merge("--baseline", str(full.folder / "baseline.json"))
    full.put("deployment", DEPLOYMENT | {"accelerator": "none"}, "")
    full.merge("--expected", STAGES)
    sources = [*report_page.TEMPLATES.glob("*.j2"), Path(report_plots.__file__)]
    written = {
        text for path in sources for _, text in re.findall(r"""\b(?:_|translate)\((["'])(.+?)\1\)""", path.read_text())
    }
    reasons = {"outside the stages' folder", "not beside the result", "left out to keep the page small", "no PNG"}
    notes = {eval_accuracy.NOTE_CPU, merge_report.engine_note(None)}
    assert written | asked | reasons | notes == set(messages)
    for text, translation in messages.items():
        assert set(re.findall(r"{\w*}", text)) == set(re.findall(r"{\w*}", translation)), text
    assert all(reason in Path(report_page.__file__).read_text() for reason in reasons)


def test_the_report_knows_every_stage_there_is() -> None:
    known = yaml.safe_load((ROLES / "glm_ocr" / "vars" / "main.yml").read_text())["__glm_ocr_known_stages"]
    assert set(known) == set(merge_report.STAGE_SCHEMAS)
