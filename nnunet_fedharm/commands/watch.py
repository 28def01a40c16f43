"""`nnunet-fedharm watch`: a page about a running federation, for a browser on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_fedharm.commands.status import add_run_arguments, reader

HELP = "A live page about a running federation, for a browser on this machine: curves, rounds, sites, who is late."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run is, and the page's port."""
    add_run_arguments(parser)
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes a free one (default: 8765)")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between refreshes (default: 5)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page to a file once, and end")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from nnunet_fedharm.evaluation.watch.page import render_watch_page
    from nnunet_fedharm.evaluation.watch.server import HOST, page_server

    read, every_s = reader(args), max(1, round(args.every))
    view = read()
    if args.page is not None:
        write_page(args.page, render_watch_page(view, every_s=every_s))
        return int(view.is_bad())
    with page_server(lambda: render_watch_page(read(), every_s=every_s), args.port) as server:
        print(f"http://{HOST}:{server.server_address[1]}/   Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
    return 0


def write_page(path: Path, page: str) -> None:
    """Write the page to a file.

    Raises:
        SetupError: it cannot be written.
    """
    from nnunet_fedharm.errors import SetupError

    try:
        path.expanduser().parent.mkdir(parents=True, exist_ok=True)
        path.expanduser().write_text(page, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"Cannot write {path}: {error.strerror}.") from error
