"""The network on slices sees what features may miss, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import case_panel
from nnunet_fedharm.differences.slice_classifier import METHOD, slice_finding, slice_set
from nnunet_fedharm.errors import DataError, ShapeError
from nnunet_fedharm.sites.features.table import FeatureTable
from tests.differences.tables import feature_table, shuffled

FAST = StatisticsOptions(bootstrap=50, slice_permutations=3, slice_epochs=6)


def cut(table: FeatureTable, blur: float, per_case: int = 1) -> dict[tuple[str, str], np.ndarray]:
    """Random textures, blurred at site B."""
    generator = np.random.default_rng(0)
    found = {}
    for row in table.rows:
        images = generator.normal(size=(per_case, 24, 24))
        sigma = 0.5 + blur * (row.site == "B")
        images = np.array([gaussian_filter(image, sigma) for image in images])
        found[row.case, "MR"] = 100 + 20 * images / images.std()
    return found


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_site_that_blurs_is_recognised_and_no_site_is_not() -> None:
    table = feature_table({"A": 30, "B": 30})
    panel = case_panel(table, "MR")
    found = slice_finding(slice_set(panel, cut(table, 0.7), "MR"), FAST, purpose="t")
    assert found.method == METHOD
    assert found.accuracy.value > 0.9
    assert found.null_high < 0.75
    assert (found.p, found.permutations, found.n) == (0.25, 3, 60)
    alike = slice_finding(slice_set(panel, cut(table, 0.0), "MR"), FAST, purpose="t")
    assert alike.accuracy.value < 0.75


def test_seeds_repeat_whatever_the_order_of_rows_and_the_global_generator_is_left_alone() -> None:
    table = feature_table({"A": 6, "B": 6})
    slices = cut(table, 0.7)
    options = StatisticsOptions(bootstrap=20, slice_permutations=1, slice_epochs=1)
    state = torch.get_rng_state()
    first = slice_finding(slice_set(case_panel(table, "MR"), slices, "MR"), options, purpose="t")
    assert torch.equal(state, torch.get_rng_state())
    assert first == slice_finding(slice_set(case_panel(shuffled(table), "MR"), slices, "MR"), options, purpose="t")


def test_several_slices_of_a_case_stay_with_its_patient_and_cases_without_slices_are_left_out() -> None:
    table = feature_table({"A": 3, "B": 3, "C": 3})
    slices = cut(table, 0.0, per_case=2)
    slices = {key: value for key, value in slices.items() if not key[0].startswith("B")}
    slices["A_0_0", "MR"] = slices["A_0_0", "MR"][0]
    found = slice_set(case_panel(table, "MR"), slices, "MR")
    assert found.panel.sites == ("A", "C")
    assert found.images.shape == (11, 24, 24)
    assert found.panel.patients.count("A_0") == 1
    assert slice_set(case_panel(table, "MR"), {}, "MR") is None


def test_slices_that_do_not_fit_together_are_refused() -> None:
    table = feature_table({"A": 3, "B": 3})
    panel = case_panel(table, "MR")
    slices = cut(table, 0.0)
    with pytest.raises(ShapeError, match="one size"):
        slice_set(panel, slices | {("B_0_0", "MR"): np.zeros((1, 30, 24))}, "MR")
    with pytest.raises(ShapeError, match="at least 12"):
        slice_set(panel, {("A_0_0", "MR"): np.zeros((8, 24))}, "MR")
    with pytest.raises(DataError, match="not finite"):
        slice_set(panel, {("A_0_0", "MR"): np.full((24, 24), np.nan)}, "MR")
