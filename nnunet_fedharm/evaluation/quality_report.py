"""Everything that `nnunet-fedharm quality` measures, as one JSON-able report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_fedharm.evaluation import quality_summary as summary
from nnunet_fedharm.evaluation.paired_files import find_pairs
from nnunet_fedharm.evaluation.quality import Folders, measure_pairs
from nnunet_fedharm.evaluation.quality_table import conventions, pair_rows


def quality_report(
    folders: Folders,
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
