"""`nnunet-fedharm plan`: plan and preprocess data that lies in one place, for the harmonized trainers."""

from __future__ import annotations

import argparse
import os

from nnunet_fedharm.commands.options import add_dataclass_options, read_dataclass_options
from nnunet_fedharm.harmonizers import KINDS, LEARNED
from nnunet_fedharm.planning.central import (
    DEFAULT_PLANS,
    CentralOptions,
    EnvironmentRoot,
    plan_central,
    train_commands,
)
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import CONFIGURATIONS, CONSENSUS, Schedule, read_section
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json

HELP = (
    "Plan a harmonized segmenter for a dataset in nnUNet_raw (all sites' data in one place) and print how to train it."
)

DEFAULT_HARMONIZER_EPOCHS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", "--dataset", required=True, help="dataset number or name in nnUNet_raw")
    # Not argparse choices: 3d_lowres and cascades are refused with the reason.
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        default=["3d_fullres"],
        metavar="CONFIGURATION",
        help=" or ".join(CONFIGURATIONS),
    )
    parser.add_argument("--harmonizer", choices=KINDS, default="curve", help="kind of harmonizer (default: curve)")
    parser.add_argument("--reference", default=CONSENSUS, help=f"site to map to, or {CONSENSUS} of all sites (default)")
    parser.add_argument(
        "-p", "--plans-name", default=DEFAULT_PLANS, help=f"plans file to write (default: {DEFAULT_PLANS})"
    )
    parser.add_argument(
        "-np", "--num-processes", type=int, default=min(8, os.cpu_count() or 1), help="worker processes"
    )
    parser.add_argument("--skip-check", action="store_true", help="do not read and check every image first")
    add_dataclass_options(parser.add_argument_group("schedule"), Schedule)
    add_dataclass_options(parser.add_argument_group("size of the network"), PlanOptions, skip={"plans_name"})


def run(args: argparse.Namespace) -> int:
    """Plan, preprocess, measure styles, write the plans, print the training commands."""
    if args.harmonizer in LEARNED and not hasattr(args, "harmonizer_epochs"):
        args.harmonizer_epochs = DEFAULT_HARMONIZER_EPOCHS
    options = CentralOptions(
        configurations=tuple(args.configurations),
        kind=args.harmonizer,
        reference=args.reference,
        schedule=read_dataclass_options(args, Schedule),
        plan=read_dataclass_options(args, PlanOptions),
        num_processes=args.num_processes,
        check=not args.skip_check,
    )
    root = EnvironmentRoot.from_environment()
    plans = plan_central(root, args.dataset, options)
    raw = root.raw / plans["dataset_name"]
    n_labelled = len(labelled_cases(raw, read_dataset_json(raw, site="central")))
    section = read_section(plans["configurations"][options.configurations[0]])
    print(f"Plans: {root.preprocessed / plans['dataset_name'] / plans['plans_name']}.json")
    for site, style in section.styles.items():
        print(f"  site {site}: style of {style.n_cases} training cases")
    print("Train with:")
    for command in train_commands(plans, options.configurations, options.kind, n_labelled=n_labelled):
        print(f"  {command}")
    return 0
