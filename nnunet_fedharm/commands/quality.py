"""`nnunet-fedharm quality`: how good harmonized volumes are, against travelling subjects."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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


def quality_report(
    folders: Any,
    *,
    pairs_file: Path | None = None,
    sites: dict[str, str] | None = None,
    region_values: list[int] | None = None,
    radiomics: bool = True,
    permutations: int = 100,
    trees: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Everything about the pairs of some folders, JSON-able.

    Args:
        folders: `evaluation.quality.Folders`.
        pairs_file, sites: see `evaluation.paired_files.find_pairs`.
        region_values: label values of the region; None takes all but 0.
        radiomics: measure features and train the site classifier.
        permutations, trees: of the site classifier.
        seed: of bootstrap and classifier.
        progress: show bars.

    Raises:
        DataError: a file is missing, unreadable or on another grid; the message names it.
        SetupError: pyradiomics is needed and not installed.
    """
    from tqdm import tqdm

    from nnunet_fedharm.evaluation import quality_summary as summary
    from nnunet_fedharm.evaluation.paired_files import find_pairs
    from nnunet_fedharm.evaluation.quality import measure_pairs
    from nnunet_fedharm.evaluation.quality_table import conventions, pair_rows

    pairs = find_pairs(folders.before, folders.reference, pairs_file=pairs_file, sites=sites)
    found = measure_pairs(pairs, folders, region_values=region_values, radiomics=radiomics, progress=progress)
    with tqdm(total=2 * (1 + permutations), desc="classify sites", disable=not (progress and radiomics)) as bar:
        classifier = summary.summarize_classifier(
            found,
            reference_site=reference_site(sites, [pair.reference for pair in pairs]),
            seed=seed,
            permutations=permutations,
            trees=trees,
            tick=partial(bar.update, 1),
        )
    return {
        "conventions": {**conventions(), "region_values": region_values, "seed": seed, "permutations": permutations},
        "sites": summary.summarize_metrics(found, seed=seed),
        "features": summary.summarize_features(found, seed=seed),
        "site_classifier": classifier,
        "lesions": summary.summarize_lesions(found, seed=seed),
        "pairs": pair_rows(found),
    }


def reference_site(sites: dict[str, str] | None, references: list[str]) -> str:
    """The one site that sites.json gives for the reference cases, else "reference"."""
    known = {(sites or {}).get(case) for case in references}
    return str(known.pop()) if len(known) == 1 and None not in known else "reference"
