"""A run as one HTML page that a browser loads again by itself; no script, no network, no case."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from nnunet_fedharm.evaluation.charts import Line, line_chart
from nnunet_fedharm.evaluation.html import Html, figure, figures, key, table
from nnunet_fedharm.evaluation.report_style import REPORT_STYLE
from nnunet_fedharm.evaluation.watch.words import ROUND_HEAD, SITE_HEAD, epsilon, facts, round_row, site_row
from nnunet_fedharm.federation.watch.view import ALARMING, RunView

SHOWN_ROUNDS = 60
_LONG = ("now", "took part")
_COLOURS = 8
"""Sites with a colour of their own; of more sites, all lines are quiet and the worst one stands out."""
_ENDED_FACTOR = 6
"""A run that has ended is loaded less often: somebody may start it again."""


def render_watch_page(run: RunView, *, every_s: int) -> str:
    """The page as text.

    Args:
        every_s: seconds until the browser loads it again.
    """
    refresh = every_s if run.state == "running" else _ENDED_FACTOR * every_s
    return Template(_PAGE).substitute(
        refresh=refresh,
        style=REPORT_STYLE + _STYLE,
        title=escape(f"{run.state}: {run.where()}"),
        heading=escape(f"Federation {run.state}: {run.where()}"),
        lead=escape(
            f"The page refreshes itself every {refresh} s and shows the server's event log; it changes nothing."
        ),
        reason=f'<p class="alarm" role="alert">{escape(run.reason)}</p>' if run.reason else "",
        cards="".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in facts(run)
        ),
        sites=_sites(run),
        charts=_charts(run),
        rounds=_rounds(run),
        warnings="".join(f"<p>{escape(text)}</p>" for text in run.warnings),
    )


def _sites(run: RunView) -> Html:
    rows = []
    for site in run.sites:
        row: list[object] = list(site_row(site, run))
        mark = "alarm" if site.state in ALARMING else "calm"
        row[1] = Html(f'<span class="long {mark}">{escape(str(row[1]))}</span>')
        rows.append(row)
    keep = [index for index, name in enumerate(SITE_HEAD) if name != "epsilon" or epsilon(run)]
    return table([_left(SITE_HEAD[i]) for i in keep], [[row[i] for i in keep] for row in rows])


def _left(name: str) -> Html:
    """Head of a column; those with words begin at the left like their cells."""
    return Html(f'<span class="long">{escape(name)}</span>' if name in _LONG else escape(name))


def _rounds(run: RunView) -> Html:
    newest = list(run.rounds)[: -SHOWN_ROUNDS - 1 : -1]
    if not newest:
        return Html("<p>No round has begun.</p>")
    older = len(run.rounds) - len(newest)
    rows = []
    for entry in newest:
        row: list[object] = list(round_row(entry, run))
        row[6] = Html(f'<span class="long">{escape(str(row[6]))}</span>')
        if entry.set_aside:
            row[7] = Html(f'<span class="long alarm">{escape(str(row[7]))}</span>')
        rows.append(row)
    more = (
        f"<p>{older} older rounds are not shown; the event log and the TensorBoard export have all.</p>"
        if older
        else ""
    )
    return Html(table([_left(name) for name in ROUND_HEAD], rows) + more)


def _charts(run: RunView) -> Html:
    wanted = (
        ("segmenter", "dice", "Dice of validation patches", True),
        ("segmenter", "train_loss", "Training loss, segmenter", False),
        ("harmonizer", "train_loss", "Training loss, harmonizer", False),
    )
    shown = [_chart(run, phase, metric, caption, worst=worst) for phase, metric, caption, worst in wanted]
    found = figures([*shown, _seconds_chart(run)])
    if not found:
        return Html("<p>Curves begin with the first complete round.</p>")
    return Html(_legend(run) + found)


def _chart(run: RunView, phase: str, metric: str, caption: str, *, worst: bool) -> Html:
    rounds = [entry for entry in run.rounds if entry.phase == phase and entry.ended]
    lines = []
    for index, site in enumerate(view.site for view in run.sites):
        points = [
            (float(entry.number), entry.sites[site].metrics[metric])
            for entry in rounds
            if site in entry.sites and metric in entry.sites[site].metrics
        ]
        lines.append(Line(site, _site_style(run, index), points))
    mean = [(float(entry.number), entry.metrics[metric]) for entry in rounds if metric in entry.metrics]
    lines.append(Line("mean", "mean", mean))
    if worst:
        lowest = [(float(entry.number), found[1]) for entry in rounds if (found := entry.worst_site()) is not None]
        lines.append(Line("worst site", "worst", lowest))
    return figure(caption, line_chart(_drawn(lines), x_label="round", label=caption, whole_x=True))


def _drawn(lines: Sequence[Line]) -> list[Line]:
    """Lines with points; a single point twice, which round ends of lines make a dot."""
    return [Line(line.name, line.style, [*line.points[:1], *line.points]) for line in lines if line.points]


def _seconds_chart(run: RunView) -> Html:
    lines = []
    for phase, style in (("harmonizer", "series-1"), ("segmenter", "series-2")):
        points = [
            (float(entry.number), entry.seconds)
            for entry in run.rounds
            if entry.phase == phase and entry.seconds is not None
        ]
        lines.append(Line(phase, style, points))
    chart = line_chart(_drawn(lines), x_label="round", label="Seconds of a round", whole_x=True)
    return figure("Seconds of a round", chart, "grey: harmonizer, blue: segmenter")


def _site_style(run: RunView, index: int) -> str:
    return f"site-{index + 1}" if len(run.sites) <= _COLOURS else "quiet"


def _legend(run: RunView) -> Html:
    entries: list[tuple[str, object]] = []
    if len(run.sites) <= _COLOURS:
        entries = [(f'<i class="site-{index + 1}"></i>', view.site) for index, view in enumerate(run.sites)]
    else:
        entries = [('<i class="quiet"></i>', "each site")]
    return key([*entries, ('<i class="mean"></i>', "mean over sites"), ('<i class="worst"></i>', "worst site")])


_STYLE = (
    "".join(
        f".line.site-{n}{{stroke:var(--s{n})}}.key .site-{n}{{background:var(--s{n})}}" for n in range(1, _COLOURS + 1)
    )
    + """
:root{--alarm:#b3261e}@media (prefers-color-scheme:dark){:root{--alarm:#ff8a80}}
.alarm{color:var(--alarm)}p.alarm{font-weight:600;max-width:none;margin:10px 0}td .alarm{font-weight:600}
.line.mean{stroke:var(--ink);stroke-width:2.6}.line.worst{stroke:var(--alarm);stroke-width:2.6;stroke-dasharray:6 4}
.line.quiet{stroke:var(--muted);stroke-width:1;opacity:.5}
.key .mean{background:var(--ink)}.key .quiet{background:var(--muted)}
.key .worst{background:repeating-linear-gradient(90deg,var(--alarm) 0 5px,transparent 5px 8px)}
.card b{font-size:17px}.cards{grid-template-columns:repeat(auto-fit,minmax(128px,1fr))}
.numbers .long{min-width:110px;overflow-wrap:anywhere}
.cards{gap:8px}.card{padding:8px 10px}
.figures{grid-template-columns:repeat(auto-fill,minmax(min(265px,100%),1fr))}main{max-width:1240px}
"""
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="$refresh"><title>$title</title><style>$style</style></head><body><main>
<header><h1>$heading</h1><p class="lead">$lead</p>$reason<div class="cards">$cards</div></header>
<section><h2>Sites</h2>$sites</section>
<section><h2>Curves</h2>$charts</section>
<section><h2>Rounds, newest first</h2>$rounds$warnings</section>
</main></body></html>
"""
