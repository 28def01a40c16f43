"""nRMSE, PSNR, SSIM and gradient correlations against formulas written out and known cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

from nnunet_fedharm.errors import ShapeError
from nnunet_fedharm.evaluation.fidelity import (
    SSIM_WINDOW,
    foreground_mask,
    nrmse,
    psnr,
    windowed_ssim,
    zscore_inside,
)
from nnunet_fedharm.evaluation.structure import correlation, edge_correlation, gradient_correlation


def smooth_volume(shape: tuple[int, ...] = (9, 10, 11), seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    waves = sum(np.sin(axis * generator.uniform(0.3, 1.2)) for axis in np.indices(shape).astype(float))
    return np.asarray(waves) + generator.normal(0, 0.1, shape)


def ssim_by_hand(truth: np.ndarray, image: np.ndarray, voxel: tuple[int, ...]) -> float:
    """SSIM of the one window around a voxel, by the formula of Wang et al."""
    half = SSIM_WINDOW // 2
    low, data_range = truth.min(), np.ptp(truth)
    image = np.clip(image, low, low + data_range)
    a, y = (v[tuple(slice(i - half, i + half + 1) for i in voxel)].ravel() - low for v in (truth, image))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = np.cov(a, y)
    top = (2 * a.mean() * y.mean() + c1) * (2 * covariance[0, 1] + c2)
    return float(top / ((a.mean() ** 2 + y.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)))


def test_ssim_is_the_mean_of_the_windows_formula() -> None:
    truth = smooth_volume()
    image = truth + np.random.default_rng(1).normal(0, 0.3, truth.shape)
    half = SSIM_WINDOW // 2
    voxels = list(itertools.product(*(range(half, size - half) for size in truth.shape)))
    low, data_range = truth.min(), np.ptp(truth)
    clipped = np.clip(image, low, low + data_range)
    _, local = structural_similarity(truth - low, clipped - low, win_size=SSIM_WINDOW, data_range=data_range, full=True)
    # Whole windows by the formula; those that reach over the border, which scikit-image reflects, by scikit-image.
    assert [local[voxel] for voxel in voxels] == pytest.approx([ssim_by_hand(truth, image, voxel) for voxel in voxels])
    assert windowed_ssim(truth, image, np.ones(truth.shape, bool)) == pytest.approx(local.mean())


def test_ssim_of_a_thin_volume_is_that_of_its_slices() -> None:
    truth, image = smooth_volume((12, 13, 3)), smooth_volume((12, 13, 3), seed=4)
    image[..., 1] = truth[..., 1]
    mask = np.ones(truth.shape, bool)
    turned = [np.moveaxis(volume, 2, 0) for volume in (truth, image, mask)]
    assert windowed_ssim(truth, image, mask) == pytest.approx(windowed_ssim(*turned))
    middle = np.zeros_like(mask)
    middle[..., 1] = True
    assert windowed_ssim(truth, image, mask) < windowed_ssim(truth, image, middle) == 1.0
    with pytest.raises(ShapeError, match=r"windows of 7 voxels.*\(12, 3, 3\)"):
        windowed_ssim(truth[:, :3], image[:, :3], mask[:, :3])


def test_an_inverted_contrast_never_looks_alike() -> None:
    """On z-scores luminance and structure are both negative, and their product was positive."""
    volume = smooth_volume()
    mask = np.ones(volume.shape, bool)
    z = zscore_inside(volume, mask)
    assert windowed_ssim(z, -z, mask) < 0
    assert nrmse(z, -z, mask) == pytest.approx(2)
    assert gradient_correlation(z, -z, mask, (1, 1, 1)) == pytest.approx(-1)
    assert edge_correlation(z, -z, mask, (1, 1, 1)) == pytest.approx(1)


def test_nrmse_and_psnr_equal_scikit_image_inside_the_mask() -> None:
    truth, image = smooth_volume(), smooth_volume(seed=5)
    mask = np.random.default_rng(0).random(truth.shape) < 0.4
    centred = truth[mask] - truth[mask].mean()
    oracle = normalized_root_mse(centred, image[mask] - truth[mask].mean(), normalization="euclidean")
    assert nrmse(truth, image, mask) == pytest.approx(oracle)
    oracle = peak_signal_noise_ratio(truth[mask], image[mask], data_range=np.ptp(truth[mask]))
    assert psnr(truth, image, mask) == pytest.approx(oracle)


def test_what_lies_outside_the_mask_counts_for_nothing() -> None:
    truth, image = smooth_volume(), smooth_volume(seed=2)
    mask = np.zeros(truth.shape, bool)
    mask[1:8, 1:9, 2:10] = True
    dirty = np.where(mask, image, 1e6)
    for metric in (nrmse, psnr, windowed_ssim):
        assert metric(truth, dirty, mask) == metric(truth, image, mask)
    spacing = (1.0, 1.0, 1.0)
    assert gradient_correlation(truth, dirty, mask, spacing) == gradient_correlation(truth, image, mask, spacing)


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.01, 100), offset=st.floats(-1000, 1000))
def test_an_affine_change_of_intensity_is_no_error_after_zscoring(gain: float, offset: float) -> None:
    volume = smooth_volume()
    mask = np.ones(volume.shape, bool)
    z, other = zscore_inside(volume, mask), zscore_inside(gain * volume + offset, mask)
    assert nrmse(z, other, mask) == pytest.approx(0, abs=1e-6)
    assert windowed_ssim(z, other, mask) == pytest.approx(1)
    assert gradient_correlation(z, other, mask, (1, 1, 1)) == pytest.approx(1)


def test_equal_and_flat_images_have_defined_values() -> None:
    volume = smooth_volume()
    mask = np.ones(volume.shape, bool)
    assert (nrmse(volume, volume, mask), psnr(volume, volume, mask)) == (0.0, math.inf)
    assert windowed_ssim(volume, volume, mask) == pytest.approx(1)
    flat = np.full(volume.shape, 3.0)
    assert all(math.isnan(metric(flat, volume, mask)) for metric in (nrmse, psnr, windowed_ssim))
    assert not zscore_inside(flat, mask).any()
    assert math.isnan(gradient_correlation(flat, volume, mask, (1, 1, 1)))
    assert nrmse(zscore_inside(volume, mask), 0 * volume, mask) == pytest.approx(1)


def test_shapes_that_do_not_fit_and_empty_masks_are_refused() -> None:
    volume = smooth_volume()
    with pytest.raises(ShapeError, match="different shapes"):
        nrmse(volume, volume[1:], np.ones(volume.shape, bool))
    with pytest.raises(ShapeError, match="mask is empty"):
        psnr(volume, volume, np.zeros(volume.shape, bool))
    with pytest.raises(ShapeError, match="do not fit"):
        gradient_correlation(volume, volume, np.ones(volume.shape, bool), (1, 1))


def test_the_foreground_is_nonzero_with_holes_filled() -> None:
    image = np.zeros((6, 6, 6))
    image[1:5, 1:5, 1:5] = 1
    image[2, 2, 2] = 0
    assert foreground_mask(image).sum() == 4**3


def test_gradient_correlation_is_the_mean_of_the_axes_correlations_per_mm() -> None:
    first, second = smooth_volume(), smooth_volume(seed=3)
    inner = (slice(1, -1),) * 3
    spacing = (1.0, 2.0, 0.5)
    mask = np.zeros(first.shape, bool)
    mask[inner] = True
    deep = (slice(2, -2),) * 3
    expected, norms = [], [0.0, 0.0]
    for axis, mm in enumerate(spacing):
        slopes = [(np.roll(v, -1, axis) - np.roll(v, 1, axis))[deep].ravel() / (2 * mm) for v in (first, second)]
        expected.append(np.corrcoef(*slopes)[0, 1])
        norms = [norm + slope**2 for norm, slope in zip(norms, slopes, strict=True)]
    assert gradient_correlation(first, second, mask, spacing) == pytest.approx(np.mean(expected))
    expected_edges = np.corrcoef(np.sqrt(norms[0]), np.sqrt(norms[1]))[0, 1]
    assert edge_correlation(first, second, mask, spacing) == pytest.approx(expected_edges)


def test_a_single_slice_has_no_gradient_across_itself() -> None:
    first, second = smooth_volume((9, 10, 1)), smooth_volume((9, 10, 1), seed=3)
    mask = np.ones(first.shape, bool)
    flat = gradient_correlation(first[..., 0], second[..., 0], mask[..., 0], (1, 2))
    assert gradient_correlation(first, second, mask, (1, 2, 3)) == pytest.approx(flat)


def test_correlation_equals_numpy_and_is_undefined_for_constants() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert math.isnan(correlation(np.ones(4), np.arange(4.0)))
