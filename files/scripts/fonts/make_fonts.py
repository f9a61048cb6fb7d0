"""Make the fonts of the known-answer pages from their sources; needed only after a change of ``ocr_texts.py``.

    pip install fonttools==4.68.0 ziamath==0.13        # MIT; Debian: apt install fonts-noto-cjk
    python make_fonts.py --noto /usr/share/fonts/opentype/noto

``page-sans.ttf`` and ``page-serif.ttf`` hold the characters that the pages use, from Noto Sans and Serif CJK SC.
``formulas.ttf`` holds the formulas of ``ocr_texts.FORMULAS``, typeset by ziamath with STIX Two Math, each as one
character of the private use area: drawing a formula is then drawing text, at any size, with nothing but Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import string
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import ziamath
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.recordingPen import DecomposingRecordingPen
from fontTools.pens.transformPen import TransformPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.svgLib.path import parse_path
from fontTools.ttLib import TTFont, newTable
from fontTools.ttLib.tables.ttProgram import Program

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import ocr_pages  # noqa: E402  beside this folder, not in it
import ocr_texts  # noqa: E402

UNITS_PER_EM = 2000
SIMPLIFIED_CHINESE = 2  # Its place in Noto's collections.
FORMULA_PX = 100
LICENCE = "This Font Software is licensed under the SIL Open Font License, Version 1.1."
LICENCE_URL = "https://openfontlicense.org"


def characters() -> list[str]:
    """Every character that a page may show, ASCII always."""
    texts = [text for name in vars(ocr_texts) if name.isupper() for text in flat(getattr(ocr_texts, name))]
    shown = {character for text in texts for character in text}
    return sorted(shown | set(string.digits + string.ascii_letters + string.punctuation + " "))


def flat(value: object) -> Iterable[str]:
    """The texts of a text, or of a tuple or dict of texts."""
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
            yield from flat(item)


def text_font(source: Path, name: str, notice: str) -> None:
    """A font of ``characters()`` with the outlines of ``source``, a Noto CJK collection."""
    font = TTFont(source, fontNumber=SIMPLIFIED_CHINESE)
    cmap, outlines = font.getBestCmap(), font.getGlyphSet()
    glyphs = {}
    for character in [chr(0), *characters()]:
        outline = outlines[cmap.get(ord(character), ".notdef")]
        pen, scale = DecomposingRecordingPen(outlines), UNITS_PER_EM / font["head"].unitsPerEm
        outline.draw(TransformPen(pen, (scale, 0, 0, scale, 0, 0)))
        glyphs[character] = (pen, round(outline.width * scale))
    ascent, descent = (round(value * scale) for value in (font["hhea"].ascent, font["hhea"].descent))
    write(name, glyphs, notice, ascent=ascent, descent=descent)


def formula_font(name: str, notice: str) -> None:
    """A font with one character for each formula, its letters half an em high: FreeType refuses more than ten ems."""
    ziamath.config.svg2 = False
    ziamath.config.precision = 3
    scale = UNITS_PER_EM / 2 / FORMULA_PX
    glyphs = {chr(0): (DecomposingRecordingPen({}), UNITS_PER_EM)}
    for index, latex in enumerate(ocr_texts.FORMULAS):
        pen = DecomposingRecordingPen({})
        for element in ElementTree.fromstring(ziamath.Math.fromlatex(latex, size=FORMULA_PX).svg()).iter():
            draw_svg(element, TransformPen(pen, (scale, 0, 0, -scale, 0, 0)))  # SVG's y runs down
        glyphs[ocr_pages.formula_letter(index)] = (pen, 0)
    write(name, glyphs, notice, ascent=2 * UNITS_PER_EM, descent=-UNITS_PER_EM)


def draw_svg(element: ElementTree.Element, pen: TransformPen) -> None:
    """The paths and bars of ziamath's SVG.  Raises ``ValueError`` for anything else."""
    tag = element.tag.rpartition("}")[2]
    if tag == "path":
        parse_path(element.attrib["d"], pen)
    elif tag == "rect":
        x, y, width, height = (float(element.attrib[key]) for key in ("x", "y", "width", "height"))
        pen.moveTo((x, y))
        for corner in ((x + width, y), (x + width, y + height), (x, y + height)):
            pen.lineTo(corner)
        pen.closePath()
    elif tag not in ("svg", "g") or "transform" in element.attrib:
        raise ValueError(f"ziamath drew an unexpected <{tag}>")


def write(
    name: str, glyphs: dict[str, tuple[DecomposingRecordingPen, int]], notice: str, *, ascent: int, descent: int
) -> None:
    """A TrueType font of ``glyphs`` (character: outline and advance); NUL becomes ``.notdef``."""
    names = {character: f"u{ord(character):04X}" if ord(character) else ".notdef" for character in glyphs}
    shapes = {}
    for character, (outline, _) in glyphs.items():
        pen = TTGlyphPen(None)
        outline.replay(Cu2QuPen(pen, max_err=1, reverse_direction=True))
        shapes[names[character]] = pen.glyph()
    builder = FontBuilder(UNITS_PER_EM, isTTF=True)
    builder.setupGlyphOrder(list(names.values()))
    builder.setupCharacterMap({ord(character): glyph for character, glyph in names.items() if ord(character)})
    builder.setupGlyf(shapes)
    builder.setupHorizontalMetrics(
        {
            names[c]: (advance, shapes[names[c]].xMin if shapes[names[c]].numberOfContours else 0)
            for c, (_, advance) in glyphs.items()
        }
    )
    builder.setupHorizontalHeader(ascent=ascent, descent=descent)
    builder.setupNameTable(
        {
            "familyName": f"Known Answer {name}",
            "styleName": "Regular",
            "copyright": notice,
            # A test looks for it, and so sees a formula that changed without its picture.
            "description": hashlib.sha256("\n".join(ocr_texts.FORMULAS).encode()).hexdigest(),
            "licenseDescription": LICENCE,
            "licenseInfoURL": LICENCE_URL,
        }
    )
    builder.setupOS2(sTypoAscender=ascent, sTypoDescender=descent, usWinAscent=ascent, usWinDescent=-descent)
    builder.setupPost(keepGlyphNames=False)
    # A font program, be it empty: without one FreeType hints by itself, each version in its own way.
    builder.font["fpgm"] = newTable("fpgm")
    builder.font["fpgm"].program = Program()
    builder.font["fpgm"].program.fromAssembly(["PUSHB[ ]", "0", "POP[ ]"])
    builder.font["head"].created = builder.font["head"].modified = 0  # the same input gives the same bytes
    builder.font.recalcTimestamp = False
    builder.save(FOLDER / f"{name}.ttf")


def main() -> None:
    """Write the three fonts beside this file."""
    parser = argparse.ArgumentParser(description="Make the fonts of the known-answer pages.")
    parser.add_argument("--noto", type=Path, default=Path("/usr/share/fonts/opentype/noto"), help="folder of Noto CJK")
    noto = parser.parse_args().noto
    adobe = "Derived from Noto {} CJK SC 2.004, (c) 2014-2021 Adobe."
    text_font(noto / "NotoSansCJK-Regular.ttc", "page-sans", adobe.format("Sans"))
    text_font(noto / "NotoSerifCJK-Regular.ttc", "page-serif", adobe.format("Serif"))
    formula_font("formulas", "Derived from STIX Two Math 2.11, Copyright 2001-2020 The STIX Fonts Project Authors.")


if __name__ == "__main__":
    main()
