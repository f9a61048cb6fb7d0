"""Have the service read the pages; needs Pillow and requests, as the serving image has them, and no metrics."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

import chat_api
import ocr_pages
import omnidocbench
from stage_result import engine_versions, now

if TYPE_CHECKING:
    from eval_ocr import Config

PIXELS_PER_TOKEN = 28 * 28  # merged patches of 14 px; the model's own figure
PROMPT_TOKENS = 64  # Generous: the template and the longest prompt take about 20.
SILENCES = 4  # Requests in a row without a reply after which the rest is not sent.
MIN_IMAGE_TOKENS = 64

FIX_SERVICE = (
    "Start the service or correct --base-url and --model; with a key set VLLM_API_KEY here, then run it again."
)


class NotMeasured(Exception):
    """The service cannot be asked: what was found, and what to do about it."""

    def __init__(self, found: str, fix: str = FIX_SERVICE) -> None:
        super().__init__(found)
        self.fix = fix


@dataclass(frozen=True)
class Reading:
    """A page that was sent and what came back; ``problem`` says why ``found`` is None.

    ``picture`` is the PNG that was sent, in base64; ``latency_ms`` is a request's among the concurrent ones.
    """

    id: str
    kind: str
    prompt: str
    expected: str
    traits: dict[str, Any]
    picture: str
    found: str | None = None
    finish_reason: str | None = None
    latency_ms: float | None = None
    http_status: int | None = None
    problem: str | None = None


@dataclass
class Service:
    """Where the pages go, and how many requests in a row stayed without a reply."""

    config: Config
    image_tokens: int = 0
    silent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, path: str) -> str:
        return self.config.base_url.rstrip("/") + path

    def prepare(self) -> None:
        """Ask for the model's context length, which bounds the pictures.  Raises ``NotMeasured``."""
        try:
            response = chat_api.send(self.url("/v1/models"), timeout_seconds=self.config.timeout)
        except chat_api.ApiError as error:
            raise NotMeasured(str(error)) from error
        if response.status != 200:
            raise NotMeasured(f"/v1/models: HTTP {response.status}: {chat_api.server_message(response.body)}")
        try:
            lengths = {entry["id"]: entry["max_model_len"] for entry in json.loads(response.body)["data"]}
        except (ValueError, LookupError, TypeError) as error:
            raise NotMeasured(f"/v1/models: not vLLM's list of models ({error!r})") from error
        if self.config.model not in lengths:
            raise NotMeasured(f"{self.config.model} is not served, only {', '.join(lengths) or 'no model'}")
        self.image_tokens = int(lengths[self.config.model]) - self.config.max_tokens - PROMPT_TOKENS
        if self.image_tokens < MIN_IMAGE_TOKENS:
            raise NotMeasured(
                f"max_model_len {lengths[self.config.model]} leaves {self.image_tokens} tokens for the picture "
                f"beside {self.config.max_tokens} for the reply",
                "Pass a smaller --max-tokens.",
            )

    def read(self, draw: Callable[[], ocr_pages.Page]) -> Reading:
        """Send one page; what goes wrong with the request is in the reading's ``problem``."""
        page = draw()
        image = shrunk(page.image, self.image_tokens)
        picture, prompt = png(image), ocr_pages.PROMPTS[page.kind]
        sent: dict[str, Any] = {
            "id": page.id,
            "kind": page.kind,
            "prompt": prompt,
            "expected": page.expected,
            "traits": page.traits | {"width": image.width, "height": image.height},
            "picture": picture,
        }
        if self.silent >= SILENCES:
            return Reading(**sent, problem=f"not sent: {SILENCES} requests in a row had no reply")
        payload = chat_api.chat_request(
            self.config.model, prompt, f"data:image/png;base64,{picture}", max_tokens=self.config.max_tokens
        )
        try:
            response = chat_api.send(self.url("/v1/chat/completions"), payload, timeout_seconds=self.config.timeout)
        except chat_api.ApiError as error:
            with self.lock:
                self.silent += 1
            return Reading(**sent, problem=str(error))
        with self.lock:
            self.silent = 0
        came: dict[str, Any] = {"latency_ms": response.latency_ms, "http_status": response.status}
        if response.status != 200:
            message = chat_api.server_message(response.body)
            return Reading(**sent, **came, problem=f"HTTP {response.status}: {message}")
        try:
            reply = chat_api.parse_reply(response.body)
        except chat_api.MalformedReplyError as error:
            return Reading(**sent, **came, problem=str(error))
        if reply.finish_reason not in ("stop", "length"):  # abort: the engine was stopped halfway
            return Reading(**sent, **came, problem=f"the reply ended by {reply.finish_reason}")
        return Reading(**sent, **came, found=reply.text, finish_reason=reply.finish_reason)


def ask(config: Config) -> dict[str, Any]:
    """Have every page read; what ``eval_ocr.py`` scores.  ``problem`` says why there are no readings at all."""
    started_at, problem, readings = now(), None, []
    service = Service(config)
    try:
        pages = sources(config)
        service.prepare()
        with ThreadPoolExecutor(config.concurrency) as pool:
            readings = list(pool.map(service.read, pages))
    except (NotMeasured, omnidocbench.UnusableError) as error:
        problem = {"found": str(error), "fix": error.fix}
    except OSError as error:  # a font or a picture that cannot be read
        problem = {"found": f"the pages cannot be made: {error}", "fix": "Ship the whole files/scripts folder."}
    return {
        "schema_version": "1.0",
        "arguments": config.as_json(),
        "engine": engine_versions(),
        "started_at": started_at,
        "finished_at": now(),
        "problem": problem,
        "readings": [asdict(reading) for reading in readings],
    }


def sources(config: Config) -> list[Callable[[], ocr_pages.Page]]:
    """What draws or cuts out each page, when its turn comes."""
    if config.omnidocbench:
        return list(omnidocbench.pages(config.omnidocbench, config.kinds, config.samples, random.Random(config.seed)))
    return [
        partial(ocr_pages.page, kind, index, config.seed, config.line_scale)
        for kind in config.kinds
        for index in range(config.samples)
    ]


def shrunk(image: Image.Image, tokens: int) -> Image.Image:
    """The picture, made smaller if it would take more than ``tokens`` visual tokens."""
    # A token more in each direction: the processor rounds both sides.
    factor = math.sqrt(tokens * PIXELS_PER_TOKEN / ((image.width + 28) * (image.height + 28)))
    if factor >= 1:
        return image
    size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def png(image: Image.Image) -> str:
    """The picture as a PNG, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
