"""smoke.py against the stand-in service: the healthy one passes, and every fault is caught by its check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import smoke
from fake_service import SCALE, SEED, Service, completion

SCHEMAS = Path(__file__).resolve().parents[2] / "files" / "schemas"
STAGE_SCHEMA = json.loads((SCHEMAS / "stage.schema.json").read_text())
ERROR_BODY = json.dumps({"error": {"message": "The model `glm-ocr` does not exist.", "type": "NotFoundError"}})


def measured(url: str, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a run from the command line."""
    output = folder / "reports" / "smoke.json"
    arguments = ["--base-url", url, "--model", "glm-ocr", "--max-model-len", "8192", "--output", str(output)]
    status = smoke.main([*arguments, "--scale", str(SCALE), "--seed", str(SEED), *more])
    report: dict[str, Any] = json.loads(output.read_text())
    jsonschema.Draft202012Validator(STAGE_SCHEMA).validate(report)
    assert [path.name for path in output.parent.iterdir()] == ["smoke.json"], "the temporary file is gone"
    return status, report


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {check["id"]: check["verdict"] for check in report["checks"]}


def test_healthy_service_passes(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = measured(service.url + "/", tmp_path)
    assert status == 0
    assert report["verdict"] == "PASS"
    assert set(verdicts(report).values()) == {"PASS"}
    assert report["arguments"]["seed"] == SEED
    assert report["engine"]["vllm-ascend"] is None
    assert not any("fix" in check or "response_body" in check for check in report["checks"])
    samples = report["checks"][3]["samples"]
    assert [sample["cer"] for sample in samples] == [0, 0, 0]
    assert {sample["finish_reason"] for sample in samples} == {"stop"}
    assert all(sample["latency_ms"] > 0 for sample in samples)
    assert capsys.readouterr().out.splitlines()[-1] == "ocr_smoke: PASS (4/4 checks)"


def test_requests_are_those_of_the_document(service: Service, tmp_path: Path) -> None:
    measured(service.url, tmp_path)
    text, *images = service.requests
    assert text == {
        "model": "glm-ocr",
        "messages": [{"role": "user", "content": "请用一句话介绍 GLM-OCR 模型。"}],
        "temperature": 0,
        "max_tokens": 128,
    }
    assert len(images) == 3
    for image in images:
        assert [part["type"] for part in image["messages"][0]["content"]] == ["image_url", "text"]
        assert image["messages"][0]["content"][1]["text"] == "Text Recognition:"
        assert (image["temperature"], image["max_tokens"]) == (0, 64)


FAULTS: dict[str, tuple[str, tuple[int, str] | None, str, str]] = {
    "health: engine dead": ("/health", (503, ""), "health", "HTTP 503"),
    "health: no reply": ("/health", None, "health", "ended before the reply was complete"),
    "models: 500": ("/v1/models", (500, "boom"), "models", "HTTP 500: boom"),
    "models: another name": ("/v1/models", (200, '{"data": [{"id": "qwen"}]}'), "models", "only 'qwen' is served"),
    "models: none": ("/v1/models", (200, '{"data": []}'), "models", "only no model is served"),
    "models: another length": (
        "/v1/models",
        (200, '{"data": [{"id": "glm-ocr", "max_model_len": 4096}]}'),
        "models",
        "max_model_len 4096",
    ),
    "models: no length": ("/v1/models", (200, '{"data": [{"id": "glm-ocr"}]}'), "models", "max_model_len None"),
    "models: not JSON": ("/v1/models", (200, "<html>"), "models", "unexpected reply"),
    "models: missing keys": ("/v1/models", (200, '{"data": [{}]}'), "models", "unexpected reply"),
    "models: not an object": ("/v1/models", (200, "[]"), "models", "unexpected reply"),
    "text: unknown model": ("text", (404, ERROR_BODY), "text", "HTTP 404: The model `glm-ocr` does not exist."),
    "text: guarded": ("text", (401, '{"error": "Unauthorized"}'), "text", "HTTP 401: Unauthorized"),
    "text: empty": ("text", (200, completion(" \n")), "text", "an empty reply"),
    "text: null": ("text", (200, completion(None)), "text", "an empty reply"),
    "text: not JSON": ("text", (200, "{"), "text", "not a chat completion"),
    "text: no choice": ("text", (200, '{"choices": []}'), "text", "not a chat completion"),
    "text: not text": ("text", (200, '{"choices": [{"message": {"content": 5}}]}'), "text", "content is int"),
    "text: odd end": ("text", (200, completion("x").replace('"stop"', "1")), "text", "finish_reason is int"),
    "image: half a character": ("image", (200, completion("\ud83d")), "image", "character error rate 1.0000"),
    "image: misread": ("image", (200, completion("SOMETHING ELSE")), "image", "character error rate"),
    "image: empty": ("image", (200, completion("")), "image", "character error rate 1.0000 on 3 lines"),
    "image: 500": ("image", (500, ""), "image", "HTTP 500: empty body"),
    "image: missing keys": ("image", (200, "{}"), "image", "not a chat completion"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_caught_by_its_check_alone(
    service: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: tuple[str, tuple[int, str] | None, str, str],
) -> None:
    where, answer, caught_by, found = fault
    service.override[where] = answer
    status, report = measured(service.url, tmp_path)
    assert status == 1
    assert report["verdict"] == "FAIL"
    assert {name for name, verdict in verdicts(report).items() if verdict != "PASS"} == {caught_by}
    check = next(check for check in report["checks"] if check["id"] == caught_by)
    assert found in check["found"]
    assert check["fix"]
    assert check["http_status"] == (answer[0] if answer else None)
    assert check["response_body"] == (answer[1] if answer else None)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "ocr_smoke: FAIL (3/4 checks)"
    assert "Traceback" not in captured.out + captured.err


def test_closed_port_is_not_measured(closed_url: str, tmp_path: Path) -> None:
    status, report = measured(closed_url, tmp_path)
    assert status == 2
    assert report["verdict"] == "ERROR"
    for check in report["checks"]:
        assert check["verdict"] == "ERROR"
        assert "no connection" in check["found"]
        assert (check["latency_ms"], check["http_status"], check["response_body"]) == (None, None, None)


def test_hanging_service_fails_rather_than_passes(silent_url: str, tmp_path: Path) -> None:
    status, report = measured(silent_url, tmp_path, "--timeout", "0.05")
    assert status == 1
    assert {check["found"].split(" from ")[0] for check in report["checks"]} == {"no reply"}
    assert {check["latency_ms"] for check in report["checks"]} == {None}


def test_unusable_url_is_not_measured(tmp_path: Path) -> None:
    status, report = measured("no-scheme", tmp_path)
    assert (status, set(verdicts(report).values())) == (2, {"ERROR"})


def test_drawing_fault_is_not_blamed_on_the_service(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("cannot open resource")

    monkeypatch.setattr("ocr_lines.render", broken)
    status, report = measured(service.url, tmp_path)
    assert (status, verdicts(report)["image"]) == (2, "ERROR")
    assert report["checks"][3]["samples"] == []


def test_long_bodies_are_cut(service: Service, tmp_path: Path) -> None:
    service.override["/health"] = (500, "x" * 5000)
    _, report = measured(service.url, tmp_path)
    assert report["checks"][0]["response_body"] == "x" * 2000


def test_error_rate_limit_decides(service: Service, tmp_path: Path) -> None:
    picture, text = next(iter(service.pictures.items()))
    service.pictures[picture] = "#" + text[1:]
    rate = 1 / sum(map(len, service.pictures.values()))
    assert measured(service.url, tmp_path, "--max-cer", str(rate))[0] == 0
    assert measured(service.url, tmp_path, "--max-cer", str(rate * 0.99))[0] == 1


def test_key_is_sent_and_not_reported(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    _, report = measured(service.url, tmp_path)
    assert set(service.keys) == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(report)


def test_a_proxy_of_the_environment_is_not_used(
    service: Service, closed_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", closed_url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert measured(service.url, tmp_path)[0] == 0


def test_seed_is_drawn_anew_in_each_run() -> None:
    seeds = {smoke.parse_args(["--output", "smoke.json"]).seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("bad", ["--lines=0", "--max-cer=nan", "--max-cer=-1", "--timeout=inf", "--seed=x"])
def test_unusable_arguments_are_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as refused:
        smoke.parse_args(["--output", "smoke.json", bad])
    assert refused.value.code == 2


def test_unwritable_output_is_said(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert smoke.main(["--base-url", service.url, "--output", str(tmp_path / "file" / "smoke.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
