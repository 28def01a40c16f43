"""Outliers are told from their own site; the plane holds sites where they are."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_fedharm.differences.embedding import axes_of, embedding
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.outliers import outliers, robust_z
from nnunet_fedharm.differences.panel import complete, panel_of
from tests.differences.tables import feature_table, panel


def test_the_score_is_the_robust_z_by_hand() -> None:
    values = np.array([[1.0, 2, 0], [2, 2, 0], [3, 2, np.nan], [4, 2, np.nan], [100, 9, np.nan]])
    found = robust_z(values)
    np.testing.assert_allclose(found[:, 0], (values[:, 0] - 3) / 1.4826)
    assert np.isnan(found[:, 1:]).all()
    assert np.isnan(robust_z(np.full((2, 1), np.nan))).all()


def test_a_case_unlike_its_own_site_is_listed_though_it_looks_like_another() -> None:
    table = feature_table({"A": 30, "B": 30}, shift={"B": 8.0})
    table.values[3] = table.values[40]
    found = outliers(panel_of(table), StatisticsOptions())
    assert found[0].case == table.rows[3].case
    assert found[0].site == "A"
    assert len(found[0].features) == 3
    assert abs(found[0].features[0][1]) == found[0].score > 3.5
    assert len(found) < 6


def test_skewed_features_alone_make_no_outlier_and_small_sites_are_not_judged() -> None:
    skewed = outliers(panel({"A": 60}, heavy=True, names=tuple(f"glcm_{i}" for i in range(100))), StatisticsOptions())
    assert len(skewed) <= 12
    table = feature_table({"A": 4})
    table.values[0] = 1e6
    assert outliers(panel_of(table), StatisticsOptions()) == []


def test_sites_lie_in_the_plane_where_they_are_and_ellipses_hold_95_percent() -> None:
    usable, _ = complete(panel({"A": 300, "B": 300, "C": 2}, shift={"B": 4.0}))
    found = embedding(usable, axes_of(usable))
    assert found is not None
    assert set(found.ellipses) == {"A", "B"}
    assert found.axes[0].startswith("PC 1 (")
    x = {site: np.mean([point[1] for point in found.points if point[0] == site]) for site in "AB"}
    assert x["A"] == pytest.approx(found.ellipses["A"][0])
    assert abs(x["A"] - x["B"]) > 3
    mean_x, mean_y, long, short, angle = found.ellipses["A"]
    turned = np.radians(angle)
    inside = [
        ((np.cos(turned) * dx + np.sin(turned) * dy) / long) ** 2
        + ((-np.sin(turned) * dx + np.cos(turned) * dy) / short) ** 2
        <= 1
        for site, px, py, _ in found.points
        if site == "A"
        for dx, dy in [(px - mean_x, py - mean_y)]
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_one_feature_gives_no_plane() -> None:
    usable, _ = complete(panel({"A": 5, "B": 5}, names=("glcm_a",)))
    assert embedding(usable, axes_of(usable)) is None
