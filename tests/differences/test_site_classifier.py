"""The site classifier finds sites that are there, and none that are not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold

from nnunet_fedharm.differences.site_classifier import permute_sites, site_accuracy
from nnunet_fedharm.errors import DataError

FAST = {"seed": 0, "permutations": 19, "trees": 10}


def travelling(shift: float, n_patients: int = 10) -> tuple[np.ndarray, list[str], list[str]]:
    """Every patient at three sites; the site moves one of four features, the patient moves all."""
    generator = np.random.default_rng(3)
    patient_effect = generator.normal(size=(n_patients, 4))
    rows, sites, patients = [], [], []
    for patient in range(n_patients):
        for index, site in enumerate("ABC"):
            row = patient_effect[patient] + generator.normal(0, 0.1, 4)
            row[2] += shift * index
            rows.append(row)
            sites.append(site)
            patients.append(f"p{patient}")
    return np.array(rows), sites, patients


def test_a_site_that_moves_a_feature_is_recognised_beyond_its_null() -> None:
    found = site_accuracy(*travelling(shift=8.0), **FAST)
    assert found.balanced_accuracy > 0.85
    assert found.balanced_accuracy > found.null_high
    assert found.p_value == pytest.approx(1 / 20)
    assert (found.n_volumes, found.n_patients, found.n_sites) == (30, 10, 3)


def test_sites_without_an_effect_stay_at_the_null() -> None:
    found = site_accuracy(*travelling(shift=0.0), **FAST)
    assert found.p_value > 0.05
    assert found.balanced_accuracy <= found.null_high + 0.1


def test_patients_of_one_site_each_work_and_patient_marks_do_not_leak() -> None:
    """Two volumes of each patient are near twins; without grouping a forest would learn patients by heart."""
    sites = np.repeat(["A", "B"] * 8, 2).tolist()
    patients = np.repeat([f"p{index}" for index in range(16)], 2).tolist()
    found = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        effect = np.repeat(generator.normal(size=(16, 3)), 2, axis=0)
        found.append(site_accuracy(effect + generator.normal(0, 0.01, effect.shape), sites, patients, **FAST))
    assert np.mean([each.balanced_accuracy for each in found]) < 0.7
    assert sum(each.p_value <= 0.05 for each in found) <= 1


def test_the_accuracy_agrees_with_another_grouped_split() -> None:
    features, sites, patients = travelling(shift=2.0, n_patients=20)
    codes = np.array(["ABC".index(site) for site in sites])
    predicted = np.zeros_like(codes)
    for train, test in GroupKFold(5).split(features, codes, patients):
        forest = RandomForestClassifier(50, random_state=1).fit(features[train], codes[train])
        predicted[test] = forest.predict(features[test])
    found = site_accuracy(features, sites, patients, seed=0, permutations=0, trees=50)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(codes, predicted), abs=0.12)
    assert found.to_dict()["p_value"] is None


def test_permutation_stays_within_travelling_patients_and_else_among_patients() -> None:
    generator = np.random.default_rng(0)
    sites, patients = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 0, 0, 1, 1, 1])
    draws = np.array([permute_sites(sites, patients, generator) for _ in range(50)])
    assert all(sorted(row[:3]) == sorted(row[3:]) == [0, 1, 2] for row in draws)
    assert len({tuple(row) for row in draws}) > 10
    sites, patients = np.array([0, 0, 1, 1, 0]), np.array([0, 0, 1, 1, 2])
    draws = np.array([permute_sites(sites, patients, generator) for _ in range(50)])
    assert all(row[0] == row[1] and row[2] == row[3] for row in draws)
    assert set(draws[:, 4]) == {0, 1}


def test_seeds_repeat_and_every_cross_validation_ticks() -> None:
    ticks: list[int] = []
    data = travelling(shift=1.0)
    first = site_accuracy(*data, **FAST, tick=lambda: ticks.append(1))
    assert len(ticks) == 20
    assert first == site_accuracy(*data, **FAST)


def test_what_cannot_be_classified_is_refused_with_the_reason() -> None:
    features, sites, patients = travelling(shift=1.0)
    with pytest.raises(DataError, match="at least two sites"):
        site_accuracy(features, ["A"] * len(sites), patients, **FAST)
    with pytest.raises(DataError, match="two patients at every site"):
        site_accuracy(features[:3], sites[:3], patients[:3], **FAST)
    with pytest.raises(DataError, match="No feature is finite"):
        site_accuracy(np.full_like(features, np.nan), sites, patients, **FAST)
