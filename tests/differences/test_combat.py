"""ComBat is that of neuroCombat and of the paper's equations, and held out it does what correcting features can do."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest

from nnunet_fedharm.differences.combat import fit_combat
from nnunet_fedharm.differences.corrected import cross_fitted, held_out_combat
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.errors import DataError
from tests.differences.tables import panel

FAST = StatisticsOptions(bootstrap=50, trees=10, forest_permutations=9)


def two_batches(
    seed: int = 0, sizes: tuple[int, ...] = (15, 9, 6), features: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    shift, spread = generator.normal(0.5, 1, (len(sizes), features)), generator.uniform(0.5, 2, (len(sizes), 1))
    values = generator.normal(size=(len(codes), features)) * spread[codes] + shift[codes]
    return 10 + values * generator.uniform(0.1, 30, features), codes


def test_the_correction_is_that_of_neurocombat() -> None:
    """neuroCombat 0.2.12 stops at a relative change of 1e-4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pytest.importorskip("neuroCombat")
        pandas = pytest.importorskip("pandas")
        values, codes = two_batches()
        with contextlib.redirect_stdout(io.StringIO()):
            found = reference.neuroCombat(values.T, pandas.DataFrame({"site": codes}), "site")
    ours = fit_combat(values, codes)
    np.testing.assert_allclose(ours.shift, found["estimates"]["gamma.star"], atol=1e-3)
    np.testing.assert_allclose(ours.spread, found["estimates"]["delta.star"], rtol=1e-3)
    np.testing.assert_allclose(ours.apply(values, codes) / ours.scale, found["data"].T / ours.scale, atol=3e-3)


def test_the_correction_of_held_out_volumes_is_that_of_pycombat() -> None:
    reference = pytest.importorskip("pycombat")
    values, codes = two_batches(2)
    train = np.arange(len(codes)) % 2 == 0
    expected = reference.Combat().fit(values[train], codes[train]).transform(values[~train].copy(), codes[~train])
    ours = fit_combat(values[train], codes[train])
    np.testing.assert_allclose(ours.apply(values[~train], codes[~train]) / ours.scale, expected / ours.scale, atol=3e-3)


def test_the_estimates_solve_the_equations_of_johnson() -> None:
    values, codes = two_batches(1)
    found = fit_combat(values, codes)
    for code in range(3):
        z = (values[codes == code] - values.mean(0)) / found.scale
        n, gamma, delta = len(z), z.mean(0), z.var(0, ddof=1)
        tau, m, v = gamma.var(ddof=1), delta.mean(), delta.var(ddof=1)
        shift, spread = found.shift[code], found.spread[code]
        np.testing.assert_allclose(shift, (n * tau * gamma + spread * gamma.mean()) / (n * tau + spread), atol=1e-6)
        residual = ((z - shift) ** 2).sum(0) / 2
        np.testing.assert_allclose(
            spread, ((m**3 + m * v) / v + residual) / (n / 2 + (m**2 + 2 * v) / v - 1), rtol=1e-6
        )


def test_sites_that_move_all_features_alike_are_shrunk_to_that_move() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat([0, 1], 8)
    values = generator.normal(size=(16, 200)) + 2.0 * codes[:, None]
    found = fit_combat(values, codes)
    raw = np.array([((values[codes == code] - found.centre) / found.scale).mean(0) for code in (0, 1)])
    assert found.shift.std(axis=1).max() < 0.6 * raw.std(axis=1).min()
    np.testing.assert_allclose(found.shift.mean(1), raw.mean(1), atol=0.05)


def test_features_of_equal_spread_and_constant_sites_are_no_error_and_bad_tables_are() -> None:
    values = np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0], [6.0, 6.0]])
    assert np.isfinite(fit_combat(values, np.array([0, 0, 1, 1])).apply(values, np.array([0, 0, 1, 1]))).all()
    values[2:] = 7.0
    assert np.isfinite(fit_combat(values, np.array([0, 0, 1, 1])).apply(values, np.array([0, 0, 1, 1]))).all()
    with pytest.raises(DataError, match="two volumes"):
        fit_combat(values, np.array([0, 0, 0, 1]))
    with pytest.raises(DataError, match="two or more"):
        fit_combat(values[:, :1], np.array([0, 0, 1, 1]))
    with pytest.raises(DataError, match="varies within no site"):
        fit_combat(np.array([[1.0, 0], [1, 1], [2, 0], [2, 1]]), np.array([0, 0, 1, 1]))


def test_no_patient_takes_part_in_its_own_correction() -> None:
    found = panel({"A": 10, "B": 10}, shift={"B": 2.0})
    halves = np.arange(20) % 2
    before = cross_fitted(found, halves)
    found.values[0] += 100.0
    after = cross_fitted(found, halves)
    np.testing.assert_array_equal(before[halves == 0][1:], after[halves == 0][1:])
    assert not np.allclose(before[halves == 1], after[halves == 1])


def test_held_out_combat_takes_a_shift_away_and_leaves_what_is_no_shift() -> None:
    shifted = held_out_combat(panel({"A": 30, "B": 30}, shift={"B": 2.0}), FAST, purpose="t")
    assert shifted.share_significant[0] is not None
    assert shifted.share_significant[1] is not None
    assert shifted.share_significant[0] > 0.5 > 0.1 > shifted.share_significant[1]
    assert shifted.classifier is not None
    assert shifted.classifier.p is not None
    assert shifted.classifier.p > 0.05
    twisted = panel({"A": 40, "B": 40})
    half = twisted.values.shape[1] // 2
    partner = twisted.values[:, :half]
    twisted.values[:, half:] = np.where(twisted.codes[:, None] == 0, 1, -1) * partner + 0.1 * twisted.values[:, half:]
    left = held_out_combat(twisted, FAST, purpose="t")
    assert left.classifier is not None
    assert left.classifier.accuracy.value is not None
    assert left.classifier.accuracy.value > 0.6


def test_small_sites_are_named_not_crashed_on() -> None:
    found = held_out_combat(panel({"A": 8, "B": 8, "C": 2}), FAST, purpose="t")
    assert found.note.endswith("Without C (fewer than 6 patients).")
    assert found.classifier is not None
    assert set(found.classifier.confusion) == {"A", "B"}
    none = held_out_combat(panel({"A": 8, "B": 2}), FAST, purpose="t")
    assert none.classifier is None
    assert "two sites" in none.note
    flat = panel({"A": 8, "B": 8}, names=("glcm_a", "glcm_b"))
    flat.values[:, 1] = flat.codes
    assert "fewer than two features" in held_out_combat(flat, FAST, purpose="t").note
