"""eval_ocr.py against the stand-in service: what is read well passes, and every fault is caught by its check."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

import eval_ocr
import ocr_pages
import ocr_readings
from fake_service import Service, completion

SCHEMAS = Path(__file__).resolve().parents[2] / "files" / "schemas"
SCHEMA_NAMES = ("stage", "ocr_quality")
SEED = 5
SAMPLES = 2
LIMITS: dict[str, float | None] = {**dict.fromkeys(eval_ocr.KINDS, 0.0), "repetition": 0.0}
LOOPING = "ORDER " + "AGAIN AND AGAIN " * 20


@pytest.fixture
def reader(service: Service) -> Service:
    """The stand-in, which can read the pages of ``SEED``."""
    for kind in eval_ocr.KINDS:
        for index in range(SAMPLES):
            teach(service, ocr_pages.page(kind, index, SEED))
    return service


def teach(service: Service, page: ocr_pages.Page, reading: str | None = None) -> None:
    service.pictures[url_of(page)] = page.expected if reading is None else reading


def url_of(page: ocr_pages.Page) -> str:
    return f"data:image/png;base64,{ocr_readings.png(page.image)}"


def evaluated(
    url: str, folder: Path, *more: str, limits: dict[str, float | None] = LIMITS, step: str = "run"
) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a step from the command line."""
    output = folder / "reports" / f"{step}.json"
    arguments = [step, "--base-url", url, "--output", str(output), "--thresholds", json.dumps(limits)]
    status = eval_ocr.main([*arguments, "--samples", str(SAMPLES), "--seed", str(SEED), "--line-scale", "1", *more])
    return status, checked(output) if step == "run" else json.loads(output.read_text())


def checked(output: Path) -> dict[str, Any]:
    """A result that follows both schemas and whose pictures are there."""
    result: dict[str, Any] = json.loads(output.read_text())
    for name in SCHEMA_NAMES:
        schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(result)
    for kind in result["kinds"]:
        for sample in kind["samples"]:
            with Image.open(output.parent / sample["picture"]) as picture:
                assert picture.size == (sample["traits"]["width"], sample["traits"]["height"])
    assert not list(output.parent.glob(".*")), "the temporary file is gone"
    return result


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {check["id"]: check["verdict"] for check in result["checks"]}


def failed(result: dict[str, Any]) -> set[str]:
    return {name for name, verdict in verdicts(result).items() if verdict != "PASS"}


def test_a_service_that_reads_passes(reader: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = evaluated(reader.url + "/", tmp_path)
    assert status == 0
    assert list(verdicts(result)) == ["requests", *eval_ocr.KINDS, "repetition"]
    assert failed(result) == set()
    for kind in result["kinds"]:
        assert (kind["error"], kind["pages"], kind["replies"], kind["loops"], kind["cut_off"]) == (0, SAMPLES, 2, 0, 0)
        assert all(sample["latency_ms"] > 0 for sample in kind["samples"])
    table = next(kind for kind in result["kinds"] if kind["kind"] == "table")
    assert table["details"] == {"teds": 1, "teds_structure": 1}
    assert table["breakdown"]["language"] == {"en": {"error": 0, "replies": 1}, "zh": {"error": 0, "replies": 1}}
    assert result["metrics"]["table-recognition-metric"] == "0.0.6"
    assert result["arguments"]["seed"] == SEED
    assert capsys.readouterr().out.splitlines()[-1] == "ocr_quality: PASS (8/8 checks)"


def test_requests_bear_the_models_own_prompts(reader: Service, tmp_path: Path) -> None:
    evaluated(reader.url, tmp_path, "--max-tokens", "77")
    assert len(reader.requests) == SAMPLES * len(eval_ocr.KINDS)
    prompts = [request["messages"][0]["content"][1]["text"] for request in reader.requests]
    assert {prompt: prompts.count(prompt) for prompt in prompts} == {
        "Text Recognition:": 8,
        "Table Recognition:": 2,
        "Formula Recognition:": 2,
    }
    assert {(request["temperature"], request["max_tokens"]) for request in reader.requests} == {(0, 77)}


@pytest.mark.parametrize("kind", eval_ocr.KINDS)
def test_a_misread_kind_fails_alone(reader: Service, tmp_path: Path, kind: str) -> None:
    teach(reader, ocr_pages.page(kind, 1, SEED), "###")
    status, result = evaluated(reader.url, tmp_path)
    assert (status, failed(result)) == (1, {kind})
    measured = next(entry for entry in result["kinds"] if entry["kind"] == kind)
    assert measured["samples"][0]["error"] == 0
    assert measured["samples"][1]["error"] > 0.5
    check = next(entry for entry in result["checks"] if entry["id"] == kind)
    assert check["fix"]


def test_the_limit_decides(reader: Service, tmp_path: Path) -> None:
    page = ocr_pages.page("line", 0, SEED)
    teach(reader, page, "#" + page.expected[1:])
    rate = 1 / sum(len(ocr_pages.page("line", index, SEED).expected) for index in range(SAMPLES))
    assert evaluated(reader.url, tmp_path, limits={"line": rate})[0] == 0
    assert evaluated(reader.url, tmp_path, limits={"line": rate * 0.99})[0] == 1


def test_a_kind_without_a_limit_is_shown_and_not_judged(
    reader: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(SAMPLES):
        teach(reader, ocr_pages.page("seal", index, SEED), LOOPING)
    status, result = evaluated(reader.url, tmp_path, limits={"line": 0.0, "seal": None, "repetition": 0.0})
    assert status == 0
    assert list(verdicts(result)) == ["requests", "line", "repetition"]
    seal = result["kinds"][1]
    assert (seal["kind"], seal["threshold"], seal["loops"]) == ("seal", None, 2)
    assert seal["error"] > 1
    assert "seal" in capsys.readouterr().out


def test_a_loop_is_caught_where_it_is_judged(reader: Service, tmp_path: Path) -> None:
    teach(reader, ocr_pages.page("line", 0, SEED), LOOPING)
    limits: dict[str, float | None] = {"line": 99.0, "seal": None, "repetition": 0.5}
    assert evaluated(reader.url, tmp_path, limits=limits)[0] == 0
    status, result = evaluated(reader.url, tmp_path, limits=limits | {"repetition": 0.49})
    assert (status, failed(result)) == (1, {"repetition"})
    sample = result["kinds"][0]["samples"][0]
    assert sample["loop"]["unit"] in "AGAIN AND AGAIN AND AGAIN"
    assert evaluated(reader.url, tmp_path, limits={"line": 99.0})[0] == 0, "no limit, no check"


def test_two_swapped_digits_are_caught_under_the_limit_of_the_error_rate(reader: Service, tmp_path: Path) -> None:
    swap = str.maketrans("08", "80")
    for index in range(20):
        page = ocr_pages.page("line", index, SEED)
        teach(reader, page, page.expected.translate(swap))
    limits: dict[str, float | None] = {"line": 0.1, "confusion": 0}
    status, result = evaluated(reader.url, tmp_path, "--samples", "20", limits=limits)
    assert (status, failed(result)) == (1, {"confusion"})
    assert 0 < result["kinds"][0]["error"] < 0.1
    (check,) = [entry for entry in result["checks"] if entry["id"] == "confusion"]
    assert "0 read as 8" in check["found"]
    assert "8 read as 0" in check["found"]
    assert evaluated(reader.url, tmp_path, "--samples", "20", limits=limits | {"confusion": 2})[0] == 0
    assert evaluated(reader.url, tmp_path, "--samples", "20", limits={"line": 0.1})[0] == 0, "no limit, no check"


def test_a_confusion_that_no_judged_kind_can_show_is_an_error(reader: Service, tmp_path: Path) -> None:
    status, result = evaluated(reader.url, tmp_path, limits={"line": None, "table": 0.0, "confusion": 0})
    assert (status, failed(result)) == (2, {"confusion"})
    assert "leave confusion out" in result["checks"][-1]["fix"]


FAULTS: dict[str, tuple[tuple[int, str] | None, str]] = {
    "500": ((500, '{"error": {"message": "boom"}}'), "HTTP 500: boom"),
    "no reply": (None, "ended before the reply was complete"),
    "malformed": ((200, "{}"), "not a chat completion"),
    "stopped halfway": ((200, completion("ORD", "abort")), "the reply ended by abort"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_pages_without_a_reading_fail_the_run(
    reader: Service, tmp_path: Path, fault: tuple[tuple[int, str] | None, str]
) -> None:
    reader.override["image"], found = fault
    status, result = evaluated(reader.url, tmp_path, limits={"line": 1.0, "repetition": 1.0})
    assert status == 2, "nothing of the kind was measured"
    assert verdicts(result) == {"requests": "FAIL", "line": "ERROR", "repetition": "ERROR"}
    assert found in result["checks"][0]["found"]
    line = result["kinds"][0]
    assert (line["error"], line["replies"], sum(line["problems"].values())) == (None, 0, SAMPLES)


def test_a_single_missing_reading_fails_even_an_unjudged_kind(
    reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = url_of(ocr_pages.page("seal", 0, SEED))
    answer: Callable[[str, dict[str, Any]], tuple[int, str] | None] = reader.answer

    def some(path: str, request: dict[str, Any]) -> tuple[int, str] | None:
        return (500, "lost") if lost in json.dumps(request) else answer(path, request)

    monkeypatch.setattr(reader, "answer", some)
    status, result = evaluated(reader.url, tmp_path, limits={"line": 0.0, "seal": None})
    assert (status, failed(result)) == (1, {"requests"})
    assert result["checks"][0]["found"] == "3 of 4; 1 x HTTP 500: lost"


def test_a_cut_off_reply_is_counted(reader: Service, tmp_path: Path) -> None:
    reader.override["image"] = (200, completion("ORDER", "length"))
    _, result = evaluated(reader.url, tmp_path, limits={"line": 1.0})
    assert result["kinds"][0]["cut_off"] == SAMPLES


def test_a_silent_service_is_not_asked_forever(reader: Service, tmp_path: Path) -> None:
    reader.override["image"] = None
    _, result = evaluated(reader.url, tmp_path, "--samples", "9", "--concurrency", "1", limits={"line": 1.0})
    assert len(reader.requests) == ocr_readings.SILENCES
    assert "5 x not sent" in result["checks"][0]["found"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((401, '{"error": "Unauthorized"}'), "HTTP 401: Unauthorized"),
        ((200, '{"data": [{"id": "qwen", "max_model_len": 8192}]}'), "only qwen"),
        ((200, '{"data": [{"id": "glm-ocr"}]}'), "not vLLM's list of models"),
        ((200, '{"data": [{"id": "glm-ocr", "max_model_len": 2100}]}'), "leaves -12 tokens for the picture"),
        ((200, "<html>"), "not vLLM's list of models"),
        (None, "ended before the reply was complete"),
    ],
)
def test_a_service_that_cannot_be_asked_is_not_measured(
    reader: Service, tmp_path: Path, answer: tuple[int, str] | None, found: str
) -> None:
    reader.override["/v1/models"] = answer
    status, result = evaluated(reader.url, tmp_path)
    assert (status, result["verdict"], verdicts(result)) == (2, "ERROR", {"service": "ERROR"})
    assert found in result["checks"][0]["found"]
    assert (result["kinds"], reader.requests) == ([], [])


def test_closed_port_is_not_measured(closed_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = evaluated(closed_url, tmp_path)
    assert status == 2
    assert "no connection" in result["checks"][0]["found"]
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_missing_font_is_not_blamed_on_the_service(
    reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr_pages, "FONTS", tmp_path)
    status, result = evaluated(reader.url, tmp_path)
    assert status == 2
    assert "the pages cannot be made" in result["checks"][0]["found"]


@pytest.mark.parametrize(("package", "module"), [("rapidfuzz", "ocr_metrics"), ("PIL", "ocr_readings")])
def test_a_missing_package_is_named_with_its_command(
    reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    status, result = evaluated(reader.url, tmp_path)
    assert status == 2
    assert package in result["checks"][0]["found"]
    assert "-m pip install" in result["checks"][0]["fix"]
    assert reader.requests == [], "known before the service is asked"


def test_the_two_halves_give_what_the_whole_gives(
    reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(reader, ocr_pages.page("table", 1, SEED), "<table></table>")
    _, whole = evaluated(reader.url, tmp_path)
    with monkeypatch.context() as host:  # the serving image has no metrics
        host.setitem(sys.modules, "ocr_metrics", None)
        assert evaluated(reader.url, tmp_path, step="read")[0] == 0
    output = tmp_path / "controller" / "ocr_quality.json"
    status = eval_ocr.main(["score", "--readings", str(tmp_path / "reports" / "read.json"), "--output", str(output)])
    halves = checked(output)
    assert status == 1
    assert halves["checks"] == whole["checks"]
    assert [kind["error"] for kind in halves["kinds"]] == [kind["error"] for kind in whole["kinds"]]
    assert halves["kinds"][0]["samples"][0]["picture"] == "ocr_quality_pictures/line-000.png"


def test_readings_of_a_service_that_was_not_reached(closed_url: str, tmp_path: Path) -> None:
    status, readings = evaluated(closed_url, tmp_path, step="read")
    assert (status, readings["readings"]) == (2, [])
    output = tmp_path / "ocr_quality.json"
    assert eval_ocr.main(["score", "--readings", str(tmp_path / "reports" / "read.json"), "--output", str(output)]) == 2
    assert "no connection" in checked(output)["checks"][0]["found"]


PICTURE = base64.b64encode(b"x").decode()
READING: dict[str, Any] = {
    **dict.fromkeys(("expected", "found", "finish_reason", "problem")),
    "id": "line-000",
    "kind": "line",
    "traits": {},
    "picture": PICTURE,
}
SESSION: dict[str, Any] = {"arguments": {"thresholds": {"line": 0}}, "engine": {}, "started_at": "", "problem": None}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "{}",
        json.dumps(SESSION | {"readings": [{"id": "line-000"}]}),
        json.dumps(SESSION | {"readings": [READING | {"id": "../../etc/passwd"}]}),
        json.dumps(SESSION | {"readings": [READING | {"picture": "?"}]}),
        json.dumps(SESSION | {"readings": [], "arguments": {"thresholds": {"poem": 0}}}),
        json.dumps(SESSION | {"readings": [], "arguments": {}}),
    ],
)
def test_unusable_readings_are_refused(tmp_path: Path, text: str | None) -> None:
    readings, output = tmp_path / "readings.json", tmp_path / "out" / "ocr_quality.json"
    if text is not None:
        readings.write_text(text)
    assert eval_ocr.main(["score", "--readings", str(readings), "--output", str(output)]) == 2
    check = checked(output)["checks"][0]
    assert str(readings) in check["found"]
    assert check["fix"]


def test_large_pictures_are_shrunk_to_the_room_there_is() -> None:
    image = Image.new("L", (3000, 2000), 255)
    small = ocr_readings.shrunk(image, 1000)
    assert 900 < small.width * small.height / 784 <= 1000
    assert small.width / small.height == pytest.approx(1.5, rel=0.02)
    assert ocr_readings.shrunk(image, 8000) is image


def omnidocbench(folder: Path) -> dict[str, ocr_pages.Page]:
    """A folder in OmniDocBench's form, its one page made of pages of ours; returns these by kind."""
    whole, regions, y = Image.new("RGB", (1300, 4000), "white"), [], 10
    pages = {kind: ocr_pages.page(kind, 0, SEED) for kind in eval_ocr.OMNIDOCBENCH_KINDS}
    members = {"document": ("text_block", "text"), "table": ("table", "html"), "code": ("code_txt", "text"),
               "formula": ("equation_isolated", "latex")}  # fmt: skip
    for kind, page in pages.items():
        whole.paste(page.image, (10, y))
        right, bottom = 10 + page.image.width, y + page.image.height
        category, member = members[kind]
        region = {"category_type": category, "poly": [10, y, right, y, right, bottom, 10, bottom], "ignore": False}
        regions += [region | {member: page.expected}, region | {member: "ignored", "ignore": True}]
        y = bottom + 10
    regions.append({"category_type": "figure", "poly": [0, 0, 9, 0, 9, 9, 0, 9], "ignore": False})
    (folder / "images").mkdir(parents=True)
    whole.save(folder / "images" / "one.png")
    page_info = {"page_no": 0, "height": 4000, "width": 1300, "image_path": "one.png"}
    (folder / "OmniDocBench.json").write_text(json.dumps([{"layout_dets": regions, "page_info": page_info}]))
    return pages


def test_a_folder_in_omnidocbenchs_form_is_scored_alike(
    reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = omnidocbench(tmp_path / "bench")
    sizes = {tuple(side + 8 for side in page.image.size): page.expected for page in pages.values()}

    def by_size(_: str, request: dict[str, Any]) -> tuple[int, str]:
        if not request:
            return 200, json.dumps({"data": [{"id": "glm-ocr", "max_model_len": 8192}]})
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as picture:
            return 200, completion(sizes[picture.size])

    monkeypatch.setattr(reader, "answer", by_size)
    limits: dict[str, float | None] = dict.fromkeys(pages, 0.0)
    status, result = evaluated(reader.url, tmp_path, "--omnidocbench", str(tmp_path / "bench"), limits=limits)
    assert status == 0
    assert {kind["kind"]: kind["pages"] for kind in result["kinds"]} == dict.fromkeys(pages, 1)
    assert {sample["traits"]["page"] for kind in result["kinds"] for sample in kind["samples"]} == {"one.png"}
    sizes[tuple(side + 8 for side in pages["table"].image.size)] = "nothing"
    status, result = evaluated(reader.url, tmp_path, "--omnidocbench", str(tmp_path / "bench"), limits=limits)
    assert (status, failed(result)) == (1, {"table"})


@pytest.mark.parametrize("broken", ["absent", "not JSON", "another form", "no picture"])
def test_another_folder_is_refused(reader: Service, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "bench"
    if broken != "absent":
        omnidocbench(folder)
    if broken == "not JSON":
        (folder / "OmniDocBench.json").write_text("{")
    elif broken == "another form":
        (folder / "OmniDocBench.json").write_text('[{"pages": []}]')
    elif broken == "no picture":
        (folder / "images" / "one.png").unlink()
    status, result = evaluated(reader.url, tmp_path, "--omnidocbench", str(folder), limits={"table": 0.0})
    assert status == 2
    assert str(folder) in result["checks"][0]["found"]


def test_a_folder_without_a_judged_kind_is_not_measured(reader: Service, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    omnidocbench(folder)
    annotations = folder / "OmniDocBench.json"
    annotations.write_text(annotations.read_text().replace("equation_isolated", "figure"))
    status, result = evaluated(reader.url, tmp_path, "--omnidocbench", str(folder), limits={"formula": 0.0})
    assert (status, verdicts(result)["formula"]) == (2, "ERROR")


def test_key_is_sent_and_not_reported(reader: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    _, result = evaluated(reader.url, tmp_path, limits={"line": 0.0})
    assert set(reader.keys) == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(result)


def test_defaults_judge_and_differ_by_source() -> None:
    generated = eval_ocr.parse_args(["run", "--output", "x"])
    assert generated.thresholds == eval_ocr.DEFAULT_LIMITS
    assert generated.kinds == list(eval_ocr.KINDS)
    supplied = eval_ocr.parse_args(["run", "--output", "x", "--omnidocbench", "bench"])
    assert supplied.kinds == ["document", "table", "formula", "code"]
    assert len({eval_ocr.parse_args(["run", "--output", "x"]).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "bad",
    [
        "--thresholds={",
        "--thresholds=[]",
        "--thresholds={}",
        '--thresholds={"line": null, "repetition": 0}',
        '--thresholds={"poem": 0.1}',
        '--thresholds={"line": true}',
        '--thresholds={"line": -1}',
        '--thresholds={"line": NaN}',
        '--thresholds={"line": "0.1"}',
        "--samples=0",
        "--concurrency=0",
        "--timeout=inf",
    ],
)
def test_unusable_arguments_are_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as refused:
        eval_ocr.parse_args(["run", "--output", "x", bad])
    assert refused.value.code == 2


def test_kinds_that_omnidocbench_lacks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_ocr.parse_args(["run", "--output", "x", "--omnidocbench", "b", '--thresholds={"line": 0, "table": 0}'])
    assert "has no line" in capsys.readouterr().err


def test_unwritable_output_is_said(reader: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reports").write_text("")
    arguments = ["run", "--base-url", reader.url, "--output", str(tmp_path / "reports" / "x.json"), "--seed", str(SEED)]
    assert eval_ocr.main([*arguments, "--samples", "1", "--line-scale", "1", "--thresholds", '{"line": 0}']) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_pass_that_measured_nothing_is_against_the_schema(reader: Service, tmp_path: Path) -> None:
    _, result = evaluated(reader.url, tmp_path, limits={"line": 0.0})
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / "ocr_quality.schema.json").read_text()))
    assert validator.is_valid(result)
    assert not validator.is_valid(result | {"kinds": []})
    line = result["kinds"][0]
    assert not validator.is_valid(result | {"kinds": [line | {"threshold": None}]})
    assert not validator.is_valid(result | {"kinds": [line | {"problems": {"HTTP 500": 1}}]})
