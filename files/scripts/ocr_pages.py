"""Pages with a known content, drawn when they are needed: what ``eval_ocr.py`` has the service read.

Every page of a kind differs in language, face, size and degradation by its place in the row, so that a run of
``len(DEGRADATIONS) * 2`` pages shows every degradation in both languages; what it says is drawn from the seed.
Formulas are typeset beforehand (``fonts/make_fonts.py``); their size and degradation are of the moment.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

import ocr_lines
import ocr_texts

TEXT, TABLE, FORMULA = "Text Recognition:", "Table Recognition:", "Formula Recognition:"
PROMPTS = {"line": TEXT, "document": TEXT, "table": TABLE, "formula": FORMULA, "code": TEXT, "seal": TEXT}
LANGUAGES = ("en", "zh")
FACES = ("sans", "serif")
SIZES_PX = (20, 28, 36)
DEGRADATIONS = ("none", "small", "rotated", "blurred", "noisy", "jpeg", "faint")
FONTS = Path(__file__).parent / "fonts"
INK, PAPER, RED, WHITE = 20, 255, (200, 20, 30), (255, 255, 255)
NEVER_FIRST = "，。；：、,.;:%"  # of a line of text


@dataclass(frozen=True)
class Page:
    """A picture, what it says, and what a report says about it (``traits``, texts and numbers)."""

    id: str
    kind: str
    expected: str
    image: Image.Image
    traits: dict[str, str | int | bool]


@dataclass(frozen=True)
class Look:
    """How a page is drawn; ``px`` is the size of its letters, ``variant`` chooses between two layouts."""

    language: str
    face: str
    px: int
    variant: bool

    def font(self, scale: float = 1.0) -> ImageFont.FreeTypeFont:
        return load(f"page-{self.face}.ttf", round(self.px * scale))


class Cell(NamedTuple):
    """A cell of a table: its place, how many rows and columns it spans, its text."""

    row: int
    column: int
    rows: int
    columns: int
    text: str


def pages(kind: str, count: int, seed: int, line_scale: int = 1) -> list[Page]:
    """``count`` pages of ``kind``; the same seed gives the same pages, whatever the other kinds and the count."""
    return [page(kind, index, seed, line_scale) for index in range(count)]


def page(kind: str, index: int, seed: int, line_scale: int = 1) -> Page:
    """Page ``index`` of ``kind``.  Lines, which the lab's model reads, are not degraded; ``line_scale`` is theirs."""
    rng = random.Random(f"{seed}/{kind}/{index}")
    identity = f"{kind}-{index:03d}"
    if kind == "line":
        text, font = ocr_lines.readable_text(rng), list(ocr_lines.FONTS)[index % len(ocr_lines.FONTS)]
        image = ocr_lines.render(text, font, scale=line_scale)
        return Page(identity, kind, text, image, {"language": "en", "face": font, "px": ocr_lines.FONT_PX * line_scale})
    look = Look(LANGUAGES[index % 2], FACES[index // 2 % 2], SIZES_PX[index % 3], index // 4 % 2 == 1)
    degradation = DEGRADATIONS[index % len(DEGRADATIONS)]
    image, expected = DRAW[kind](rng, look)
    traits: dict[str, str | int | bool] = {"px": look.px, "degradation": degradation}
    if kind in ("document", "table", "seal"):
        traits |= {"language": look.language, "face": look.face}
    if kind == "table":
        traits["spans"] = look.variant
    return Page(identity, kind, expected, degraded(image, degradation, look.px, rng), traits)


def load(name: str, px: int) -> ImageFont.FreeTypeFont:
    """A shipped font; basic layout, so that the picture does not depend on the libraries of the machine."""
    return ImageFont.truetype(FONTS / name, px, layout_engine=ImageFont.Layout.BASIC)


def numbered(rng: random.Random, text: str) -> str:
    """The text with its number drawn."""
    return text.replace("{number}", str(rng.randint(12, 9876)))


def draw_document(rng: random.Random, look: Look) -> tuple[Image.Image, str]:
    """A title and two paragraphs; the truth has one line for each."""
    px, language = look.px, look.language
    sentences = [numbered(rng, text) for text in rng.sample(ocr_texts.SENTENCES[language], 6)]
    glue = " " if language == "en" else ""
    title, *paragraphs = [rng.choice(ocr_texts.TITLES[language]), glue.join(sentences[:3]), glue.join(sentences[3:])]
    font, width, leading = look.font(), 30 * px, round(1.6 * px)
    blocks = [wrapped(paragraph, font, width) for paragraph in paragraphs]
    height = 6 * px + sum(len(lines) * leading + px for lines in blocks)
    image = Image.new("L", (width + 4 * px, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((image.width / 2, 2 * px), title, fill=INK, font=look.font(1.4), anchor="mt")
    y = 5 * px
    for lines in blocks:
        for line in lines:
            draw.text((2 * px, y), line, fill=INK, font=font, anchor="ls")
            y += leading
        y += px
    return image, "\n".join([title, *paragraphs])


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels: broken at spaces, in Chinese anywhere but in a number.

    A punctuation mark may hang over the edge by one character, as typesetters let it.
    """
    pieces = re.findall(r"\S+ ?" if " " in text else r"\d+|.", text)
    lines = [""]
    for piece in pieces:
        if lines[-1] and piece not in NEVER_FIRST and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def draw_table(rng: random.Random, look: Look) -> tuple[Image.Image, str]:
    """A ruled table; the variant has a head of two rows, with merged cells.  The truth is HTML."""
    cells = table_cells(rng, look)
    px, font = look.px, look.font()
    rows, columns = max(cell.row + cell.rows for cell in cells), max(cell.column + cell.columns for cell in cells)
    widths = [
        round(px * 1.4 + max(font.getlength(cell.text) / cell.columns for cell in cells if covers(cell, column)))
        for column in range(columns)
    ]
    xs = [px + sum(widths[:column]) for column in range(columns + 1)]
    ys = [px + 2 * px * row for row in range(rows + 1)]
    image = Image.new("L", (xs[-1] + px, ys[-1] + px), PAPER)
    draw = ImageDraw.Draw(image)
    for cell in cells:
        box = (xs[cell.column], ys[cell.row], xs[cell.column + cell.columns], ys[cell.row + cell.rows])
        draw.rectangle(box, outline=INK, width=max(1, px // 14))
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), cell.text, fill=INK, font=font, anchor="mm")
    return image, html(cells)


def covers(cell: Cell, column: int) -> bool:
    return cell.column <= column < cell.column + cell.columns


def table_cells(rng: random.Random, look: Look) -> list[Cell]:
    """Row by row, from left to right."""
    first, *rest = ocr_texts.TABLE_HEADS[look.language]
    if look.variant:
        groups = ocr_texts.TABLE_GROUPS[look.language]
        heads = rng.sample(rest, 2) * 2
        cells = [Cell(0, 0, 2, 1, first)] + [Cell(0, 1 + 2 * i, 1, 2, group) for i, group in enumerate(groups)]
        top = 2
    else:
        heads = rng.sample(rest, rng.randint(2, 4))
        cells = [Cell(0, 0, 1, 1, first)]
        top = 1
    cells += [Cell(top - 1, 1 + i, 1, 1, head) for i, head in enumerate(heads)]
    for row, name in enumerate(rng.sample(ocr_texts.TABLE_ROWS[look.language], rng.randint(3, 5)), top):
        cells.append(Cell(row, 0, 1, 1, name))
        cells += [Cell(row, 1 + i, 1, 1, number(rng)) for i in range(len(heads))]
    return cells


def number(rng: random.Random) -> str:
    """A figure as tables have them: plain, with decimals, or a percentage."""
    return rng.choice([f"{rng.randint(3, 9999)}", f"{rng.uniform(0, 999):.2f}", f"{rng.uniform(-40, 40):.1f}%"])


def html(cells: list[Cell]) -> str:
    """The table of ``cells`` (ordered by row), a span of 1 left unsaid."""
    rows: list[str] = []
    for cell in cells:
        if cell.row == len(rows):
            rows.append("")
        spans = "".join(f' {n}="{v}"' for n, v in (("rowspan", cell.rows), ("colspan", cell.columns)) if v > 1)
        rows[cell.row] += f"<td{spans}>{cell.text}</td>"
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def draw_formula(rng: random.Random, look: Look) -> tuple[Image.Image, str]:
    """One display formula; the truth is LaTeX without delimiters."""
    index = rng.randrange(len(ocr_texts.FORMULAS))
    font, formula = load("formulas.ttf", round(2.6 * look.px)), formula_letter(index)  # letters are half its size
    left, top, right, bottom = font.getbbox(formula)
    margin = look.px
    image = Image.new("L", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin), PAPER)
    ImageDraw.Draw(image).text((margin - left, margin - top), formula, fill=INK, font=font)
    return image, ocr_texts.FORMULAS[index]


def formula_letter(index: int) -> str:
    """The character of ``formulas.ttf``, in the private use area, that shows formula ``index``."""
    return chr(0xE000 + index)


def draw_code(rng: random.Random, look: Look) -> tuple[Image.Image, str]:
    """A program in a fixed pitch, its indentation kept."""
    text = numbered(rng, rng.choice(ocr_texts.PROGRAMS)).rstrip("\n")
    name = "DejaVuSansMono.ttf" if look.face == "sans" else "LiberationMono-Regular.ttf"
    font, px, lines = load(name, look.px), look.px, text.split("\n")
    width = round(max(font.getlength(line) for line in lines))
    image = Image.new("L", (width + 2 * px, round(1.5 * px * len(lines)) + 2 * px), PAPER)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((px, px + round(1.5 * px * (row + 0.75))), line, fill=INK, font=font, anchor="ls")
    return image, text


def draw_seal(rng: random.Random, look: Look) -> tuple[Image.Image, str]:
    """A round red seal: a ring of letters over a star, a line under it.  The truth is the ring, then the line."""
    ring, line = rng.choice(ocr_texts.SEAL_RINGS[look.language]), rng.choice(ocr_texts.SEAL_LINES[look.language])
    px, font = look.px, look.font(1.3)
    advances = [font.getlength(letter) + 0.2 * px for letter in ring]
    radius = max(sum(advances) / math.radians(250), 4.5 * px)  # of the ring of letters, which spans at most 250 degrees
    outer = round(radius + 1.6 * px)
    image = Image.new("RGB", (2 * outer + px, 2 * outer + px), WHITE)
    draw, centre = ImageDraw.Draw(image), image.width / 2
    ring_box = (centre - outer, centre - outer, centre + outer, centre + outer)
    draw.ellipse(ring_box, outline=RED, width=max(2, px // 6))
    along = -sum(advances) / 2  # of the ring, from its top, clockwise
    for letter, advance in zip(ring, advances, strict=True):
        angle = (along + advance / 2) / radius
        draw_turned(image, letter, font, (centre + radius * math.sin(angle), centre - radius * math.cos(angle)), angle)
        along += advance
    points = [(1.5 if point % 2 == 0 else 0.6, math.radians(36 * point)) for point in range(10)]
    draw.polygon([(centre + r * px * math.sin(a), centre - r * px * math.cos(a)) for r, a in points], fill=RED)
    draw.text((centre, centre + 0.55 * radius), line, fill=RED, font=look.font(1.0), anchor="mm")
    return image, f"{ring}\n{line}"


def draw_turned(
    image: Image.Image, letter: str, font: ImageFont.FreeTypeFont, at: tuple[float, float], angle: float
) -> None:
    """A red letter centred on ``at``, turned clockwise by ``angle`` radians."""
    side = 2 * round(font.size)
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).text((side / 2, side / 2), letter, fill=255, font=font, anchor="mm")
    mask = mask.rotate(-math.degrees(angle), Image.Resampling.BICUBIC)
    image.paste(RED, (round(at[0] - side / 2), round(at[1] - side / 2)), mask)


DRAW: dict[str, Callable[[random.Random, Look], tuple[Image.Image, str]]] = {
    "document": draw_document,
    "table": draw_table,
    "formula": draw_formula,
    "code": draw_code,
    "seal": draw_seal,
}


def degraded(image: Image.Image, degradation: str, px: int, rng: random.Random) -> Image.Image:
    """The picture after one of ``DEGRADATIONS``; ``px`` is the size of its letters."""
    if degradation == "small":
        return image.resize((round(image.width * 0.6), round(image.height * 0.6)), Image.Resampling.LANCZOS)
    if degradation == "rotated":
        white = PAPER if image.mode == "L" else WHITE
        return image.rotate(rng.choice((-1.5, 1.5)), Image.Resampling.BICUBIC, expand=True, fillcolor=white)
    if degradation == "blurred":
        return image.filter(ImageFilter.GaussianBlur(0.045 * px))
    if degradation == "noisy":
        noise = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
        return Image.blend(image, noise.convert(image.mode), 0.3)
    if degradation == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=20)
        return Image.open(buffer).convert(image.mode)
    if degradation == "faint":
        return image.point(lambda value: 150 + value * 95 // 255)
    return image
