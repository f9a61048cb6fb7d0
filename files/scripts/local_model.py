"""GLM-OCR through transformers on this machine: what inference.py and the two accuracy stages share.

torch and transformers are imported late, so that what does not need them runs where they are absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

TRANSFORMERS_NEEDED = "5.1"  # the first release line with GlmOcrForConditionalGeneration


class LocalModelError(Exception):
    """The model cannot be used on this machine: what was found, and what to do about it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(f"{found}: {fix}")
        self.found = found
        self.fix = fix


def required(module: str) -> ModuleType:
    """The imported module.  Raises ``LocalModelError``."""
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # torch_npu without CANN's libraries raises the last two
        wanted = f"transformers>={TRANSFORMERS_NEEDED}" if module == "transformers" else module.replace("_", "-")
        raise LocalModelError(f"a local model needs {module} ({error})", f"pip install '{wanted}'") from error


def require_architecture(model_path: Path, transformers: ModuleType) -> None:
    """Raises ``LocalModelError`` unless this transformers knows the ``model_type`` of the weights."""
    try:
        model_type = json.loads((model_path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LocalModelError(
            f"{model_path}/config.json names no model_type ({error!r})", "copy the official weights again"
        ) from error
    if model_type not in transformers.CONFIG_MAPPING:
        raise LocalModelError(
            f"transformers {transformers.__version__} does not know model_type {model_type!r}; "
            f"glm_ocr needs >= {TRANSFORMERS_NEEDED}",
            f"pip install 'transformers>={TRANSFORMERS_NEEDED}'",
        )


def require_device(device: str, torch: ModuleType) -> None:
    """Raises ``LocalModelError`` unless ``device`` (``cpu``, ``npu`` or ``npu:<index>``) is there."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return
    required("torch_npu")  # registers the device with torch
    count = torch.npu.device_count() if torch.npu.is_available() else 0
    if int(index or 0) >= count:
        raise LocalModelError(
            f"no {device} here: torch-npu sees {count} device(s)",
            "mount the NPU's devices and driver into this container, and compare with npu-smi info",
        )


def load_processor(model_path: Path) -> Any:
    """Tokenizer, chat template and image processor of the weights.  Raises ``LocalModelError``."""
    transformers = required("transformers")
    require_architecture(model_path, transformers)
    try:
        return transformers.AutoProcessor.from_pretrained(model_path, local_files_only=True)
    except Exception as error:  # loaders raise anything; the user needs one line
        raise unusable(model_path, "cpu", error) from error


def load_model(model_path: Path, dtype: Any, device: str, *, attention: str | None = None) -> Any:
    """The model, ready to evaluate; transformers chooses the ``attention``.  Raises ``LocalModelError``."""
    transformers = required("transformers")
    require_architecture(model_path, transformers)
    try:
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return model.to(device).eval()
    except Exception as error:
        raise unusable(model_path, device, error) from error


def unusable(model_path: Path, device: str, error: Exception) -> LocalModelError:
    """Any other error of the model, as one line with a fix."""
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return LocalModelError(
        f"{model_path} failed on {device} ({cause})",
        "check that the folder holds the complete official weights, that torchvision is installed and that memory "
        "suffices",
    )


def encode(processor: Any, prompt: str, image: Any | None) -> dict[str, Any]:
    """The tensors of one chat turn, image first, up to where the reply begins; batch size 1, on the CPU."""
    content = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    inputs = dict(
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )
    inputs.pop("token_type_ids", None)  # some tokenizers add them, and the model refuses them
    return inputs


def on(device: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors on a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def with_reply(inputs: Mapping[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """The tensors of ``encode`` with a given reply after the prompt (teacher forcing)."""
    torch = required("torch")
    reply = torch.tensor([list(token_ids)], dtype=inputs["input_ids"].dtype)
    tails = {
        "input_ids": reply,
        "attention_mask": torch.ones_like(reply),
        "mm_token_type_ids": torch.zeros_like(reply),  # text; older transformers do without this tensor
    }
    return {
        name: torch.cat([tensor, tails[name].to(tensor.dtype)], dim=1) if name in tails else tensor
        for name, tensor in inputs.items()
    }
