"""Negative control of the site report: one site split at random in two, many times. Nothing may differ.

    nnunet-fedharm sites report -d 910 -o report
    python benchmarks/site_report_control.py report/features.csv --site A [--splits 100]

Each split deals the site's patients to two sites of equal size and runs the report's own statistics on their features of the
foreground, z-scored. A test at level .05 may find a difference in 5 of 100 splits.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.differences.summary import summarize
from nnunet_fedharm.sites.features.table import FOREGROUND, SCALES, FeatureTable
from nnunet_fedharm.sites.features.table_files import read_table

PERMUTATIONS = 99
FORESTS = 4
"""Splits whose random forest gets a null too, of 19 permutations: it is the slow one."""


def halves(table: FeatureTable, generator: np.random.Generator) -> FeatureTable:
    """The site's rows under two made-up sites, a patient's cases together."""
    patients = sorted({row.patient for row in table.rows})
    side = dict(zip(patients, generator.permutation(len(patients)) % 2, strict=True))
    return FeatureTable(
        tuple(replace(row, site="XY"[side[row.patient]]) for row in table.rows), table.names, table.values
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--site", required=True)
    parser.add_argument("--splits", type=int, default=100)
    arguments = parser.parse_args()
    table = read_table(arguments.features)
    channel = table.rows[0].channel
    table = table.part(channel, FOREGROUND, SCALES[0], site=arguments.site).where(lambda row: not row.travelling)
    generator = np.random.default_rng(0)
    significant, shares, discriminant, forest, kernel, forest_null, claims = [], [], [], [], [], [], []
    for split in tqdm(range(arguments.splits), desc="Splits"):
        options = StatisticsOptions(
            seed=split,
            bootstrap=0,
            permutations=PERMUTATIONS,
            mmd_permutations=199,
            forest_permutations=19 if split < FORESTS else 0,
        )
        (part,) = find_differences(halves(table, generator), options=options)
        q = np.array([feature.q for feature in part.features if feature.q is not None])
        significant.append(bool((q < 0.05).any()))
        shares.append(float((q < 0.05).mean()))
        trees, linear = part.classifiers
        forest.append(trees.accuracy.value)
        discriminant.append((linear.accuracy.value, linear.p))
        if trees.p is not None:
            forest_null.append(trees.p)
        kernel.append(part.pairs[0].mmd_p)
        claims.append(not summarize([part], [])[0].startswith("No difference"))
    linear_p = np.array([p for _, p in discriminant], dtype=float)
    print("| of the random splits | |\n|---|---|")
    print(f"| splits, patients | {arguments.splits}, {len(table.rows)} |")
    print(f"| splits with any feature at q < .05 | {np.mean(significant):.3f} |")
    print(f"| share of features at q < .05 | {np.mean(shares):.4f} |")
    print(f"| accuracy of the discriminant (chance .5) | {np.mean([a for a, _ in discriminant]):.3f} |")
    print(f"| its p <= .05 | {np.mean(linear_p <= 0.05):.3f} |")
    print(f"| accuracy of the random forest | {np.mean(forest):.3f} |")
    print(
        f"| its p, {len(forest_null)} splits: smallest, median | {min(forest_null):.2f}, {np.median(forest_null):.2f} |"
    )
    print(f"| kernel distance: p <= .05 | {np.mean(np.array(kernel, dtype=float) <= 0.05):.3f} |")
    print(f"| splits whose first sentence says that the sites differ | {np.mean(claims):.3f} |")


if __name__ == "__main__":
    main()
