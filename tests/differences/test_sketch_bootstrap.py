"""Patients drawn from histograms and correlations against the bootstrap of the patients themselves."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.discriminant import moments_of
from nnunet_fedharm.differences.sketch_bootstrap import bootstrap, copula_of
from nnunet_fedharm.differences.sketch_statistics import cut_of, kruskal_wallis

FEATURES, REPLICATES = 30, 150
EDGES = sketch.equal_edges(np.full(FEATURES, -4.0), np.full(FEATURES, 6.0), 64)


def tables(shared: float) -> list[np.ndarray]:
    """Three sites whose features share a factor: without it medians over features would hardly vary."""
    generator = np.random.default_rng(0)
    return [
        0.4 * index
        + np.sqrt(shared) * generator.normal(size=(n, 1))
        + np.sqrt(1 - shared) * generator.normal(size=(n, FEATURES))
        for index, n in enumerate((40, 35, 30))
    ]


def counts_of(values: np.ndarray) -> np.ndarray:
    return sketch.count_bins(values, EDGES)[:, :-1]


def from_patients(sites: list[np.ndarray]) -> np.ndarray:
    """(replicates, F) effects of resampled patients."""
    generator = np.random.default_rng(1)
    drawn = [[own[generator.integers(len(own), size=len(own))] for own in sites] for _ in range(REPLICATES)]
    return np.array([kruskal_wallis(np.stack([counts_of(own) for own in one])).effect for one in drawn])


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_single_features_and_medians_over_them_spread_as_with_resampled_patients(shared: float) -> None:
    sites = tables(shared)
    counts = np.stack([counts_of(own) for own in sites])
    copulas = [
        copula_of(own, moments_of(values), tuple(range(FEATURES))) for own, values in zip(counts, sites, strict=True)
    ]
    draws = bootstrap(
        copulas,
        EDGES,
        cut_of(counts.sum(0), EDGES),
        replicates=REPLICATES,
        generator=np.random.default_rng(2),
    )
    exact = from_patients(sites)
    assert draws.effect.std(0).mean() == pytest.approx(exact.std(0).mean(), rel=0.15)
    assert np.median(draws.effect, axis=1).std() == pytest.approx(np.median(exact, axis=1).std(), rel=0.35)
    assert draws.ks.shape == draws.wasserstein.shape == (3, REPLICATES, FEATURES)
    assert np.isfinite(draws.wasserstein).all()


def test_without_correlations_features_are_drawn_apart() -> None:
    sites = tables(0.7)
    counts = np.stack([counts_of(own) for own in sites])
    apart = [copula_of(own, None, ()) for own in counts]
    draws = bootstrap(apart, EDGES, cut_of(counts.sum(0), EDGES), replicates=60, generator=np.random.default_rng(2))
    assert np.median(draws.effect, axis=1).std() < 0.5 * np.median(from_patients(sites), axis=1).std()


def test_every_draw_has_the_sites_patients_and_its_missing_values() -> None:
    values = tables(0.5)[0]
    values[:7, 3] = np.nan
    counts = counts_of(values)
    copula = copula_of(counts, None, ())
    drawn = copula.draw(np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.sum(1), counts.sum(1))
    many = np.mean([copula.draw(np.random.default_rng(seed)) for seed in range(300)], axis=0)
    np.testing.assert_allclose(many, counts, atol=0.8)
