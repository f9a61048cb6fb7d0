"""ocr_lines.py: pictures of a known size that show their text."""

from __future__ import annotations

import base64
import io
import random

import pytest
from PIL import Image, ImageChops

import ocr_lines


@pytest.mark.parametrize("font", ocr_lines.FONTS)
@pytest.mark.parametrize("scale", [1, 4])
def test_size_is_whole_tokens(font: str, scale: int) -> None:
    image = ocr_lines.render("ORDER 4821 PAGE", font, scale=scale)
    assert image.mode == "RGB"
    assert image.height == 28 * scale
    assert image.width == ocr_lines.width_px("ORDER 4821 PAGE") * scale
    assert image.width % (28 * scale) == 0


@pytest.mark.parametrize("font", ocr_lines.FONTS)
def test_every_character_is_drawn_and_inside(font: str) -> None:
    pictures = set()
    for character in ocr_lines.ALPHABET:
        box = ImageChops.invert(ocr_lines.render(character, font, scale=4)).getbbox()
        assert (box is None) == (character == " ")
        # The ink ends before the border, so nothing was cut off.
        assert box is None or (box[0] > 0 and box[1] > 0 and box[2] < 112 and box[3] < 112)
        pictures.add(ocr_lines.data_url(ocr_lines.render(character, font, scale=4)))
    assert len(pictures) == len(ocr_lines.ALPHABET)


def test_shift_moves_the_text() -> None:
    plain, moved = (ImageChops.invert(ocr_lines.render("A", dx=dx)).getbbox() for dx in (0, 3))
    assert plain is not None
    assert moved is not None
    assert moved[0] - plain[0] == 3


def test_width_grows_by_whole_tokens() -> None:
    assert ocr_lines.width_px("A") == 28
    assert ocr_lines.width_px("AB") == 56  # 2 x 14 px and the margins
    assert ocr_lines.width_px("A", dx=11) == 56


def test_unknown_font_is_refused() -> None:
    with pytest.raises(KeyError):
        ocr_lines.render("A", "comic")


def test_texts_are_repeatable_and_normal() -> None:
    for seed in range(50):
        text = ocr_lines.readable_text(random.Random(seed))
        assert text == ocr_lines.readable_text(random.Random(seed))
        assert len(text) <= 16
        assert set(text) <= set(ocr_lines.ALPHABET)
        words = text.split(" ")
        assert len(words) == 3
        assert words[0] != words[2]
        free = ocr_lines.random_text(random.Random(seed), 12)
        assert len(free) == 12
        assert free == " ".join(free.split())


def test_data_url_holds_the_picture() -> None:
    image = ocr_lines.render("A")
    kind, data = ocr_lines.data_url(image).split(",")
    assert kind == "data:image/png;base64"
    assert ImageChops.difference(Image.open(io.BytesIO(base64.b64decode(data))), image).getbbox() is None
