"""Noisy fingerprint summaries: one patient's share is bounded whatever the images, and every plan from them is a plan."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import DataError, PlanError, SiteMismatchError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.private_merge import EXTENT_MM, SHAPE, expected_error, merge_private, nearest_histogram
from nnunet_fedharm.planning.private_summary import (
    SPACINGS,
    PrivateSummary,
    length,
    measured_channels,
    patient_vector,
    private_summary,
)
from nnunet_fedharm.planning.summary import CaseSummary, Moments
from nnunet_fedharm.privacy.noise import SecureNoise

NO_VOXELS: tuple[tuple[Moments, dict[int, float]], ...] = ()


def case(
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    shape: tuple[int, ...] = (35, 50, 36),
    *,
    kept: float = 1.0,
    channels: tuple[tuple[Moments, dict[int, float]], ...] = NO_VOXELS,
) -> CaseSummary:
    return CaseSummary(spacing, shape, kept, bool(channels), channels)


def channel(mean: float, std: float) -> tuple[Moments, dict[int, float]]:
    from nnunet_fedharm.planning.histogram import INTENSITY

    values = np.random.default_rng(0).normal(mean, std, 500)
    codes, counts = np.unique(INTENSITY.codes(values), return_counts=True)
    shares = {int(code): count / values.size for code, count in zip(codes, counts, strict=True)}
    return (float(values.mean()), float(values.var()), float(values.min()), float(values.max())), shares


def hippocampi(count: int, seed: int = 0) -> list[tuple[str, CaseSummary]]:
    drawn = np.rint(np.random.default_rng(seed).normal([35, 50, 36], [2, 3.5, 4], (count, 3))).astype(int)
    return [(f"case{index}", case(shape=tuple(row.tolist()))) for index, row in enumerate(drawn)]


def summary_of(
    cases: list[tuple[str, CaseSummary]],
    *,
    noise: float = 0.0,
    site: str = "A",
    measured: tuple[int, ...] = (),
    patients: dict[str, str] | None = None,
) -> PrivateSummary:
    return private_summary(
        cases, patients or {}, site=site, measured=measured, noise_multiplier=noise, noise=SecureNoise()
    )


def four_sites(noise: float, count: int = 40) -> list[PrivateSummary]:
    return [summary_of(hippocampi(count, seed), noise=noise, site=name) for seed, name in enumerate("ABCD")]


cases = st.builds(
    case,
    spacing=st.tuples(*[st.floats(1e-6, 1e6)] * 3),
    shape=st.tuples(*[st.integers(1, 10**6)] * 3),
    kept=st.floats(0, 1),
    channels=st.sampled_from([NO_VOXELS, (channel(40, 20), channel(1e6, 3e5))]),
)


@settings(deadline=None, max_examples=60)
@given(own=st.lists(cases, min_size=1, max_size=4), measured=st.sampled_from([(), (0,), (0, 1)]))
def test_no_patient_tells_more_than_the_bound(own: list[CaseSummary], measured: tuple[int, ...]) -> None:
    vector = patient_vector(own, measured)
    assert vector.shape == (length(len(measured)),)
    assert np.linalg.norm(vector) <= 1 + 1e-12


@settings(deadline=None, max_examples=30)
@given(others=st.lists(cases, min_size=1, max_size=6), one=st.lists(cases, min_size=1, max_size=3))
def test_neighbouring_sites_differ_by_at_most_one(others: list[CaseSummary], one: list[CaseSummary]) -> None:
    rest = [(f"other{index}", value) for index, value in enumerate(others)]
    more = [*rest, *((f"own{index}", value) for index, value in enumerate(one))]
    patients = {f"own{index}": "one patient" for index in range(len(one))}
    sums = [np.array(summary_of(own, measured=(0, 1), patients=patients).sums) for own in (rest, more)]
    assert np.linalg.norm(sums[1] - sums[0]) <= 1 + 1e-9


def test_the_noise_is_as_large_as_it_says() -> None:
    exact = np.array(summary_of(hippocampi(5)).sums)
    drawn = np.stack([summary_of(hippocampi(5), noise=3.0).sums for _ in range(60)]) - exact
    assert drawn.std() == pytest.approx(3.0, rel=0.03)
    assert abs(drawn.mean()) < 0.1


def test_without_noise_common_spacings_and_usual_extents_come_back() -> None:
    found = merge_private(four_sites(0.0), n_channels=1)
    assert np.array_equal(np.median(found["spacings"], axis=0), [1, 1, 1])
    np.testing.assert_allclose(np.median(found["shapes_after_crop"], axis=0), [35, 50, 36], atol=1)
    assert len(found["spacings"]) == len(found["shapes_after_crop"]) == 160
    mixed = [
        summary_of([(str(i), case((3.0, size, size), (30, 200, 200))) for i in range(10)]) for size in (0.5, 1.0, 1.2)
    ]
    spacing = np.median(merge_private(mixed, n_channels=1)["spacings"], axis=0)
    np.testing.assert_allclose(spacing, [3, 1, 1], rtol=0.045)


def test_noise_of_half_the_budget_of_epsilon_2_leaves_the_common_spacing() -> None:
    for _ in range(5):
        found = merge_private(four_sites(2.8), n_channels=1)
        assert np.array_equal(np.median(found["spacings"], axis=0), [1, 1, 1])
        octaves = np.log2(np.median(found["shapes_after_crop"], axis=0) / [35, 50, 36])
        assert np.abs(octaves).max() < 6 * expected_error(four_sites(2.8)).octaves


def test_only_ct_is_measured_and_its_constants_are_means_over_patients() -> None:
    names = {"0": "T1", "1": "CT", "2": "noNorm"}
    assert measured_channels(names) == (1,)
    own = (channel(1e4, 10), channel(40, 20), channel(7, 1))
    summary = summary_of([(str(i), case(channels=own)) for i in range(4)], measured=(1,))
    found = merge_private([summary], n_channels=3)["foreground_intensity_properties_per_channel"]
    assert found["1"]["mean"] == pytest.approx(own[1][0][0], rel=1e-6)
    assert found["1"]["std"] == pytest.approx(math.sqrt(own[1][0][1]), rel=1e-6)
    assert found["0"] == found["2"], "what nnU-Net does not read says nothing about the images"
    assert "10000" not in json.dumps(found)


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40).map(np.array),
    total=st.floats(0.5, 500),
)
def test_the_nearest_histogram_has_its_total_and_no_negative_bin(counts: np.ndarray, total: float) -> None:
    nearest = nearest_histogram(counts, total)
    assert nearest.min() >= 0
    assert nearest.sum() == pytest.approx(total, rel=1e-6, abs=1e-6)
    if (counts >= 0).all() and counts.sum() == total:
        np.testing.assert_allclose(nearest, counts)


@settings(deadline=None, max_examples=12)
@given(noise=st.sampled_from([0.5, 5.0, 50.0, 5000.0]), count=st.integers(1, 30), ct=st.booleans())
def test_every_noisy_fingerprint_can_be_planned(
    tmp_path_factory: pytest.TempPathFactory, noise: float, count: int, ct: bool
) -> None:
    measured = (0,) if ct else ()
    sites = [summary_of(hippocampi(count), noise=noise, site=site, measured=measured) for site in "AB"]
    found = merge_private(sites, n_channels=1)
    spacing, shape = np.array(found["spacings"]), np.array(found["shapes_after_crop"])
    assert spacing.min() >= SPACINGS[0]
    assert spacing.max() <= SPACINGS[-1]
    assert SHAPE[0] <= shape.min()
    assert shape.max() <= SHAPE[1]
    assert (spacing * shape).max() <= max(EXTENT_MM[1] * 1.5, SHAPE[0] * SPACINGS[-1])
    plans = plan_federation(
        found,
        {
            "channel_names": {"0": "CT" if ct else "MRI"},
            "labels": {"background": 0, "x": 1},
            "numTraining": 2 * count,
            "file_ending": ".nii.gz",
        },
        dataset_name="Dataset001_Small",
        reader="SimpleITKIO",
        root=NnunetRoot(tmp_path_factory.mktemp("server")),
        options=PlanOptions(),
    )
    for name in ("2d", "3d_fullres"):
        planned = plans["configurations"][name]
        assert min(planned["patch_size"]) >= 8
        assert math.prod(planned["patch_size"]) <= 2**25
        assert np.isfinite(planned["spacing"]).all()


def test_summaries_survive_json_and_damaged_ones_are_refused() -> None:
    summary = summary_of(hippocampi(3), noise=1.0)
    assert PrivateSummary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary
    for change in ({"version": 1}, {"sums": [0.0]}, {"n_patients": 0}, {"n_labelled": 9}, {"sums": None}):
        with pytest.raises(PlanError, match="summar"):
            PrivateSummary.from_dict({**summary.to_dict(), **change})
    with pytest.raises(SiteMismatchError, match="site A"):
        merge_private(
            [summary, summary_of([("x", case(channels=(channel(1, 1),)))], measured=(0,), site="B")], n_channels=1
        )
    with pytest.raises(DataError, match="empty"):
        summary_of([])
    with pytest.raises(PlanError, match="none"):
        merge_private([], n_channels=1)
