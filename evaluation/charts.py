"""Charts of a report as inline SVG. Colours are those of the page's style sheet, light or dark.

Owns geometry alone; shares are 0 to 1 and all axes go from 0 to 100 per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.shown_text import in_html

WHISKER_ERRORS = 1.96  # standard errors to either side: 95 %
ROW, BAR, TOP, BOTTOM = 27, 15, 6, 24  # heights
VALUE_WIDTH = 54
PANEL_WIDTH, PANEL_HEIGHT = 300, 190
LEFT, RIGHT, ABOVE, BELOW = 34, 12, 10, 38  # margins of a panel
MAX_TICKS = 8


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a bar chart."""

    label: str
    value: float
    error: float | None = None
    chance: float | None = None
    marks: Mapping[str, float] = field(default_factory=dict)  # by a class of the style sheet


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a line chart."""

    x: float
    value: float
    error: float | None
    title: str  # shown on pointing at it


def bar_chart(bars: Sequence[Bar], *, width: int = 640, label_width: int = 130) -> str:
    """Horizontal bars with whiskers; a dashed line is chance, marks are figures of others."""
    plot = width - label_width - VALUE_WIDTH
    height = TOP + ROW * len(bars) + BOTTOM
    parts = [_opening(width, height)]
    for percent in range(0, 101, 25):
        x = label_width + plot * percent / 100
        parts.append(_line("grid", (x, TOP), (x, TOP + ROW * len(bars))))
        parts.append(_text("tick", (x, height - 6), str(percent), anchor="middle"))
    for index, bar in enumerate(bars):
        parts += _bar(bar, TOP + ROW * index + ROW / 2, label_width, plot)
    return "".join((*parts, "</svg>"))


def _bar(bar: Bar, middle: float, left: float, plot: float) -> list[str]:
    def x_of(value: float) -> float:
        return left + plot * min(max(value, 0.0), 1.0)

    top = middle - BAR / 2
    parts = [
        _text("label", (left - 9, middle + 4), _fitting(bar.label, left), anchor="end"),
        f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" rx="2" height="{BAR}" '
        f'width="{max(x_of(bar.value) - left, 1.0):.1f}"/>',
    ]
    if bar.chance is not None:
        x = x_of(bar.chance)
        parts.append(_line("chance", (x, top - 4), (x, top + BAR + 4)))
    if bar.error is not None:
        low, high = (x_of(bar.value + side * WHISKER_ERRORS * bar.error) for side in (-1, 1))
        parts.append(_line("whisker", (low, middle), (high, middle)))
        parts += [_line("whisker", (x, middle - 3.5), (x, middle + 3.5)) for x in (low, high)]
    for name, value in bar.marks.items():
        x = x_of(value)
        shape = f"M{x:.1f} {middle - 6} l5.5 6 l-5.5 6 l-5.5 -6 z"
        title = f"<title>{name} {100 * value:.1f}</title>"
        parts.append(f'<path class="mark {name}" d="{shape}">{title}</path>')
    parts.append(_text("value", (left + plot + 10, middle + 4), f"{100 * bar.value:.1f}"))
    return parts


def line_chart(points: Sequence[Point], *, x_label: str) -> str:
    """One line with whiskers over whole numbers."""
    plot_width, plot_height = PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - ABOVE - BELOW
    low, high = min(point.x for point in points), max(point.x for point in points)
    span = max(high - low, 1)

    def place(x: float, value: float) -> tuple[float, float]:
        inset = 10 + (plot_width - 20) * ((x - low) / span if high > low else 0.5)
        return LEFT + inset, ABOVE + plot_height * (1 - min(max(value, 0.0), 1.0))

    parts = [_opening(PANEL_WIDTH, PANEL_HEIGHT)]
    for percent in (0, 50, 100):
        y = place(low, percent / 100)[1]
        parts.append(_line("grid", (LEFT, y), (PANEL_WIDTH - RIGHT, y)))
        parts.append(_text("tick", (LEFT - 6, y + 4), str(percent), anchor="end"))
    for x in _ticks(points):
        at = place(x, 0)[0]
        parts.append(_text("tick", (at, ABOVE + plot_height + 15), f"{x:g}", anchor="middle"))
    middle = LEFT + plot_width / 2
    parts.append(_text("tick", (middle, PANEL_HEIGHT - 7), x_label, anchor="middle"))
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(p.x, p.value) for p in points))
    parts.append(f'<polyline class="curve" points="{steps}"/>')
    for point in points:
        x, y = place(point.x, point.value)
        if point.error:
            ends = [
                place(point.x, point.value + side * WHISKER_ERRORS * point.error)
                for side in (-1, 1)
            ]
            parts.append(_line("whisker", ends[0], ends[1]))
        title = f"<title>{in_html(point.title)}</title>"
        parts.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>')
    return "".join((*parts, "</svg>"))


def _ticks(points: Sequence[Point]) -> list[float]:
    values = sorted({point.x for point in points})
    return values[:: max(1, math.ceil(len(values) / MAX_TICKS))]


def _fitting(label: str, width: float) -> str:
    characters = int((width - 12) / 6.4)
    return label if len(label) <= characters else f"{label[: characters - 1]}…"


def _opening(width: int, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _line(name: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(name: str, at: tuple[float, float], text: str, *, anchor: str = "start") -> str:
    x, y = at
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{in_html(text)}</text>"
    )
