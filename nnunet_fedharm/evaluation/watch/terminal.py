"""A run in the terminal: once, or again and again until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nnunet_fedharm.evaluation.watch.words import ROUND_HEAD, SITE_HEAD, epsilon, facts, round_row, site_row
from nnunet_fedharm.federation.watch.view import ALARMING, RunView

SHOWN_ROUNDS = 12
_WIDE = 120
"""Columns of a terminal from which on everything is shown."""
_WORDS = ("took part", "set aside")
_PIPE_WIDTH = 200


def make_console() -> Console:
    """The terminal; files and pipes get lines as long as they need."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def show(run: RunView, console: Console) -> None:
    """Print it once."""
    console.print(layout(run, console.width))
    if run.results:
        console.print(f"results: {run.results}", soft_wrap=True, highlight=False, markup=False)


def follow(read: Callable[[], RunView], console: Console, *, every_s: float) -> RunView:
    """Refresh until the run ends or Ctrl-C; returns the last look."""
    run = read()
    with Live(layout(run, console.width), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while run.state == "running":
            try:
                time.sleep(every_s)
            except KeyboardInterrupt:
                break
            run = read()
            live.update(layout(run, console.width), refresh=True)
    return run


def layout(run: RunView, width: int) -> Group:
    """Everything, from the most to the least urgent."""
    grid = Table.grid(padding=(0, 3))
    for value, name in facts(run):
        grid.add_row(Text(name, style="dim"), Text(value, style=_colour(run) if value == run.state else "bold"))
    parts: list[Table | Text] = [grid]
    if run.reason:
        parts.append(Text(run.reason, style="bold red"))
    parts += [Text(f"warning: {text}", style="yellow") for text in run.warnings]
    parts += [Text(), _sites(run, width), *([_rounds(run, width)] if run.rounds else [])]
    return Group(*parts)


def _colour(run: RunView) -> str:
    return "bold red" if run.is_bad() else "bold green"


def _sites(run: RunView, width: int) -> Table:
    dropped = {name for name in SITE_HEAD if name == "epsilon" and not epsilon(run)}
    dropped |= {"set aside", "usual time", "down", "up"} if width < _WIDE else set()
    rows = [(site_row(site, run), "red" if site.state in ALARMING else "") for site in run.sites]
    return _table("sites", SITE_HEAD, rows, dropped, words=("now",))


def _rounds(run: RunView, width: int) -> Table:
    left_out = max(0, len(run.rounds) - SHOWN_ROUNDS)
    title = f"rounds, newest first ({left_out} older ones are not shown)" if left_out else "rounds, newest first"
    dropped = {"took part", "down", "up"} if width < _WIDE else set()
    newest = list(run.rounds)[: -SHOWN_ROUNDS - 1 : -1]
    return _table(title, ROUND_HEAD, [(round_row(entry, run), "") for entry in newest], dropped, words=_WORDS)


def _table(
    title: str,
    head: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    dropped: set[str],
    *,
    words: Sequence[str],
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    kept = [index for index, name in enumerate(head) if name not in dropped]
    for index in kept:
        long = head[index] in words
        table.add_column(
            head[index],
            overflow="fold",
            no_wrap=not long,
            min_width=14 if long else None,
            justify="left" if long or not index else "right",
        )
    for cells, style in rows:
        table.add_row(*(Text(cells[index]) for index in kept), style=style)
    return table
