"""inference.py: the document's command lines, and one clear line for every cause of failure."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import inference
import ocr_lines
from fake_service import Service, completion

# Verbatim from the user's document, without the shell's line continuations.
LOCAL_TEXT = 'python inference.py --mode local --model /opt/atomgit/weights/GLM-OCR-bf16 --prompt "Text Recognition:"'
LOCAL_IMAGE = (
    "python inference.py --mode local --model /opt/atomgit/weights/GLM-OCR-bf16 --image test.png "
    '--prompt "Text Recognition:"'
)
API = (
    "python inference.py --mode api --url http://localhost:8000/v1/chat/completions --model-name glm-ocr "
    '--prompt "Text Recognition:"'
)


def arguments(line: str) -> list[str]:
    return shlex.split(line)[2:]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a run that exits 2 and prints nothing else."""
    assert inference.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inference.py: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_command_lines_of_the_document() -> None:
    weights = Path("/opt/atomgit/weights/GLM-OCR-bf16")
    text, image, api = (inference.parse_args(arguments(line)) for line in (LOCAL_TEXT, LOCAL_IMAGE, API))
    assert (text.mode, text.model, text.image, text.prompt) == ("local", weights, None, "Text Recognition:")
    assert (image.mode, image.model, image.image) == ("local", weights, Path("test.png"))
    assert (api.mode, api.url, api.model_name) == ("api", "http://localhost:8000/v1/chat/completions", "glm-ocr")
    assert {config.max_tokens for config in (text, image, api)} == {512}


def api_arguments(service: Service) -> list[str]:
    return arguments(API.replace("http://localhost:8000", service.url))


def test_api_prints_the_text_only(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(api_arguments(service)) == 0
    assert capsys.readouterr().out == "GLM-OCR 是一个文字识别模型。\n"
    assert service.requests[0]["max_tokens"] == 512


def test_api_reads_an_image(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = next(iter(service.pictures.values()))
    ocr_lines.render(text, scale=1).save(tmp_path / "test.png")
    assert inference.main([*api_arguments(service), "--image", str(tmp_path / "test.png")]) == 0
    assert capsys.readouterr().out.strip() == text


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ((404, '{"error": {"message": "The model does not exist."}}'), "The model does not exist.: make --model-name"),
        ((400, '{"error": {"message": "maximum context\\nlength"}}'), "maximum context length: shorten"),
        ((401, '{"error": "Unauthorized"}'), "Unauthorized: set VLLM_API_KEY"),
        ((500, ""), "HTTP 500: empty body: look at the service's log"),
        ((200, "{"), "not a chat completion"),
        ((200, completion("x").replace("message", "massage")), "not a chat completion"),
        (None, "ended before the reply was complete"),
    ],
)
def test_api_faults_are_explained(
    service: Service, capsys: pytest.CaptureFixture[str], answer: tuple[int, str] | None, named: str
) -> None:
    service.override["text"] = answer
    assert named in refused(api_arguments(service), capsys)


def test_api_unreachable(closed_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "start the service" in refused(["--mode", "api", "--url", closed_url], capsys)


def test_api_timeout(silent_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "within 0.05 s" in refused(["--mode", "api", "--url", silent_url, "--timeout", "0.05"], capsys)


@pytest.mark.parametrize("mode", [["--mode", "api"], ["--mode", "local", "--model", "/nowhere"]])
@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n cut"])
def test_image_faults_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str], content: bytes | None
) -> None:
    image = tmp_path / "test.png"
    if content is not None:
        image.write_bytes(content)
    named = "not found" if content is None else "cannot be read"
    assert named in refused([*mode, "--image", str(image)], capsys)


def test_truncated_image_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "test.png"
    Image.effect_noise((200, 200), 50).save(image)
    image.write_bytes(image.read_bytes()[:2000])
    assert "cannot be read" in refused(["--mode", "api", "--image", str(image)], capsys)


def test_local_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        inference.main(["--mode", "local"])
    assert stopped.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_local_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json" in refused(["--mode", "local", "--model", str(tmp_path / "absent")], capsys)


def weights(folder: Path, config: str = '{"model_type": "glm_ocr"}') -> list[str]:
    (folder / "config.json").write_text(config)
    return ["--mode", "local", "--model", str(folder)]


def test_local_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail
    message = refused(weights(tmp_path), capsys)
    assert "needs transformers" in message
    assert "pip install 'transformers>=5.1'" in message


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part of transformers that is used before anything is loaded."""
    module = ModuleType("transformers")
    vars(module).update(__version__="4.57.6", CONFIG_MAPPING={"glm4v": object()})
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    return module


@pytest.mark.usefixtures("transformers")
def test_local_transformers_too_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(weights(tmp_path), capsys)
    assert "transformers 4.57.6 does not know model_type 'glm_ocr'" in message
    assert "pip install 'transformers>=5.1'" in message


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("config", ["{", "{}", "[]"])
def test_local_damaged_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    assert "names no model_type" in refused(weights(tmp_path, config), capsys)


def test_local_load_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: ModuleType) -> None:
    vars(transformers)["CONFIG_MAPPING"] = {"glm_ocr": object()}
    message = refused(weights(tmp_path), capsys)  # the stand-in has nothing more to load with
    assert f"{tmp_path} failed on cpu" in message


@pytest.mark.usefixtures("transformers")
def test_npu_is_taken_when_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = ModuleType("torch")
    assert inference.best_device(torch) == "cpu"
    npu = ModuleType("npu")
    vars(torch)["npu"] = npu
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    for usable, device in ((False, "cpu"), (True, "npu")):
        vars(npu)["is_available"] = lambda usable=usable: usable
        assert inference.best_device(torch) == device


def test_npu_asked_for_and_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: ModuleType) -> None:
    vars(transformers)["CONFIG_MAPPING"] = {"glm_ocr": object()}
    assert "needs torch_npu" in refused([*weights(tmp_path), "--device", "npu"], capsys)
