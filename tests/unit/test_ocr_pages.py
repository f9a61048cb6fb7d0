"""ocr_pages.py: pages that show what they are said to show, and the fonts that were made for them."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable

import pytest
from PIL import Image, ImageChops, ImageFont

import eval_ocr
import ocr_pages
import ocr_texts

SEED = 11
DRAWN = tuple(ocr_pages.DRAW)


def ink(image: Image.Image) -> tuple[int, int, int, int]:
    """The box around everything that is not white."""
    box = ImageChops.invert(image.convert("L")).getbbox()
    assert box is not None
    return box


def texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts(tuple(value.values()))
    elif isinstance(value, tuple):
        for item in value:
            yield from texts(item)


def shape(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def test_the_kinds_are_those_of_the_command_line() -> None:
    assert tuple(ocr_pages.PROMPTS) == eval_ocr.KINDS
    assert {"line", *DRAWN} == set(eval_ocr.KINDS)


@pytest.mark.parametrize("kind", eval_ocr.KINDS)
def test_a_seed_gives_its_pages_again(kind: str) -> None:
    once, again = (ocr_pages.page(kind, 3, SEED) for _ in range(2))
    assert once.expected == again.expected
    assert once.image.tobytes() == again.image.tobytes()
    others = {ocr_pages.page(kind, 3, seed).expected for seed in range(8)}
    assert len(others) > 1


@pytest.mark.parametrize("kind", DRAWN)
def test_fourteen_pages_show_every_degradation_in_both_languages(kind: str) -> None:
    traits = [ocr_pages.page(kind, index, SEED).traits for index in range(14)]
    assert {trait["px"] for trait in traits} == set(ocr_pages.SIZES_PX)
    assert {trait["degradation"] for trait in traits} == set(ocr_pages.DEGRADATIONS)
    if "language" in traits[0]:
        assert len({(trait["degradation"], trait["language"]) for trait in traits}) == 14


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("language", ocr_pages.LANGUAGES)
@pytest.mark.parametrize("face", ocr_pages.FACES)
@pytest.mark.parametrize("variant", [False, True])
def test_nothing_is_cut_off(kind: str, language: str, face: str, variant: bool) -> None:
    for px in ocr_pages.SIZES_PX:
        image, expected = ocr_pages.DRAW[kind](random.Random(SEED), ocr_pages.Look(language, face, px, variant))
        left, top, right, bottom = ink(image)
        assert expected
        assert left > 0
        assert top > 0
        assert right < image.width
        assert bottom < image.height


@pytest.mark.parametrize("name", [name for name in ocr_pages.DEGRADATIONS if name != "none"])
@pytest.mark.parametrize("kind", ["document", "seal"])
def test_each_degradation_changes_the_picture_and_leaves_ink(name: str, kind: str) -> None:
    look = ocr_pages.Look("en", "sans", 20, False)
    image, _ = ocr_pages.DRAW[kind](random.Random(SEED), look)
    changed = ocr_pages.degraded(image, name, 20, random.Random(SEED))
    assert changed.mode == image.mode
    assert (changed.size, changed.tobytes()) != (image.size, image.tobytes())
    low, high = changed.convert("L").getextrema()
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    assert high - low > 40


@pytest.mark.parametrize("name", ["page-sans.ttf", "page-serif.ttf"])
def test_the_fonts_have_every_character(name: str) -> None:
    font = ocr_pages.load(name, 40)
    absent = shape(font, "\u0e01")
    sources = (ocr_texts.TITLES, ocr_texts.SENTENCES, ocr_texts.TABLE_HEADS, ocr_texts.TABLE_GROUPS,
               ocr_texts.TABLE_ROWS, ocr_texts.SEAL_RINGS, ocr_texts.SEAL_LINES)  # fmt: skip
    characters = {character for source in sources for text in texts(source) for character in text} - {" "}
    assert [c for c in sorted(characters) if shape(font, c) == absent] == [], "run fonts/make_fonts.py"


def test_the_formulas_are_those_that_were_typeset() -> None:
    made_with = hashlib.sha256("\n".join(ocr_texts.FORMULAS).encode()).hexdigest()
    assert made_with.encode("utf-16-be") in (ocr_pages.FONTS / "formulas.ttf").read_bytes(), "run fonts/make_fonts.py"
    font = ocr_pages.load("formulas.ttf", 94)  # the largest that is drawn
    shapes = {shape(font, ocr_pages.formula_letter(index)) for index in range(len(ocr_texts.FORMULAS))}
    assert len(shapes) == len(ocr_texts.FORMULAS)
    assert shape(font, ocr_pages.formula_letter(len(ocr_texts.FORMULAS))) not in shapes


@pytest.mark.parametrize("variant", [False, True])
def test_a_tables_cells_fill_its_grid(variant: bool) -> None:
    for seed in range(10):
        look = ocr_pages.Look("zh", "sans", 20, variant)
        cells = ocr_pages.table_cells(random.Random(seed), look)
        places = [
            (row, column)
            for cell in cells
            for row in range(cell.row, cell.row + cell.rows)
            for column in range(cell.column, cell.column + cell.columns)
        ]
        rows, columns = (max(place[axis] for place in places) + 1 for axis in (0, 1))
        assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]
        assert ("rowspan" in ocr_pages.html(cells)) == variant


def test_html_of_a_table() -> None:
    cells = [ocr_pages.Cell(0, 0, 2, 1, "a"), ocr_pages.Cell(0, 1, 1, 2, "b"), ocr_pages.Cell(1, 1, 1, 1, "c"),
             ocr_pages.Cell(1, 2, 1, 1, "d")]  # fmt: skip
    assert ocr_pages.html(cells) == (
        '<table><tr><td rowspan="2">a</td><td colspan="2">b</td></tr><tr><td>c</td><td>d</td></tr></table>'
    )


@pytest.mark.parametrize("language", ocr_pages.LANGUAGES)
def test_wrapping_keeps_the_text_and_the_width(language: str) -> None:
    font = ocr_pages.load("page-sans.ttf", 20)
    text = (" " if language == "en" else "").join(ocr_texts.SENTENCES[language]).replace("{number}", "9876")
    for width in range(300, 420, 7):
        lines = ocr_pages.wrapped(text, font, width)
        assert (" " if language == "en" else "").join(lines) == text
        # A closing mark may hang over by its own width.
        assert all(font.getlength(line.rstrip(ocr_pages.NEVER_FIRST)) <= width for line in lines)
        assert not any(line[0] in ocr_pages.NEVER_FIRST for line in lines)
        assert sum(line.count("9876") for line in lines) == text.count("9876"), "no number is broken"


def test_programs_keep_their_indentation() -> None:
    image, text = ocr_pages.draw_code(random.Random(3), ocr_pages.Look("en", "sans", 20, False))
    assert image.height == 30 * len(text.split("\n")) + 40
    assert any(re.match(" +", line) for program in ocr_texts.PROGRAMS for line in program.split("\n"))
