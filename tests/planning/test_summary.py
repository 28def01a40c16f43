"""Bounded summaries: exact moments, bounded percentiles, the same result in any order and grouping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import DataError, PlanError, SiteMismatchError
from nnunet_fedharm.planning.histogram import GEOMETRY, INTENSITY, Histogram, add, at_level, build, percentile
from nnunet_fedharm.planning.merge import fingerprint, merge_summaries, pool
from nnunet_fedharm.planning.summary import (
    MAX_BYTES_BASE,
    MAX_BYTES_CHANNEL,
    CaseSummary,
    Moments,
    SiteSummary,
    combine_cases,
    summarize_site,
)
from tests.sites.raw import ENDING, write_case, write_description, write_multi_site, write_volume

N_CHANNELS = 2


def describe(values: np.ndarray) -> tuple[Moments, dict[int, float]]:
    codes, counts = np.unique(INTENSITY.codes(values), return_counts=True)
    shares = {int(code): int(count) / values.size for code, count in zip(codes, counts, strict=True)}
    moments = (float(values.mean()), float(values.var()), float(values.min()), float(values.max()))
    return moments, shares


def random_cases(rng: np.random.Generator, count: int, *, decades: float = 0.0, voxels: int = 50) -> list[CaseSummary]:
    cases = []
    for _ in range(count):
        labelled = bool(rng.random() < 0.8)
        scale = 10 ** (decades * rng.standard_normal())
        values = [scale * rng.normal(50, 30, int(rng.integers(5, voxels))) for _ in range(N_CHANNELS)]
        cases.append(
            CaseSummary(
                spacing_mm=tuple(float(np.float32(value)) for value in rng.uniform(0.4, 5, 3)),
                shape=tuple(int(size) for size in rng.integers(10, 600, 3)),
                relative_size=float(rng.uniform(0.3, 1)),
                labelled=labelled,
                channels=tuple(describe(value) for value in values) if labelled else (),
            )
        )
    return cases


def summary_of(cases: Sequence[CaseSummary], site: str = "A") -> SiteSummary:
    return combine_cases(cases, site=site, n_channels=N_CHANNELS)


def assert_same_fingerprint(one: SiteSummary, other: SiteSummary) -> None:
    a, b = fingerprint(one), fingerprint(other)
    assert a["spacings"] == b["spacings"]
    assert a["shapes_after_crop"] == b["shapes_after_crop"]
    assert a["median_relative_size_after_cropping"] == b["median_relative_size_after_cropping"]
    for channel, values in a["foreground_intensity_properties_per_channel"].items():
        assert values == pytest.approx(b["foreground_intensity_properties_per_channel"][channel], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 29), min_size=2, max_size=2, unique=True))
@example(seed=67845, cuts=[1, 2])  # where a percentile falls between two bins, and the order of addition decided
def test_merging_does_not_depend_on_order_or_grouping_and_equals_pooled(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    cases = random_cases(rng, 30, decades=1.0)
    cases[0] = next(case for case in cases if case.labelled)
    first, last = sorted(cuts)
    parts = [summary_of(cases[:first], "A"), summary_of(cases[first:last], "B"), summary_of(cases[last:], "C")]
    pooled = summary_of(cases)
    assert_same_fingerprint(pool(parts), pooled)
    assert_same_fingerprint(pool(parts[::-1]), pooled)
    assert_same_fingerprint(pool([pool(parts[:2]), parts[2]]), pooled)
    assert_same_fingerprint(pool([parts[0], pool(parts[1:])]), pooled)
    shuffled = [cases[index] for index in rng.permutation(30)]
    assert_same_fingerprint(summary_of(shuffled), pooled)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_coarsening_in_steps_or_at_once_gives_the_same_bins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = GEOMETRY.codes(rng.uniform(0.01, 100, 200))
    histogram = Histogram(0, {(int(code), int(rng.integers(1, 900))): 1 for code in codes})
    for level in range(1, len(GEOMETRY.levels)):
        in_steps = at_level(at_level(histogram, level - 1, GEOMETRY), level, GEOMETRY)
        assert in_steps == at_level(histogram, level, GEOMETRY)
    halves = [Histogram(0, dict(list(histogram.bins.items())[part::2])) for part in (0, 1)]
    coarse = [at_level(halves[0], 4, GEOMETRY), at_level(halves[1], 2, GEOMETRY)]
    assert add(coarse, GEOMETRY) == at_level(histogram, 4, GEOMETRY)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False, width=32), min_size=1, max_size=50),
    level=st.integers(0, 3),
)
def test_a_value_lies_in_its_bin_and_codes_are_ordered_like_values(values: list[float], level: int) -> None:
    array = np.sort(np.asarray(values, dtype=np.float32))
    codes = INTENSITY.codes(array, level)
    assert (np.diff(codes) >= 0).all()
    for value, code in zip(array.tolist(), codes.tolist(), strict=True):
        low, high = INTENSITY.interval(code, level)
        if abs(value) < INTENSITY.smallest:
            assert code == 0
        else:
            assert low <= value <= high
            assert (high - low) <= 2.0 ** -INTENSITY.levels[level][0] * abs(value) * 1.01 + 1e-12
        assert INTENSITY.coarser((code, 0), level, 3)[0] == INTENSITY.codes(np.float32([value]), 3)[0]


@pytest.mark.parametrize("percent", [0.5, 50.0, 99.5])
def test_percentiles_are_within_the_stated_bin_error(percent: float) -> None:
    values = np.random.default_rng(0).lognormal(5, 1.5, 200_000).astype(np.float32)
    codes, counts = np.unique(INTENSITY.codes(values), return_counts=True)
    histogram = build({(int(c), 0): float(n) for c, n in zip(codes, counts, strict=True)}, INTENSITY)
    assert histogram.level == 0
    found = percentile(histogram, INTENSITY, percent, minimum=float(values.min()), maximum=float(values.max()))
    assert found == pytest.approx(np.percentile(values, percent), rel=2.0**-8)


@pytest.mark.parametrize("count", [1, 10_000])
def test_a_summary_is_bounded_whatever_the_number_of_cases(count: int) -> None:
    rng = np.random.default_rng(0)
    # Fifteen decades of intensities, other spacings and shapes in every case: worse than any real site.
    few = random_cases(rng, min(count, 300), decades=5.0, voxels=3000)
    cases = [few[index % len(few)] for index in range(count)]
    geometry = [
        CaseSummary(
            tuple(rng.uniform(0.4, 5, 3).tolist()),
            tuple(rng.integers(10, 600, 3).tolist()),
            case.relative_size,
            case.labelled,
            case.channels,
        )
        for case in cases
    ]
    size = len(json.dumps(summary_of(geometry).to_dict()))
    assert size < MAX_BYTES_BASE + N_CHANNELS * MAX_BYTES_CHANNEL


def test_medians_stay_close_where_no_two_cases_share_spacing_or_shape() -> None:
    rng = np.random.default_rng(1)
    cases = random_cases(rng, 5000, voxels=6)
    merged = merge_summaries([summary_of(cases[:4000]), summary_of(cases[4000:], "B")])
    spacings = np.median([case.spacing_mm for case in cases], axis=0)
    shapes = np.median([case.shape for case in cases], axis=0)
    assert np.median(merged["spacings"], axis=0) == pytest.approx(spacings, rel=0.03)
    assert np.median(merged["shapes_after_crop"], axis=0) == pytest.approx(shapes, rel=0.03)


def test_moments_are_those_of_all_foreground_voxels_with_equal_weight_per_case(tmp_path: Path) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    dataset = write_multi_site(tmp_path / "Dataset001_Small", {"A": 3, "B": 2}, channels=("MR", "CT"))
    summary = summarize_site(dataset, site="all")
    first, second = [], []
    for label in sorted((dataset / "labelsTr").iterdir()):
        case = label.name.removesuffix(ENDING)
        inside = SimpleITKIO().read_seg(str(label))[0][0] > 0
        files = [str(dataset / "imagesTr" / f"{case}_{channel:04d}{ENDING}") for channel in range(2)]
        values = SimpleITKIO().read_images(files)[0][:, inside].astype(np.float64)
        first.append(values.mean(axis=1))
        second.append(np.square(values).mean(axis=1))
    mean = np.mean(first, axis=0)
    std = np.sqrt(np.mean(second, axis=0) - mean**2)
    for index, channel in enumerate(summary.channels):
        assert channel.mean == pytest.approx(mean[index], rel=1e-12)
        assert np.sqrt(channel.m2 / channel.n) == pytest.approx(std[index], rel=1e-9)


def test_unlabelled_cases_give_geometry_and_no_intensities(tmp_path: Path) -> None:
    write_description(tmp_path)
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        write_case(tmp_path, case, rng, labelled=False)
    summary = summarize_site(tmp_path, site="A")
    assert (summary.n_cases, summary.n_training) == (3, 0)
    assert sum(summary.geometry[0].bins.values()) == 3
    assert summary.channels[0].n == 0
    assert SiteSummary.from_dict(json.loads(json.dumps(summary.to_dict(), allow_nan=False))) == summary
    with pytest.raises(PlanError, match="No site has foreground voxels in channel 0"):
        merge_summaries([summary])


def test_summaries_hold_no_case_name_and_survive_json(tmp_path: Path) -> None:
    write_description(tmp_path)
    for case in ("patient_x", "patient_y"):
        write_case(tmp_path, case, np.random.default_rng(0))
    summary = summarize_site(tmp_path, site="A", num_processes=1)
    sent = json.dumps(summary.to_dict())
    assert "patient" not in sent
    assert SiteSummary.from_dict(json.loads(sent)) == summary


def test_label_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    write_description(tmp_path)
    write_case(tmp_path, "a", np.random.default_rng(0))
    write_volume(np.ones((3, 3, 3), dtype=np.uint8), tmp_path / "labelsTr" / f"a{ENDING}")
    with pytest.raises(DataError, match=r"Site A, case a: the label .* has shape \(3, 3, 3\)"):
        summarize_site(tmp_path, site="A")


def test_damaged_and_foreign_summaries_are_refused() -> None:
    good = summary_of(random_cases(np.random.default_rng(0), 5)).to_dict()
    with pytest.raises(PlanError, match="has version 9"):
        SiteSummary.from_dict({**good, "version": 9})
    with pytest.raises(PlanError, match="is damaged"):
        SiteSummary.from_dict({key: value for key, value in good.items() if key != "geometry"})
    bad = {**good["geometry"][0], "weights": [float("nan")] * len(good["geometry"][0]["weights"])}
    with pytest.raises(PlanError, match="not finite"):
        SiteSummary.from_dict({**good, "geometry": [bad, *good["geometry"][1:]]})


def test_sites_with_other_channels_do_not_merge() -> None:
    cases = random_cases(np.random.default_rng(0), 5)
    with pytest.raises(SiteMismatchError, match="Site B summarized 3 channels, site A 2"):
        pool([summary_of(cases), combine_cases(cases, site="B", n_channels=3)])
    with pytest.raises(PlanError, match="at least one"):
        merge_summaries([])
