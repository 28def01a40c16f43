"""The simulated scanners and the three demo hospitals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.datasets import anatomy, demo
from nnunet_fedharm.datasets.site_effects import (
    add_rician_noise,
    blur_point_spread,
    draw_scanner,
    receive_field,
    scan,
    tone_curve,
)
from nnunet_fedharm.errors import DataError, SetupError

SIZE = demo.DemoSize(training=2, held_out=1, spacing_mm=5.0)


@settings(deadline=None)
@given(tone=st.floats(-4, 4))
def test_a_tone_curve_keeps_the_order_and_fixes_zero_and_one(tone: float) -> None:
    levels = np.linspace(0.0, 1.2, 50)
    curve = tone_curve(levels, tone)
    assert (np.diff(curve) > 0).all()
    assert curve[0] == 0
    assert tone_curve(np.array([1.0]), tone)[0] == pytest.approx(1.0)


def test_tone_zero_is_the_identity() -> None:
    levels = np.linspace(0.0, 1.0, 5)
    np.testing.assert_array_equal(tone_curve(levels, 0.0), levels)


def test_a_receive_field_reaches_its_strength_and_is_smooth() -> None:
    field = np.log(receive_field((12, 14, 10), 0.2, np.random.default_rng(0)))
    assert np.abs(field).max() == pytest.approx(0.2)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.2
    np.testing.assert_array_equal(receive_field((4, 4), 0.0, np.random.default_rng(0)), np.ones((4, 4)))


def test_the_point_spread_keeps_the_sum_and_has_the_stated_width() -> None:
    point = np.zeros((41, 41))
    point[20, 20] = 1.0
    blurred = blur_point_spread(point, 6.0, (1.0, 2.0))
    assert blurred.sum() == pytest.approx(1.0)
    assert blurred[23, 20] == pytest.approx(blurred[20, 20] / 2, rel=1e-6)
    np.testing.assert_array_equal(blur_point_spread(point, 0.0, (1.0, 2.0)), point)


def test_rician_noise_has_its_known_second_moment() -> None:
    noisy = add_rician_noise(np.full(200_000, 0.5), 0.2, np.random.default_rng(0))
    assert (noisy**2).mean() == pytest.approx(0.5**2 + 2 * 0.2**2, rel=0.01)
    assert (noisy >= 0).all()


def test_scanner_tones_of_two_hospitals_never_overlap() -> None:
    ranges = [hospital.scanner.tone for hospital in demo.HOSPITALS.values()]
    for (low, high), (other_low, other_high) in itertools.combinations(ranges, 2):
        assert high < other_low or other_high < low


def test_a_scan_is_zero_outside_the_brain_positive_inside_and_seeded() -> None:
    signal = np.random.default_rng(0).random((8, 8, 8))
    mask = signal > 0.5
    draw = draw_scanner(demo.HOSPITALS["birch"].scanner, np.random.default_rng(1))
    first, second = (scan(signal, mask, (2.0, 2.0, 2.0), draw, np.random.default_rng(2)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first > 0, mask)
    with pytest.raises(DataError, match="different shapes"):
        scan(signal, mask[:4], (2.0, 2.0, 2.0), draw, np.random.default_rng(2))


def test_a_deformation_folds_no_tissue() -> None:
    displacement = anatomy.smooth_displacement((40, 48, 40), 4.0, 2.5, np.random.default_rng(0))
    gradient = np.stack([np.stack(np.gradient(axis, 4.0)) for axis in displacement])
    jacobian = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))
    assert displacement.std() > 1.0
    assert jacobian.min() > 0.1


def test_subjects_differ_in_anatomy_and_hold_both_tissues_in_human_proportions() -> None:
    first, second = (anatomy.make_subject(np.random.default_rng(seed), spacing_mm=5.0) for seed in (0, 1))
    assert (first.labels != second.labels).mean() > 0.02
    for subject in (first, second):
        ratio = (subject.labels == 1).sum() / (subject.labels == 2).sum()
        assert 1.0 < ratio < 3.0
        assert not subject.labels[~subject.brain].any()
        assert subject.signal[subject.labels == 2].mean() > 1.2 * subject.signal[subject.labels == 1].mean()
        assert not subject.brain[[0, -1]].any()
        assert not subject.brain[:, [0, -1]].any()


def test_three_hospitals_are_written_in_the_consortium_layout(tmp_path: Path) -> None:
    demo.write_demo(tmp_path, size=SIZE, progress=False)
    for site, hospital in demo.HOSPITALS.items():
        raw = tmp_path / "sites" / site / "nnUNet_raw" / demo.DATASET_NAME
        training = raw / ("imagesTr" if hospital.labelled else "imagesUnlabelled")
        assert [path.name for path in sorted(training.iterdir())] == [f"{site}_{n:03d}_0000.nii.gz" for n in (0, 1)]
        assert (raw / "labelsTr").exists() == hospital.labelled
        image = nib.load(raw / f"imagesTs/{site}_002_0000.nii.gz")
        label = nib.load(raw / f"labelsTs/{site}_002.nii.gz")
        np.testing.assert_array_equal(image.affine, label.affine)
        assert set(np.unique(np.asarray(label.dataobj))) == {0, 1, 2}
        assert json.loads((raw / "dataset.json").read_text())["numTraining"] == (2 if hospital.labelled else 0)
        assert set(json.loads((raw / "sites.json").read_text())["cases"].values()) == {site}


def test_a_case_depends_on_seed_site_and_number_only() -> None:
    first, second = (demo.make_case("alder", 1, spacing_mm=5.0, seed=3)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != demo.make_case("alder", 1, spacing_mm=5.0, seed=4)[1]).any()


def test_too_little_data_and_an_unwritable_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 training"):
        demo.DemoSize(training=1)
    (tmp_path / "sites").write_text("a file where a folder should be")
    with pytest.raises(DataError, match="Cannot write the demo data"):
        demo.write_demo(tmp_path, size=SIZE, progress=False)


def test_a_missing_nilearn_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install nilearn"):
        anatomy.template_folder()
