"""The site report of a federation beside the one on pooled features: how far apart are the numbers, and what was sent.

    nnunet-fedharm sites split -d 910 -o ROOT --held-out-fraction 0
    PYTHONPATH=. python benchmarks/site_report.py --root ROOT -d 910 --secure-sums --epsilon 10 --epsilon-few 1 3 10 \\
        --output page.md

Runs `flwr run` (simulation) once in the open, with `--secure-sums` once so, and once for each epsilon on all features or on
FEW, and the pooled statistics on the very same features, which every site has kept. Writes Markdown tables. Features are
measured once and cached at the sites.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.findings import EmbeddingFinding, Findings, PartFinding
from nnunet_fedharm.differences.options import SIGNIFICANT, StatisticsOptions
from nnunet_fedharm.differences.ranks import false_discovery
from nnunet_fedharm.differences.sketch_statistics import kruskal_wallis, noisy_rank_test
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.launch import federated_findings
from nnunet_fedharm.federation.report.noise import Protection, sensitivity_of
from nnunet_fedharm.sites.features.table import FeatureTable
from nnunet_fedharm.sites.features.table_files import read_table

DISCRIMINANT = "linear discriminant on features"
FEW = (
    "firstorder_Skewness",
    "firstorder_Entropy",
    "firstorder_10Percentile",
    "glcm_Contrast",
    "glcm_Correlation",
    "glrlm_RunEntropy",
    "gldm_DependenceEntropy",
    "shape_Sphericity",
)
"""Features for a report with noise: a few of each family, and the control."""
_PATIENTS, _EPSILONS = (50, 200, 1000, 5000), (1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Line:
    """One compared number: which statistic, federated and pooled value."""

    statistic: str
    federated: float
    pooled: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="consortium folder with sites/")
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument(
        "--permutations", type=int, default=199, help="of the pooled null, and simulations of the federated one"
    )
    parser.add_argument("--epsilon", type=float, nargs="*", default=[], help="further runs with noise on all features")
    parser.add_argument(
        "--epsilon-few", type=float, nargs="*", default=[], help="further runs with noise on few features"
    )
    parser.add_argument("--secure-sums", action="store_true", help="a further run with secure sums")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    config = SiteReportConfig(root=str(args.root), dataset=args.dataset, simulations=args.permutations)
    found, seconds = timed(config)
    table = site_tables(args.root)
    pooled = pooled_parts(table, args.permutations)
    text = [*differences(found, pooled, table), "", *sent(found, seconds), ""]
    protected = [("secure sums", replace(config, secure_sums=True))] if args.secure_sums else []
    protected += [(f"epsilon {value:g}", replace(config, epsilon=value)) for value in args.epsilon]
    few: dict[str, Any] = {"regions": "foreground", "scales": "z-score", "features": ",".join(FEW), "bins": 8}
    protected += [
        (f"epsilon {value:g}, {len(FEW)} features", replace(config, epsilon=value, **few)) for value in args.epsilon_few
    ]
    text += protection([(name, *timed(one)) for name, one in protected], found) if protected else []
    text += ["", *scaling(table)]
    args.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


def timed(config: SiteReportConfig) -> tuple[Findings, float]:
    """A federated report and how long it took."""
    start = time.monotonic()
    return federated_findings(config), time.monotonic() - start


def site_tables(root: Path) -> FeatureTable:
    """The features that the sites kept in their newest report."""
    tables = []
    for site in sorted((root / "sites").iterdir()):
        newest = max((site / "fedharm" / "site-report").glob("*/features.csv"), key=lambda path: path.stat().st_mtime)
        tables.append(read_table(newest))
    names = tuple(dict.fromkeys(name for table in tables for name in table.names))
    values = [table.only(names).values if set(names) <= set(table.names) else widened(table, names) for table in tables]
    return FeatureTable(tuple(row for table in tables for row in table.rows), names, np.concatenate(values))


def widened(table: FeatureTable, names: Sequence[str]) -> np.ndarray:
    """Values with a column for every name; NaN where the table does not have it."""
    values = np.full((len(table.rows), len(names)), np.nan)
    for index, name in enumerate(names):
        if name in table.names:
            values[:, index] = table.column(name)
    return values


def pooled_parts(table: FeatureTable, permutations: int) -> dict[tuple[str, str, str], PartFinding]:
    """Statistics of the pooled table."""
    options = StatisticsOptions(
        bootstrap=200, permutations=permutations, mmd_permutations=0, forest_permutations=0, slice_permutations=0
    )
    parts = find_differences(table, options=options)
    return {(part.channel, part.region, part.scale): part for part in parts}


def lines(found: PartFinding, pooled: PartFinding, spread: dict[str, float]) -> Iterator[Line]:
    """Everything that both reports have."""
    exact = {feature.name: feature for feature in pooled.features}
    for feature in found.features:
        other = exact[feature.name]
        if feature.effect.value is None or other.effect.value is None:
            continue
        yield Line("eta squared of a feature", feature.effect.value, other.effect.value)
        if feature.effect.low is not None and other.effect.low is not None:
            yield Line("lower end of its interval", feature.effect.low, other.effect.low)
        if feature.q is not None and other.q is not None:
            yield Line("decision q < .05 (share that differs)", feature.q < SIGNIFICANT, other.q < SIGNIFICANT)
        for site, median in feature.medians.items():
            yield Line(
                "median of a site / SD", median / spread[feature.name], other.medians[site] / spread[feature.name]
            )
    for family, estimate in found.families.items():
        if estimate.value is not None and family in pooled.families and pooled.families[family].value is not None:
            yield Line("median eta squared of a family", estimate.value, float(pooled.families[family].value or 0))
    for pair, other_pair in zip(found.pairs, pooled.pairs, strict=True):
        yield Line("Kolmogorov-Smirnov of two sites", float(pair.ks.value or 0), float(other_pair.ks.value or 0))
        yield Line(
            "Wasserstein of two sites / SD",
            float(pair.wasserstein.value or 0),
            float(other_pair.wasserstein.value or 0),
        )
        for name in ("low", "high"):
            own, exact_end = getattr(pair.wasserstein, name), getattr(other_pair.wasserstein, name)
            if own is not None and exact_end is not None:
                yield Line("an end of its interval", own, exact_end)
    yield from classifier_lines(found, pooled)
    if found.embedding and pooled.embedding:
        yield from embedding_lines(found.embedding, pooled.embedding)


def classifier_lines(found: PartFinding, pooled: PartFinding) -> Iterator[Line]:
    """The discriminant of both."""
    ours = [one for one in found.classifiers if one.method == DISCRIMINANT]
    theirs = [one for one in pooled.classifiers if one.method == DISCRIMINANT]
    for one, other in zip(ours, theirs, strict=False):
        yield Line("accuracy of the discriminant", float(one.accuracy.value or 0), float(other.accuracy.value or 0))
        yield Line("mean of its null (simulated, permuted)", float(one.null_mean or 0), float(other.null_mean or 0))
        yield Line("95th percentile of its null", float(one.null_high or 0), float(other.null_high or 0))


def embedding_lines(found: EmbeddingFinding, pooled: EmbeddingFinding) -> Iterator[Line]:
    """Ellipses, in units of the largest semi-axis; the sign of an axis is arbitrary."""
    unit = max(values[2] for values in pooled.ellipses.values())
    for site, own in found.ellipses.items():
        other = pooled.ellipses[site]
        for index in (0, 1):
            yield Line("centre of an ellipse / largest semi-axis", abs(own[index]) / unit, abs(other[index]) / unit)
        for index in (2, 3):
            yield Line("semi-axis of an ellipse / largest", own[index] / unit, other[index] / unit)


def differences(found: Findings, pooled: dict[tuple[str, str, str], PartFinding], table: FeatureTable) -> list[str]:
    """The table of differences."""
    compared: dict[str, list[float]] = {}
    for part in found.variants[0].parts:
        key = (part.channel, part.region, part.scale)
        values = table.part(*key).values
        low, high = np.nanquantile(values, [0.005, 0.995], axis=0)
        spread = dict(zip(table.names, np.nanstd(np.clip(values, low, high), axis=0), strict=True))
        for line in lines(part, pooled[key], spread):
            compared.setdefault(line.statistic, []).append(abs(float(line.federated) - float(line.pooled)))
    rows = ["| statistic | compared | median difference | 95th percentile | largest |", "|---|---|---|---|---|"]
    for statistic, gaps in compared.items():
        if "share" in statistic:
            rows.append(f"| {statistic} | {len(gaps)} | | | {np.mean(gaps):.4f} |")
            continue
        middle, high, most = np.percentile(gaps, [50, 95, 100])
        rows.append(f"| {statistic} | {len(gaps)} | {middle:.4f} | {high:.4f} | {most:.4f} |")
    bounds = found.settings["bounds"]
    rows += ["", "| stated bound of a feature | median | largest |", "|---|---|---|"]
    rows += [f"| {name} | {value['median']:.3f} | {value['largest']:.3f} |" for name, value in bounds.items()]
    return rows


def sent(found: Findings, seconds: float) -> list[str]:
    """What left the site that sent most."""
    parts = len(found.variants[0].parts)
    features = len(found.variants[0].parts[0].features)
    rows = [
        f"{len(found.sites)} sites, {parts} parts of {features} features, {seconds:.0f} s with cached features.",
        "",
    ]
    rows += ["| message | holds | kB |", "|---|---|---|"]
    rows += [f"| {what} | {holds} | {size / 1000:.1f} |" for what, holds, size in found.shared]
    return rows


def protection(runs: Sequence[tuple[str, Findings, float]], plain: Findings) -> list[str]:
    """Protected reports against the plain one."""
    rows = [
        "| protection | s | kB of a site | eta squared: median and largest difference | same decision (q < .05) |",
        "|---|---|---|---|---|",
    ]
    exact = {
        (part.channel, part.region, part.scale, feature.name): feature
        for part in plain.variants[0].parts
        for feature in part.features
    }
    for name, found, seconds in runs:
        gaps: list[float] = []
        same: list[bool] = []
        for part in found.variants[0].parts:
            for feature in part.features:
                other = exact.get((part.channel, part.region, part.scale, feature.name))
                if other is None or other.effect.value is None or feature.effect.value is None:
                    continue
                gaps.append(abs(feature.effect.value - other.effect.value))
                same.append(((feature.q or 1.0) < SIGNIFICANT) == ((other.q or 1.0) < SIGNIFICANT))
        size = sum(count for _, _, count in found.shared) / 1000
        rows.append(
            f"| {name} | {seconds:.0f} | {size:.0f} | {np.median(gaps):.3f}, {max(gaps):.3f} | {np.mean(same):.0%} |"
        )
    return rows


def scaling(table: FeatureTable, *, draws: int = 5) -> list[str]:
    """How many patients noise needs: the same sites with more patients, drawn again from those that there are.

    Only the two messages with counts are simulated, with the noise that they have in a report on FEW.
    """
    part = table.part(table.parts[0][0], "foreground", "z-score").only(FEW)
    sites = [part.where(lambda row, own=site: row.site == own).values for site in part.sites]
    rows = ["| patients of a site | " + " | ".join(f"epsilon {value:g}" for value in _EPSILONS) + " |"]
    rows.append("|---" * (1 + len(_EPSILONS)) + "|")
    for patients in _PATIENTS:
        cells = []
        for epsilon in _EPSILONS:
            found = [
                one_noisy(sites, patients, epsilon, np.random.default_rng([seed, patients])) for seed in range(draws)
            ]
            gaps, same = (np.concatenate([each[index] for each in found]) for index in (0, 1))
            cells.append(f"{np.median(gaps):.3f}, {same.mean():.0%}")
        rows.append(f"| {patients} | {' | '.join(cells)} |")
    return rows


def one_noisy(
    sites: list[np.ndarray], patients: int, epsilon: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of eta squared to that without noise, and whether decisions are the same, of each feature."""
    plan, features = Protection(epsilon=epsilon), [len(FEW)]
    drawn = [own[generator.integers(len(own), size=patients)] for own in sites]

    def noisy(step: str, counts: np.ndarray) -> np.ndarray:
        return counts + generator.normal(0, plan.sigma(step, sensitivity_of(step, features)), counts.shape)

    located = np.sum([noisy("locate", sketch.locate(own)) for own in drawn], axis=0)
    sigma = plan.sigma("locate", sensitivity_of("locate", features)) * len(sites) ** 0.5
    edges = sketch.equal_edges(*sketch.located_range(sketch.above_noise(located, sigma)), 8)
    counts = np.stack([noisy("histograms", sketch.count_bins(own, edges))[:, :-1] for own in drawn])
    fine = sketch.equal_edges(*sketch.located_range(np.sum([sketch.locate(own) for own in drawn], axis=0)), 256)
    exact = kruskal_wallis(np.stack([sketch.count_bins(own, fine)[:, :-1] for own in drawn]))
    test = noisy_rank_test(
        counts, plan.sigma("histograms", sensitivity_of("histograms", features)), simulations=99, generator=generator
    )
    decisions = [false_discovery(each.p) < SIGNIFICANT for each in (test, exact)]
    return np.abs(np.nan_to_num(test.effect) - exact.effect), decisions[0] == decisions[1]


if __name__ == "__main__":
    main()
