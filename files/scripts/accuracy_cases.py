"""The prompts of the two accuracy stages: the same texts and pixels for whatever is compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

import ocr_lines

IMAGE_PROMPT = "Text Recognition:"
# The document's smoke, one sentence of English, and two prompts of the model's own, here without an image.
TEXT_PROMPTS = (
    "请用一句话介绍 GLM-OCR 模型。",
    "Read the text of an invoice and name its total.",
    "Text Recognition:",
    '请按下列JSON格式输出图中信息:\n{"姓名": "", "日期": "", "金额": ""}',
)


@dataclass(frozen=True)
class Case:
    """One prompt; ``drawn`` is the text in its image."""

    name: str
    prompt: str
    image: Image.Image | None = None
    drawn: str | None = None

    @property
    def kind(self) -> str:
        """``image`` or ``text``."""
        return "image" if self.image else "text"


def cases(images: int, scale: int, seed: int) -> list[Case]:
    """``images`` pictures and every text prompt; the pictures show, in turn, one and two lines of drawn text.

    Two lines make the picture two visual tokens high at scale 1: a fault in the vertical part of the rotary
    embedding does not show on one row.
    """
    rng = random.Random(seed)
    made = []
    for index in range(1, images + 1):
        lines = [ocr_lines.readable_text(rng) for _ in range(2 - index % 2)]
        picture = _stacked([ocr_lines.render(line, scale=scale) for line in lines])
        made.append(Case(f"image-{index}", IMAGE_PROMPT, picture, "\n".join(lines)))
    return [*made, *(Case(f"text-{index}", prompt) for index, prompt in enumerate(TEXT_PROMPTS, 1))]


def _stacked(pictures: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page
