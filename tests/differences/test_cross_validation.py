"""Folds that sites can deal alone, permutations that keep patients together, accuracies and their intervals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from nnunet_fedharm.differences.cross_validation import (
    accuracy_interval,
    balanced_accuracy,
    confusion,
    deal_folds,
    null_of,
    out_of_fold,
    permute_sites,
    priorities,
    resample_patients,
    stratified_folds,
)
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.errors import DataError

PATIENTS = [f"p{index // 2}" for index in range(46)]


def test_pooled_folds_are_those_that_each_site_deals_for_itself() -> None:
    sites = np.repeat([0, 1], [20, 26])
    groups = np.repeat(np.arange(23), 2)
    pooled = stratified_folds(sites, groups, priorities(PATIENTS, 7), 5)
    alone = [deal_folds(PATIENTS[:20], folds=5, seed=7), deal_folds(PATIENTS[20:], folds=5, seed=7)]
    np.testing.assert_array_equal(pooled, np.concatenate(alone))
    assert sorted(Counter(alone[1][::2].tolist()).values()) == [2, 2, 3, 3, 3]
    assert all(pooled[index] == pooled[index + 1] for index in range(0, 46, 2))
    assert deal_folds(PATIENTS, folds=5, seed=8).tolist() != deal_folds(PATIENTS, folds=5, seed=7).tolist()


def test_folds_do_not_depend_on_the_order_of_rows() -> None:
    order = np.random.default_rng(0).permutation(46)
    dealt = deal_folds(PATIENTS, folds=5, seed=0)
    np.testing.assert_array_equal(deal_folds([PATIENTS[index] for index in order], folds=5, seed=0), dealt[order])


def test_a_patient_of_two_sites_is_in_one_fold() -> None:
    sites, patients = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2])
    folds = stratified_folds(sites, patients, priorities([f"p{p}" for p in patients], 0), 3)
    assert folds[0] == folds[1]
    assert sorted(folds[::2].tolist()) == [0, 1, 2]


def test_permutations_shuffle_single_site_patients_even_beside_travelling_ones() -> None:
    generator = np.random.default_rng(0)
    sites, patients = np.array([0, 1, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2, 3])
    draws = {tuple(permute_sites(sites, patients, generator).tolist()) for _ in range(200)}
    assert all(sorted(row[:2]) == [0, 1] and row[2] == row[3] and row[4] == row[5] for row in draws)
    assert {row[2] for row in draws} == {0, 1}
    assert len(draws) == 2 * 3


def test_predictions_come_from_other_folds_of_the_same_block() -> None:
    seen: list[tuple[set[int], set[int]]] = []

    def predict(train: np.ndarray, sites: np.ndarray, test: np.ndarray) -> np.ndarray:
        seen.append((set(train.tolist()), set(test.tolist())))
        return np.zeros(len(test), dtype=int)

    blocks, folds = np.repeat([0, 1], 4), np.array([0, 0, 1, 1] * 2)
    assert (out_of_fold(predict, np.zeros(8, dtype=int), folds, blocks) == 0).all()
    assert seen == [({2, 3}, {0, 1}), ({0, 1}, {2, 3}), ({6, 7}, {4, 5}), ({4, 5}, {6, 7})]


def test_accuracy_confusion_and_interval() -> None:
    sites, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2])
    assert balanced_accuracy(sites, predicted) == pytest.approx(balanced_accuracy_score(sites, predicted))
    assert confusion(sites, predicted, ["A", "B", "C"])["A"] == {"A": 2, "B": 1, "C": 0}
    twice = balanced_accuracy(sites, predicted, np.array([[1.0, 1, 1, 1, 1, 1], [2, 0, 0, 1, 0, 1]]))
    np.testing.assert_allclose(twice, [13 / 18, 1.0])
    generator = np.random.default_rng(0)
    sites = np.repeat([0, 1], 50)
    predicted = np.r_[sites[:40], 1 - sites[40:60], sites[60:]]
    found = accuracy_interval(sites, predicted, np.arange(100), resamples=500, generator=generator)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.72, abs=0.02)
    assert found.high == pytest.approx(0.87, abs=0.02)
    assert accuracy_interval(sites, sites, np.arange(100), resamples=0, generator=generator).low is None


def test_draws_keep_each_sites_number_of_patients_and_patients_whole() -> None:
    sites, patients = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 3, 4, 5])
    drawn = resample_patients(sites, patients, 50, np.random.default_rng(0))
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 1] + drawn[:, 2] + drawn[:, 3] == 3).all()
    assert (drawn[:, 6] == 1).all()


def test_the_null_counts_the_data_itself() -> None:
    null = null_of(0.9, [0.2, 0.3, 0.9])
    assert (null.p, null.mean) == (0.5, pytest.approx(1.4 / 3))
    assert null_of(0.9, []).p is None


def test_options_refuse_what_cannot_be_and_streams_differ_by_purpose() -> None:
    with pytest.raises(DataError, match="folds must be at least 2"):
        StatisticsOptions(folds=1)
    with pytest.raises(DataError, match="permutations cannot be negative"):
        StatisticsOptions(permutations=-1)
    options = StatisticsOptions()
    assert options.to_dict()["bootstrap"] == options.bootstrap
    assert options.generator("a").random() == options.generator("a").random() != options.generator("b").random()
