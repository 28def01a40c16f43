"""A small page on a site's adaptation, for this site's own eyes: it shows slices of its volumes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

import numpy as np
from torch import Tensor

from nnunet_fedharm.evaluation.adapt import Adaptation
from nnunet_fedharm.evaluation.charts import Line, line_chart
from nnunet_fedharm.evaluation.page_style import STYLE
from nnunet_fedharm.evaluation.pictures import data_uri, grey_picture
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS

DIFFERENCE_WINDOW = (-2.0, 2.0)
"""Standard deviations from black to white in pictures of the difference; grey is no change."""

SIZES = ".chart{max-width:480px}.pictures{max-width:760px}"
"""A page with little on it need not fill a screen with it."""

PICTURE_WIDTH = 240
"""Least width of a picture in pixels."""


def render_adaptation(adaptation: Adaptation, *, title: str, lead: str, table: str, channels: Sequence[str]) -> str:
    """The page as text.

    Args:
        adaptation: what was measured.
        title, lead: heading and the sentence under it.
        table: the table that the command prints.
        channels: names, in order.
    """
    rows = "".join(
        _row(f"volume {number}, {name}", before[index], after[index])
        for number, (before, after) in enumerate(adaptation.shown.samples, start=1)
        for index, name in enumerate(channels)
    )
    charts = "".join(_chart(adaptation, index, name) for index, name in enumerate(channels))
    return Template(_PAGE).substitute(
        style=STYLE + SIZES, title=escape(title), lead=escape(lead), table=escape(table), rows=rows, charts=charts
    )


def _row(name: str, before: Tensor, after: Tensor) -> str:
    """Middle slice of one channel (D, H, W), before, after, and what changed."""
    middle = before.shape[0] // 2
    first, second = before[middle].numpy(), after[middle].numpy()
    inside = first != 0
    pictures = (
        ("as scanned", grey_picture(first, inside)),
        ("harmonized", grey_picture(second, inside)),
        ("difference", grey_picture(second - first, np.ones_like(inside), DIFFERENCE_WINDOW)),
    )
    scale = max(1, -(-PICTURE_WIDTH // first.shape[1]))
    cells = "".join(
        f'<td><img src="{data_uri(picture, scale)}" alt="{escape(name, quote=True)}, {caption}"></td>'
        for caption, picture in pictures
    )
    return f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"


def _chart(adaptation: Adaptation, channel: int, name: str) -> str:
    """Share of voxels below each intensity: the reference's, and the volumes' before and after."""
    curves = (
        ("reference", "series-1", adaptation.reference),
        ("as scanned", "series-3", adaptation.shown.before),
        ("harmonized", "series-2", adaptation.shown.after),
    )
    lines = [
        Line(text, style, list(zip(quantiles[channel].tolist(), QUANTILE_LEVELS, strict=True)))
        for text, style, quantiles in curves
    ]
    chart = line_chart(
        lines,
        x_label="standard deviations from the mean",
        label=f"Share of voxels below an intensity, {name}",
        y_range=(0.0, 1.0),
    )
    key = "".join(f'<span><i class="{style}"></i>{text}</span>' for text, style, _ in curves)
    return f'<figure class="chart"><figcaption>{escape(name)}</figcaption>{chart}<p class="key">{key}</p></figure>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$title</h1><p class="lead">$lead</p></header>
<section><h2>What was measured</h2><div class="scroll"><pre>$table</pre></div></section>
<section><h2>Share of voxels below an intensity</h2><p>Mean over the volumes. The nearer to the reference, the better.</p>
<div class="pair">$charts</div></section>
<section><h2>Middle slices</h2><p>With the gate open, in one intensity window for all; in the difference, grey is no change.
These are images of patients: keep this page where they may be.</p><div class="scroll"><table class="pictures">
<tr><th></th><th>as scanned</th><th>harmonized</th><th>difference</th></tr>$rows</table></div></section>
</main></body></html>
"""
