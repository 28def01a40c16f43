"""`nnunet-fedharm privacy plan|show`: the noise for a target epsilon, and what a site has spent."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_fedharm.privacy.releases import Release

HELP = "Plan the noise for a target epsilon, or show what a site has released about its patients and what that costs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `plan` and `show`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="plan|show")
    plan = actions.add_parser("plan", help="the noise multiplier with which a training stays within (epsilon, delta)")
    plan.add_argument("--epsilon", type=float, required=True, help="of the whole training")
    plan.add_argument("--delta", type=float, required=True, help="well below 1 / number of patients")
    plan.add_argument(
        "--sample-rate", type=float, default=1.0, help="chance of a patient to be drawn in a step (default: 1, all)"
    )
    plan.add_argument("--steps", type=int, required=True, help="noisy steps of the whole training")
    plan.add_argument("--site-root", type=Path, metavar="FOLDER", help="count what this site has spent before")
    show = actions.add_parser("show", help="the ledger of a site, or of all sites of a consortium")
    where = show.add_mutually_exclusive_group(required=True)
    where.add_argument("--site-root", type=Path, metavar="FOLDER", help="a site's nnU-Net root")
    where.add_argument("--root", type=Path, metavar="ROOT", help="folder with sites/<SITE>/")
    show.add_argument("--delta", type=float, default=1e-5, help="at which epsilon is counted (default: 1e-5)")
    show.add_argument("--all", action="store_true", help="every entry, not one line per kind of release")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    return _plan(args) if args.action == "plan" else _show(args)


def _plan(args: argparse.Namespace) -> int:
    # Imported here: Opacus brings torch, which --help need not wait for.
    from nnunet_fedharm.errors import PrivacyError
    from nnunet_fedharm.privacy.accounting import Noise, noise_for, rdp_epsilon
    from nnunet_fedharm.privacy.ledger import Ledger
    from nnunet_fedharm.privacy.releases import spent

    if args.site_root is not None and not args.site_root.is_dir():
        raise PrivacyError(
            f"{args.site_root} is no folder, so what its site has spent is not known. Give a site's nnU-Net root."
        )
    releases = [] if args.site_root is None else Ledger(args.site_root / "fedharm").releases()
    before = [release.noise for release in releases if release.bounded]
    noise = noise_for(args.epsilon, args.delta, sample_rate=args.sample_rate, steps=args.steps, before=before)
    planned = [*before, Noise(noise, args.sample_rate, args.steps)]
    if args.site_root is not None and not releases:
        print(f"spent before: nothing in {args.site_root}")
    if releases:
        former = spent(releases, args.delta)
        print(f"spent before: epsilon {former.epsilon:.3g} at delta {args.delta:g}")
        if former.unbounded:
            print("not counted, because released without noise: " + _names(former.unbounded))
    print(f"noise multiplier {noise:.4g} = standard deviation of the noise / clip norm of one patient")
    print(f"{args.steps} steps, each patient drawn with a chance of {args.sample_rate:g}, at delta {args.delta:g}")
    print(f"epsilon {args.epsilon:g} at most (by RDP alone {rdp_epsilon(planned, args.delta):.3g})")
    print(meaning(args.epsilon, args.delta))
    return 0


def _show(args: argparse.Namespace) -> int:
    from nnunet_fedharm.errors import PrivacyError

    roots = [args.site_root] if args.site_root is not None else sorted((args.root / "sites").glob("*"))
    roots = [root for root in roots if root.is_dir()]
    if not roots:
        where = args.site_root if args.site_root is not None else args.root / "sites"
        raise PrivacyError(f"{where} holds no site. Give the nnU-Net root of a site, or a folder with sites/<SITE>/.")
    for number, root in enumerate(roots):
        if number:
            print()
        _show_site(root, args.delta, every=args.all)
    return 0


def _show_site(root: Path, delta: float, *, every: bool) -> None:
    from nnunet_fedharm.privacy.ledger import Ledger
    from nnunet_fedharm.privacy.releases import ANNOUNCED

    ledger = Ledger(root / "fedharm")
    releases = ledger.releases()
    print(f"{root.resolve().name}: {len(releases)} entries in {ledger.path}")
    if not releases:
        print("Nothing has been entered yet.")
        return
    print(f"  {'last':<20} {'mechanism':<20} {'noise':>7} {'rate':>6} {'steps':>6}  release")
    for row in releases if every else _by_kind(releases):
        noise = f"{row.noise_multiplier:.3g}" if row.bounded else "-"
        rate = f"{row.sample_rate:.3g}" if row.bounded else "-"
        note = f" ({row.note})" if row.note else ""
        print(f"  {row.time[:19]:<20} {row.mechanism:<20} {noise:>7} {rate:>6} {row.steps:>6}  {row.what}{note}")
    public = dict.fromkeys(release.what for release in releases if release.mechanism == ANNOUNCED)
    if public:
        print(f"Public by agreement, not hidden by any noise: {', '.join(public)}.")
    total = ledger.spent(delta)
    if any(release.bounded for release in releases):
        print(f"Releases with noise: epsilon {total.epsilon:.3g} at delta {delta:g}, unit patient.")
        print(meaning(total.epsilon, delta))
    if total.alone > total.epsilon:
        print(
            f"If all other sites and the server work together: epsilon {total.alone:.3g}, by this site's own share of noise "
            "that was added with them."
        )
    if total.unbounded:
        print(
            "Total: unbounded. Without noise left this site: "
            + ", ".join(dict.fromkeys(map(kind, total.unbounded)))
            + "."
        )
        print("No epsilon says what these tell about a patient.")
    else:
        print(f"Total: epsilon {total.total:.3g} at delta {delta:g}.")


def meaning(epsilon: float, delta: float) -> str:
    """What a pair of epsilon and delta promises a patient, in one sentence."""
    bound = math.exp(min(epsilon, 50.0))
    factor = f"{bound:.3g}" if bound < 1000 else f"{float(f'{bound:.2g}'):,.0f}"
    factor = factor if epsilon < 50 else f"e^{epsilon:.0f}, which is no protection"
    return (
        f"Meaning: with or without one patient's data, every outcome is as likely within a factor of {factor}, "
        f"but for outcomes of a chance of about {delta:g}."
    )


def kind(what: str) -> str:
    """A release's name without its number: rounds of a phase are one kind."""
    words = what.split()
    return " ".join(words[:-1]) if words and words[-1].isdigit() else what


def _names(releases: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(kind(what) for what in releases))


def _by_kind(releases: list[Release]) -> list[Release]:
    """One line for equal releases of one kind: its steps added up, the time of the last one."""
    rows: dict[tuple[object, ...], Release] = {}
    for release in releases:
        name = kind(release.what)
        key = (name, release.mechanism, release.noise_multiplier, release.sample_rate, release.note)
        steps = release.steps + (rows[key].steps if key in rows else 0)
        rows[key] = replace(release, what=name, steps=steps)
    return list(rows.values())
