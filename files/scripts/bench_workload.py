"""What is asked: request bodies with a fixed length or a fixed picture, encoded before any clock runs."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

IMAGE_PROMPT = "Text Recognition:"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PADDING_CHUNK = b"paDd"  # ancillary and private: decoders skip it
FIT_STEPS = 12

Fetch = Callable[[str, bytes], "tuple[int | None, bytes]"]


@dataclass(frozen=True)
class Workload:
    """``bodies`` of the requests, sent in turn, and what they are.

    ``input_tokens`` is the exact number of prompt tokens of every body, None when the service would not count them
    (``usage`` then says what it was). The image figures are None for text.
    """

    bodies: list[bytes]
    input_tokens: int | None
    image_pixels: tuple[int, int] | None
    image_bytes: int | None


def text_workload(model: str, input_len: int, count: int, options: dict[str, Any], seed: int, fetch: Fetch) -> Workload:
    """``count`` different prompts of ``input_len`` tokens each, chat template included, as ``/tokenize`` counts them.

    Different from their first word on, so that no prefix cache answers. Without ``/tokenize``, one digit is taken for
    one token.
    """
    rng = random.Random(seed)
    prompts, exact = [], True
    guess = input_len
    for _ in range(count):
        digits = [str(rng.randrange(10)) for _ in range(4 * input_len)]
        if exact:
            fitted, guess = fit(digits, input_len, guess, lambda text: count_tokens(model, text, fetch))
            exact = fitted is not None
        prompts.append((fitted if exact else None) or " ".join(digits[:input_len]))
    bodies = [encode(model, prompt, options) for prompt in prompts]
    return Workload(bodies, input_len if exact else None, None, None)


def fit(words: list[str], wanted: int, guess: int, measure: Callable[[str], int | None]) -> tuple[str | None, int]:
    """The first words that make ``wanted`` tokens, and their number; None when no number of words does."""
    number, tried = guess, set()
    for _ in range(FIT_STEPS):
        text = " ".join(words[:number])
        if (found := measure(text)) is None:
            return None, guess
        if found == wanted:
            return text, number
        tried.add(number)
        # The template's tokens stay; each word brings at least one.
        step = max(1, abs(wanted - found) // 2) if abs(wanted - found) > 8 else 1
        number = min(max(number + (step if found < wanted else -step), 1), len(words))
        if number in tried:
            break
    return None, guess


def count_tokens(model: str, prompt: str, fetch: Fetch) -> int | None:
    """Prompt tokens of a chat request as the service renders it; None when it does not say."""
    request = {"model": model, "messages": [{"role": "user", "content": prompt}], "add_generation_prompt": True}
    status, body = fetch("/tokenize", json.dumps(request).encode())
    try:
        number = json.loads(body)["count"] if status == 200 else None
    except (ValueError, LookupError, TypeError):
        return None
    return number if isinstance(number, int) else None


def image_workload(model: str, width: int, height: int, count: int, options: dict[str, Any], seed: int) -> Workload:
    """``count`` different pages of text of ``width`` by ``height`` pixels, PNG, all of the same number of bytes.

    Different pixels, so that no processor cache answers. Raises ``ImportError`` without Pillow.
    """
    rng = random.Random(seed)
    files = [page(width, height, rng) for _ in range(count)]
    size = max(map(len, files)) + 12
    urls = ["data:image/png;base64," + base64.b64encode(padded(file, size)).decode() for file in files]
    bodies = [
        encode(
            model, [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": IMAGE_PROMPT}], options
        )
        for url in urls
    ]
    return Workload(bodies, None, (width, height), size)


def page(width: int, height: int, rng: random.Random) -> bytes:
    """A page of random lines of text as a PNG file, the same for the same state of ``rng``."""
    from PIL import Image

    import ocr_lines  # Pillow: slow to load, and only pages need it

    image = Image.new("RGB", (width, height), "white")
    for top in range(0, max(height - ocr_lines.TOKEN_PX, 1), ocr_lines.TOKEN_PX + 8):
        length = max((width - ocr_lines.TOKEN_PX) // ocr_lines.ADVANCE_PX, 1)
        image.paste(ocr_lines.render(ocr_lines.random_text(rng, length)), (0, top))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def padded(png: bytes, size: int) -> bytes:
    """The same picture in a PNG file of ``size`` bytes, at least 12 more than it has.

    The filler is an ancillary chunk right after the header (PNG specification, 5.3): length, type, data, CRC.
    """
    at = len(PNG_HEAD) + 25
    data = bytes(size - len(png) - 12)
    chunk = struct.pack(">I", len(data)) + PADDING_CHUNK + data + struct.pack(">I", zlib.crc32(PADDING_CHUNK + data))
    return png[:at] + chunk + png[at:]


def encode(model: str, content: Any, options: dict[str, Any]) -> bytes:
    """The body of a streaming, greedy chat request; usage is asked for in every chunk."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **options,
    }
    return json.dumps(request, separators=(",", ":")).encode()
