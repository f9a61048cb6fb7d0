"""One-shot inference with GLM-OCR, through transformers on this machine or through a served model.

    python inference.py --mode local --model /opt/atomgit/weights/GLM-OCR-bf16 --prompt "Text Recognition:"
    python inference.py --mode local --model /opt/atomgit/weights/GLM-OCR-bf16 --image test.png \
        --prompt "Text Recognition:"
    python inference.py --mode api --url http://localhost:8000/v1/chat/completions --model-name glm-ocr \
        --prompt "Text Recognition:"

Prints the generated text and nothing else on standard output.  Exit status: 0, or 2 with one line on standard
error that names the fix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageOps

import chat_api
import local_model
import ocr_lines


class InferenceError(Exception):
    """No text could be generated; the message names the cause and the fix in one line."""


@dataclass(frozen=True)
class Config:
    """The command line; ``max_tokens`` counts generated tokens, ``timeout`` is in seconds."""

    mode: str
    model: Path | None
    image: Path | None
    prompt: str
    url: str
    model_name: str
    max_tokens: int
    device: str | None
    timeout: float


def run(config: Config) -> str:
    """The generated text.  Raises ``InferenceError``."""
    image = load_image(config.image) if config.image else None
    return run_local(config, image) if config.mode == "local" else run_api(config, image)


def load_image(path: Path) -> Image.Image:
    """The picture as RGB, upright as the camera meant it.  Raises ``InferenceError``."""
    if not path.is_file():
        raise InferenceError(f"image {path} not found: pass an existing file to --image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InferenceError(f"image {path} cannot be read ({error}): pass a complete PNG or JPEG") from error


def run_api(config: Config, image: Image.Image | None) -> str:
    """The reply of a served model.  Raises ``InferenceError``."""
    image_url = ocr_lines.data_url(image) if image else None
    payload = chat_api.chat_request(config.model_name, config.prompt, image_url, max_tokens=config.max_tokens)
    try:
        response = chat_api.send(config.url, payload, timeout_seconds=config.timeout)
        if response.status == 200:
            return chat_api.parse_reply(response.body).text
    except chat_api.UnreachableError as error:
        raise InferenceError(f"{error}: start the service or correct --url") from error
    except chat_api.NoReplyError as error:
        raise InferenceError(f"{error}: look at the service's log, raise --timeout or lower --max-tokens") from error
    except chat_api.MalformedReplyError as error:
        raise InferenceError(f"{config.url}: {error}: make --url end in /v1/chat/completions of vLLM") from error
    fixes = {
        400: "shorten the prompt, shrink the image or lower --max-tokens: together they must fit --max-model-len",
        401: "set VLLM_API_KEY to the key of the service",
        404: "make --model-name equal to --served-model-name, and --url end in /v1/chat/completions",
    }
    fix = fixes.get(response.status, "look at the service's log")
    raise InferenceError(f"{config.url}: HTTP {response.status}: {chat_api.server_message(response.body)}: {fix}")


def run_local(config: Config, image: Image.Image | None) -> str:
    """Greedy generation in bfloat16 with transformers.  Raises ``InferenceError``."""
    model_path = config.model
    if model_path is None or not (model_path / "config.json").is_file():
        raise InferenceError(f"no config.json in {model_path}: pass the folder with the GLM-OCR weights to --model")
    try:
        torch = local_model.required("torch")
        local_model.require_architecture(model_path, local_model.required("transformers"))
        device = config.device or best_device(torch)
        local_model.require_device(device, torch)
        processor = local_model.load_processor(model_path)
        model = local_model.load_model(model_path, torch.bfloat16, device)
        try:
            inputs = local_model.on(device, local_model.encode(processor, config.prompt, image))
            output = model.generate(**inputs, max_new_tokens=config.max_tokens, do_sample=False)
        except Exception as error:  # anything can fail on a device; the user needs one line
            raise local_model.unusable(model_path, device, error) from error
    except local_model.LocalModelError as error:
        raise InferenceError(f"{error}; or use --mode api") from error
    text: str = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text


def best_device(torch: ModuleType) -> str:
    """``npu`` where one is usable, otherwise ``cpu``."""
    try:
        import_module("torch_npu")
    except ImportError:
        return "cpu"
    return "npu" if torch.npu.is_available() else "cpu"


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="One-shot inference with GLM-OCR.")
    parser.add_argument("--mode", choices=("local", "api"), required=True)
    parser.add_argument("--model", type=Path, help="local mode: folder with the weights")
    parser.add_argument("--image", type=Path, help="picture to read; without it the prompt is sent alone")
    parser.add_argument("--prompt", default="Text Recognition:")
    parser.add_argument("--url", default="http://localhost:8000/v1/chat/completions", help="api mode: endpoint")
    parser.add_argument("--model-name", default="glm-ocr", help="api mode: served model name")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens to generate at most")
    parser.add_argument("--device", choices=("cpu", "npu"), help="local mode: npu if available, otherwise cpu")
    parser.add_argument("--timeout", type=float, default=120.0, help="api mode: seconds to wait for the reply")
    config = Config(**vars(parser.parse_args(argv)))
    if config.mode == "local" and config.model is None:
        parser.error("--mode local needs --model: the folder with the weights")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the generated text; returns the exit status."""
    try:
        print(run(parse_args(argv)))
    except InferenceError as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
