"""Embedding and classifier from moments against the same things computed on pooled values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.decomposition import PCA

from nnunet_fedharm.differences.discriminant import fit_discriminant, merge_moments, moments_of
from nnunet_fedharm.differences.sketch_classifier import (
    accuracy_interval,
    balanced_accuracy,
    ellipse,
    fold_models,
    fold_moments,
    folds_of,
    importances,
    moments_from_sums,
    predicted_sites,
    principal_axes,
    simulated_null,
)

SITES = ("A", "B", "C")


def tables(shift: float = 1.0, n: int = 40, features: int = 12) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(features, features))
    return {
        site: generator.normal(size=(n, features)) @ mixing + shift * index * mixing[0]
        for index, site in enumerate(SITES)
    }


def test_axes_from_merged_moments_are_those_of_pooled_principal_components() -> None:
    by_site = tables()
    pooled = np.concatenate(list(by_site.values()))
    axes = principal_axes(merge_moments([moments_of(values) for values in by_site.values()]), 5)
    scaled = (pooled - pooled.mean(0)) / pooled.std(0, ddof=1)
    reference = PCA(5).fit(scaled)
    np.testing.assert_allclose(axes.explained, reference.explained_variance_ratio_, rtol=1e-10)
    np.testing.assert_allclose(np.abs(axes.project(pooled)), np.abs(reference.transform(scaled)), rtol=1e-6, atol=1e-9)
    assert axes.weights.shape == (12, 5)


def test_an_ellipse_is_that_of_the_projected_cases() -> None:
    by_site = tables()
    axes = principal_axes(merge_moments([moments_of(values) for values in by_site.values()]), 5)
    projected = axes.project(by_site["B"])[:, :2]
    x, y, long, short, angle = ellipse(axes.moments(moments_of(by_site["B"])))
    np.testing.assert_allclose([x, y], projected.mean(0), atol=1e-9)
    direction = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    along = (projected - projected.mean(0)) @ direction
    assert long == pytest.approx(np.sqrt(along.var(ddof=1) * chi2.ppf(0.95, 2)))
    assert long >= short


def test_constant_features_have_no_weight_and_no_importance() -> None:
    values = tables()["A"]
    values[:, 3] = 7.0
    axes = principal_axes(moments_of(values), 20)
    assert axes.weights.shape[1] == 11
    assert not axes.weights[3].any()
    weights = np.random.default_rng(0).normal(size=(5, 12, 3))
    found = importances(weights, axes.spread)
    assert found[3] == 0
    assert (np.delete(found, 3) > 0).all()


def test_the_federated_classifier_predicts_what_the_pooled_one_predicts() -> None:
    by_site = tables(shift=0.8)
    axes = principal_axes(merge_moments([moments_of(values) for values in by_site.values()]), 6)
    projected = {site: axes.project(values) for site, values in by_site.items()}
    patients = [f"p{index // 2}" for index in range(40)]
    fold = {site: folds_of(patients, 5, np.random.default_rng(index)) for index, site in enumerate(SITES)}
    weights, biases = fold_models({site: fold_moments(projected[site], fold[site], 5) for site in SITES})
    for held_out in range(5):
        model = fit_discriminant({site: moments_of(projected[site][fold[site] != held_out]) for site in SITES})
        for site in SITES:
            chosen = fold[site] == held_out
            found = predicted_sites(projected[site], fold[site], weights, biases)[chosen]
            np.testing.assert_array_equal(found, model.predict(projected[site][chosen]))
            scores = projected[site][chosen] @ weights[held_out] + biases[held_out]
            np.testing.assert_allclose(scores, model.scores(projected[site][chosen]), atol=1e-9)


def test_folds_keep_patients_whole_and_are_of_equal_size() -> None:
    patients = [f"p{index % 11}" for index in range(33)]
    fold = folds_of(patients, 5, np.random.default_rng(0))
    by_patient = {
        patient: {int(f) for p, f in zip(patients, fold, strict=True) if p == patient} for patient in patients
    }
    assert all(len(found) == 1 for found in by_patient.values())
    sizes = np.bincount([next(iter(found)) for found in by_patient.values()], minlength=5)
    assert sizes.max() - sizes.min() <= 1


def test_the_simulated_null_is_that_of_permuted_sites() -> None:
    """Labels of one population are permuted many times; the null of normal patients has the same mean and 95th percentile."""
    generator = np.random.default_rng(3)
    sizes, folds = (30, 30, 30), 5
    variances = np.array([4.0, 2.0, 1.0, 0.5])
    values = np.sign(generator.normal(size=(90, 4))) * generator.gamma(1.0, size=(90, 4)) * np.sqrt(variances / 2)
    permuted = []
    for _ in range(200):
        order = generator.permutation(90)
        parts = {str(k): values[order[30 * k : 30 * k + 30]] for k in range(3)}
        fold = np.arange(30) % folds
        weights, biases = fold_models({site: fold_moments(part, fold, folds) for site, part in parts.items()})
        rows = [np.bincount(predicted_sites(part, fold, weights, biases), minlength=3) for part in parts.values()]
        permuted.append(balanced_accuracy(np.array(rows)))
    axes = principal_axes(moments_of(values), 4)
    null = simulated_null(sizes, axes.variances, folds, simulations=200, generator=np.random.default_rng(4))
    assert np.mean(null) == pytest.approx(np.mean(permuted), abs=0.015)
    assert np.percentile(null, 95) == pytest.approx(np.percentile(permuted, 95), abs=0.03)


def test_accuracy_counts_sites_equally_and_its_interval_narrows_with_patients() -> None:
    confusion = np.array([[90, 10], [5, 5]])
    assert balanced_accuracy(confusion) == pytest.approx(0.7)
    few, many = (accuracy_interval(confusion, sizes, 0) for sizes in ((10, 10), (1000, 1000)))
    assert few[0] < many[0] < 0.7 < many[1] < few[1]


def test_moments_from_sums_are_the_moments() -> None:
    values = tables()["B"]
    upper = np.triu_indices(12)
    found = moments_from_sums(len(values), values.sum(0), (values.T @ values)[upper])
    exact = moments_of(values)
    np.testing.assert_allclose(found.mean, exact.mean)
    np.testing.assert_allclose(found.scatter, exact.scatter, atol=1e-9)
    assert moments_from_sums(0.3, values.sum(0), (values.T @ values)[upper]).n == 0


def test_sums_with_noise_still_give_a_scatter() -> None:
    values = tables()["B"]
    noise = np.random.default_rng(0).normal(0, 100, size=78)
    found = moments_from_sums(40.2, values.sum(0), (values.T @ values)[np.triu_indices(12)] + noise)
    assert np.linalg.eigvalsh(found.scatter).min() > -1e-6
