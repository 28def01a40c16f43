"""Charts as SVG text: lines, and points with intervals. Colours come from the page's style sheet, light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 18.0, 12.0, 34.0
_LEAST_RANGE = 0.05
"""Smallest range of an interval chart: differences below it should look small."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend and the tooltip.
        style: CSS class, such as "series-1".
        points: (x, y), in order of x.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One mean with its interval.

    Attributes:
        name: for the tooltip.
        style: CSS class.
        mean, low, high: low and high may be None.
    """

    name: str
    style: str
    mean: float
    low: float | None
    high: float | None


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    label: str,
    width: int = 420,
    height: int = 210,
    y_range: tuple[float, float] | None = None,
    whole_x: bool = False,
) -> str:
    """Lines over a common x; an empty string if no line has a point.

    Args:
        lines: drawn in order.
        x_label: under the axis.
        label: what the chart shows, for screen readers.
        y_range: range of y; None: what the points need.
        whole_x: x counts something, so ticks are whole numbers.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_ticks = ticks(*(y_range or (min(ys), max(ys))))
    x_ticks = [tick for tick in ticks(min(xs), max(xs)) if not whole_x or tick == round(tick)]
    x_of = scale(min(xs), max(xs), _LEFT, width - _RIGHT)
    y_of = scale(y_ticks[0], y_ticks[-1], height - _BOTTOM, _TOP)
    parts = [_grid_line(y_of(tick), width, f"{tick:g}") for tick in y_ticks]
    for tick in x_ticks:
        if min(xs) <= tick <= max(xs):
            parts.append(f'<text x="{x_of(tick):.1f}" y="{height - _BOTTOM + 15}" class="tick mid">{tick:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + width - _RIGHT) / 2:.1f}" y="{height - 4}" class="tick mid">{escape(x_label)}</text>'
    )
    for line in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline points="{path}" class="line {line.style}"><title>{escape(line.name)}</title></polyline>'
        )
    return svg(parts, width, height, label)


def interval_chart(
    groups: Sequence[tuple[str, Sequence[Point]]],
    *,
    label: str,
    x_label: str,
    width: int = 400,
    left: float = 60.0,
    x_range: tuple[float, float] | None = None,
    natural: bool = False,
) -> str:
    """Horizontal means with their intervals, grouped by row names.

    Args:
        groups: (row name, its points from top to bottom).
        label: what the chart shows, for screen readers.
        x_label: under the axis.
        left: room for the row names.
        x_range: range of x; None: what the points need.
        natural: never wider than `width` pixels, so that letters keep their size.
    """
    values = [v for _, points in groups for p in points for v in (p.mean, p.low, p.high) if v is not None]
    if not values:
        return ""
    step, gap = 17, 11
    height = int(_TOP + sum(step * len(points) + gap for _, points in groups) + _BOTTOM)
    centre, half = (min(values) + max(values)) / 2, max(max(values) - min(values), _LEAST_RANGE) / 2
    x_ticks = ticks(*(x_range or (centre - half, centre + half)))
    x_of = scale(x_ticks[0], x_ticks[-1], left, width - _RIGHT)
    parts = []
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 15}" class="tick mid">{tick:g}</text>')
    parts.append(f'<text x="{(left + width) / 2:.1f}" y="{height - 4}" class="tick mid">{escape(x_label)}</text>')
    y = _TOP + gap / 2
    for name, points in groups:
        middle = y + step * len(points) / 2
        parts.append(f'<text x="{left - 12}" y="{middle + 4:.1f}" class="row end">{escape(name)}</text>')
        for point in points:
            parts.append(_interval(point, x_of, y + step / 2))
            y += step
        y += gap
    return svg(parts, width, height, label, natural=natural)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], from at or below `low` to at or above `high`."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _interval(point: Point, x_of: Callable[[float], float], y: float) -> str:
    text = f"{point.name}: {point.mean:.3f}"
    bar = ""
    if point.low is not None and point.high is not None:
        text += f" [{point.low:.3f}, {point.high:.3f}]"
        bar = f'<line x1="{x_of(point.low):.1f}" x2="{x_of(point.high):.1f}" y1="{y}" y2="{y}" class="line {point.style}"/>'
    dot = f'<circle cx="{x_of(point.mean):.1f}" cy="{y}" r="5" class="dot {point.style}"/>'
    return f"<g>{bar}{dot}<title>{escape(text)}</title></g>"


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Linear map from [low, high] to [start, end]."""
    factor = (end - start) / (high - low) if high > low else 0.0
    return lambda value: start + (value - low) * factor


def _grid_line(y: float, width: int, text: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="tick end">{text}</text>'
    )


def svg(
    parts: Sequence[str], width: int, height: int, label: str, *, description: str = "", natural: bool = False
) -> str:
    """A picture of its parts.

    Args:
        parts: SVG elements.
        width, height: of the view box.
        label: what it shows, for screen readers.
        description: what can be seen in it, in words.
        natural: never wider than `width` pixels, so that letters keep their size.
    """
    size = f' style="max-width:{width}px"' if natural else ""
    words = f"<desc>{escape(description)}</desc>" if description else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}"{size}>'
        f"{words}{''.join(parts)}</svg>"
    )
