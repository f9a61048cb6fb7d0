"""A few simple plots as inline SVG, for the report.

Drawn here and not by matplotlib: the controller needs nothing installed for it, which matters where there is no
network; a page of twelve plots is about 60 kB instead of 400; the colours are the page's own classes, so that one
drawing serves the light and the dark page; and every mark can carry its value, unit and n as a title.

All functions are pure and return one ``<svg>`` element.  Texts are escaped; a NaN or an infinity raises ``ValueError``,
because it is no measurement; None is a gap.  The drawing is 360 units wide with 11 unit text, so that it can be read on
a phone at its own size.  Series differ by colour (Okabe and Ito 2008), by shape of the mark and by dashes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
LEFT, RIGHT = 46.0, 10.0
PLOT_HEIGHT = 150.0
LINE = 16.0  # height of a line of text
ROW = 38.0  # height of a row of ``ranges`` and ``bars``: a line of text and the drawing under it
CROWDED = 20  # more marks than that are small
DASHES = ("", "5 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Point:
    """A place on a plot; ``y`` None was not measured; ``title`` is what a pointer or a reader is told."""

    x: float
    y: float | None
    title: str


@dataclass(frozen=True)
class Series:
    """Points joined in order, with one mark."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Row:
    """A row of ``ranges``: figures of one distribution by the name of their mark, ``label`` tells its n."""

    label: str
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Bar:
    """A row of ``bars``: the label tells value, unit and n; ``limit`` is drawn as a line."""

    label: str
    value: float | None
    limit: float | None = None


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on the units from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def checked(values: Iterable[float | None]) -> list[float]:
    """The measured values.  Raises ``ValueError`` for NaN and infinity."""
    found = [value for value in values if value is not None]
    if not all(map(math.isfinite, found)):
        raise ValueError("a plot of NaN or infinity; what was not measured is null")
    return found


def short(value: float) -> str:
    """A number for a person: three significant digits, no exponent between 0.001 and a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def linear_scale(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """From 0, so that lengths compare, to the first tick over the largest value; at most six ticks."""
    top = max([*values, 0.0]) or 1.0
    rough = top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    count = math.ceil(top / step - 1e-9)
    return Scale(0.0, count * step, start, end), [index * step for index in range(count + 1)]


def log_scale(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """From decade to decade around the positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    step = max(1, math.ceil((high - low) / 6))
    return Scale(10.0**low, 10.0**high, start, end, True), [10.0**power for power in range(low, high + 1, step)]


def text_width(text: str) -> float:
    """About how wide a text is at 11 units."""
    return sum(11.0 if unicodedata.east_asian_width(character) in "WF" else 6.0 for character in text)


def clipped(text: str, width: float) -> str:
    """The text, or its beginning and an ellipsis where it is too wide."""
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 11:
        text = text[:-1]
    return text + "…"


def label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "lab") -> str:
    """A text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def mark(index: int, x: float, y: float, title: str = "", size: float = 4.0) -> str:
    """A mark of its own shape for each of six series."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    kind = f'class="mark s{index % 6}"'
    shapes = (
        [(-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7), (1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7)],  # round
        [(-1, 0.9), (0, -1), (1, 0.9)],  # triangle
        [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],  # square
        [(-1.2, 0), (0, -1.2), (1.2, 0), (0, 1.2)],  # diamond
        [(-0.3, -1.6), (0.3, -1.6), (0.3, 1.6), (-0.3, 1.6)],  # bar
        [(-1, -0.9), (1, -0.9), (0, 1)],  # triangle, downwards
    )
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shapes[index % 6])
    return f'<polygon points="{points}" {kind}>{inside}</polygon>'


def legend(labels: Sequence[str], top: float) -> tuple[list[str], float]:
    """The marks and their names in as many lines as they need, and where the last one ends."""
    parts, x, y = [], 4.0, top
    for index, name in enumerate(clipped(text, WIDTH - 30) for text in labels):
        width = 22 + text_width(name)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + LINE
        parts += [mark(index, x + 5, y + 8), label(x + 13, y + 12, name)]
        x += width
    return parts, y + LINE + 4


def drawing(parts: Iterable[str], height: float, description: str) -> str:
    """The element around the parts; its description is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(description)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def lines(
    description: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_log: bool = False,
    x_names: Sequence[str] | None = None,
    mark_at: tuple[float, str] | None = None,
    limit: tuple[float, str] | None = None,
) -> str:
    """Series over x.  Without ``x_names`` x is on a scale of powers of two; with them the points' x counts names.

    ``mark_at`` draws an upright line with its text, ``limit`` a level one.  On a log scale a 0 cannot be drawn: it is a
    gap, which the caller has to say.  Raises ``ValueError`` for NaN and infinity, and for an x that is not positive on
    its log scale.
    """
    ys = checked([*(point.y for one in series for point in one.points), limit and limit[0]])
    xs = checked(point.x for one in series for point in one.points)
    parts, top = legend([one.label for one in series], 0.0)
    parts.append(label(4, top + 11, y_label, kind="lab unit"))
    top += LINE + 6
    bottom = top + PLOT_HEIGHT
    y_scale, y_ticks = (log_scale if y_log else linear_scale)(ys, bottom, top)
    for tick in y_ticks:
        parts += [
            line(LEFT, y_scale(tick), WIDTH - RIGHT, y_scale(tick), "grid"),
            label(LEFT - 5, y_scale(tick) + 4, short(tick), anchor="end"),
        ]
    if x_names is None:
        if any(x <= 0 for x in xs):
            raise ValueError("x must be positive on its log scale")
        ticks = sorted(set(xs)) or [1.0]
        x_scale = Scale(min(ticks), max(ticks) if len(ticks) > 1 else 2 * ticks[0], LEFT + 10, WIDTH - RIGHT - 10, True)
        names = [(tick, short(tick)) for tick in ticks]
    else:
        x_scale = Scale(0, max(len(x_names) - 1, 1), LEFT + 10, WIDTH - RIGHT - 10)
        names = list(enumerate(x_names))
    parts.append(line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    parts += tick_names([(x_scale(value), name) for value, name in names], bottom)
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, bottom + 30, x_label, anchor="middle", kind="lab unit"))
    if mark_at is not None:
        x = x_scale(checked([mark_at[0]])[0])
        anchor = "end" if x > WIDTH / 2 else "start"
        parts += [
            line(x, top, x, bottom, "note"),
            label(x + (-5 if anchor == "end" else 5), bottom - 8, mark_at[1], anchor=anchor),
        ]
    if limit is not None:
        y = y_scale(limit[0])
        parts += [line(LEFT, y, WIDTH - RIGHT, y, "limit"), label(LEFT + 4, y - 4, limit[1])]
    size = 4.0 if all(len(one.points) <= CROWDED for one in series) else 2.6
    for index, one in reversed(list(enumerate(series))):  # the first is the one to see
        shown = [
            None if point.y is None or (y_log and point.y <= 0) else (x_scale(point.x), y_scale(point.y))
            for point in one.points
        ]
        parts += [
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}" class="line s{index % 6}" '
            f'stroke-dasharray="{DASHES[index % 4]}"/>'
            for run in runs(shown)
        ]
        parts += [
            mark(index, *place, point.title, size)
            for place, point in zip(shown, one.points, strict=True)
            if place is not None
        ]
    return drawing(parts, bottom + 38, description)


def tick_names(names: Sequence[tuple[float, str]], bottom: float) -> list[str]:
    """The names under an axis, as many as there is room for; the last one always."""
    parts: list[str] = []
    free = math.inf
    for x, name in reversed(names):
        half = text_width(name) / 2
        x_text = min(max(x, half), WIDTH - half)
        if x_text + half + 4 <= free:
            parts += [line(x, bottom, x, bottom + 3, "axis"), label(x_text, bottom + 15, name, anchor="middle")]
            free = x_text - half
    return parts


def runs(places: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """What lies between gaps, where it is at least two places long."""
    found: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            found.append([])
        else:
            found[-1].append(place)
    return [run for run in found if len(run) > 1]


def ranges(description: str, rows: Sequence[Row], *, unit: str, log: bool = False) -> str:
    """A distribution a row: a line from its least to its largest figure, and a mark for each.

    Raises ``ValueError`` for NaN and infinity.
    """
    values = checked(value for row in rows for value in row.figures.values())
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    parts, top = legend(names, 0.0)
    bottom = top + ROW * len(rows) + 2
    scale, ticks = (log_scale if log else linear_scale)(values, 10.0, WIDTH - 18)
    parts += [line(scale(tick), top, scale(tick), bottom, "grid") for tick in ticks]
    for index, row in enumerate(rows):
        y = top + ROW * index
        parts.append(label(4, y + 12, clipped(row.label, WIDTH - 8)))
        places = {
            name: scale(value) for name, value in row.figures.items() if value is not None and not (log and value <= 0)
        }
        if places:
            parts.append(line(min(places.values()), y + 25, max(places.values()), y + 25, "range"))
        parts += [
            mark(names.index(name), x, y + 25, f"{row.label}: {name} {short(row.figures[name] or 0)} {unit}")
            for name, x in places.items()
        ]
    parts.append(line(10, bottom, WIDTH - 18, bottom, "axis"))
    parts += tick_names([(scale(tick), short(tick)) for tick in ticks], bottom)
    parts.append(label(WIDTH / 2, bottom + 30, unit, anchor="middle", kind="lab unit"))
    return drawing(parts, bottom + 38, description)


def bars(description: str, rows: Sequence[Bar], *, unit: str, top: float | None = None) -> str:
    """A bar a row, its text above it, its limit as a line across; a bar beyond ``top`` is cut and marked.

    Raises ``ValueError`` for NaN and infinity.
    """
    values = checked(value for row in rows for value in (row.value, row.limit))
    bottom = ROW * len(rows) + 2
    scale, ticks = linear_scale(values if top is None else [top], 10.0, WIDTH - 18)
    parts = [line(scale(tick), 0, scale(tick), bottom, "grid") for tick in ticks]
    for index, row in enumerate(rows):
        y = ROW * index
        over = row.value is not None and row.limit is not None and row.value > row.limit
        parts.append(label(4, y + 12, clipped(row.label, WIDTH - 8)))
        if row.value is not None:
            width = max(scale(min(row.value, scale.high)) - 10, 1.0)
            kind = "bar s1" if over else "bar s0"
            parts.append(
                f'<rect x="10" y="{y + 18:.1f}" width="{width:.1f}" height="13" class="{kind}">'
                f"<title>{escape(row.label)}</title></rect>"
            )
            if row.value > scale.high:
                parts.append(label(WIDTH - 16, y + 29, "»"))
        if row.limit is not None and row.limit <= scale.high:
            parts.append(line(scale(row.limit), y + 15, scale(row.limit), y + 34, "limit"))
    parts.append(line(10, bottom, WIDTH - 18, bottom, "axis"))
    parts += tick_names([(scale(tick), short(tick)) for tick in ticks], bottom)
    parts.append(label(WIDTH / 2, bottom + 30, unit, anchor="middle", kind="lab unit"))
    return drawing(parts, bottom + 38, description)
