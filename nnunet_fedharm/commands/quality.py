"""`nnunet-fedharm quality`: how good harmonized volumes are, against travelling subjects."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from nnunet_fedharm.sites.registry import SitesFile

HELP = "harmonization quality against travelling subjects: fidelity, structure, radiomics, site classifier, lesions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    folder = parser.add_argument_group("folders of NIfTI images CASE_0000.nii.gz, ...")
    folder.add_argument("--reference", type=Path, required=True, help="the same subjects at the reference site")
    folder.add_argument("--before", type=Path, required=True, help="volumes as scanned")
    folder.add_argument("--after", type=Path, required=True, help="volumes as `nnunet-fedharm harmonize` wrote them")
    folder = parser.add_argument_group("folders of NIfTI label maps CASE.nii.gz")
    folder.add_argument(
        "--labels", type=Path, help="region of features and lesions; default: features of the foreground"
    )
    folder.add_argument("--masks", type=Path, help="foregrounds; default: where the reference image is not zero")
    folder.add_argument("--predictions-before", type=Path, help="an independent segmenter's output on the scans")
    folder.add_argument("--predictions-after", type=Path, help="its output on the harmonized volumes")
    parser.add_argument(
        "--pairs", type=Path, help='JSON {"CASE": {"reference": "CASE", "site": "B"}, ...}; default: same names'
    )
    parser.add_argument("--sites", type=Path, help="sites.json (case -> site), for cases whose pair states no site")
    parser.add_argument(
        "--region", type=int, nargs="+", help="label values that make up the region; default: all but 0"
    )
    parser.add_argument("--no-radiomics", action="store_true", help="leave out features and the site classifier")
    parser.add_argument(
        "--permutations",
        type=at_least(0),
        default=100,
        help="null of the site classifier; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--trees", type=at_least(1), default=50, help="trees of the site classifier (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and classifier (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("quality.json"), help="default: %(default)s")


def at_least(smallest: int) -> Callable[[str], int]:
    """Parser of a whole number with a lower bound."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is too small; use {smallest} or more")
        return value

    return whole_number


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON file."""
    # Imported here: scikit-learn and scikit-image take seconds that --help need not wait for.
    from nnunet_fedharm.evaluation.quality import Folders
    from nnunet_fedharm.evaluation.quality_report import quality_report
    from nnunet_fedharm.evaluation.quality_table import format_quality
    from nnunet_fedharm.evaluation.segmentation import write_metrics

    folders = Folders(
        reference=args.reference,
        before=args.before,
        after=args.after,
        labels=args.labels,
        masks=args.masks,
        predictions_before=args.predictions_before,
        predictions_after=args.predictions_after,
    )
    report = quality_report(
        folders,
        pairs_file=args.pairs,
        sites=None if args.sites is None else SitesFile.load(args.sites).cases,
        region_values=args.region,
        radiomics=not args.no_radiomics,
        permutations=args.permutations,
        trees=args.trees,
        seed=args.seed,
    )
    write_metrics(report, args.output)
    sys.stdout.write(f"{format_quality(report)}\n\nWritten to {args.output}\n")
    return 0
