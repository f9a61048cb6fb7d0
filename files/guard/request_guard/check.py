"""What a request may contain: the fields of each route, and what each of them may be."""

from __future__ import annotations

import binascii
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pybase64  # what vLLM decodes images with: what it would accept is what is checked

from request_guard.document import Document
from request_guard.images import ImageError, size
from request_guard.limits import Limits
from request_guard.refusal import Refusal, not_allowed, shown

#: Takes the place in the request and the value there; raises ``Refusal``.
Rule = Callable[[str, Any], None]

ROLES = ("system", "user", "assistant")
#: An image this many times longer than wide is refused by the model's processor (Glm46VImageProcessor).
ASPECT = 200
#: Texts that are names or marks, in characters, and how many of them.
NAME_CHARACTERS = 256
STOPS = 16
#: Levels of lists and objects in a field that is passed unchecked.
DEPTH = 16


class Checker:
    """The rules of a site.  ``special_tokens`` are the texts that the tokenizer makes single tokens of."""

    def __init__(self, limits: Limits, special_tokens: Collection[str]) -> None:
        self.limits = limits
        self.special_tokens = tuple(special_tokens)
        self.routes = self._routes()

    def check(self, path: str, body: bytes) -> None:
        """Raises ``Refusal``; ``KeyError`` for a path that is not among ``routes``."""
        rules = self.routes[path]
        document = Document(body, text_bytes=self.limits.text_bytes, images=self.limits.images)
        request = document.value
        if not isinstance(request, dict):
            raise not_allowed("", "an object", shown(request))
        for name, value in request.items():
            if name in rules:
                if value is not None:
                    rules[name](name, value)
            elif name in self.limits.unchecked_fields:
                self._unchecked(name, value, DEPTH)
            else:
                raise unknown(name, rules)
        self._together(request)
        if path == "/v1/completions" or (path == "/tokenize" and request.get("messages") is None):
            if request.get("prompt") is None:
                raise not_allowed("prompt", "a text", "none")
        else:
            self._messages(request.get("messages"), document)
        if document.leftover:
            raise not_allowed("", "images as image_url of a message only", f"{document.leftover} elsewhere")

    def _routes(self) -> dict[str, Mapping[str, Rule]]:
        limits = self.limits
        sampling: dict[str, Rule] = {
            "model": text,
            "user": text,
            "max_tokens": whole(1, limits.tokens),
            "min_tokens": whole(0, limits.tokens),
            "n": whole(1, limits.n),
            "temperature": number(0, 2),
            "top_p": number(0, 1),
            "top_k": whole(-1, 1_000_000),
            "min_p": number(0, 1),
            "repetition_penalty": number(0, 2),
            "presence_penalty": number(-2, 2),
            "frequency_penalty": number(-2, 2),
            "seed": whole(-(2**63), 2**63 - 1),
            "stop": stop,
            "ignore_eos": boolean,
            "skip_special_tokens": boolean,
            "stream": boolean,
            "stream_options": exactly({"include_usage": boolean, "continuous_usage_stats": boolean}),
            "response_format": exactly({"type": one_of("text")}),
            "prompt_logprobs": whole(0, limits.logprobs),
            "return_token_ids": boolean,
            "return_tokens_as_token_ids": boolean,
        }
        return {
            "/v1/chat/completions": sampling
            | {
                "messages": anything,  # looked at last, and with the images
                "max_completion_tokens": whole(1, limits.tokens),
                "logprobs": boolean,
                "top_logprobs": whole(0, limits.logprobs),
            },
            "/v1/completions": sampling | {"prompt": self._text, "logprobs": whole(0, limits.logprobs)},
            "/tokenize": {
                "model": text,
                "messages": anything,
                "prompt": self._text,
                "add_generation_prompt": boolean,
                "add_special_tokens": boolean,
            },
        }

    def _together(self, request: Mapping[str, Any]) -> None:
        least = request.get("min_tokens")
        given = [request[name] for name in ("max_tokens", "max_completion_tokens") if request.get(name) is not None]
        if least and least > min(given, default=0):
            raise not_allowed("min_tokens", "at most max_tokens, which goes with it", f"{least}, {given or 'none'}")

    def _messages(self, messages: Any, document: Document) -> None:
        most = self.limits.messages
        if not isinstance(messages, list) or not 1 <= len(messages) <= most:
            raise not_allowed("messages", f"a list of 1 to {most} messages", shown(messages))
        pixels = 0
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            MESSAGE(where, message)
            for name in ("role", "content"):
                if message.get(name) is None:
                    raise not_allowed(f"{where}.{name}", "a value", "none")
            pixels += self._content(f"{where}.content", message["content"], document)
            if pixels > self.limits.image_pixels:
                raise not_allowed(where, f"images of at most {self.limits.image_pixels} pixels", f"{pixels}")

    def _content(self, where: str, content: Any, document: Document) -> int:
        """Pixels of the images in a message's content."""
        if isinstance(content, str):
            self._text(where, content)
            return 0
        if not isinstance(content, list) or not content:
            raise not_allowed(where, "a text, or a list of parts", shown(content))
        pixels, texts = 0, []
        for index, part in enumerate(content):
            place = f"{where}[{index}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                TEXT_PART(place, part)
                self._text(f"{place}.text", part.get("text"))
                texts.append(part["text"])
            elif kind == "image_url":
                IMAGE_PART(place, part)
                url = (part.get("image_url") or {}).get("url")
                pixels += self._image(f"{place}.image_url.url", url, document)
            else:
                raise not_allowed(f"{place}.type", "text or image_url", "another one, or none")
        # A chat template may put texts next to each other: two halves would make a token.
        if len(texts) > 1:
            self._text(where, "".join(texts))
        return pixels

    def _image(self, where: str, url: Any, document: Document) -> int:
        taken = document.take(url) if isinstance(url, str) else None
        if taken is None:
            scheme = url[: url.find(":") + 1][:16] if isinstance(url, str) else ""
            raise not_allowed(where, "a data:image/png;base64 or data:image/jpeg;base64 URL", scheme or "none")
        kind, payload = taken
        try:
            width, height = size(kind, pybase64.b64decode(payload, validate=True))
        except binascii.Error as error:
            raise not_allowed(where, "base64", "other characters, or a wrong length") from error
        except ImageError as error:
            raise not_allowed(where, error.expected, error.found) from error
        if max(width, height) > ASPECT * min(width, height):
            raise not_allowed(where, f"sides of at most {ASPECT} to 1", f"{width} by {height} pixels")
        if width * height > self.limits.image_pixels:
            raise not_allowed(where, f"at most {self.limits.image_pixels} pixels", f"{width} by {height}")
        return width * height

    def _text(self, where: str, value: Any) -> None:
        """Text that becomes tokens of the prompt."""
        if not isinstance(value, str):
            raise not_allowed(where, "a text", shown(value))
        _encodable(where, value)
        for token in self.special_tokens:
            if token in value:
                raise not_allowed(where, "text without the model's special tokens", token[:40])

    def _unchecked(self, where: str, value: Any, depth: int) -> None:
        """What the site lets through unseen: not too deep, and no special tokens in it either."""
        if not depth:
            raise not_allowed(where, f"at most {DEPTH} levels", "more")
        if isinstance(value, str):
            self._text(where, value)
        elif isinstance(value, dict):
            for name, below in value.items():
                self._text(where, name)
                self._unchecked(where, below, depth - 1)
        elif isinstance(value, list):
            for below in value:
                self._unchecked(where, below, depth - 1)


def unknown(name: str, rules: Collection[str], where: str = "") -> Refusal:
    # Not more of it than a name has: an image may have strayed here.
    name = name.partition(",")[0][:40]
    return not_allowed(f"{where}.{name}" if where else name, f"one of {', '.join(rules)}", "another field")


def anything(where: str, value: Any) -> None:
    """Checked elsewhere."""


def whole(low: int, high: int) -> Rule:
    def rule(where: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise not_allowed(where, f"a whole number from {low} to {high}", shown(value))

    return rule


def number(low: float, high: float) -> Rule:
    def rule(where: str, value: Any) -> None:
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise not_allowed(where, f"a number from {low} to {high}", shown(value))

    return rule


def boolean(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise not_allowed(where, "true or false", shown(value))


def text(where: str, value: Any) -> None:
    """A name or a mark: it does not become tokens of the prompt."""
    if not isinstance(value, str) or len(value) > NAME_CHARACTERS:
        raise not_allowed(where, f"a text of at most {NAME_CHARACTERS} characters", shown(value))
    _encodable(where, value)


def _encodable(where: str, value: str) -> None:
    # JSON can hold half a surrogate pair, and UTF-8 cannot.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise not_allowed(where, "Unicode text", "half a surrogate pair") from error


def stop(where: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) > STOPS:
        raise not_allowed(where, f"at most {STOPS} texts", shown(value))
    for one in values:
        text(where, one)


def one_of(*values: str) -> Rule:
    def rule(where: str, value: Any) -> None:
        if value not in values:
            raise not_allowed(where, " or ".join(values), "another one")

    return rule


def exactly(rules: Mapping[str, Rule]) -> Rule:
    """An object with these fields and no other."""

    def rule(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise not_allowed(where, "an object", shown(value))
        for name, one in value.items():
            if name not in rules:
                raise unknown(name, rules, where)
            if one is not None:
                rules[name](f"{where}.{name}", one)

    return rule


MESSAGE = exactly({"role": one_of(*ROLES), "content": anything})
TEXT_PART = exactly({"type": anything, "text": anything})
#: ``detail`` is OpenAI's, and vLLM takes no notice of it.
IMAGE_URL = exactly({"url": anything, "detail": one_of("auto", "low", "high")})
IMAGE_PART = exactly({"type": anything, "image_url": IMAGE_URL})
