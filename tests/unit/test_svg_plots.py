"""svg_plots.py: what is drawn lies where its value says, and nothing that was not measured is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise

import pytest

from svg_plots import WIDTH, Bar, Point, Row, Series, bars, clipped, linear_scale, lines, log_scale, ranges, short

SVG = "{http://www.w3.org/2000/svg}"


def series(*values: float | None, start: float = 1.0) -> list[Series]:
    return [Series("one", [Point(start * 2**index, y, f"point {y}") for index, y in enumerate(values)])]


def marks(svg: str) -> list[tuple[float, float]]:
    """The middles of the marks that have a title: those of values, not of the legend."""
    found = []
    for polygon in ElementTree.fromstring(svg).iter(f"{SVG}polygon"):
        if polygon.find(f"{SVG}title") is not None:
            pairs = [tuple(map(float, pair.split(","))) for pair in polygon.attrib["points"].split()]
            found.append((sum(x for x, _ in pairs) / len(pairs), sum(y for _, y in pairs) / len(pairs)))
    return found


def plot(values: list[Series], **more: object) -> str:
    return lines("A plot", values, x_label="x", y_label="ms", **more)  # type: ignore[arg-type]


def test_marks_lie_in_order_and_inside() -> None:
    svg = plot(series(10, 20, 40, 30))
    places = marks(svg)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    steps = [right[0] - left[0] for left, right in pairwise(places)]
    assert max(steps) - min(steps) < 0.3, "powers of two are evenly spaced"
    y = [place[1] for place in places]
    assert y[2] < y[3] < y[1] < y[0], "upwards"
    assert (y[0] - y[1]) * 2 == pytest.approx(y[1] - y[2], abs=0.5), "in proportion"
    height = float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3])
    assert all(0 < x < WIDTH and 0 < place_y < height for x, place_y in places)


def test_a_gap_is_no_zero() -> None:
    svg = plot(series(10, None, 20, 30))
    assert len(marks(svg)) == 3
    assert [line.count(",") for line in re.findall(r'<polyline points="([^"]*)"', svg)] == [2], "no line over the gap"


def test_zero_is_a_gap_on_a_log_scale() -> None:
    assert len(marks(plot(series(10, 0, 20), y_log=True))) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "draw",
    [
        lambda bad: plot(series(1, bad)),
        lambda bad: plot(series(1, bad), y_log=True),
        lambda bad: plot(series(1, 2), limit=(bad, "limit")),
        lambda bad: plot(series(1, 2), mark_at=(bad, "here")),
        lambda bad: ranges("R", [Row("row", {"p50": bad})], unit="ms"),
        lambda bad: bars("B", [Bar("row", bad)], unit="ms"),
        lambda bad: bars("B", [Bar("row", 1.0, bad)], unit="ms"),
    ],
)
def test_nan_and_infinity_are_refused(draw: Callable[[float], str], bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        draw(bad)


def test_a_place_off_the_log_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        plot([Series("one", [Point(0.0, 1.0, "")])])


@pytest.mark.parametrize("values", [(), (None,), (0.0,), (5.0,), (1e-9, 1e9)])
@pytest.mark.parametrize("y_log", [False, True])
def test_few_and_strange_values_are_drawn(values: tuple[float | None, ...], y_log: bool) -> None:
    ElementTree.fromstring(plot(series(*values), y_log=y_log))
    ElementTree.fromstring(plot(series(*values), y_log=y_log, x_names=["a"] * len(values)))
    ElementTree.fromstring(ranges("R", [Row("row", {"p50": value}) for value in values], unit="ms", log=y_log))
    ElementTree.fromstring(bars("B", [Bar("row", value, 2.0) for value in values], unit="ms"))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars("B", [Bar("a", 10.0), Bar("b", 20.0, 15.0), Bar("c", None), Bar("d", 500.0)], unit="ms", top=40.0)
    root = ElementTree.fromstring(svg)
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.2), "cut at the top"
    assert svg.count("»") == 1
    kinds = [bar.attrib["class"] for bar in root.iter(f"{SVG}rect")]
    assert kinds == ["bar s0", "bar s1", "bar s0"], "over its limit it has another colour"


def test_ranges_mark_what_was_measured() -> None:
    figures: dict[str, float | None] = {"p50": 10.0, "p99": None, "max": 30.0}
    svg = ranges("R", [Row("n = 5", figures)], unit="ms")
    assert len(marks(svg)) == 2
    assert "<title>n = 5: max 30 ms</title>" in svg


def test_texts_are_escaped() -> None:
    bad = '</svg><script>"&'
    points = [Series(bad, [Point(0, 1.0, bad)])]
    for svg in (
        lines(bad, points, x_label=bad, y_label=bad, x_names=[bad], mark_at=(0.0, bad), limit=(1.0, bad)),
        ranges(bad, [Row(bad, {bad: 1.0})], unit=bad),
        bars(bad, [Bar(bad, 1.0)], unit=bad),
    ):
        assert "<script" not in svg
        assert ElementTree.fromstring(svg).attrib["aria-label"] == bad


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (0.0123, "0.0123"), (2.5, "2.5"), (999.6, "1000"), (1e-5, "1e-5"), (2.5e7, "2.5e7")],
)
def test_numbers_for_a_person(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("top", [0.0, 0.003, 1.0, 7.3, 99.9, 100.0, 12345.0])
def test_scales_hold_their_values(top: float) -> None:
    scale, ticks = linear_scale([top], 100.0, 0.0)
    assert scale.low == 0
    assert top <= ticks[-1] == scale.high
    assert len(ticks) <= 6
    assert 0 <= scale(top) <= 100
    logarithmic, _ = log_scale([top], 100.0, 0.0)
    assert top == 0 or 0 <= logarithmic(top) <= 100


def test_wide_texts_are_clipped() -> None:
    assert clipped("short", 100) == "short"
    assert clipped("字" * 40, 110) == "字" * 9 + "…"
