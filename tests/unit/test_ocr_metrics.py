"""ocr_metrics.py: values computed by hand, and the repetitions that GLM-OCR is known for."""

from __future__ import annotations

import random

import pytest
from rapidfuzz.distance.Levenshtein import distance

import eval_ocr
import ocr_metrics
import ocr_texts
import text_metrics
from ocr_metrics import details, error, latex, loop, plain, program, repeated_end, table, teds


def test_the_fast_distance_is_the_plain_one() -> None:
    rng = random.Random(1)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc文", k=rng.randint(0, 12))) for _ in range(2))
        assert distance(a, b) == text_metrics.edit_distance(a, b)


@pytest.mark.parametrize("kind", eval_ocr.KINDS)
def test_every_kind_has_an_error(kind: str) -> None:
    truth = "<table><tr><td>a</td></tr></table>" if kind == "table" else "abc"
    assert error(kind, [truth], [truth]) == 0
    assert error(kind, [truth], [""]) == 1
    assert error(kind, [], []) is None
    assert ocr_metrics.NAMES[kind]


def test_character_errors_are_pooled_and_table_and_formula_errors_averaged() -> None:
    assert error("document", ["a", "bbbbbbbbb"], ["x", "bbbbbbbbb"]) == pytest.approx(0.1)
    assert error("formula", ["a", "bbbbbbbbb"], ["x", "bbbbbbbbb"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("reading", "normal"),
    [
        ("  a\n\nb ", "a b"),
        ("（甲）， 乙", "(甲),乙"),
        ("第 12 号\n文件。 完", "第12号文件。完"),
        ("\u201cIt\u2019s\u201d \u2013 so", '"It\'s" - so'),
        ("# Title\n**bold** text", "Title bold text"),
        ("3 # 4 * 5", "3 # 4 * 5"),
    ],
)
def test_plain(reading: str, normal: str) -> None:
    assert plain(reading) == normal


def test_program_keeps_relative_indentation() -> None:
    expected = "if a:\n    b()"
    assert program("```python\n\nif a:\n\n\tb()  \n```") == expected
    assert program("  if a:\n      b()\n") == expected
    assert program("if a:\nb()") != expected
    assert error("code", [expected], ["if a:\nb()"]) == pytest.approx(4 / len(expected))
    assert details("code", expected, "if a:\nb()") == {"cer_without_indentation": 0}


@pytest.mark.parametrize(
    "written",
    [
        r"\sum_{i=1}^{n} x_i",
        r"$$" + "\n" + r"\sum_ {i = 1} ^ {n} x _ {i}." + "\n$$",
        r"\[ \sum\limits_{i=1}^{n}\,x_{i} \]",
        r"\begin{equation}\sum_{i=1}^n x_i \tag{3}\end{equation}",
    ],
)
def test_one_formula_written_in_many_ways(written: str) -> None:
    assert latex(written) == [r"\sum", "_", "{", "i", "=", "1", "}", "^", "n", "x", "_", "i"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"a \le b", r"a \leq b"),
        (r"f'(x)", r"f ^ {\prime} (x)"),
        (r"\operatorname {s g n} x", r"\sgn x"),
        (r"f(x) dx", r"f (x) \mathrm {d} x"),
        (r"\begin{pmatrix} a & b \end{pmatrix}", r"\left( \begin{array}{c c} a & b \end{array} \right)"),
        (r"P(A \mid B)", r"P (A | B)"),
    ],
)
def test_formulas_that_mean_the_same(one: str, other: str) -> None:
    assert latex(one) == latex(other)


def test_formulas_that_do_not() -> None:
    assert ocr_metrics.formula_distance("x^2", "x^3") == pytest.approx(1 / 3)
    assert ocr_metrics.formula_distance(r"\frac{a}{b}", r"\frac{b}{a}") == pytest.approx(2 / 3)
    assert ocr_metrics.formula_distance(r"x_{12}", "x_1 2") > 0
    everything = [tuple(latex(formula)) for formula in ocr_texts.FORMULAS]
    assert len(set(everything)) == len(everything), "normalising keeps the formulas apart"


TABLE = '<table><tr><td rowspan="2">A</td><td>B</td></tr><tr><td>1</td></tr></table>'


def test_table_keeps_structure_and_text_only() -> None:
    written = (
        '```html\n<table border="1" class=x><thead><tr><th rowspan=2 id=a>A</th><th colspan="1"> B</th></tr></thead>'
        "<tbody><tr><td>1</td></tr></tbody></table>\n``` and more"
    )
    assert table(written) == f"<html><body>{TABLE}</body></html>"
    assert table("<table><tr><td>a &lt; b<br>c<td>d") == (
        "<html><body><table><tr><td>a &lt; b c</td><td>d</td></tr></table></body></html>"
    )
    assert table("| a | b |") is None


def test_teds() -> None:
    assert teds(TABLE, TABLE) == 1
    # table, 2 rows, 3 cells: 6 nodes; one text wrong, one span wrong, one cell missing.
    assert teds(TABLE, TABLE.replace("B", "C")) == pytest.approx(5 / 6)
    assert teds(TABLE, TABLE.replace("B", "C"), structure_only=True) == 1
    assert teds(TABLE, TABLE.replace(' rowspan="2"', "")) == pytest.approx(5 / 6)
    assert teds(TABLE, TABLE.replace("<td>1</td>", "")) == pytest.approx(5 / 6)
    assert details("table", TABLE, TABLE.replace("B", "C")) == {"teds": pytest.approx(5 / 6), "teds_structure": 1}


@pytest.mark.parametrize("reading", ["", "no table", "<table>", "<table></table>", "<table><tr><td", "\x00<table>\x00"])
def test_teds_of_no_table_is_low_and_no_error(reading: str) -> None:
    assert teds(TABLE, reading) < 0.34  # at most the table and one row


# The ends that users of GLM-OCR report: a sentence, a block of lines, table rows, one character, cut off anywhere.
LOOPS = {
    "sentence": "I hope you have a great day. " + "Enjoy your birthday, my friend!\n" * 12 + "Enjoy yo",
    "lines": "INTRO\n" + "COME\nTHIS FAR\nYOU DID NOT\nGO FAR TO ONLY\n" * 6 + "COME\nTHI",
    "rows": "<table>" + "<tr><td>Benzene</td><td>71</td></tr><tr><td>Toluene</td><td>92</td></tr>" * 3 + "<tr><td>Ben",
    "character": "合计 0" + "0" * 200,
    "latex": r"\frac{a}{b}" + r"\quad " * 40,
    "fences": "text\n" + "```\n" * 30,
}


@pytest.mark.parametrize("reading", LOOPS.values(), ids=LOOPS)
def test_loops_are_found(reading: str) -> None:
    found = loop(reading, "something else")
    assert found is not None
    assert found.repeats >= 3
    assert found.unit * 2 in " ".join(reading.split())


def test_a_loop_is_named_by_its_shortest_unit() -> None:
    assert repeated_end("x" + "ab" * 40) == ("ab", 40, 80)
    assert repeated_end("abcabcab") is None
    assert repeated_end("abcabcabc") == ("abc", 3, 9)
    assert repeated_end("") is None


def test_what_the_page_repeats_is_no_loop() -> None:
    dotted = "Contents" + "." * 80
    assert loop(dotted, "something else") is not None
    assert loop(dotted, dotted) is None
    assert loop(dotted + "." * 100, dotted) is not None
    rows = "<table>" + "<tr><td>0</td></tr>" * 9 + "</table>"
    assert loop(rows, "") is None, "it comes to an end"
    for language in ("en", "zh"):
        assert loop(" ".join(ocr_texts.SENTENCES[language]), "") is None
    for text in ocr_texts.PROGRAMS:
        assert loop(text, "") is None


def test_a_confusion_needs_several_places_and_nearly_all_of_them() -> None:
    def found(truth: str, reading: str) -> list[tuple[str, str, int, int]]:
        return [(*entry,) for entry in ocr_metrics.confusions([("line", truth, reading)])]

    assert found("A1 B1 C1", "A7 B7 C7") == [("1", "7", 3, 3)]
    assert found("80 08 80", "08 80 08") == [("0", "8", 3, 3), ("8", "0", 3, 3)], "neighbours that change places"
    assert found("A1 B1", "A7 B7") == [], "twice may be chance"
    assert found("A1 B1 C1", "A7 B7 C1") == [], "two of three"
    assert found("A1 B1 C1", "A7 B4 C2") == [], "not as the same one"
    assert found("A- B- C-", "A. B. C.") == [], "neither letter nor digit"
    assert found("A1 B1 C1", "A B C") == [], "left out, not confused"
