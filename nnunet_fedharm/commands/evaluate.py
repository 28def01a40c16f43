"""`nnunet-fedharm evaluate`: Dice and HD95 per label, case and site."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.sites.registry import SitesFile

HELP = "Dice and HD95 per label, case and site, with bootstrap intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-p", "--predictions", type=Path, required=True, help="folder of predicted label maps")
    parser.add_argument("-g", "--labels", type=Path, required=True, help="folder of reference label maps")
    parser.add_argument("--sites", type=Path, help="sites.json (case -> site); without it all cases are one site")
    parser.add_argument(
        "--dataset-json", type=Path, help="default: dataset.json beside the predictions, the labels, or one folder up"
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file; default: metrics.json in the prediction folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument("--num-processes", type=int, default=2, help="cases scored at once (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Score, print the table, write the JSON file."""
    # Imported here: scipy and nnU-Net's readers take a second that --help need not wait for.
    from nnunet_fedharm.evaluation.segmentation import format_table, score_folder, write_metrics

    dataset_json = read_json(
        args.dataset_json or find_dataset_json(args.predictions, args.labels), what="The dataset description"
    )
    metrics = score_folder(
        args.predictions,
        args.labels,
        dataset_json,
        sites=None if args.sites is None else SitesFile.load(args.sites).cases,
        seed=args.seed,
        num_processes=args.num_processes,
    )
    output = args.output or args.predictions / "metrics.json"
    write_metrics(metrics, output)
    sys.stdout.write(f"{format_table(metrics)}\n\nWritten to {output}\n")
    return 0


def find_dataset_json(predictions: Path, labels: Path) -> Path:
    """dataset.json as nnUNetv2_predict leaves it beside predictions, or as it lies beside labelsTr.

    Raises:
        DataError: there is none.
    """
    places = [folder / "dataset.json" for folder in (predictions, labels, labels.resolve().parent)]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"No dataset.json in {predictions} or beside {labels}. Name it with --dataset-json.")
