"""Travelling subjects: who counts, at which sites, and what the coefficients say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nnunet_fedharm.differences.agreement import concordance, intraclass_correlation
from nnunet_fedharm.differences.notes import travelling_note
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.travelling import agreement_findings, travelling_values
from nnunet_fedharm.sites.features.table import FeatureTable
from tests.differences.tables import feature_table, shuffled

OPTIONS = StatisticsOptions(bootstrap=100)


def travelled(offsets: dict[str, float], patients: int = 8, stay: int = 3) -> FeatureTable:
    """Patients of A who went to other sites; a site adds its offset and a little noise to all but the shape."""
    home = feature_table({"A": patients + stay})
    rows, values = list(home.rows), list(home.values)
    generator = np.random.default_rng(9)
    moved = np.array([not name.startswith("shape") for name in home.names])
    for site, offset in offsets.items():
        for row, value in list(zip(home.rows, home.values, strict=True))[:patients]:
            rows.append(replace(row, site=site, case=f"{row.case}_{site}", travelling=True))
            values.append(value + moved * (offset + 0.05 * generator.normal(size=len(value))))
    return FeatureTable(tuple(rows), home.names, np.array(values))


def test_only_patients_of_two_sites_count_and_the_home_scan_is_one_of_them() -> None:
    values, sites = travelling_values(travelled({"B": 0.0, "C": 1.0}))
    assert sites == ["A", "B", "C"]
    assert values.shape == (8, 3, 20)
    assert np.isfinite(values).all()


def test_coefficients_are_those_of_the_table_and_an_offset_costs_agreement() -> None:
    table = travelled({"B": 0.0, "C": 2.0})
    values, _ = travelling_values(table)
    found = {(item.measure, item.sites, item.family): item for item in agreement_findings(table, OPTIONS, purpose="t")}
    texture = [index for index, name in enumerate(table.names) if name.startswith("glcm")]
    assert found["CCC", ("A", "B"), "texture"].median.value == pytest.approx(
        np.median(concordance(values[:, 0][:, texture], values[:, 1][:, texture]))
    )
    overall = [index for index, name in enumerate(table.names) if not name.startswith("shape")]
    icc = found["ICC(2,1)", ("A", "B", "C"), "all"]
    assert icc.median.value == pytest.approx(np.median(intraclass_correlation(values[:, :, overall])))
    assert (icc.n_patients, icc.n_features) == (8, 16)
    good, bad = found["CCC", ("A", "B"), "all"], found["CCC", ("A", "C"), "all"]
    assert (good.share_good, bad.share_good) == (1.0, 0.0)
    assert bad.median.high < good.median.low
    assert found["CCC", ("A", "C"), "shape"].median.value == 1.0
    assert icc.median.low < icc.median.value < icc.median.high


def test_the_order_of_rows_and_a_second_volume_of_a_patient_do_no_harm() -> None:
    table = travelled({"B": 0.0})
    assert agreement_findings(shuffled(table), OPTIONS, purpose="t") == agreement_findings(table, OPTIONS, purpose="t")
    again = replace(table.rows[-1], case="again")
    more = FeatureTable((*table.rows, again), table.names, np.vstack([table.values, table.values[-1] + 2]))
    values, _ = travelling_values(more)
    np.testing.assert_allclose(values[-1, 1], table.values[-1] + 1)


def test_too_few_or_no_travelling_subjects_and_missing_features_give_reasons() -> None:
    assert agreement_findings(travelled({"B": 0.0}, patients=2), OPTIONS, purpose="t") == []
    assert "needs 3 patients" in travelling_note(travelled({"B": 0.0}, patients=2))
    alone = feature_table({"A": 4, "B": 4})
    assert agreement_findings(alone, OPTIONS, purpose="t") == []
    assert "No patient was seen at two sites" in travelling_note(alone)
    table = travelled({"B": 0.0})
    table.values[-1, 0] = np.nan
    table.values[:, 1] = 3.0
    found = {item.family: item for item in agreement_findings(table, OPTIONS, purpose="t")}
    assert found["intensity"].n_features == 4
    one = agreement_findings(travelled({"B": 0.0}), replace(OPTIONS, bootstrap=0), purpose="t")
    assert one[0].median.low is None
