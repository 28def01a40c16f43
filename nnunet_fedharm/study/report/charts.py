"""Figures of a study as SVG text; colours come from the style sheet, light or dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.evaluation.charts import scale, svg, ticks
from nnunet_fedharm.evaluation.site_report.charts import marker
from nnunet_fedharm.study.report.dot_plot import LEAST_RANGE, Column, Row, dot, room_for

LEAST_PLOT = 290
"""Width beside the names."""


def band_chart(
    rows: Sequence[tuple[str, str, Estimate]],
    *,
    margin: float | None,
    x_label: str,
    label: str,
    width: int = 520,
) -> str:
    """Differences with their intervals around 0, and the margin of equivalence as a band.

    Args:
        rows: (name, CSS class, difference).
        margin: half the band; None draws none.
        x_label: under the axis.
        label: what the chart shows, for screen readers.
    """
    values = [v for _, _, found in rows for v in (found.value, found.low, found.high) if v is not None]
    if not values:
        return ""
    left = room_for([name for name, _, _ in rows])
    width = max(width, int(left) + LEAST_PLOT)  # long names make it wider, and then its letters a little smaller
    reach = max(*(abs(value) for value in values), 1.4 * (margin or 0.0), 0.01)
    x_ticks = ticks(-reach, reach, 4)
    x_of = scale(x_ticks[0], x_ticks[-1], left, width - 28)
    height = int(12 + 24 * len(rows) + 42)
    bottom = height - 36
    parts = []
    if margin is not None:
        x = x_of(-margin)
        parts.append(
            f'<rect x="{x:.1f}" y="6" width="{x_of(margin) - x:.1f}" height="{bottom - 6}" class="band">'
            f"<title>within {margin:g}</title></rect>"
        )
    for tick in x_ticks:
        x = x_of(tick)
        css = "rule zero" if tick == 0 else "grid"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom}" class="{css}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" class="tick mid">{f"{tick:+g}" if tick else "0"}</text>')
    parts.append(f'<text x="{(left + width) / 2:.1f}" y="{height - 4}" class="tick mid">{escape(x_label)}</text>')
    for index, (name, style, found) in enumerate(rows):
        y = 12 + 24 * index + 12
        parts.append(f'<text x="{left - 12}" y="{y + 4}" class="armname end">{escape(name)}</text>')
        if found.value is not None:
            row = Row("", name, style, {"": found})
            parts.append(dot(row, Column("", "difference", ""), x_of, y))
    return svg(parts, width, height, label, natural=True)


def paired_chart(
    points: Sequence[tuple[str, float, float]],
    sites: Sequence[str],
    *,
    margin: float,
    label: str,
    axes: tuple[str, str] = ("central", "federated"),
    size: int = 300,
) -> str:
    """A mark per case, one way of training against the other, with the line where both are equal and the margin beside it.

    Args:
        points: (site, x, y).
        sites: in the report's order, for marks.
        margin: half the band, in y.
        label: what the chart shows, for screen readers.
        axes: names of x and y.
    """
    if not points:
        return ""
    values = [value for _, x, y in points for value in (x, y)]
    centre, half = (min(values) + max(values)) / 2, max(max(values) - min(values), LEAST_RANGE) / 2
    both = ticks(max(centre - half, 0.0), centre + half, 4)
    left, right, top, bottom = 44.0, 12.0, 8.0, 40.0
    x_of, y_of = scale(both[0], both[-1], left, size - right), scale(both[0], both[-1], size - bottom, top)
    parts = []
    for tick in both:
        x, y = x_of(tick), y_of(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{size - bottom}" class="grid"/>')
        parts.append(f'<line x1="{left}" x2="{size - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{size - bottom + 16}" class="tick mid">{tick:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick end">{tick:g}</text>')
    parts += _diagonal((both[0], both[-1]), margin, x_of, y_of)
    order = {site: index for index, site in enumerate(sites)}
    for site, x, y in points:
        mark = marker(order[site], x_of(x), y_of(y), 4.0)
        parts.append(f"<g>{mark}<title>{escape(site)}: {axes[0]} {x:.3f}, {axes[1]} {y:.3f}</title></g>")
    parts.append(
        f'<text x="{(left + size - right) / 2:.1f}" y="{size - 5}" class="tick mid">Dice, {escape(axes[0])}</text>'
    )
    middle = (top + size - bottom) / 2
    parts.append(
        f'<text transform="translate(10 {middle:.1f}) rotate(-90)" class="tick mid">Dice, {escape(axes[1])}</text>'
    )
    return svg(parts, size, size, label, natural=True)


def _diagonal(
    ends: tuple[float, float], margin: float, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> list[str]:
    low, high = ends
    corners = [
        (low, low + margin),
        (high - margin, high),
        (high, high),
        (high, high - margin),
        (low + margin, low),
        (low, low),
    ]
    outline = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in corners)
    return [
        f'<polygon points="{outline}" class="band"/>',
        f'<line x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" x2="{x_of(high):.1f}" y2="{y_of(high):.1f}" class="rule zero"/>',
    ]


def epsilon_chart(
    lines: Sequence[tuple[str, str, Mapping[float, Estimate], Estimate | None]],
    *,
    label: str,
    y_label: str = "",
    width: int = 560,
    height: int = 290,
) -> str:
    """Dice against epsilon, with "no privacy" at the right end; epsilons at even steps.

    Args:
        lines: (name, CSS class, epsilon -> Dice, Dice without privacy).
        label: what the chart shows, for screen readers.
        y_label: beside the axis.
    """
    epsilons = sorted({epsilon for _, _, found, _ in lines for epsilon in found})
    shown = [
        (
            name,
            style,
            [*((epsilons.index(e), found[e]) for e in sorted(found)), *([(len(epsilons), free)] if free else [])],
        )
        for name, style, found, free in lines
    ]
    values = [v for _, _, points in shown for _, e in points for v in (e.value, e.low, e.high) if v is not None]
    if not values or not epsilons:
        return ""
    y_ticks = ticks(min(values), max(values), 5)
    left, right, top, bottom = 60.0, 44.0, 10.0, 40.0
    x_of, y_of = scale(-0.3, len(epsilons), left, width - right), scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick end">{tick:g}</text>')
    for place, words in enumerate([*(f"{epsilon:g}" for epsilon in epsilons), "no privacy"]):
        parts.append(f'<text x="{x_of(place):.1f}" y="{height - bottom + 17}" class="tick mid">{words}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2:.1f}" y="{height - 4}" class="tick mid">epsilon for each patient</text>'
    )
    parts.append(
        f'<text transform="translate(12 {(top + height - bottom) / 2:.1f}) rotate(-90)" class="tick mid">{escape(y_label)}</text>'
    )
    for row, (name, style, points) in enumerate(shown):
        shift = 7.0 * (row - (len(shown) - 1) / 2)  # so that intervals at one epsilon do not cover each other
        parts += _epsilon_line(name, style, points, lambda place, shift=shift: x_of(place) + shift, y_of)  # type: ignore[misc]
    return svg(parts, width, height, label, natural=True)


def _epsilon_line(
    name: str,
    style: str,
    points: Sequence[tuple[int, Estimate]],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> list[str]:
    known = [(x_of(place), estimate) for place, estimate in points if estimate.value is not None]
    path = " ".join(f"{x:.1f},{y_of(estimate.value or 0.0):.1f}" for x, estimate in known)
    parts = [f'<polyline points="{path}" class="line thin {style}"/>']
    for x, estimate in known:
        bar = ""
        if estimate.low is not None and estimate.high is not None:
            ends = f'y1="{y_of(estimate.low):.1f}" y2="{y_of(estimate.high):.1f}"'
            bar = f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} class="line {style}"/>'
        dot = f'<circle cx="{x:.1f}" cy="{y_of(estimate.value or 0.0):.1f}" r="4.5" class="dot {style}"/>'
        parts.append(f"<g>{bar}{dot}<title>{escape(name)}: {estimate.value:.3f}</title></g>")
    return parts
