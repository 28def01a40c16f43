"""`nnunet-fedharm plan`: plan and preprocess data that lies in one place, for the harmonized trainers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nnunet_fedharm.commands.options import add_dataclass_options, given_options
from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import KINDS, build_harmonizer
from nnunet_fedharm.planning.central import (
    DEFAULT_PLANS,
    CentralOptions,
    EnvironmentRoot,
    existing_plans,
    plan_central,
    train_commands,
)
from nnunet_fedharm.planning.defaults import suggest_gpu_memory
from nnunet_fedharm.planning.explain import explain, explanation_file
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import CONFIGURATIONS, CONSENSUS, Schedule, private_judge, read_section
from nnunet_fedharm.planning.situation import Device, find_device
from nnunet_fedharm.planning.start import find_checkpoint
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.start_weights import with_judge_of

HELP = (
    "Plan a harmonized segmenter for a dataset in nnUNet_raw (all sites' data in one place) and print how to train it."
)


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
    parser.add_argument(
        "--harmonizer", choices=KINDS, default="polarity", help="kind of harmonizer (default: polarity)"
    )
    parser.add_argument("--reference", default=CONSENSUS, help=f"site to map to, or {CONSENSUS} of all sites (default)")
    parser.add_argument(
        "-p", "--plans-name", default=DEFAULT_PLANS, help=f"plans file to write (default: {DEFAULT_PLANS})"
    )
    parser.add_argument(
        "-np", "--num-processes", type=int, default=min(8, os.cpu_count() or 1), help="worker processes"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="what you will train on: cpu, cuda, or auto (a GPU if this machine has one; default)",
    )
    parser.add_argument(
        "--harmonizer-options",
        default="",
        metavar="JSON",
        help="sizes and loss weights of the harmonizer, a JSON object",
    )
    parser.add_argument(
        "--explain", action="store_true", help="only print why the values of existing plans are what they are"
    )
    parser.add_argument(
        "--start-from",
        default="",
        metavar="MODEL",
        help="results folder, fold or checkpoint whose weights the training starts from, for example of public data; its network "
        "and patch are taken too, unless options size them",
    )
    parser.add_argument("--skip-check", action="store_true", help="do not read and check every image first")
    schedule = parser.add_argument_group("schedule", "what is not given is chosen for the data and the device")
    add_dataclass_options(schedule, Schedule, show_defaults=False)
    add_dataclass_options(parser.add_argument_group("size of the network"), PlanOptions, skip={"plans_name"})
    private = parser.add_argument_group(
        "differential privacy", "of the training, by patient; off unless --epsilon is given"
    )
    add_dataclass_options(private, PrivacyOptions, skip={"fingerprint_noise"})
    private.add_argument(
        "--fingerprint-noise",
        type=float,
        default=0.0,
        help="noise multiplier of the fingerprint that is planned from; -1: what costs a tenth of the budget (in squared noise); "
        "0 (default): nnU-Net's own, without noise, which the ledger names",
    )


def run(args: argparse.Namespace) -> int:
    """Plan, preprocess, measure styles, write the plans, print the training commands."""
    root, device = EnvironmentRoot.from_environment(), find_device(args.device)
    if args.explain:
        print_explained(existing_plans(root, args.dataset, args.plans_name), device)
        return 0
    size = {"gpu_memory_gb": suggest_gpu_memory(device).value, **given_options(args, PlanOptions)}
    options = CentralOptions(
        configurations=tuple(args.configurations),
        kind=args.harmonizer,
        reference=args.reference,
        schedule=given_options(args, Schedule),
        harmonizer=with_judge_of(
            args.start_from, args.harmonizer, read_harmonizer_options(args.harmonizer, args.harmonizer_options)
        ),
        device=device,
        plan=PlanOptions(**size),
        num_processes=args.num_processes,
        check=not args.skip_check,
        privacy=read_privacy(args),
        noisy_fingerprint=bool(args.fingerprint_noise),
        start_from=str(find_checkpoint(args.start_from)) if args.start_from else "",
    )
    plans = plan_central(root, args.dataset, options)
    raw = root.raw / plans["dataset_name"]
    n_labelled = len(labelled_cases(raw, read_dataset_json(raw, site="central")))
    section = read_section(plans["configurations"][options.configurations[0]])
    print(f"Plans: {root.preprocessed / plans['dataset_name'] / plans['plans_name']}.json")
    for site, style in section.styles.items():
        print(f"  site {site}: style of {style.n_cases} training cases")
    print_explained(plans, device)
    print(f"The same explanations: {explanation_file(root, plans)}")
    if options.start_from and not options.plan.sizes_network:
        print(f"Network, patch, spacing and normalization are those of {options.start_from}.")
    if against := private_judge(
        section.kind, section.harmonizer, private=section.privacy is not None, start_from=section.start_from
    ):
        print(f"warning: {against}")
    print("Train with:")
    trainer = trainer_name_for(options.kind)
    for command in train_commands(plans, options.configurations, trainer, n_labelled=n_labelled):
        print(f"  {command}")
    return 0


def read_privacy(args: argparse.Namespace) -> PrivacyOptions | None:
    """Differential privacy if --epsilon was given.

    Raises:
        PlanError: its other options were given without it.
    """
    given = {name: value for name, value in given_options(args, PrivacyOptions).items() if name != "fingerprint_noise"}
    asked = dict(given) | ({"fingerprint_noise": args.fingerprint_noise} if args.fingerprint_noise else {})
    if asked and "epsilon" not in given:
        raise PlanError(f"--{sorted(asked)[0].replace('_', '-')} belongs to differential privacy: give --epsilon too.")
    return PrivacyOptions(**given, fingerprint_noise=args.fingerprint_noise) if given else None


def read_harmonizer_options(kind: str, text: str) -> dict[str, Any]:
    """Options of the harmonizer, checked by building a small one.

    Raises:
        PlanError: not a JSON object, an unknown option, or a value out of range.
    """
    try:
        options = json.loads(text) if text else {}
    except ValueError as error:
        raise PlanError(f"--harmonizer-options is not JSON: {error}. Write it like '{{\"width\": 16}}'.") from error
    if not isinstance(options, dict):
        raise PlanError(f"--harmonizer-options must be a JSON object like '{{\"width\": 16}}', got {text}.")
    build_harmonizer(kind, options, num_channels=1, spatial_dims=3, styles=[], reference=None)
    return options


def print_explained(plans: Mapping[str, Any], device: Device) -> None:
    """A table per configuration: value, meaning, reason."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"Values for a {device} (--device if you train on another):")
    for configuration, rows in explain(plans, device).items():
        table = Table(title=configuration, title_justify="left")
        for heading, share in (("value", 2), ("", 1), ("what it means", 3), ("why here", 3)):
            table.add_column(heading, overflow="fold", ratio=share)
        for row in rows:
            table.add_row(escape(row.name), escape(str(row.value)), escape(row.meaning), escape(row.reason))
        console.print(table)
