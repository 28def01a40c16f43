"""Charts of the site report as SVG text: volumes in a plane, distances between sites, one histogram per site.

A site has a colour and a marker, in the order of the report, so that nobody has to tell sites by colour alone. All are
drawn at their natural size: letters stay readable on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from nnunet_fedharm.evaluation.charts import Point, scale, svg, ticks

SITE_STYLES = 8
"""Colours of the style sheet; further sites take them again, with other markers."""

_MIDDLE, _STRONG = 0.55, 0.85
"""Shares of the full colour from which the number in a cell is written in the colour of the page: dark pages, all pages."""

Ellipse = tuple[float, float, float, float, float]


def site_class(index: int) -> str:
    """CSS class of the site at this place."""
    return f"site-{index % SITE_STYLES + 1}"


def marker(index: int, x: float, y: float, radius: float = 5.0) -> str:
    """The mark of the site at this place: disc, square, triangle, diamond, ..."""
    shape = _SHAPES[(index + index // SITE_STYLES) % len(_SHAPES)]
    if not shape:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="mark {site_class(index)}"/>'
    points = " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in shape)
    return f'<polygon points="{points}" class="mark {site_class(index)}"/>'


def marker_icon(index: int) -> str:
    """The mark alone, for text."""
    return f'<svg class="icon" viewBox="0 0 14 14" aria-hidden="true">{marker(index, 7, 7, 5.5)}</svg>'


def scatter_chart(
    points: Sequence[tuple[str, float, float, str]],
    ellipses: Mapping[str, Ellipse],
    sites: Sequence[str],
    *,
    axes: tuple[str, str],
    label: str,
    width: int = 340,
    height: int = 300,
) -> str:
    """Volumes in a plane, with an ellipse per site.

    Args:
        points: (site, x, y, text of the tooltip).
        ellipses: site -> (centre x, centre y, semi-axis, semi-axis, degrees).
        sites: in the report's order.
        axes: names of x and y.
        label: what the chart shows, for screen readers.
    """
    outlines = {site: _outline(ellipse) for site, ellipse in ellipses.items()}
    corners = [(x, y) for _, x, y, _ in points] + [corner for outline in outlines.values() for corner in outline]
    if not corners:
        return ""
    left, right, top, bottom = 40.0, 10.0, 10.0, 40.0
    x_ticks, y_ticks = (ticks(min(values), max(values), 4) for values in zip(*corners, strict=True))
    x_of = scale(x_ticks[0], x_ticks[-1], left, width - right)
    y_of = scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    parts = _axes(x_ticks, y_ticks, x_of, y_of, axes, (width, height))
    order = {site: index for index, site in enumerate(sites)}
    for site, outline in outlines.items():
        path = " L".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in outline)
        parts.append(
            f'<path d="M{path}Z" class="ellipse {site_class(order[site])}"><title>{escape(site)}</title></path>'
        )
    for site, x, y, text in points:
        mark = marker(order[site], x_of(x), y_of(y), 4.0)
        parts.append(f"<g>{mark}<title>{escape(text)}</title></g>" if text else mark)
    taken: list[tuple[float, float]] = []
    for site, ellipse in ellipses.items():
        x, y = x_of(ellipse[0]), y_of(ellipse[1]) + 5
        while any(abs(x - other) < 9 * len(_short(site)) + 4 and abs(y - line) < 14 for other, line in taken):
            y += 14
        taken.append((x, y))
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="halo mid">{escape(_short(site))}</text>')
    return svg(parts, width, height, label, natural=True)


def matrix_chart(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], tuple[float | None, str, str]],
    *,
    highest: float,
    label: str,
    axes: tuple[str, str] = ("", ""),
    cell: tuple[int, int] = (62, 40),
) -> str:
    """A table of numbers, the darker the larger.

    Args:
        rows, columns: names.
        values: (row, column) -> (value or None, text in the cell, tooltip); a pair that is missing stays empty.
        highest: value of the full colour.
        label: what the chart shows, for screen readers.
        axes: names of rows and columns.
        cell: width and height.
    """
    longest = max((len(_short(name)) for name in rows), default=1)
    left, top = 14.0 + 8.5 * longest + (18 if axes[0] else 0), 26.0 + (18 if axes[1] else 0)
    width, height = int(left + cell[0] * len(columns) + 4), int(top + cell[1] * len(rows) + 4)
    parts = []
    if axes[1]:
        parts.append(
            f'<text x="{left + cell[0] * len(columns) / 2:.1f}" y="14" class="tick mid">{escape(axes[1])}</text>'
        )
    if axes[0]:
        middle = top + cell[1] * len(rows) / 2
        parts.append(
            f'<text transform="translate(14 {middle:.1f}) rotate(-90)" class="tick mid">{escape(axes[0])}</text>'
        )
    for index, name in enumerate(columns):
        x = left + cell[0] * (index + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{top - 8:.1f}" class="row mid">{escape(_short(name))}</text>')
    for index, name in enumerate(rows):
        y = top + cell[1] * (index + 0.5)
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 5:.1f}" class="row end">{escape(_short(name))}</text>')
        for number, column in enumerate(columns):
            if (name, column) in values:
                corner = left + cell[0] * number, top + cell[1] * index
                parts.append(_cell(corner, cell, values[name, column], highest))
    words = "; ".join(f"{tip}" for _, _, tip in values.values())
    return svg(parts, width, height, label, description=words, natural=True)


def ridge_chart(
    edges: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    sites: Sequence[str],
    *,
    label: str,
    medians: Mapping[str, float],
    x_range: tuple[float, float] | None = None,
    width: int = 250,
) -> str:
    """A histogram per site, one below the other, over a common x, with a line at the site's median.

    Args:
        edges: (bins + 1,).
        shares: site -> share of its volumes in each bin.
        sites: in the report's order.
        label: what the chart shows, for screen readers.
        medians: site -> median.
        x_range: range of x; None: the edges'.
    """
    shown = [site for site in sites if shares.get(site)]
    if not shown or len(edges) < 2:
        return ""
    left, right, top, bottom, step = 14 + 8.5 * max(len(_short(site)) for site in shown), 12.0, 6.0, 24.0, 34.0
    low, high = x_range or (edges[0], edges[-1])
    x_of = scale(low, high, left, width - right)
    height = int(top + step * len(shown) + bottom)
    highest = max(max(shares[site]) for site in shown) or 1.0
    parts = []
    for row, site in enumerate(shown):
        base, index = top + step * (row + 1), sites.index(site)
        outline = [f"M{x_of(edges[0]):.1f},{base:.1f}"]
        for first, last, share in zip(edges, edges[1:], shares[site], strict=False):
            y = base - (step - 4) * share / highest
            outline.append(f"L{x_of(first):.1f},{y:.1f} L{x_of(last):.1f},{y:.1f}")
        outline.append(f"L{x_of(edges[-1]):.1f},{base:.1f}Z")
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{base}" y2="{base}" class="grid"/>')
        parts.append(f'<path d="{" ".join(outline)}" class="ridge {site_class(index)}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{base - 6:.1f}" class="row end">{escape(_short(site))}</text>')
        if site in medians and low <= medians[site] <= high:
            x = x_of(medians[site])
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base - step + 6}" y2="{base}" class="median"/>')
    parts += _x_labels([tick for tick in ticks(low, high, 3) if low <= tick <= high], x_of, height - 6, width)
    return svg(parts, width, height, label, natural=True)


def track(points: Sequence[Point], *, highest: float = 1.0, tick_values: Sequence[float] = ()) -> str:
    """Means with their intervals on one line from 0 to `highest`, as wide as the place it is put in.

    Args:
        points: from top to bottom.
        highest: at the right end.
        tick_values: numbers written below instead, for the head of a column.
    """
    if tick_values:
        ends = {0.0: "", highest: " end"}
        texts = "".join(
            f'<text x="{100 * tick / highest:.1f}%" y="12" class="tick{ends.get(tick, " mid")}">{tick:g}</text>'
            for tick in tick_values
        )
        return f'<svg class="track" height="16" aria-hidden="true">{texts}</svg>'
    lines = "".join(f'<line x1="{x}%" x2="{x}%" y1="0" y2="100%" class="grid"/>' for x in (0, 25, 50, 75, 100))
    marks = ""
    for row, point in enumerate(points):
        y = 9 + 16 * row
        at = [None if v is None else 100 * min(max(v / highest, 0.0), 1.0) for v in (point.low, point.mean, point.high)]
        if at[0] is not None and at[2] is not None:
            marks += f'<line x1="{at[0]:.1f}%" x2="{at[2]:.1f}%" y1="{y}" y2="{y}" class="line {point.style}"/>'
        marks += f'<circle cx="{at[1]:.1f}%" cy="{y}" r="4.5" class="dot {point.style}"/>'
    return f'<svg class="track" height="{16 * len(points) + 2}" aria-hidden="true">{lines}{marks}</svg>'


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    names: tuple[str, str],
    size: tuple[int, int],
) -> list[str]:
    width, height = size
    left, right, top, bottom = x_of(x_ticks[0]), x_of(x_ticks[-1]), y_of(y_ticks[-1]), y_of(y_ticks[0])
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" class="grid"/>')
    parts += _x_labels(x_ticks, x_of, bottom + 16, width)
    parts += [f'<text x="{left - 6:.1f}" y="{y_of(tick) + 4:.1f}" class="tick end">{tick:g}</text>' for tick in y_ticks]
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 6}" class="tick mid">{escape(names[0])}</text>')
    parts.append(
        f'<text transform="translate(11 {(top + bottom) / 2:.1f}) rotate(-90)" class="tick mid">{escape(names[1])}</text>'
    )
    return parts


def _x_labels(values: Sequence[float], x_of: Callable[[float], float], y: float, width: int) -> list[str]:
    """Numbers under an axis, those that would touch the one before left out."""
    parts, free = [], -math.inf
    for value in values:
        text, x = f"{value:.4g}", x_of(value)
        half = 4.2 * len(text)
        x = min(x, width - half)
        if x - half >= free:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="tick mid">{text}</text>')
            free = x + half + 6
    return parts


def _cell(
    corner: tuple[float, float], size: tuple[int, int], content: tuple[float | None, str, str], highest: float
) -> str:
    value, text, tip = content
    share = 0.0 if value is None or highest <= 0 else min(max(value / highest, 0.0), 1.0)
    x, y = corner
    css = "cell strong" if share > _STRONG else "cell middle" if share > _MIDDLE else "cell"
    return (
        f'<g><rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size[0] - 2}" height="{size[1] - 2}" rx="4" class="heat" '
        f'fill-opacity="{0.06 + 0.94 * share:.2f}"/><text x="{x + size[0] / 2:.1f}" y="{y + size[1] / 2 + 5:.1f}" '
        f'class="{css}">{escape(text)}</text><title>{escape(tip)}</title></g>'
    )


def _outline(ellipse: Ellipse, corners: int = 48) -> list[tuple[float, float]]:
    x, y, first, second, degrees = ellipse
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    outline = []
    for index in range(corners):
        u, v = (
            first * math.cos(2 * math.pi * index / corners),
            second * math.sin(2 * math.pi * index / corners),
        )
        outline.append((x + u * cosine - v * sine, y + u * sine + v * cosine))
    return outline


def _short(name: str, most: int = 12) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _polygon(corners: int, start: float = -90.0) -> list[tuple[float, float]]:
    angles = [math.radians(start + 360 * index / corners) for index in range(corners)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _star(arms: int, inner: float, start: float = -90.0) -> list[tuple[float, float]]:
    pairs = zip(_polygon(arms, start), _polygon(arms, start + 180 / arms), strict=True)
    points = [point for tip, notch in pairs for point in (tip, (inner * notch[0], inner * notch[1]))]
    return [(1.35 * x, 1.35 * y) for x, y in points]  # as much ink as a disc


_SHAPES: tuple[list[tuple[float, float]], ...] = (
    [],  # a disc
    _polygon(4, -45),
    _polygon(3),
    _star(4, 0.35),
    _polygon(3, 90),
    _star(4, 0.35, -45),
    _polygon(6),
    _star(5, 0.45),
)
