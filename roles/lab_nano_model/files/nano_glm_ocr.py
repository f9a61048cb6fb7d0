#!/usr/bin/env python3
"""Make the lab's nano GLM-OCR, and measure how well it reads.

The checkpoint has the real architecture (``GlmOcrForConditionalGeneration``) at about 1.4 M parameters,
and reads single lines drawn by ``files/scripts/ocr_lines.py``.

    nano_glm_ocr.py train   --output DIR [--steps N]      an hour to an hour and a half on 2 CPU cores
    nano_glm_ocr.py random  --output DIR                  same shapes, untrained: it must fail the smoke
    nano_glm_ocr.py measure --model DIR [--url URL]       held-out error rates; with --url also through vLLM

Needs torch, transformers >= 5.1, pillow and requests (the engine image has them all).
A line is held out when the first byte of its SHA-256 is under 16: training skips those by construction.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "files" / "scripts"))
import ocr_lines
from text_metrics import character_error_rate

SEED = 20260318
MAX_CHARACTERS = 16
PROMPT = "Text Recognition:"
CHAT_REPLY = "GLM-OCR nano reads lines of text."
SPECIAL_TOKENS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|>"
).split()
# A literal newline before `{%-` is stripped by Jinja, hence `{{ "\n" }}`.
CHAT_TEMPLATE = (
    "[gMASK]<sop>"
    "{%- for message in messages -%}"
    "<|{{ message.role }}|>{{ '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type in ('image', 'image_url') -%}<|begin_of_image|><|image|><|end_of_image|>"
    "{%- elif part.type in ('video', 'video_url') -%}<|begin_of_video|><|video|><|end_of_video|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{{ '\\n' }}{%- endif -%}"
)
IMAGE_PROCESSOR = {
    "size": {"shortest_edge": 784, "longest_edge": 9633792},
    "do_rescale": True,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Glm46VImageProcessor",
    "processor_class": "Glm46VProcessor",
}


def define_torchvision_operators() -> None:
    """Let a torchvision built for another torch be imported: only its pure-PyTorch transforms are used here.

    The lab's engine image does the same in its site-packages; where torchvision fits torch, nothing is done.
    """
    try:
        import torchvision  # noqa: F401  (imported for whether it can be)
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        define_torchvision_operators.library = library  # type: ignore[attr-defined]  # keeps the definitions alive


def held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 16


# --- the checkpoint -------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Byte-level BPE without merges: 256 byte symbols, then GLM's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=131072,
    )


def make_config(tokenizer: Any) -> Any:
    """The real model's config at nano size.

    Two ratios must hold as in the real one: the sum of mrope_section is head_dim / 2, and the text's
    intermediate_size is 3 x the vision's out_hidden_size.  vLLM sizes the vision merger by either,
    depending on its version, and narrows a tensor that is larger without any error.
    """
    from transformers import GlmOcrConfig

    token = tokenizer.convert_tokens_to_ids
    end = [token("<|endoftext|>"), token("<|user|>")]
    config = GlmOcrConfig(
        text_config={
            "vocab_size": 64 * math.ceil(len(tokenizer) / 64),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000,
                "partial_rotary_factor": 1.0,
                "mrope_section": [4, 6, 6],
            },
            "pad_token_id": end[0],
            "eos_token_id": end,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    config.architectures = ["GlmOcrForConditionalGeneration"]
    return config


def make_model() -> tuple[Any, Any]:
    """A freshly initialised float32 model and its tokenizer."""
    from transformers import GlmOcrForConditionalGeneration

    tokenizer = make_tokenizer()
    model = GlmOcrForConditionalGeneration._from_config(make_config(tokenizer), attn_implementation="sdpa")
    return model.float(), tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bf16 checkpoint with the files the real one has."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    out = copy.deepcopy(model).to(torch.bfloat16)
    out.generation_config.do_sample = False
    out.generation_config.eos_token_id = out.config.text_config.eos_token_id
    out.generation_config.pad_token_id = out.config.text_config.pad_token_id
    out.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    video = IMAGE_PROCESSOR | {"video_processor_type": "Glm46VVideoProcessor", "image_processor_type": None}
    video = {key: value for key, value in video.items() if value is not None}
    for name, content in (("preprocessor_config.json", IMAGE_PROCESSOR), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# --- batches --------------------------------------------------------------------------------------------


def patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [H*W/196, 3*2*14*14], exactly as Glm46VImageProcessor lays them out."""
    mean, std = (np.asarray(IMAGE_PROCESSOR[key], np.float32) for key in ("image_mean", "image_std"))
    values = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    channels, height, width = values.shape
    grid = values.reshape(channels, height // 28, 2, 14, width // 28, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6)
    repeated = np.broadcast_to(grid[:, :, :, :, :, None], (*grid.shape[:5], 2, 14, 14))
    return repeated.reshape(height * width // 196, channels * 2 * 14 * 14)


@dataclass
class Batch:
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    cells: torch.Tensor
    """[merged tokens, 2]: the character under each half of a visual token, for the auxiliary head."""


def cell_targets(text: str, dx_px: int, tokens: int) -> list[list[int]]:
    """Which character's centre lies in the left and right half of each visual token; 0 is none."""
    cells = [[0, 0] for _ in range(tokens)]
    for index, character in enumerate(text):
        centre = ocr_lines.MARGIN_PX + dx_px + index * ocr_lines.ADVANCE_PX + ocr_lines.ADVANCE_PX // 2
        half = centre // ocr_lines.ADVANCE_PX
        cells[half // 2][half % 2] = 1 + ocr_lines.ALPHABET.index(character)
    return cells


class Batches:
    """An endless, seeded stream of training batches: mostly lines, a few text-only chats."""

    def __init__(self, model: Any, tokenizer: Any, size: int, seed: int) -> None:
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.rng = random.Random(seed)
        self.longest = 2
        ids = tokenizer.convert_tokens_to_ids
        self.image = ids("<|image|>")
        self.head = [ids(t) for t in ("[gMASK]", "<sop>", "<|user|>")] + self.text("\n")
        self.tail = [ids("<|assistant|>"), *self.text("\n")]
        self.begin, self.finish, self.end = ids("<|begin_of_image|>"), ids("<|end_of_image|>"), ids("<|user|>")

    def text(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def line(self) -> str:
        while True:
            if self.longest >= MAX_CHARACTERS and self.rng.random() < 0.15:
                text = ocr_lines.readable_text(self.rng)
            else:
                text = ocr_lines.random_text(self.rng, self.rng.randint(1, self.longest))
            if not held_out(text):
                return text

    def chat(self) -> tuple[list[int], list[int]]:
        """Any text without an image gets the same short reply, so that a text smoke is never empty."""
        prompt = "".join(
            chr(self.rng.choice((self.rng.randint(32, 126), self.rng.randint(0x4E00, 0x9FA5))))
            for _ in range(self.rng.randint(1, 12))
        )
        if self.rng.random() < 0.3:
            prompt = PROMPT
        return self.head + self.text(prompt) + self.tail, [*self.text(CHAT_REPLY), self.end]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows, pixels, grids, cells = [], [], [], []
        for index in range(self.size):
            if index % 16 == 15 and self.longest > 2:
                rows.append(self.chat())
                continue
            text = self.line()
            dx, dy = self.rng.randint(0, 6), self.rng.randint(-2, 2)
            image = augmented(self.rng, ocr_lines.render(text, self.rng.choice(list(ocr_lines.FONTS)), dx=dx, dy=dy))
            tokens = image.shape[1] // ocr_lines.TOKEN_PX
            prompt = [*self.head, self.begin, *[self.image] * tokens, self.finish, *self.text(PROMPT), *self.tail]
            rows.append((prompt, [*self.text(text), self.end]))
            pixels.append(patches(image))
            grids.append([1, 2, 2 * tokens])
            cells += cell_targets(text, dx, tokens)
        width = max(len(prompt) + len(reply) for prompt, reply in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, reply) in enumerate(rows):
            length = len(prompt) + len(reply)
            ids[row, :length] = torch.tensor(prompt + reply)
            labels[row, len(prompt) : length] = torch.tensor(reply)
            mask[row, :length] = 1
        grid = torch.tensor(grids)
        position_ids, _ = self.model.model.get_rope_index(ids, (ids == self.image).int(), grid, attention_mask=mask)
        # Padding is on the right and attention is causal, so no mask is needed to compute the loss.
        inputs = {
            "input_ids": ids,
            "position_ids": position_ids,
            "pixel_values": torch.from_numpy(np.concatenate(pixels)),
            "image_grid_thw": grid,
        }
        return Batch(inputs, labels, torch.tensor(cells))


def augmented(rng: random.Random, image: Any) -> np.ndarray:
    """Contrast and Gaussian noise drawn from ``rng``: RGB image -> uint8 [H, W, 3]."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 16), pixels.shape[:2])
    return np.clip(255 - (255 - pixels) * rng.uniform(0.75, 1.0) + noise[..., None], 0, 255).astype(np.uint8)


# --- training -------------------------------------------------------------------------------------------


def train(output: Path, steps: int, batch_size: int = 64, peak: float = 2e-3) -> None:
    """Train from scratch; a checkpoint is written every 500 steps and at the end.

    Plain cross-entropy sits at the unigram loss for a thousand steps.  What makes it learn at once is an
    auxiliary linear head on the merged vision output that names the characters under each token (dropped
    afterwards), and lines that grow by two characters whenever the running loss is under 0.3.
    """
    torch.manual_seed(SEED)
    model, tokenizer = make_model()
    symbols = len(ocr_lines.ALPHABET) + 1
    auxiliary = torch.nn.Linear(model.config.vision_config.out_hidden_size, 2 * symbols)
    seen: dict[str, torch.Tensor] = {}
    model.model.visual.merger.register_forward_hook(lambda _m, _i, result: seen.update(merged=result))
    parameters = [*model.parameters(), *auxiliary.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * max(0.0, 2 * step / steps - 1))),
    )
    batches = Batches(model, tokenizer, batch_size, SEED)
    running, started = 3.0, time.monotonic()
    cross_entropy = torch.nn.functional.cross_entropy
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        logits = model(**batch.inputs).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
        named = auxiliary(seen["merged"]).view(-1, symbols)
        total = loss + cross_entropy(named, batch.cells.flatten())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += 0.05 * (loss.item() - running)
        if running < 0.3 and batches.longest < MAX_CHARACTERS:
            batches.longest += 2
            running = 1.0
        if step % 50 == 0:
            print(
                f"step {step}/{steps} loss {running:.4f} aux {total.item() - loss.item():.4f} "
                f"longest {batches.longest} {(time.monotonic() - started) / 60:.1f} min",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            save(model, tokenizer, output)


# --- measuring ------------------------------------------------------------------------------------------


def held_out_lines(count: int) -> list[tuple[str, Any]]:
    """``count`` held-out texts of 1 to 16 characters with their pictures, the same at every call."""
    from PIL import Image

    rng = random.Random(SEED + 1)
    lines: list[tuple[str, Any]] = []
    while len(lines) < count:
        text = ocr_lines.random_text(rng, rng.randint(1, MAX_CHARACTERS))
        if held_out(text):
            font = rng.choice(list(ocr_lines.FONTS))
            image = ocr_lines.render(text, font, dx=rng.randint(0, 6), dy=rng.randint(-2, 2))
            lines.append((text, Image.fromarray(augmented(rng, image))))
    return lines


def read_with_transformers(model_folder: Path, images: list[Any]) -> list[str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    texts = []
    for image in images:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(dtype=torch.bfloat16)
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        texts.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def read_with_api(url: str, images: list[Any], name: str = "glm-ocr") -> list[str]:
    import requests

    session, texts = requests.Session(), []
    for image in images:
        content = [
            {"type": "image_url", "image_url": {"url": ocr_lines.data_url(image)}},
            {"type": "text", "text": PROMPT},
        ]
        body = {"model": name, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
        response = session.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        response.raise_for_status()
        texts.append(response.json()["choices"][0]["message"]["content"])
    return texts


def measure(model_folder: Path, url: str | None, count: int = 500) -> dict[str, Any]:
    """Character error rates over held-out lines, and how many lines both engines read alike."""
    lines = held_out_lines(count)
    truth, images = [text for text, _ in lines], [image for _, image in lines]
    readings = {"transformers": read_with_transformers(model_folder, images)}
    if url:
        readings["vllm"] = read_with_api(url, images)
    weights = model_folder / "model.safetensors"
    result: dict[str, Any] = {
        "model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "lines": count,
        "characters": sum(map(len, truth)),
        "formula": "character_error_rate = sum of edit distances / sum of characters of the truth",
    }
    for engine, texts in readings.items():
        result[engine] = {
            "character_error_rate": character_error_rate(truth, texts),
            "lines_exact": sum(a == b for a, b in zip(truth, texts, strict=True)),
        }
    result["lines_agreeing"] = sum(a == b for a, b in zip(*readings.values(), strict=True)) if url else None
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "random"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True)
        if name == "train":
            command.add_argument("--steps", type=int, default=10000)
    command = commands.add_parser("measure")
    command.add_argument("--model", type=Path, required=True)
    command.add_argument("--url", help="base URL of a running service, e.g. http://localhost:8000")
    command.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    define_torchvision_operators()
    if arguments.command == "train":
        train(arguments.output, arguments.steps)
    elif arguments.command == "random":
        torch.manual_seed(SEED)
        save(*make_model(), arguments.output)
    else:
        text = json.dumps(measure(arguments.model, arguments.url), indent=2)
        print(text)
        if arguments.output:
            arguments.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
