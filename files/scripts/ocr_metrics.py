"""How far a reading is from the truth, for each kind of page, and whether the model repeated itself.

Every kind has one **error**, a ratio of which less is better, so that one rule judges them all:

| kind | error of a set of pages | what is normalised before |
|---|---|---|
| line, document, seal | pooled character error rate: edits / characters of the truths | ``plain`` |
| code | pooled character error rate, indentation counted | ``program`` |
| formula | mean normalised edit distance: edits / the longer of the two, in LaTeX tokens | ``latex`` |
| table | mean of 1 - TEDS (Zhong et al. 2020, tree edit distance over the larger tree) | ``table`` |

Edits are insertions, deletions and substitutions of cost 1 (Levenshtein), computed by rapidfuzz.  TEDS is that of
table-recognition-metric; packages differ on the same pair, so its version stands in the result.  An empty reading,
and one without a table, has TEDS 0.  Not computed, of OmniDocBench's official metrics: CDM, reading order, layout
detection, BLEU and METEOR; and its edit distances normalise otherwise, so figures do not compare with its ranking.
"""

from __future__ import annotations

import html
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lxml.etree import LxmlError
from rapidfuzz.distance.Levenshtein import distance, editops
from table_recognition_metric import TEDS

from text_metrics import character_error_rate

PACKAGES = ("rapidfuzz", "table-recognition-metric", "levenshtein", "apted", "lxml")
NAMES = {
    "line": "character error rate",
    "document": "character error rate",
    "seal": "character error rate",
    "code": "character error rate with indentation",
    "formula": "normalised edit distance of LaTeX tokens",
    "table": "1 - TEDS",
}
CHARACTERS = ("line", "document", "code", "seal")  # kinds that are compared character by character
CONFUSED_TIMES, CONFUSED_SHARE = 3, 0.8
LOOP_REPEATS = 3
LOOP_CHARACTERS = 60
WIDE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters and their punctuation
# Curly quotes, en dash, em dash and minus sign.
TYPOGRAPHY = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014\u2212", "\"\"''---")
LATEX_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S")
LATEX_SPACES = {r"\,", r"\;", r"\:", r"\!", r"\ ", "~", r"\quad", r"\qquad"}
LATEX_STYLE = {r"\left", r"\right", r"\displaystyle", r"\limits", r"\nolimits", r"\mathrm", r"\mathbf", r"\mathit"}
LATEX_SAME = {r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow", r"\dots": r"\ldots",
              r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\dfrac": r"\frac", r"\tfrac": r"\frac",
              r"\varepsilon": r"\epsilon", r"\mid": "|"}  # fmt: skip

LATEX_REWRITES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\\(begin|end)\s*\{\s*([A-Za-z]+)\s*(\*?)\s*\}", r"\\\1{\2\3}"),
    (r"\\tag\s*\*?\s*\{[^}]*\}|\\(?:begin|end)\{(?:equation|displaymath|align|aligned|gather)\*?\}", ""),
    (r"\\operatorname\s*\*?\s*\{([^}]*)\}", lambda match: "\\" + match[1].replace(" ", "") + " "),
    (r"\^\s*(\{\s*\\prime\s*\}|\\prime(?![A-Za-z]))", "'"),
    (r"\\begin\{pmatrix\}", r"(\\begin{array}{}"),
    (r"\\end\{pmatrix\}", r"\\end{array})"),
    (r"\\begin\{array\}\s*\{[^}]*\}", r"\\beginarray "),
    (r"\\(begin|end)\{(\w+)\*?\}", r"\\\1\2 "),
)


class Loop(NamedTuple):
    """A text's end that says the same again: the repeated ``unit``, how often, over how many characters."""

    unit: str
    repeats: int
    characters: int


class Confusion(NamedTuple):
    """A character that is read as another one: ``times`` in the ``places`` where it stands."""

    expected: str
    found: str
    times: int
    places: int


def error(kind: str, truths: Sequence[str], readings: Sequence[str]) -> float | None:
    """The error of a set of pages of one ``kind``, a ratio from 0 up; None without pages."""
    if not truths:
        return None
    if kind == "table":
        return statistics.fmean(1 - teds(*pair) for pair in zip(truths, readings, strict=True))
    if kind == "formula":
        return statistics.fmean(formula_distance(*pair) for pair in zip(truths, readings, strict=True))
    normal = normal_form(kind)
    return character_error_rate([normal(text) for text in truths], [normal(text) for text in readings], distance)


def normal_form(kind: str) -> Callable[[str], str]:
    """What is done to a text of one of ``CHARACTERS`` before it is compared."""
    return program if kind == "code" else plain


def confusions(pages: Sequence[tuple[str, str, str]]) -> list[Confusion]:
    """The letters and digits that are nearly always read as one other.

    That is, in ``CONFUSED_SHARE`` or more of their places, which are ``CONFUSED_TIMES`` or more.
    ``pages`` are kind, truth and reading.  With independent errors of 2 % a character, one that stands three times is
    confused each time by chance in about one of 10^5.
    """
    places: Counter[str] = Counter()
    swaps: Counter[tuple[str, str]] = Counter()
    for kind, truth, reading in pages:
        expected, found = (normal_form(kind)(text) for text in (truth, reading))
        places.update(expected)
        swaps.update(substitutions(expected, found))
    return [
        Confusion(expected, found, times, places[expected])
        for (expected, found), times in sorted(swaps.items())
        if expected.isalnum() and places[expected] >= CONFUSED_TIMES and times >= CONFUSED_SHARE * places[expected]
    ]


def substitutions(expected: str, found: str) -> list[tuple[str, str]]:
    """The characters that differ in the shortest edit: where one has substitutions alone that one, else rapidfuzz's."""
    if len(expected) == len(found):
        differing = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        if len(differing) == distance(expected, found):
            return differing
    return [
        (expected[edit.src_pos], found[edit.dest_pos]) for edit in editops(expected, found) if edit.tag == "replace"
    ]


def details(kind: str, truth: str, reading: str) -> dict[str, float | None]:
    """What is worth knowing of one page beside its error."""
    if kind == "table":
        return {"teds": teds(truth, reading), "teds_structure": teds(truth, reading, structure_only=True)}
    if kind == "code":
        return {"cer_without_indentation": character_error_rate([flat(truth)], [flat(reading)], distance)}
    return {}


def plain(text: str) -> str:
    """Running text: what an engine may write either way becomes one way.

    NFKC (full-width forms become ASCII), straight quotes and hyphens; the marks of Markdown headings and bold go;
    runs of white space become one space, and none beside a Chinese character.
    """
    text = unicodedata.normalize("NFKC", text).translate(TYPOGRAPHY)
    text = re.sub(r"^#{1,6} |\*\*", "", text, flags=re.MULTILINE)
    return re.sub(rf"(?<=[{WIDE}]) | (?=[{WIDE}])", "", " ".join(text.split()))


def program(text: str) -> str:
    """Code without a Markdown fence, empty lines, trailing spaces and common indentation; a tab is four spaces."""
    lines = [line.expandtabs(4).rstrip() for line in unfenced(text).split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return "\n".join(line[indent:] for line in lines)


def flat(text: str) -> str:
    """A program whose white space does not matter."""
    return " ".join(program(text).split())


def unfenced(text: str) -> str:
    """What is between Markdown's ```; everything when nothing is fenced, or the second fence is missing."""
    fenced = re.fullmatch(r"\s*```[^\n]*\n(.*?)(```.*)?", text, re.DOTALL)
    return fenced[1] if fenced else text


def latex(text: str) -> list[str]:
    r"""The tokens of a formula: commands and single characters.

    Delimiters ($, \[, \(), spaces, \left, \right, fonts and the like go; synonyms (\le, \leq) become one; a pmatrix
    is an array in parentheses, whose column types go; braces around a single token go, so that x^{2} equals x^2;
    a \tag goes, and so does a final full stop or comma.
    """
    text = unfenced(unicodedata.normalize("NFKC", text)).strip()
    for pattern, replacement in LATEX_REWRITES:
        text = re.sub(pattern, replacement, text)
    dropped = LATEX_SPACES | LATEX_STYLE | {r"\[", r"\]", r"\(", r"\)", "$"}
    tokens = [LATEX_SAME.get(token, token) for token in LATEX_TOKEN.findall(text) if token not in dropped]
    while tokens and tokens[-1] in (".", ","):
        tokens.pop()
    return without_single_braces(tokens)


def without_single_braces(tokens: list[str]) -> list[str]:
    """``{`` x ``}`` becomes x, and so on from the inside."""
    kept: list[str] = []
    for token in tokens:
        if token == "}" and len(kept) > 1 and kept[-2] == "{" and kept[-1] not in "{}":
            kept[-2:] = kept[-1:]
        else:
            kept.append(token)
    return kept


def formula_distance(truth: str, reading: str) -> float:
    """Normalised edit distance of two formulas in LaTeX tokens, from 0 (equal) to 1."""
    a, b = latex(truth), latex(reading)
    return distance(a, b) / max(len(a), len(b)) if a or b else 0.0


def table(text: str) -> str | None:
    """The first table in a reading as plain HTML of tr and td with their spans; None without one.

    Head cells become td, row groups, attributes and line breaks go, the cells' texts are ``plain``.
    """
    if not (found := re.search(r"<table\b.*?(</table>|$)", text, re.DOTALL | re.IGNORECASE)):
        return None
    rows = []
    for row in re.split(r"<tr\b[^>]*>", found[0], flags=re.IGNORECASE)[1:]:
        cells = re.findall(r"<t[dh]\b([^>]*)>(.*?)(?=<t[dh]\b|</t[dhr]>|</table>|$)", row, re.DOTALL | re.IGNORECASE)
        rows.append("".join(f"<td{spans(attributes)}>{cell_text(content)}</td>" for attributes, content in cells))
    return "<html><body><table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></body></html>"


def spans(attributes: str) -> str:
    """The row and column spans of a cell that are not 1."""
    found = re.findall(r"\b(rowspan|colspan)\s*=\s*[\"']?\s*(\d{1,4})", attributes, re.IGNORECASE)
    return "".join(f' {name.lower()}="{int(count)}"' for name, count in sorted(found) if int(count) > 1)


def cell_text(content: str) -> str:
    """A cell's text without markup, escaped again."""
    return html.escape(plain(html.unescape(re.sub(r"<[^>]*>", " ", content))), quote=False)


def teds(truth: str, reading: str, *, structure_only: bool = False) -> float:
    """Tree edit distance similarity of two HTML tables, from 0 to 1 (equal); ``structure_only`` ignores the texts."""
    expected, found = table(truth), table(reading)
    if expected is None or found is None:
        return 0.0
    try:
        return max(0.0, float(TEDS(structure_only=structure_only)(found, expected)))
    except (LxmlError, ValueError):  # a reading that is no HTML after all
        return 0.0


def loop(reading: str, truth: str) -> Loop | None:
    """The repetition in which a reading ends, None when it does not, or when the truth ends in as much of it.

    A loop is an end of at least ``LOOP_CHARACTERS`` characters that repeats one unit at least ``LOOP_REPEATS`` times
    (the last one may be cut off), and is at least twice as long as the truth's own repetitive end.
    """
    found, own = repeated_end(reading), repeated_end(truth)
    if found is None or found.characters < LOOP_CHARACTERS or (own and found.characters < 2 * own.characters):
        return None
    return found


def repeated_end(text: str) -> Loop | None:
    """The longest end of a text that repeats a unit at least ``LOOP_REPEATS`` times, white space counted as one.

    By the Z function (Gusfield 1997) of the reversed text: with Z the length for which it agrees with itself moved by
    p characters, the last p + Z characters have the period p.
    """
    text = " ".join(text.split())
    best: Loop | None = None
    for period, agreement in enumerate(z_function(text[::-1])):
        length = period + agreement
        if period and length >= LOOP_REPEATS * period and (best is None or length > best.characters):
            best = Loop(text[-period:], length // period, length)
    return best


def z_function(text: str) -> list[int]:
    """For each place, how many characters from there on equal the text's beginning; 0 for the first."""
    lengths, left, right = [0] * len(text), 0, 0
    for place in range(1, len(text)):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < len(text) and text[length] == text[place + length]:
            length += 1
        lengths[place] = length
        if place + length > right:
            left, right = place, place + length
    return lengths
