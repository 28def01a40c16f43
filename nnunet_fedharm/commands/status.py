"""`nnunet-fedharm status`: how a federation is going, read from the server's event log."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.watch.reading import STALLED_AFTER_S, Reading, read_run, server_root
from nnunet_fedharm.federation.watch.view import RunView

HELP = (
    "How a federation is going: round, sites, who is late or set aside, bytes, losses, Dice, epsilon. Exit status 1 where it \
failed, stopped or stalled."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run is, and how it is shown."""
    add_run_arguments(parser)
    parser.add_argument("--watch", action="store_true", help="refresh until the run ends or Ctrl-C")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for other programs")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write the curves as TensorBoard event files too"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and when it counts as stalled."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--root", type=Path, help="folder with sites/ and server/, as for federate")
    where.add_argument(
        "--server-root", type=Path, metavar="DIR", help="the server's own folder, or the folder of `server init`"
    )
    parser.add_argument(
        "--stalled-after",
        type=float,
        default=STALLED_AFTER_S,
        metavar="S",
        help=f"seconds without an event after which a run counts as stalled (default: {STALLED_AFTER_S:.0f})",
    )


def reader(args: argparse.Namespace) -> Callable[[], RunView]:
    """Reads the run that the options name; refuses at once where there is none."""
    for name in ("every", "stalled_after"):
        if not getattr(args, name) > 0:
            raise FederationError(f"--{name.replace('_', '-')} must be > 0, got {getattr(args, name):g}.")
    folder = server_root(args.root, args.server_root)
    before = Reading()
    return lambda: read_run(folder, stalled_after_s=args.stalled_after, before=before)


def run(args: argparse.Namespace) -> int:
    """Show it; 1 where somebody should look after it."""
    from nnunet_fedharm.evaluation.watch.terminal import follow, make_console, show

    read, console = reader(args), make_console()
    with ExitStack() as stack:
        if args.tensorboard is not None:
            read = _exporting(read, args.tensorboard, stack)
        view = follow(read, console, every_s=args.every) if args.watch else read()
        if args.json:
            print(json.dumps(dataclasses.asdict(view), default=_plain))
        elif not args.watch or console.is_terminal:  # the live view's screen is gone at its end
            show(view, console)
    return int(view.is_bad())


def _exporting(read: Callable[[], RunView], folder: Path, stack: ExitStack) -> Callable[[], RunView]:
    from nnunet_fedharm.evaluation.watch.tensorboard import TensorBoardExport

    export = TensorBoardExport(folder)
    stack.callback(export.close)

    def reading() -> RunView:
        view = read()
        export.write(view)
        return view

    return reading


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
