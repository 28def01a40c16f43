"""Findings from what the exchanges brought: the same form as a pooled report's, without anything about a case."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.cross_validation import null_of
from nnunet_fedharm.differences.findings import (
    ALL_SITES,
    ClassifierFinding,
    EmbeddingFinding,
    Estimate,
    Failure,
    FeatureFinding,
    Findings,
    PairFinding,
    PartFinding,
    VariantFinding,
)
from nnunet_fedharm.differences.options import SIGNIFICANT, digest
from nnunet_fedharm.differences.panel import judged
from nnunet_fedharm.differences.ranks import centred_interval, false_discovery, median_over
from nnunet_fedharm.differences.site_classifier import DISCRIMINANT, top_features
from nnunet_fedharm.differences.sketch import quantile
from nnunet_fedharm.differences.sketch_bootstrap import Draws, bootstrap, copula_of
from nnunet_fedharm.differences.sketch_classifier import (
    accuracy_interval,
    balanced_accuracy,
    ellipse,
    importances,
    simulated_null,
)
from nnunet_fedharm.differences.sketch_statistics import (
    RankTest,
    cut_of,
    display_histogram,
    kruskal_wallis,
    ks_bounds,
    noisy_rank_test,
    rank_test_from_sums,
    tie_correction,
    wasserstein,
)
from nnunet_fedharm.federation.report.noise import sensitivity_of
from nnunet_fedharm.federation.report.parts import PartState
from nnunet_fedharm.federation.report.settings import PartBounds, card_of, notes_of, settings_of, shared_of
from nnunet_fedharm.federation.report.steps import Steps
from nnunet_fedharm.sites.features.table import family_of

Array = npt.NDArray[np.float64]

DISPLAY_BINS = 20
TOP = 10
_ELLIPSE_PATIENTS = 4


def findings_of(steps: Steps) -> Findings:
    """The whole report of the sites that are in."""
    built = [_part(state, steps) for state in steps.parts]
    return Findings(
        dataset=str(next(iter(steps.sites.descriptions.values()))["dataset"]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mode="federated",
        settings=settings_of(steps, [bounds for _, bounds in built]),
        sites=[card_of(site, steps) for site in _sites_in(steps)],
        variants=[VariantFinding("as scanned", [finding for finding, _ in built])],
        failures=[
            Failure(site, "", "could not be measured; the site's own report says why")
            for site, numbers in sorted(steps.numbers.items())
            for _ in range(numbers.get("n_failed", 0))
        ],
        shared=shared_of(steps),
    )


def _sites_in(steps: Steps) -> list[str]:
    """Sites that are in, and those that fell silent after they had sent histograms, which stay in the report."""
    counted = {site for state in steps.parts for site in state.counts if site in steps.sites.descriptions}
    return sorted({*steps.sites.names, *counted})


def _part(state: PartState, steps: Steps) -> tuple[PartFinding, PartBounds]:
    sites = list(state.counts)
    counts = np.maximum(np.stack([state.counts[site][:, :-1] for site in sites]), 0)
    names = state.part.names
    purpose = "/".join(state.part.key)
    test = _rank_test(state, steps, purpose)
    q = false_discovery(test.p)
    draws = _draws(state, counts, steps, purpose)
    effects = np.zeros((0, len(names))) if draws is None else draws.effect
    features = [
        _feature(state, counts, sites, index, test, float(q[index]), effects[:, index]) for index in range(len(names))
    ]
    pairs, ks, distance = _pairs(state, counts, sites, draws)
    families = np.array([family_of(name) for name in names])
    finding = PartFinding(
        channel=state.part.channel,
        region=state.part.region,
        scale=state.part.scale,
        n={site: round(state.patients[site]) for site in sites},
        families={
            str(family): centred_interval(
                float(median_over(test.effect[families == family])),
                median_over(effects[:, families == family]),
                most=1.0,
            )
            for family in dict.fromkeys(families.tolist())
        },
        share_significant={
            str(family): float((q[rows] < SIGNIFICANT).mean())
            for family in dict.fromkeys(families.tolist())
            if (rows := (families == family) & np.isfinite(q)).any()
        },
        features=features,
        pairs=pairs,
        classifiers=_classifiers(state, steps, purpose),
        embedding=_embedding(state),
        agreement=[],
        combat=None,
        outliers=[],
        notes=notes_of(steps, state),
    )
    return finding, PartBounds(test.error, ks, distance)


def _rank_test(state: PartState, steps: Steps, purpose: str) -> RankTest:
    counts = np.stack([own[:, :-1] for own in state.counts.values()])
    if steps.plan.sums:
        pooled = state.pooled()[:, :-1]
        return rank_test_from_sums(
            squares=state.ranks[0],
            slack=state.ranks[1],
            total=pooled.sum(1),
            sites=np.rint(state.ranks[2]),
            tie=tie_correction(pooled),
        )
    if not steps.plan.on:
        return kruskal_wallis(counts)
    sigma = steps.plan.sigma("histograms", sensitivity_of("histograms", [len(one.part.names) for one in steps.parts]))
    return noisy_rank_test(
        counts, sigma, simulations=max(steps.config.simulations, 19), generator=_generator(steps, purpose, "noise")
    )


def _draws(state: PartState, counts: Array, steps: Steps, purpose: str) -> Draws | None:
    if steps.config.bootstrap == 0 or steps.plan.on or steps.plan.sums:
        return None
    copulas = [
        copula_of(own, state.moments.get(site), state.joint) for site, own in zip(state.counts, counts, strict=True)
    ]
    return bootstrap(
        copulas,
        state.edges,
        cut_of(counts.sum(0), state.edges),
        replicates=steps.config.bootstrap,
        generator=_generator(steps, purpose, "intervals"),
    )


def _feature(
    state: PartState, counts: Array, sites: list[str], index: int, test: RankTest, q: float, draws: Array
) -> FeatureFinding:
    own, edges = counts[:, index], state.edges[index]
    present = [row for row in range(len(sites)) if own[row].sum() > 0.5]
    whole = np.hstack([own, np.zeros((len(sites), 1))])
    plain, shares = display_histogram(own, edges, DISPLAY_BINS)
    return FeatureFinding(
        name=state.part.names[index],
        family=family_of(state.part.names[index]),
        p=_number(test.p[index]),
        q=_number(q),
        effect=centred_interval(float(test.effect[index]), draws, most=1.0),
        medians={sites[row]: float(quantile(whole[row][None], edges[None], 0.5)[0]) for row in present},
        n=round(float(own.sum())),
        edges=plain.tolist(),
        # A picture of all sites together would show nothing of their differences.
        histogram={} if sites == [ALL_SITES] else {sites[row]: shares[row].tolist() for row in present},
    )


def _pairs(
    state: PartState, counts: Array, sites: list[str], draws: Draws | None
) -> tuple[list[PairFinding], Array, Array]:
    """Findings of each two sites, and the largest error of both distances over the features."""
    names = state.part.names
    counted, families = judged(names), np.array([family_of(name) for name in names])
    cut = cut_of(counts.sum(0), state.edges)
    pairs, ks_error, distance_error = [], np.zeros(len(names)), np.zeros(len(names))
    nothing = np.zeros((0, len(names)))
    for index, (first, second) in enumerate(combinations(range(len(sites)), 2)):
        ks, highest = ks_bounds(counts[first], counts[second])
        distance, error = wasserstein(counts[first], counts[second], state.edges, cut)
        ks = np.where(np.isfinite(distance), ks, np.nan)
        ks_error, distance_error = np.fmax(ks_error, highest - ks), np.fmax(distance_error, error)
        drawn = (nothing, nothing) if draws is None else (draws.ks[index], draws.wasserstein[index])
        pairs.append(
            PairFinding(
                first=sites[first],
                second=sites[second],
                ks=centred_interval(
                    float(median_over(ks[counted])), median_over(drawn[0][:, counted]), least=0.0, most=1.0
                ),
                wasserstein=centred_interval(
                    float(median_over(distance[counted])), median_over(drawn[1][:, counted]), least=0.0
                ),
                by_family={
                    str(family): float(middle)
                    for family in dict.fromkeys(families.tolist())
                    if np.isfinite(middle := median_over(distance[families == family]))
                },
                features=[
                    (name, value)
                    for name, value in top_features(names, np.nan_to_num(distance, nan=-1.0))[:TOP]
                    if value >= 0
                ],
            )
        )
    return pairs, ks_error, distance_error


def _classifiers(state: PartState, steps: Steps, purpose: str) -> list[ClassifierFinding]:
    if not state.confusion or state.axes is None:
        return []
    sites = list(state.confusion)
    confusion = np.stack([state.confusion[site] for site in sites])
    sizes = [sum(fold.n for fold in state.folds[site]) for site in sites]
    accuracy = balanced_accuracy(confusion)
    low, high = accuracy_interval(confusion, sizes, digest(f"{steps.config.seed}/{purpose}/accuracy"))
    scores = simulated_null(
        sizes,
        state.axes.variances,
        steps.n_folds,
        simulations=steps.config.simulations,
        generator=_generator(steps, purpose, "null"),
    )
    null = null_of(accuracy, scores.tolist())
    features = importances(state.weights, state.axes.spread)
    return [
        ClassifierFinding(
            method=DISCRIMINANT,
            accuracy=Estimate(accuracy, low, high),
            chance=1 / len(sites),
            null_mean=null.mean,
            null_high=null.high,
            p=null.p,
            permutations=steps.config.simulations,
            confusion={
                site: {other: round(float(confusion[row, column])) for column, other in enumerate(sites)}
                for row, site in enumerate(sites)
            },
            n=int(sum(sizes)),
            features=top_features(state.joint_part.names, features),
        )
    ]


def _embedding(state: PartState) -> EmbeddingFinding | None:
    axes = state.axes
    if axes is None or axes.weights.shape[1] < 2:
        return None
    return EmbeddingFinding(
        method="PCA",
        axes=(f"PC 1 ({axes.explained[0]:.0%} of variance)", f"PC 2 ({axes.explained[1]:.0%})"),
        points=[],
        ellipses={
            site: ellipse(axes.moments(own)) for site, own in state.moments.items() if own.n >= _ELLIPSE_PATIENTS
        },
    )


def _generator(steps: Steps, *purpose: str) -> np.random.Generator:
    return np.random.default_rng([steps.config.seed, digest("/".join(purpose))])


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
