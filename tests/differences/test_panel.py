"""Panels: an order of their own, patients as units, and what is complete."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nnunet_fedharm.differences.panel import by_patient, complete, judged, panel_of
from nnunet_fedharm.differences.sketch import count_bins, equal_edges, standard_of
from nnunet_fedharm.differences.standard import standard_of_values
from nnunet_fedharm.sites.features.table import FeatureTable
from tests.differences.tables import NAMES, feature_table, panel, shuffled


def test_a_panel_does_not_depend_on_the_order_of_rows_and_leaves_travellers_out() -> None:
    table = feature_table({"B": 3, "A": 4})
    travelling = replace(table.rows[0], travelling=True, case="T")
    more = FeatureTable((*table.rows, travelling), table.names, np.vstack([table.values, table.values[:1]]))
    first, second = panel_of(table), panel_of(shuffled(more))
    assert first.sites == ("A", "B") == second.sites
    assert first.cases == second.cases
    np.testing.assert_array_equal(first.values, second.values)


def test_a_patients_volumes_count_as_their_mean() -> None:
    table = feature_table({"A": 2, "B": 2}, volumes=2, names=("glcm_a", "glcm_b"))
    table.values[0, 0] = np.nan
    table.values[2:4, 1] = np.inf
    found = by_patient(panel_of(table))
    assert found.cases == ("A_0", "A_1", "B_0", "B_1")
    assert found.codes.tolist() == [0, 0, 1, 1]
    assert found.values[0, 0] == table.values[1, 0]
    assert np.isnan(found.values[1, 1])
    np.testing.assert_allclose(found.values[3], table.values[6:].mean(0))
    single = panel({"A": 2})
    assert by_patient(single) is single


def test_complete_features_vary_exist_everywhere_and_are_no_control() -> None:
    table = feature_table({"A": 6, "B": 6})
    table.values[3, 0], table.values[:, 1], table.values[5] = np.nan, 4.0, np.nan
    found, notes = complete(panel_of(table))
    assert len(found.cases) == 11
    assert set(NAMES) - set(found.names) == {
        "firstorder_F0",
        "firstorder_F1",
        *(n for n in NAMES if n.startswith("shape")),
    }
    assert notes == [
        "1 volume without most features left out of classifiers and embedding.",
        "1 feature missing for some volumes left out of classifiers and embedding.",
    ]
    assert judged(["shape_a"]).all()
    empty, _ = complete(panel_of(table.where(lambda row: False)))
    assert empty.names == ()


def test_rounding_errors_are_no_feature() -> None:
    table = feature_table({"A": 3, "B": 3})
    noise = 1e-16 * np.arange(6)
    table.values[:, 0], table.values[:, 1], table.values[:, 2] = noise, 1 + noise, 1e-7 * (1 + np.arange(6))
    table.values[2, 1] = np.nan
    found = panel_of(table)
    assert np.ptp(found.values[:, 0]) == 0 == np.nanmax(found.values[:, 1]) - np.nanmin(found.values[:, 1])
    assert np.isnan(found.values[2, 1])
    np.testing.assert_array_equal(found.values[:, 2], table.values[:, 2])


def test_small_sites_can_be_left_out() -> None:
    found = panel({"A": 4, "B": 1, "C": 3}).with_patients(3)
    assert found.sites == ("A", "C")
    assert found.codes.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.patients_of_sites().tolist() == [4, 3]


def test_the_scale_is_that_of_the_sketches_and_blind_to_outliers() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=(4000, 2))
    values[0, 0], values[:, 1] = 1e9, 8.0
    found = standard_of_values(values)
    np.testing.assert_allclose([found.centre[0], found.scale[0]], [3, 2], rtol=0.05)
    assert found.apply(values)[0, 0] == 4.0
    assert (found.apply(values)[:, 1] == 0).all()
    edges = equal_edges(np.array([-5.0]), np.array([11.0]), 200)
    sketched = standard_of(count_bins(values[1:, :1], edges), edges)
    np.testing.assert_allclose([sketched.centre[0], sketched.scale[0]], [found.centre[0], found.scale[0]], rtol=0.02)
    assert standard_of_values(np.zeros((0, 2))).scale.tolist() == [0, 0]
