"""The discriminant from moments is scikit-learn's, and does not care who holds the volumes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from nnunet_fedharm.differences.discriminant import (
    Discriminant,
    Moments,
    fit_discriminant,
    merge_moments,
    moments_of,
    oas_shrinkage,
)
from nnunet_fedharm.errors import DataError, ShapeError


def three_classes(seed: int = 0, n: int = 20, features: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(3), n)
    mixing = generator.normal(size=(features, features))
    return generator.normal(size=(3 * n, features)) @ mixing + codes[:, None] * generator.normal(size=features), codes


def fit(values: np.ndarray, codes: np.ndarray, shrinkage: float | None = None) -> Discriminant:
    return fit_discriminant({str(c): moments_of(values[codes == c]) for c in np.unique(codes)}, shrinkage=shrinkage)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_probabilities_of_classes_are_those_of_scikit_learn(shrinkage: float) -> None:
    """scikit-learn divides by n rather than n - k and shrinks unscaled features: both undone here."""
    values, codes = three_classes()
    values /= values.std(0)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[1 / 3] * 3).fit(values, codes)
    scores = fit(values, codes, shrinkage).scores(values) * len(values) / (len(values) - 3)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(shares / shares.sum(1, keepdims=True), reference.predict_proba(values), atol=1e-9)


def test_the_shrinkage_is_oas() -> None:
    values, _ = three_classes(n=15)
    values -= values.mean(0)
    covariance, amount = oas(values, assume_centered=True)
    assert oas_shrinkage(values.T @ values / len(values), len(values)) == pytest.approx(amount)
    assert covariance.shape == (6, 6)
    assert oas_shrinkage(np.eye(4), 10) == 1.0


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), min_size=1, max_size=4), size=st.sampled_from([1.0, 1e6]))
def test_moments_of_pieces_merge_to_those_of_the_whole(cuts: list[int], size: float) -> None:
    values = size * (5 + np.random.default_rng(1).normal(size=(30, 4)))
    pieces = [moments_of(piece) for piece in np.split(values, sorted(cuts))]
    whole, merged = moments_of(values), merge_moments(pieces)
    assert merged.n == 30
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * size**2)


def test_units_of_features_and_their_origin_change_no_prediction() -> None:
    values, codes = three_classes()
    units = np.array([1e-6, 1.0, 1e9, 3.0, 1e3, 0.1])
    np.testing.assert_allclose(
        fit(values, codes).scores(values), fit(values * units + 7 * units, codes).scores(values * units + 7 * units)
    )


def test_constant_and_collinear_features_are_harmless() -> None:
    values, codes = three_classes()
    more = np.column_stack([values, values[:, 0], np.full(len(values), 0.1)])
    found = fit(more, codes)
    assert np.isfinite(found.scores(more)).all()
    assert found.importances()[-1] == 0
    np.testing.assert_array_equal(
        fit(np.column_stack([values, np.ones(60)]), codes).predict(more[:, :7] * 1.0),
        fit(values, codes).predict(values),
    )


def test_a_feature_without_spread_inside_the_classes_decides() -> None:
    """Voxel spacing: the same for all of a site's volumes."""
    values, codes = three_classes()
    assert (
        fit(np.column_stack([values * 0 + np.random.default_rng(0).normal(size=values.shape), codes]), codes).predict(
            np.column_stack([values * 0, codes])
        )
        == codes
    ).all()
    assert (fit(codes[:, None].astype(float), codes).predict(codes[:, None].astype(float)) == codes).all()


def test_more_features_than_volumes_still_tell_classes() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat([0, 1], 10)
    train, test = (generator.normal(size=(20, 80)) + 1.5 * codes[:, None] * (np.arange(80) < 8) for _ in range(2))
    assert (fit(train, codes).predict(test) == codes).mean() > 0.85


def test_what_cannot_be_fitted_is_refused() -> None:
    one, none = moments_of(np.ones((1, 2))), moments_of(np.ones((0, 2)))
    with pytest.raises(DataError, match="two classes"):
        fit_discriminant({"A": one, "B": none})
    with pytest.raises(DataError, match="two volumes"):
        fit_discriminant({"A": one, "B": one})
    with pytest.raises(DataError, match="constant"):
        fit_discriminant({"A": moments_of(np.ones((3, 2))), "B": one})
    with pytest.raises(DataError, match="share"):
        fit_discriminant({"A": moments_of(np.eye(2)), "B": one}, shrinkage=2.0)
    with pytest.raises(DataError, match="finite"):
        moments_of(np.full((2, 2), np.nan))
    with pytest.raises(ShapeError, match="features cannot be merged"):
        merge_moments([one, moments_of(np.ones((1, 3)))])
    with pytest.raises(ShapeError, match="fit together"):
        Moments(1, np.ones(2), np.ones((3, 3)))
