"""A row per arm, a column per site, a dot with its interval in each cell; SVG text, colours from the style sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.evaluation.charts import scale, svg, ticks

ROW, HEADING, LINE, BOTTOM = 21.0, 24.0, 16.0, 26.0
LETTER = 6.9
"""Width of a letter of an arm's name, rather too much."""
LEAST_RANGE = 0.05
"""Smallest range of Dice on an axis: differences below it should look small."""


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        group: heading that it stands under.
        name: for readers.
        style: CSS class.
        values: column -> estimate; a column may be missing.
    """

    group: str
    name: str
    style: str
    values: Mapping[str, Estimate]


@dataclass(frozen=True)
class Column:
    """One site, or another number of all arms.

    Attributes:
        title, note: above it; the note has a line for each part between semicolons.
        lines: (CSS class, place, tooltip) of vertical lines, such as the control's mean.
        marks: further places that the range has to hold.
    """

    key: str
    title: str
    note: str
    lines: Sequence[tuple[str, float, str]] = ()
    x_range: tuple[float, float] | None = None


def dot_plot(
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    label: str,
    width: int = 1060,
    left: float = 262.0,
    natural: bool = False,
) -> str:
    """A row per arm, a column per site with an axis of its own, a dot with its interval in each cell.

    Args:
        rows: arms in order; a new group begins with its heading.
        columns: from left to right.
        label: what the chart shows, for screen readers.
        width: of the view box.
        left: room for names.
        natural: never wider than `width` pixels, so that letters keep their size.
    """
    columns = [column for column in columns if any(has_value(row, column) for row in rows)]
    if not columns:
        return ""
    top = 12 + LINE * (1 + max(len(_lines(column)) for column in columns))
    places, height = _row_places(rows, top)
    parts = []
    for row, y in zip(rows, places, strict=True):
        parts.append(f'<text x="{left - 14}" y="{y + 4:.1f}" class="armname end">{escape(row.name)}</text>')
    for group, y in _headings(rows, places):
        parts.append(f'<text x="0" y="{y:.1f}" class="tick">{escape(group)}</text>')
        parts.append(f'<line x1="0" x2="{width}" y1="{y + 5:.1f}" y2="{y + 5:.1f}" class="grid"/>')
    step = (width - left) / len(columns)
    for index, column in enumerate(columns):
        box = (left + index * step + 20, left + (index + 1) * step - 22)
        parts += _column(column, rows, places, (*box, top, height - BOTTOM))
    return svg(parts, width, int(height), label, description=_words(rows, columns), natural=natural)


def room_for(names: Sequence[str], least: float = 120.0) -> float:
    """Width for the longest of some names and the space after it."""
    return max(least, 20 + LETTER * max((len(name) for name in names), default=0))


def has_value(row: Row, column: Column) -> bool:
    """Whether an arm has a dot in a column."""
    estimate = row.values.get(column.key)
    return estimate is not None and estimate.value is not None


def _row_places(rows: Sequence[Row], top: float) -> tuple[list[float], float]:
    """Middle of each row, and the height of the whole."""
    places, y, before = [], top, ""
    for row in rows:
        y += HEADING if row.group != before else 0
        places.append(y + ROW / 2)
        y, before = y + ROW, row.group
    return places, y + BOTTOM


def _headings(rows: Sequence[Row], places: Sequence[float]) -> list[tuple[str, float]]:
    found, before = [], ""
    for row, y in zip(rows, places, strict=True):
        if row.group != before:
            found.append((row.group, y - ROW / 2 - 8))
        before = row.group
    return found


def _column(
    column: Column, rows: Sequence[Row], places: Sequence[float], box: tuple[float, float, float, float]
) -> list[str]:
    left, right, top, bottom = box
    x_ticks = _ticks_of(column, rows)
    x_of = scale(x_ticks[0], x_ticks[-1], left, right)
    middle = (left + right) / 2
    parts = [
        f'<text x="{middle:.1f}" y="16" class="row mid">{escape(column.title)}</text>',
        *(
            f'<text x="{middle:.1f}" y="{33 + LINE * line:.0f}" class="tick mid">{escape(words)}</text>'
            for line, words in enumerate(_lines(column))
        ),
    ]
    for index, tick in enumerate(x_ticks):
        x = x_of(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:.1f}" class="grid"/>')
        if len(x_ticks) <= 3 or index % 2 == (len(x_ticks) - 1) % 2:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.1f}" class="tick mid">{tick:g}</text>')
    for css, place, words in column.lines:
        x = x_of(place)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:.1f}" class="rule {css}">'
            f"<title>{escape(words)}</title></line>"
        )
    for row, y in zip(rows, places, strict=True):
        if has_value(row, column):
            parts.append(dot(row, column, x_of, y))
    return parts


def _lines(column: Column) -> list[str]:
    return [words.strip() for words in column.note.split(";") if words.strip()]


def _ticks_of(column: Column, rows: Sequence[Row]) -> list[float]:
    shown = [row.values[column.key] for row in rows if column.key in row.values]
    values = [v for estimate in shown for v in (estimate.value, estimate.low, estimate.high) if v is not None]
    values += [place for _, place, _ in column.lines]
    values += list(column.x_range or ())
    centre, half = (min(values) + max(values)) / 2, max(max(values) - min(values), LEAST_RANGE) / 2
    low = max(centre - half, 0.0) if min(values) >= 0 else centre - half  # Dice is never negative
    return ticks(low, centre + half, 4)


def dot(row: Row, column: Column, x_of: Callable[[float], float], y: float) -> str:
    estimate = row.values[column.key]
    mean = estimate.value if estimate.value is not None else 0.0
    bar, words = "", f"{row.name}, {column.title}: {mean:.3f}"
    if estimate.low is not None and estimate.high is not None:
        words += f" ({estimate.low:.3f} to {estimate.high:.3f})"
        bar = (
            f'<line x1="{x_of(estimate.low):.1f}" x2="{x_of(estimate.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'class="line {row.style}"/>'
        )
    dot = f'<circle cx="{x_of(mean):.1f}" cy="{y:.1f}" r="4.5" class="dot {row.style}"/>'
    return f"<g>{bar}{dot}<title>{escape(words)}</title></g>"


def _words(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    said = []
    for row in rows:
        cells = [
            f"{column.title} {found.value:.3f}"
            for column in columns
            if (found := row.values.get(column.key)) is not None and found.value is not None
        ]
        said.append(f"{row.name} ({row.group}): {', '.join(cells)}")
    return "; ".join(said)
