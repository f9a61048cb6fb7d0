"""Single lines of text with a known content, rendered as images.

One place for the known-answer images: the smoke sends them to the service, the lab's nano model is
trained on them.  The two fonts are shipped beside this file (licences in ``fonts/README.md``), so that
the same text gives the same picture on every machine.

Geometry at ``scale=1``: a line is one merged visual token of GLM-OCR high (28 px, 2 x 2 patches of
14 px) and a whole number of them wide; a character advances 14 px.
"""

from __future__ import annotations

import base64
import io
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TOKEN_PX = 28
ADVANCE_PX = 14
FONT_PX = 23
BASELINE_PX = 21
MARGIN_PX = 2
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:-/"
FONTS = {
    "dejavu-sans-mono": Path(__file__).parent / "fonts" / "DejaVuSansMono.ttf",
    "liberation-mono": Path(__file__).parent / "fonts" / "LiberationMono-Regular.ttf",
}
WORDS = (
    "INVOICE REPORT TOTAL NUMBER DATE ORDER PAGE TABLE CITY STREET WATER LIGHT PAPER GREEN NORTH SOUTH "
    "RIVER STONE HOUSE TRAIN CLOCK BRIDGE GARDEN MARKET WINDOW SILVER ORANGE PLANET JACKET FIGURE QUARTZ "
    "ZEBRA VALVE"
).split()


def width_px(text: str, dx: int = 0) -> int:
    """Width in pixels at scale 1: the smallest whole number of visual tokens that holds the line."""
    return TOKEN_PX * math.ceil((len(text) * ADVANCE_PX + dx + 2 * MARGIN_PX) / TOKEN_PX)


def render(text: str, font: str = "dejavu-sans-mono", *, scale: int = 1, dx: int = 0, dy: int = 0) -> Image.Image:
    """Draw ``text`` black on white.

    ``dx`` and ``dy`` shift the text by pixels at scale 1.  Returns an RGB image of
    ``28 * scale`` by ``width_px(text, dx) * scale`` pixels.  Raises ``KeyError`` for an unknown font.
    """
    image = Image.new("RGB", (width_px(text, dx) * scale, TOKEN_PX * scale), "white")
    face = ImageFont.truetype(FONTS[font], FONT_PX * scale, layout_engine=ImageFont.Layout.BASIC)
    draw = ImageDraw.Draw(image)
    for index, character in enumerate(text):
        # Placed one by one: the advance is then the same in every font and at every scale.
        x = (MARGIN_PX + dx + index * ADVANCE_PX) * scale
        draw.text((x, (BASELINE_PX + dy) * scale), character, fill="black", font=face, anchor="ls")
    return image


def random_text(rng: random.Random, length: int) -> str:
    """A text of exactly ``length`` characters of ``ALPHABET``, without leading, trailing or double spaces."""
    while True:
        text = "".join(" " if rng.random() < 0.1 else rng.choice(ALPHABET) for _ in range(length))
        if text == text.strip() and "  " not in text:
            return text


def readable_text(rng: random.Random) -> str:
    """Words and a number such as ``ORDER 4821 PAGE``, at most 16 characters: nothing to confuse O with 0 in."""
    first, last = rng.sample([word for word in WORDS if len(word) <= 5], 2)
    return f"{first} {rng.randint(1000, 9999)} {last}"


def data_url(image: Image.Image) -> str:
    """The image as a PNG ``data:`` URL, the form the chat API takes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
