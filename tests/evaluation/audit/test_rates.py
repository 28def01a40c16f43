"""Rates of attacks against scikit-learn, scipy, and mechanisms of known epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.audit.rates import auc, clopper_pearson, largest_bound, roc, separation, tpr_at


def test_auc_is_scikit_learn_s_with_ties_too() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 6, 30) + 1.0, generator.integers(0, 6, 20) * 1.0
    truth = np.r_[np.ones(30), np.zeros(20)]
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, np.r_[members, others]))


def test_limits_are_scipy_s_exact_ones() -> None:
    for count, total in ((0, 10), (3, 10), (10, 10)):
        exact = binomtest(count, total).proportion_ci(confidence_level=0.9, method="exact")
        assert clopper_pearson(count, total, 0.05) == pytest.approx((exact.low, exact.high))


def test_a_perfect_attack_reaches_the_largest_bound_and_no_attack_none() -> None:
    members, others = np.arange(40) + 100.0, np.arange(40) * 1.0
    perfect = separation("loss", members, others, delta=1e-5)
    assert perfect.auc == 1
    assert perfect.epsilon_low == largest_bound(40, 40, delta=1e-5, confidence=0.95) > 1
    assert perfect.p_value == pytest.approx(1 / 2001)
    assert perfect.tpr_at[0.05] == 1
    none = separation("loss", others, others, delta=1e-5)
    assert none.auc == pytest.approx(0.5)
    assert none.epsilon_low == 0
    assert none.p_value > 0.3


def test_a_rate_below_one_false_positive_is_not_reported() -> None:
    members, others = np.arange(20) * 1.0, np.arange(20) * 1.0
    assert tpr_at(members, others, 0.01) is None
    assert tpr_at(members, others, 0.05) == pytest.approx(0.05)


def test_the_curve_runs_from_nothing_to_all() -> None:
    points = roc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    assert points[0] == (0, 0)
    assert points[-1] == (1, 1)
    assert (0.0, 0.5) in points


def test_randomized_response_is_not_refuted_at_its_own_epsilon() -> None:
    generator, epsilon = np.random.default_rng(1), 1.0
    chance, wrong = 1 / (1 + math.exp(-epsilon)), 0
    for seed in range(40):
        members, others = generator.random(60) < chance, generator.random(60) < 1 - chance
        wrong += separation("bit", members * 1.0, others * 1.0, delta=0, seed=seed).epsilon_low > epsilon
    assert wrong <= 4


def test_one_case_on_a_side_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        separation("loss", np.array([1.0]), np.array([1.0, 2.0]), delta=0)
