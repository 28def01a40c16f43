"""One self-contained HTML page about a run: what harmonization changed, what the segmenter gained, what each step took.

`render_page` turns `Report` into text; it computes nothing and reads no file. The page needs no network and no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from nnunet_fedharm.evaluation.charts import Line, Point, interval_chart, line_chart
from nnunet_fedharm.evaluation.page_style import STYLE


@dataclass(frozen=True)
class SitePictures:
    """One site's row of pictures, all of one held-out case and slice, as data addresses.

    Attributes:
        site: name.
        note: a few words about scanner and labels.
        columns: (caption, data address), from left to right.
    """

    site: str
    note: str
    columns: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """What one step did and how long it took."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page.

    Attributes:
        title, lead: heading and the one sentence under it.
        headline: (value, explanation) cards on the first screen.
        pictures: before and after, one row per site.
        overlays: labels and predictions, one row per site.
        label_names: in the order of label values, for the colour key.
        kinds: names of the compared harmonizers, first the control.
        metrics: kind -> result of `segmentation.score_folder`.
        histograms: ("as scanned" | "harmonized") -> site -> (intensity, density) points.
        training: chart title -> lines.
        steps: in order.
        notes: paragraphs at the end: how it was made, what it does not show.
    """

    title: str
    lead: str
    headline: Sequence[tuple[str, str]]
    pictures: Sequence[SitePictures]
    overlays: Sequence[SitePictures]
    label_names: Sequence[str]
    kinds: Sequence[str]
    metrics: Mapping[str, Mapping[str, Any]]
    histograms: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    training: Mapping[str, Sequence[Line]]
    steps: Sequence[Step]
    notes: Sequence[str]


def render_page(report: Report) -> str:
    """The page as text."""
    return Template(_PAGE).substitute(
        style=STYLE,
        title=escape(report.title),
        lead=escape(report.lead),
        cards="".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
            for value, text in report.headline
        ),
        pictures=_picture_columns(report.pictures),
        overlays=_picture_table(report.overlays),
        label_key=_label_key(report.label_names),
        dice_chart=_dice_chart(report),
        kind_key=_key([(f"series-{index + 1}", kind) for index, kind in enumerate(report.kinds)]),
        table=_metrics_table(report),
        histograms=_histograms(report.histograms),
        training="".join(_training_chart(name, lines) for name, lines in report.training.items()),
        steps=_steps_table(report.steps),
        notes="".join(f"<p>{escape(note)}</p>" for note in report.notes),
    )


def _picture_columns(sites: Sequence[SitePictures]) -> str:
    """One column per site, one row per caption: rows of the same kind can be compared across sites."""
    if not sites:
        return ""
    head = "".join(f"<th>{escape(site.site)}<small>{escape(site.note)}</small></th>" for site in sites)
    rows = ""
    for index, (caption, _) in enumerate(sites[0].columns):
        cells = "".join(_picture(site.site, *site.columns[index]) for site in sites)
        rows += f"<tr><th scope='row'>{escape(caption)}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="pictures"><tr><th></th>{head}</tr>{rows}</table></div>'


def _picture(site: str, caption: str, address: str) -> str:
    return f'<td><img src="{address}" alt="{escape(site, quote=True)}, {escape(caption, quote=True)}"></td>'


def _picture_table(rows: Sequence[SitePictures]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(caption)}</th>" for caption, _ in rows[0].columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(row.site)}<small>{escape(row.note)}</small></th>"
        + "".join(_picture(row.site, caption, address) for caption, address in row.columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="pictures"><tr><th></th>{head}</tr>{body}</table></div>'


def _label_key(names: Sequence[str]) -> str:
    return _key([(f"label-{index + 1}", name) for index, name in enumerate(names)])


def _key(entries: Sequence[tuple[str, str]]) -> str:
    return (
        '<p class="key">'
        + "".join(f'<span><i class="{css}"></i>{escape(text)}</span>' for css, text in entries)
        + "</p>"
    )


def _dice_chart(report: Report) -> str:
    first = report.metrics[report.kinds[0]]
    groups = []
    for site in first["sites"]:
        points = []
        for index, kind in enumerate(report.kinds):
            value = report.metrics[kind]["sites"][site]["labels"]["mean"]["dice"]
            if value["mean"] is not None:
                points.append(Point(kind, f"series-{index + 1}", value["mean"], value["low"], value["high"]))
        groups.append((site, points))
    return interval_chart(
        groups, label="Mean Dice per site with 95% intervals", x_label="mean Dice, 95% interval over cases"
    )


def _metrics_table(report: Report) -> str:
    head = "".join(f'<th colspan="2">{escape(kind)}</th>' for kind in report.kinds)
    sub = "<th>Dice</th><th>HD95 mm</th>" * len(report.kinds)
    rows = []
    for site, entry in report.metrics[report.kinds[0]]["sites"].items():
        for index, label in enumerate(entry["labels"]):
            name = f"<th scope='rowgroup' rowspan='{len(entry['labels'])}'>{escape(site)}</th>" if index == 0 else ""
            cells = ""
            for kind in report.kinds:
                values = report.metrics[kind]["sites"][site]["labels"][label]
                cells += f"<td>{_number(values['dice'], 3)}</td><td>{_number(values['hd95_mm'], 1)}</td>"
            rows.append(f"<tr>{name}<td class='label'>{escape(label)}</td>{cells}</tr>")
    table = f"<tr><th></th><th></th>{head}</tr><tr><th></th><th></th>{sub}</tr>{''.join(rows)}"
    return f'<div class="scroll"><table class="numbers">{table}</table></div>'


def _number(value: Mapping[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return "-"
    interval = "" if value["low"] is None else f"<small>{value['low']:.{digits}f} to {value['high']:.{digits}f}</small>"
    return f"{value['mean']:.{digits}f}{interval}"


def _histograms(histograms: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    figures = []
    sites: list[str] = []
    # One scale for all, so that heights can be compared.
    highest = max((y for by_site in histograms.values() for points in by_site.values() for _, y in points), default=1.0)
    for name, by_site in histograms.items():
        sites = list(by_site)
        lines = [Line(site, f"site-{index + 1}", points) for index, (site, points) in enumerate(by_site.items())]
        chart = line_chart(
            lines,
            x_label="standard deviations from the mean",
            label=f"Histograms, {name}",
            width=260,
            height=170,
            y_range=(0.0, highest),
        )
        figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>")
    return (
        _key([(f"site-{index + 1}", site) for index, site in enumerate(sites)])
        + f'<div class="two">{"".join(figures)}</div>'
    )


def _training_chart(name: str, lines: Sequence[Line]) -> str:
    chart = line_chart(lines, x_label="round", label=name, width=320, height=200, whole_x=True)
    key = _key([(line.style, line.name) for line in lines if line.points])
    return f"<figure><figcaption>{escape(name)}</figcaption>{chart}{key}</figure>" if chart else ""


def _steps_table(steps: Sequence[Step]) -> str:
    longest = max((step.seconds for step in steps), default=1.0) or 1.0
    rows = "".join(
        f"<tr><td>{escape(step.name)}</td><td class='wide'>{escape(step.what)}</td><td class='time'>{step.seconds:.0f} s"
        f'<i class="bar" style="width:{100 * step.seconds / longest:.0f}%"></i></td></tr>'
        for step in steps
    )
    total = sum(step.seconds for step in steps)
    end = f'<tr><td><b>total</b></td><td></td><td class="time"><b>{total / 60:.1f} min</b></td></tr>'
    return f'<table class="steps">{rows}{end}</table>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$title</h1><p class="lead">$lead</p><div class="cards">$cards</div></header>
<div class="first"><section><h2>What the harmonizer changes</h2>
<p>One held-out case per hospital, all in the same intensity window.</p>$pictures</section>
<section><h2>What it does to segmentation</h2><p>Held-out cases of each hospital.</p>$kind_key$dice_chart
<h2 class="next">Intensities inside the brain</h2>$histograms</section></div>
<section><h2>Held-out cases, per hospital and label</h2>$table</section>
<section><h2>Where it is right and wrong</h2>$label_key$overlays</section>
<section><h2>Training</h2><div class="three">$training</div></section>
<section><h2>What ran, and how long</h2>$steps</section>
<section class="notes"><h2>Notes</h2>$notes</section>
</main></body></html>
"""
