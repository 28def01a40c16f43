"""`nnunet-fedharm evaluate`: Dice and HD95 per label, case and site."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError

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
    from nnunet_fedharm.evaluation.segmentation import format_table, score_folder, write_metrics

    dataset_json = read_json(args.dataset_json or find_dataset_json(args.predictions, args.labels))
    metrics = score_folder(
        args.predictions,
        args.labels,
        dataset_json,
        sites=None if args.sites is None else read_sites(args.sites),
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


def read_sites(path: Path) -> dict[str, str]:
    """Case -> site of a sites.json.

    Raises:
        DataError: the file has no `cases`.
    """
    content = read_json(path)
    if not isinstance(content.get("cases"), dict):
        raise DataError(f"{path} has no entry 'cases' (case -> site). See `nnunet-fedharm sites split --help`.")
    return {str(case): str(site) for case, site in content["cases"].items()}


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object.")
    return content
