"""What nnU-Net plans from fingerprints with noise: spacing, patch, batch, and the constants that CT would be normalized with.

    python docs/experiments/private-fingerprint/plans.py --data DATA [--seeds 100] [--output table.md]

DATA is the folder of Dataset910_HippocampusSites (A, B, C, D). Each site keeps 40 patients; the fingerprint takes all of epsilon.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.histogram import INTENSITY
from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.private_merge import merge_private
from nnunet_fedharm.planning.private_summary import PrivateSummary, private_summary
from nnunet_fedharm.planning.summary import CaseSummary, combine_cases, read_cases
from nnunet_fedharm.privacy.gaussian import gaussian_sigma
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

Cases = list[tuple[str, CaseSummary]]
DELTA = 1e-5
CT = ("mean", "std", "percentile_00_5", "percentile_99_5")


def by_site(data: Path, patients: int) -> dict[str, Cases]:
    registry = SitesFile.load(data / SITES_FILE)
    found: dict[str, Cases] = defaultdict(list)
    for name, summary in read_cases(data, site="all")[1]:
        site = registry.site_of(name)
        if site is not None and len(found[site]) < patients:
            found[site].append((name, summary))
    return dict(sorted(found.items()))


def plan(fingerprint: dict[str, Any], cases: int) -> dict[str, Any]:
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    with tempfile.TemporaryDirectory() as folder:
        return plan_federation(
            fingerprint,
            description,
            dataset_name="Dataset910_HippocampusSites",
            reader="SimpleITKIO",
            root=NnunetRoot(Path(folder)),
            options=PlanOptions(),
        )["configurations"]


def told(sites: dict[str, Cases], *, summed: bool = False, measured: tuple[int, ...] = ()) -> list[PrivateSummary]:
    """Summaries without noise; `summed`: one of all sites, as if noise came on the sum only."""
    parts = {"all": [case for cases in sites.values() for case in cases]} if summed else sites
    return [
        private_summary(cases, {}, site=site, measured=measured, noise_multiplier=0, noise=SecureNoise())
        for site, cases in parts.items()
    ]


def noisy(summaries: Sequence[PrivateSummary], noise: float) -> dict[str, Any]:
    """Fingerprint after a fresh draw of the noise."""
    drawn = [
        replace(
            summary,
            noise_multiplier=noise,
            sums=tuple(np.add(summary.sums, noise * SecureNoise().wide(len(summary.sums))).tolist()),
        )
        for summary in summaries
    ]
    return merge_private(drawn, n_channels=1)


def as_ct(sites: dict[str, Cases]) -> dict[str, Cases]:
    """The same cases with intensities of an organ in CT: means of 100 +- 20 HU, standard deviations of 60 +- 10."""
    generator = np.random.default_rng(0)
    levels = norm.ppf((np.arange(1000) + 0.5) / 1000)

    def marked(case: CaseSummary) -> CaseSummary:
        values = generator.normal(100, 20) + generator.normal(60, 10) * levels
        codes, counts = np.unique(INTENSITY.codes(values), return_counts=True)
        shares = {int(code): count / values.size for code, count in zip(codes, counts, strict=True)}
        return replace(case, channels=(((values.mean(), values.var(), values.min(), values.max()), shares),))

    return {site: [(name, marked(case)) for name, case in cases] for site, cases in sites.items()}


def medians(fingerprint: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.median(fingerprint["spacings"], axis=0), np.median(fingerprint["shapes_after_crop"], axis=0)


def row(name: str, prints: Sequence[dict[str, Any]], exact: dict[str, Any], cases: int, drawn: int) -> str:
    spacing, shape = medians(exact)
    spacings, shapes = (np.stack(values) for values in zip(*map(medians, prints), strict=True))
    right = np.mean(np.abs(np.log2(spacings / spacing)) < 0.07)
    off = np.abs(np.log2(spacings / spacing)).max(axis=1)
    shape_error = np.abs(np.log2(shapes / shape))
    plans = [plan(fingerprint, cases) for fingerprint in prints[:drawn]]
    patches = sorted({"x".join(map(str, planned["3d_fullres"]["patch_size"])) for planned in plans})
    voxels = sorted(math.prod(planned["3d_fullres"]["patch_size"]) for planned in plans)
    batches = sorted({planned["3d_fullres"]["batch_size"] for planned in plans})
    shown = patches[0] if len(patches) == 1 else f"{len(patches)} of {drawn} kinds"
    cells = [
        name,
        f"{right:.0%}",
        f"{2 ** np.quantile(off, 0.9) - 1:.0%}",
        f"{2 ** np.median(shape_error) - 1:.0%}, {2 ** np.quantile(shape_error, 0.9) - 1:.0%}",
        shown,
        f"{voxels[0] / 1000:.0f} to {voxels[-1] / 1000:.0f}",
        f"{batches[0]} to {batches[-1]}",
    ]
    return "| " + " | ".join(cells) + " |"


def constants(prints: Sequence[dict[str, Any]], exact: dict[str, Any]) -> str:
    wanted = exact["foreground_intensity_properties_per_channel"]["0"]
    values = [[p["foreground_intensity_properties_per_channel"]["0"][k] - wanted[k] for p in prints] for k in CT]
    return " | ".join(f"{np.mean(v):+.0f} ± {np.std(v):.0f}" for v in values)


def exact_of(sites: dict[str, Cases]) -> dict[str, Any]:
    return merge_summaries(
        [combine_cases((case for _, case in own), site=site, n_channels=1) for site, own in sites.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=100, help="draws of the noise; a fifth of them is planned")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    sites = by_site(args.data, args.patients)
    cases = sum(map(len, sites.values()))
    exact, organs = exact_of(sites), as_ct(sites)
    truth, told_organs = exact_of(organs), told(organs, measured=(0,))
    wanted = truth["foreground_intensity_properties_per_channel"]["0"]
    quiet = [noisy(told_organs, 0.0)]
    lines = [
        "| fingerprint | spacing right | spacing off, 9 of 10 below | shape off, median and 9 of 10 below | 3D patch | "
        "thousand voxels | batch |",
        "|---|---|---|---|---|---|---|",
        row("exact", [exact], exact, cases, 1),
        row("bounded, no noise", quiet, exact, cases, 1),
    ]
    ct = [
        "| epsilon | mean | std | percentile .5 | percentile 99.5 |",
        "|---|---|---|---|---|",
        "| exact | " + " | ".join(f"{wanted[name]:.0f}" for name in CT) + " |",
        f"| bounded, no noise | {constants(quiet, truth)} |",
    ]
    for summed in (False, True):
        summaries = told(sites, summed=summed)
        for epsilon in (2.0, 1.0, 0.5):
            sigma = gaussian_sigma(epsilon, DELTA)
            prints = [noisy(summaries, sigma) for _ in range(args.seeds)]
            name = f"epsilon {epsilon:g}" + (", noise on the sum" if summed else "")
            lines.append(row(name, prints, exact, cases, args.seeds // 5))
            print(lines[-1], f"sigma {sigma:.3g}", flush=True)
            if not summed:
                ct.append(f"| {epsilon:g} | {constants([noisy(told_organs, sigma) for _ in prints], truth)} |")
    text = "\n".join([*lines, "", *ct]) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
