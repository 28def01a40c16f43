"""All statistics together: simulated sites of known difference, small and broken tables, and the negative control."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.differences.findings import PartFinding, to_json
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import panel_of
from nnunet_fedharm.differences.ranks import rank_tests
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.sites.features.table import FeatureTable
from tests.differences.tables import NAMES, feature_table, shuffled

FAST = StatisticsOptions(
    bootstrap=30,
    permutations=19,
    mmd_permutations=99,
    trees=8,
    forest_permutations=4,
    slice_permutations=1,
    slice_epochs=2,
)


def only(table: FeatureTable, options: StatisticsOptions = FAST) -> PartFinding:
    (found,) = find_differences(table, options=options)
    return found


def test_a_site_that_differs_in_texture_is_found_by_every_method() -> None:
    found = only(feature_table({"A": 25, "B": 20, "C": 20}, shift={"C": 2.0}, families=("glcm",)))
    assert found.n == {"A": 25, "B": 20, "C": 20}
    assert found.families["texture"].value > 0.2
    assert found.families["texture"].low > found.families["intensity"].high
    assert found.share_significant["texture"] == 1.0
    assert found.share_significant["shape"] <= 0.25
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    assert pairs["A", "B"].mmd_p > 0.05 > pairs["A", "C"].mmd_p == 0.01
    assert max(found.pairs, key=lambda pair: pair.wasserstein.value).second == "C"
    forest, linear = found.classifiers
    assert forest.method == "random forest on features"
    assert forest.features[0][0].startswith("glcm")
    assert linear.p == 0.05
    assert linear.accuracy.value > linear.null_high
    assert linear.confusion["C"]["C"] >= 15
    assert found.combat.share_significant[1] == 0.0 < found.combat.share_significant[0]
    assert len(found.embedding.points) == 65
    assert found.notes == ["No patient was seen at two sites, so agreement (CCC, ICC) cannot be estimated."]
    feature = next(item for item in found.features if item.name == "glcm_F0")
    assert feature.medians["C"] - feature.medians["A"] == pytest.approx(2.0, abs=1.0)
    assert all(sum(shares) == pytest.approx(1) for shares in feature.histogram.values())
    assert len(feature.edges) == FAST.bins + 1


def test_the_order_of_rows_changes_nothing_and_seeds_repeat() -> None:
    table = feature_table({"A": 8, "B": 7}, volumes=2)
    first = only(table)
    assert to_json(first) == to_json(only(shuffled(table)))
    assert to_json(first) != to_json(only(table, replace(FAST, seed=1)))


def test_parts_come_in_order_with_progress_and_no_part_depends_on_another() -> None:
    table = feature_table({"A": 6, "B": 6})
    raw = tuple(replace(row, scale="raw") for row in table.rows)
    both = FeatureTable((*table.rows, *raw), table.names, np.vstack([table.values, np.exp(table.values)]))
    told: list[tuple[str, float]] = []
    found = find_differences(both, options=FAST, progress=lambda what, share: told.append((what, share)))
    assert [part.scale for part in found] == ["z-score", "raw"]
    assert to_json(found[0]) == to_json(only(table))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (told[-1], told[0]) == (("done", 1.0), ("rank tests, MR/foreground/z-score", 0.0))


def test_several_processes_give_the_same_numbers() -> None:
    table = feature_table({"A": 6, "B": 6}, names=("glcm_a", "glcm_b", "firstorder_a"))
    raw = tuple(replace(row, scale="raw") for row in table.rows)
    both = FeatureTable((*table.rows, *raw), table.names, np.vstack([table.values, np.exp(table.values)]))
    told: list[float] = []
    found = find_differences(both, options=FAST, num_processes=2, progress=lambda _, share: told.append(share))
    assert to_json(found) == to_json(find_differences(both, options=FAST))
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_slices_are_judged_once_per_channel_and_stand_in_its_parts() -> None:
    table = feature_table({"A": 4, "B": 4, "C": 1})
    generator = np.random.default_rng(0)
    slices = {(row.case, "MR"): generator.normal(size=(16, 16)) for row in table.rows}
    (found,) = find_differences(table, options=FAST, slices=slices)
    network = found.classifiers[-1]
    assert network.method == "CNN on slices"
    assert set(network.confusion) == {"A", "B"}
    (none,) = find_differences(table, options=FAST, slices={})
    assert [item.method for item in none.classifiers] == [item.method for item in found.classifiers[:-1]]


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    missing=st.sampled_from([0.0, 0.2, 0.9]),
    constant=st.booleans(),
    volumes=st.integers(1, 2),
)
def test_small_sites_missing_and_constant_features_crash_nothing(
    sizes: list[int], missing: float, constant: bool, volumes: int
) -> None:
    table = feature_table({f"S{index}": size for index, size in enumerate(sizes)}, volumes=volumes)
    generator = np.random.default_rng(0)
    table.values[generator.random(table.values.shape) < missing] = np.nan
    if constant:
        table.values[:, :3] = 2.0
    found = only(table, replace(FAST, bootstrap=5, permutations=2, forest_permutations=1, mmd_permutations=9))
    assert "NaN" not in json.dumps(to_json(found))
    assert len(found.pairs) == len(sizes) * (len(sizes) - 1) // 2
    assert found.notes


def test_reasons_are_given_in_sentences() -> None:
    notes = only(feature_table({"A": 6, "B": 3, "C": 1})).notes
    assert any(note.startswith("C: one patient only") for note in notes)
    assert any(note.startswith("B: fewer than 5 patients") for note in notes)
    assert any(note.startswith("Classifiers leave out C") for note in notes)
    assert any(note.startswith("Outliers were not looked for at B and C") for note in notes)
    table = feature_table({"A": 6, "B": 6}, volumes=2)
    table.values[:, 0], table.values[:2, 1], table.values[12:, 2] = 1.0, np.nan, np.nan
    notes = only(table).notes
    assert "Several volumes of one patient at one site count as one in tests: their mean." in notes
    assert "1 feature not tested: the same value everywhere." in notes
    assert "1 feature tested without the volumes that lack them." in notes
    assert "1 feature not tested: too few volumes or sites have them." in notes
    alone = only(feature_table({"A": 6}))
    assert alone.notes[0] == "Only A was measured here, so there is nothing to compare."
    assert (alone.pairs, alone.classifiers, alone.combat) == ([], [], None)
    assert find_differences(feature_table({}), options=FAST) == []


def test_nothing_is_found_between_two_random_halves_of_one_site() -> None:
    """The negative control, on correlated and skewed features."""
    one = feature_table({"A": 60}, heavy=True)
    generator = np.random.default_rng(0)
    discoveries, classified, kernels = [], [], []
    for repeat in range(20):
        halves = generator.permutation(60) % 2
        rows = tuple(replace(row, site="XY"[half]) for row, half in zip(one.rows, halves, strict=True))
        table = FeatureTable(rows, one.names, one.values)
        panel = panel_of(table)
        discoveries.append((rank_tests(panel.values, panel.codes, np.zeros((0, 60))).q < 0.05).any())
        if repeat < 5:
            found = only(table, replace(FAST, bootstrap=0, forest_permutations=0))
            classified.append(found.classifiers[1])
            kernels.append(found.pairs[0].mmd_p)
    assert np.mean(discoveries) <= 0.15
    assert np.mean([item.accuracy.value for item in classified]) == pytest.approx(0.5, abs=0.1)
    assert sum(item.p <= 0.05 for item in classified) <= 1
    assert sum(p <= 0.05 for p in kernels) <= 1
    assert len(one.names) == len(NAMES)
