"""`nnunet-fedharm sites split|check|report`: one nnU-Net root per site, checks of raw data, differences between sites."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_fedharm.commands import sites_report
from nnunet_fedharm.commands.datasets import find_raw_dataset
from nnunet_fedharm.sites.checks import N_FOLDS, check_raw_dataset
from nnunet_fedharm.sites.split import SplitOptions, split_dataset

HELP = "Split a dataset of several sites into one nnU-Net root per site, check raw data, or measure how different sites are."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `split`, `check` and `report`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="split|check|report")
    split = actions.add_parser("split", help="write ROOT/sites/<site>/ for every site of sites.json, and ROOT/server/")
    split.add_argument("-d", "--dataset", required=True, help="raw dataset folder, or its number or name in nnUNet_raw")
    split.add_argument("-o", "--output", type=Path, required=True, metavar="ROOT", help="folder of the consortium")
    split.add_argument(
        "--labelled-sites", nargs="+", metavar="SITE", help="sites that keep their labels (default: all)"
    )
    split.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.2,
        metavar="X",
        help="share of each site for testing (default: 0.2)",
    )
    split.add_argument("--seed", type=int, default=0, help="seed of the choice of held-out cases (default: 0)")
    how = split.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", default=True, help="link the files where possible (default)")
    how.add_argument("--copy", dest="link", action="store_false", help="copy the files")
    check = actions.add_parser("check", help="read every case and name the first defect")
    check.add_argument("-d", "--dataset", required=True, help="raw dataset folder, or its number or name in nnUNet_raw")
    check.add_argument("--site", help="name of the site in messages (default: the folder that holds its nnU-Net root)")
    check.add_argument("-np", "--num-processes", type=int, default=min(8, os.cpu_count() or 1), help="worker processes")
    report = actions.add_parser("report", help=sites_report.HELP, description=sites_report.HELP)
    sites_report.add_arguments(report)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    if args.action == "report":
        return sites_report.run(args)
    dataset = find_raw_dataset(args.dataset)
    if args.action == "check":
        site = args.site or dataset.resolve().parent.parent.name
        check_raw_dataset(dataset, site=site, num_processes=args.num_processes)
        print(f"{dataset} can be used.")
        return 0
    options = SplitOptions(
        labelled_sites=None if args.labelled_sites is None else tuple(args.labelled_sites),
        held_out_fraction=args.held_out_fraction,
        seed=args.seed,
        link=args.link,
    )
    shares = split_dataset(dataset, args.output, options)
    print(f"{'site':<16} {'labelled':>9} {'unlabelled':>11} {'held out':>9}")
    for share in shares:
        print(f"{share.site:<16} {share.n_labelled:>9} {share.n_unlabelled:>11} {share.n_held_out:>9}")
    for share in shares:
        if share.n_left_out:
            print(
                f"{share.site}: {share.n_left_out} cases without a label are in no folder; their patients are tested."
            )
    for share in shares:
        if 0 < share.n_labelled < N_FOLDS:
            print(f"Site {share.site} has too few labelled cases for nnU-Net's {N_FOLDS} folds: use fold all.")
    return 0
