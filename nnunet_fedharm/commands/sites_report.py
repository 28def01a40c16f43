"""`nnunet-fedharm sites report`: how different the sites of a raw dataset are, as scanned and harmonized."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_fedharm.commands import sites_report_federated as federated
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.nnunet_root import environment_paths
from nnunet_fedharm.sites.files import read_dataset_json

if TYPE_CHECKING:
    from nnunet_fedharm.differences.findings import Findings
    from nnunet_fedharm.differences.options import Progress, StatisticsOptions
    from nnunet_fedharm.evaluation.site_report.build import ReportOptions

HELP = "measure how different the sites are, and write a page, JSON and CSV about it"

FOLDER = "site_report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", "--dataset", help="raw dataset folder, or its number or name in nnUNet_raw")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the report (default: nnUNet_results/DATASET/site_report, or DATASET_site_report here where "
        "nnUNet_results is not set)",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="results folders TRAINER__PLANS__CONFIGURATION of our trainers: the same volumes harmonized by each, side by "
        "side; {site} in a path stands for each site's name",
    )
    parser.add_argument(
        "-np", "--num-processes", type=int, default=min(8, os.cpu_count() or 1), help="worker processes"
    )
    parser.add_argument(
        "--cases-per-site",
        type=int,
        metavar="N",
        help="measure at most N cases of each site, one a patient, spread over their names, and as many travelling subjects "
        "(default: all)",
    )
    parser.add_argument("--image-region", action="store_true", help="features of the whole body in the image too")
    parser.add_argument("--channels", nargs="+", metavar="NAME", help="channels of dataset.json (default: all)")
    parser.add_argument(
        "--permutations",
        type=int,
        metavar="N",
        help="permuted sites behind each p (default: a number for each test, in the report's settings); the slow nulls of the "
        "forest and of the network on slices take no more than by default",
    )
    parser.add_argument("--bootstrap", type=int, metavar="N", help="draws behind each interval (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    parser.add_argument("--no-slices", action="store_true", help="no pictures of patients, no classifier on slices")
    parser.add_argument("--device", default="cpu", help="where --model runs: cpu, cuda, mps (default: %(default)s)")
    federated.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print what it says and where it is."""
    # Imported here: scikit-learn, torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.differences.summary import describe
    from nnunet_fedharm.evaluation.site_report.files import write_report

    if args.findings:
        findings, page = _from_findings(args, write_report)
    elif args.root:
        findings, folder = federated.federated_findings(args)
        page = write_report(findings, args.output or folder)
    elif args.dataset:
        findings, page = _pooled(args, write_report)
    else:
        raise DataError("Say what to report on: -d DATASET, -d DATASET --root ROOT, or --findings REPORT_JSON.")
    print("\n".join(describe(findings)))
    failed = len(findings.failures)
    if failed:
        print(f"{failed} measurement{'' if failed == 1 else 's'} failed; the page lists which and why.")
    print(f"\nThe page: {page}")
    return 0


def _pooled(args: argparse.Namespace, write: Callable[..., Path]) -> tuple[Findings, Path]:
    from nnunet_fedharm.commands.datasets import find_raw_dataset
    from nnunet_fedharm.evaluation.site_report.build import build_report

    dataset = find_raw_dataset(args.dataset)
    output = args.output or default_output(dataset)
    options = report_options(args, dataset)
    with progress_bar() as progress:
        report = build_report(dataset, output, models=args.model, options=options, progress=progress)
    return report.findings, write(report.findings, output, tables=report.tables, slices=report.slices)


def _from_findings(args: argparse.Namespace, write: Callable[..., Path]) -> tuple[Findings, Path]:
    findings = federated.read_findings(args.findings)
    folder = args.output or args.findings.parent
    if args.output is None and findings.mode == "pooled":
        raise DataError(
            "A pooled report.json holds no pictures, so its page would lose them. Choose another folder with -o."
        )
    return findings, write(findings, folder)


def default_output(dataset: Path) -> Path:
    """Beside the dataset's trained models, or in the current folder where nnU-Net has no results folder."""
    name = dataset.resolve().name
    try:
        return environment_paths()[2] / name / FOLDER
    except SetupError:
        return Path(f"{name}_{FOLDER}")


def report_options(args: argparse.Namespace, dataset: Path) -> ReportOptions:
    """Options of the report from the command line.

    Raises:
        DataError: a channel that dataset.json does not name, or a number that cannot be used.
    """
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.evaluation.site_report.build import ReportOptions
    from nnunet_fedharm.sites.features.options import FeatureOptions

    if args.num_processes < 1:
        raise DataError(f"-np must be at least 1, got {args.num_processes}.")
    known = [str(name) for name in read_dataset_json(dataset, site=dataset.name)["channel_names"].values()]
    unknown = [name for name in args.channels or [] if name not in known]
    if unknown:
        raise DataError(f"--channels: {dataset.name} has no channel {unknown[0]!r}. It has: {', '.join(known)}.")
    return ReportOptions(
        features=FeatureOptions(
            image_region=args.image_region, channels=tuple(args.channels) if args.channels else None
        ),
        statistics=statistics_options(args.seed, args.permutations, args.bootstrap),
        slices=not args.no_slices,
        cases_per_site=args.cases_per_site,
        num_processes=args.num_processes,
        device=str(torch_device(args.device)) if args.model else "cpu",
    )


def statistics_options(seed: int, permutations: int | None, bootstrap: int | None) -> StatisticsOptions:
    """Sizes of the resampling; `permutations` never makes the slow nulls larger than they are by default."""
    from nnunet_fedharm.differences.options import StatisticsOptions

    standard = StatisticsOptions(seed=seed)
    draws = standard.bootstrap if bootstrap is None else bootstrap
    if permutations is None:
        return StatisticsOptions(seed=seed, bootstrap=draws)
    return StatisticsOptions(
        seed=seed,
        bootstrap=draws,
        permutations=permutations,
        mmd_permutations=permutations,
        forest_permutations=min(permutations, standard.forest_permutations),
        slice_permutations=min(permutations, standard.slice_permutations),
    )


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar that says what is being computed; it appears with the first report."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def tell(what: str, share: float) -> None:
        if not bars:
            bars.append(tqdm(total=100, leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}|"))
        bars[0].set_description_str(what, refresh=False)
        bars[0].n = round(100 * share)
        bars[0].refresh()

    try:
        yield tell
    finally:
        for bar in bars:
            bar.close()
