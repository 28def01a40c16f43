"""Findings from what the exchanges brought: the same form as a pooled report's, without anything about a case."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.cross_validation import null_of
from nnunet_fedharm.differences.findings import (
    ClassifierFinding,
    EmbeddingFinding,
    Estimate,
    Failure,
    FeatureFinding,
    Findings,
    PairFinding,
    PartFinding,
    SiteCard,
    VariantFinding,
)
from nnunet_fedharm.differences.options import SIGNIFICANT, digest
from nnunet_fedharm.differences.panel import judged
from nnunet_fedharm.differences.ranks import false_discovery, median_over
from nnunet_fedharm.differences.site_classifier import DISCRIMINANT, top_features
from nnunet_fedharm.differences.sketch import quantile
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
    effect_intervals,
    kruskal_wallis,
    ks_bounds,
    noisy_rank_test,
    wasserstein,
)
from nnunet_fedharm.federation.measure_noise import SHARES, sensitivity_of
from nnunet_fedharm.federation.measure_parts import PartState
from nnunet_fedharm.federation.measure_steps import Steps
from nnunet_fedharm.sites.features.table import family_of

Array = npt.NDArray[np.float64]

DISPLAY_BINS = 20
TOP = 10
_ELLIPSE_PATIENTS = 4
_HOLDS = {
    "measure": "counts on a public grid of every feature; numbers of patients, cases, failures; settings",
    "histograms": "counts of every feature on common edges, in all zooms",
    "moments": "sums and sums of products of standardised features over all patients",
    "folds": "the same on principal axes for each fold",
    "classify": "patients taken for each site",
    "keep": "that the findings are stored",
}
NOTES = (
    "Patients are the units: several cases of a patient count as one, their mean. Numbers come from histograms and sums; "
    "settings.bounds says how far they can be from those of the pooled features.",
    "Not in a federated report: kernel distance, random forest, network on slices, travelling subjects and ComBat, which need "
    "single cases of several sites in one place; outliers, which each site finds in its own report.",
)


@dataclass(frozen=True)
class PartBounds:
    """Largest differences from pooled statistics that the exchanged numbers leave possible, over the features of a part."""

    effect: Array
    ks: Array
    wasserstein: Array


def findings_of(steps: Steps) -> Findings:
    """The whole report of the sites that are in."""
    built = [_part(state, steps) for state in steps.parts]
    return Findings(
        dataset=str(next(iter(steps.sites.descriptions.values()))["dataset"]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mode="federated",
        settings=_settings(steps, [bounds for _, bounds in built]),
        sites=[_card(site, steps) for site in steps.sites.names],
        variants=[VariantFinding("as scanned", [finding for finding, _ in built])],
        failures=[
            Failure(site, "", "could not be measured; the site's own report says why")
            for site, numbers in sorted(steps.numbers.items())
            for _ in range(numbers.get("n_failed", 0))
        ],
        shared=[
            (what, _HOLDS[what], max(sizes.values())) for what, sizes in steps.sites.sent.items() if what in _HOLDS
        ],
    )


def _part(state: PartState, steps: Steps) -> tuple[PartFinding, PartBounds]:
    sites = list(state.counts)
    counts = np.maximum(np.stack([state.counts[site][:, :-1] for site in sites]), 0)
    names = state.part.names
    purpose = "/".join(state.part.key)
    test = _rank_test(state, steps, purpose)
    q = false_discovery(test.p)
    intervals = _intervals(counts, steps, purpose)
    features = [
        _feature(state, counts, sites, index, test, float(q[index]), intervals[index]) for index in range(len(names))
    ]
    pairs, ks, distance = _pairs(state, counts, sites)
    families = np.array([family_of(name) for name in names])
    finding = PartFinding(
        channel=state.part.channel,
        region=state.part.region,
        scale=state.part.scale,
        n={site: round(state.patients[site]) for site in sites},
        families={
            str(family): Estimate(_number(median_over(test.effect[families == family])))
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
        notes=[*_left_out(steps, state), *state.notes, *NOTES, *_noise_notes(steps)],
    )
    return finding, PartBounds(test.error, ks, distance)


def _rank_test(state: PartState, steps: Steps, purpose: str) -> RankTest:
    counts = np.stack([own[:, :-1] for own in state.counts.values()])
    if not steps.plan.on:
        return kruskal_wallis(counts)
    sigma = steps.plan.sigma("histograms", sensitivity_of("histograms", [len(one.part.names) for one in steps.parts]))
    return noisy_rank_test(
        counts, sigma, simulations=max(steps.config.simulations, 19), generator=_generator(steps, purpose, "noise")
    )


def _intervals(counts: Array, steps: Steps, purpose: str) -> Array:
    if steps.config.bootstrap == 0 or steps.plan.on:
        return np.full((counts.shape[1], 2), np.nan)
    return effect_intervals(
        counts, replicates=steps.config.bootstrap, generator=_generator(steps, purpose, "intervals")
    )


def _feature(
    state: PartState, counts: Array, sites: list[str], index: int, test: RankTest, q: float, interval: Array
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
        effect=Estimate(_number(test.effect[index]), _number(interval[0]), _number(interval[1])),
        medians={sites[row]: float(quantile(whole[row][None], edges[None], 0.5)[0]) for row in present},
        n=round(float(own.sum())),
        edges=plain.tolist(),
        histogram={sites[row]: shares[row].tolist() for row in present},
    )


def _pairs(state: PartState, counts: Array, sites: list[str]) -> tuple[list[PairFinding], Array, Array]:
    """Findings of each two sites, and the largest error of both distances over the features."""
    names = state.part.names
    counted, families = judged(names), np.array([family_of(name) for name in names])
    cut = cut_of(counts.sum(0), state.edges)
    pairs, ks_error, distance_error = [], np.zeros(len(names)), np.zeros(len(names))
    for first, second in combinations(range(len(sites)), 2):
        ks, highest = ks_bounds(counts[first], counts[second])
        distance, error = wasserstein(counts[first], counts[second], state.edges, cut)
        ks = np.where(np.isfinite(distance), ks, np.nan)
        ks_error, distance_error = np.maximum(ks_error, highest - np.nan_to_num(ks)), np.fmax(distance_error, error)
        pairs.append(
            PairFinding(
                first=sites[first],
                second=sites[second],
                ks=Estimate(_number(median_over(ks[counted]))),
                wasserstein=Estimate(_number(median_over(distance[counted]))),
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


def _card(site: str, steps: Steps) -> SiteCard:
    scanner = steps.sites.descriptions[site].get("scanner", {})
    numbers = steps.numbers.get(site, {})
    about = round(max((state.patients.get(site, 0.0) for state in steps.parts), default=0.0))
    vendor, field, sequence = (scanner.get(key) for key in ("vendor", "field", "sequence"))
    return SiteCard(
        site=site,
        vendor=None if vendor is None else str(vendor),
        field=float(field) if isinstance(field, int | float) else None,
        sequence=None if sequence is None else str(sequence),
        n_cases=numbers.get("n_cases", about),
        n_patients=numbers.get("n_patients", about),
        n_labelled=numbers.get("n_labelled", about),
    )


def _left_out(steps: Steps, state: PartState) -> list[str]:
    notes = [f"Left out: {reason.rstrip('.')}." if site in reason else f"Left out: {site}, {reason.rstrip('.')}."
             for site, reason in sorted(steps.sites.left_out.items())]  # fmt: skip
    without = sorted(set(steps.sites.names) - set(state.patients))
    return [*notes, f"Too few patients here at {', '.join(without)}."] if without else notes


def _noise_notes(steps: Steps) -> list[str]:
    if not steps.plan.on:
        return []
    return [
        f"Everything that left a site carries noise: epsilon {steps.plan.epsilon:g} at delta {steps.plan.delta:g} for a patient, "
        "all messages together. p-values compare with sites that are alike under the same noise; numbers of patients are "
        "approximate; distances and medians are blurred by noise that nothing takes out."
    ]


def _settings(steps: Steps, bounds: list[PartBounds]) -> dict[str, Any]:
    config, plan = steps.config, steps.plan
    features = [len(state.part.names) for state in steps.parts]
    settings: dict[str, Any] = {
        "features": steps.settings,
        "versions": next(iter(steps.sites.descriptions.values()))["versions"],
        "federation": {
            name: getattr(config, name)
            for name in ("seed", "min_patients", "bins", "dimensions", "simulations", "bootstrap", "secure_sums")
        }
        | {"folds": steps.n_folds, "null": "simulated from pooled moments"},
        "left_out": dict(sorted(steps.sites.left_out.items())),
    }
    if plan.on:
        settings["noise"] = {
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "unit": "patient",
            "sigma": {step: plan.sigma(step, sensitivity_of(step, features)) for step in SHARES},
        }
    else:
        settings["bounds"] = {
            name: {"median": _percentile(bounds, name, 50), "largest": _percentile(bounds, name, 100)}
            for name in ("effect", "ks", "wasserstein")
        }
    return settings


def _percentile(bounds: list[PartBounds], name: str, percent: float) -> float | None:
    values = np.concatenate([getattr(own, name) for own in bounds]) if bounds else np.zeros(0)
    values = values[np.isfinite(values)]
    return float(np.percentile(values, percent)) if values.size else None


def _generator(steps: Steps, *purpose: str) -> np.random.Generator:
    return np.random.default_rng([steps.config.seed, digest("/".join(purpose))])


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
