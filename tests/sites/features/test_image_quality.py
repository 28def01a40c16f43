"""Image quality against images whose noise, field, blur and contrast are known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from nnunet_fedharm.sites.features.image_quality import bias_field_strength, entropy_focus, image_quality, noise_sigma

SHAPE = (26, 28, 30)
GRID = np.indices(SHAPE) - (np.array(SHAPE) / 2).reshape(3, 1, 1, 1)
BODY = (GRID**2).sum(axis=0) < 11**2
INNER = (GRID**2).sum(axis=0) < 5**2
SPACING = (1.0, 1.0, 1.0)


def tissue() -> np.ndarray:
    return np.where(BODY, 100.0, 0.0) + np.where(INNER, 50.0, 0.0)


def noisy(sigma: float, seed: int = 0) -> np.ndarray:
    """Rician noise, as a magnitude image has it."""
    real, imaginary = np.random.default_rng(seed).normal(0, sigma, (2, *SHAPE))
    return np.hypot(tissue() + real, imaginary)


def quality(image: np.ndarray, **more: object) -> dict[str, float]:
    settings = {"body": BODY, "labels": [INNER, BODY & ~INNER], "spacing_mm": SPACING} | more
    return image_quality(image, **settings)


@pytest.mark.parametrize("sigma", [1.0, 5.0, 15.0])
def test_noise_is_estimated_within_a_few_percent(sigma: float) -> None:
    assert noise_sigma(noisy(sigma), BODY) == pytest.approx(sigma, rel=0.06)


def test_noise_does_not_take_smooth_structure_and_edges_for_noise() -> None:
    smooth = tissue() + 3 * GRID[0] + GRID[1] ** 2 / 5
    assert noise_sigma(smooth, BODY) < 0.2


def test_noise_of_a_slice_is_estimated_in_its_plane() -> None:
    image = np.random.default_rng(0).normal(100, 4, (64, 64))
    assert noise_sigma(image, np.ones_like(image, dtype=bool)) == pytest.approx(4, rel=0.06)


def test_noise_in_air_agrees_with_noise_in_the_body() -> None:
    found = quality(noisy(6.0))
    assert found["quality_noise_air"] == pytest.approx(found["quality_noise"], rel=0.08)


def test_ratios_follow_from_known_means() -> None:
    found = quality(noisy(4.0))
    assert found["quality_cnr_labels"] == pytest.approx(50 / 4, rel=0.08)
    assert found["quality_cnr_tissue"] == pytest.approx(50 / 4, rel=0.08)
    mean = tissue()[BODY].mean()
    assert found["quality_snr"] == pytest.approx(mean / 4, rel=0.08)
    assert found["quality_cnr_air"] == pytest.approx((mean - 4 * math.sqrt(math.pi / 2)) / 4, rel=0.08)
    assert found["quality_fber_db"] == pytest.approx(20 * math.log10(100 / (4 * math.sqrt(2 * math.log(2)))), abs=0.5)


def test_a_single_label_is_compared_with_its_surroundings() -> None:
    assert quality(noisy(4.0), labels=[INNER])["quality_cnr_labels"] == pytest.approx(50 / 4, rel=0.08)
    assert math.isnan(quality(noisy(4.0), labels=[])["quality_cnr_labels"])


def test_bias_field_strength_grows_with_a_known_field() -> None:
    found = []
    for strength in (0.0, 0.2, 0.5):
        field = 1 + strength * GRID[2] / 11
        found.append(bias_field_strength(noisy(2.0) * field, BODY, SPACING))
        truth = field[BODY].std() / field[BODY].mean()
        assert found[-1] == pytest.approx(truth, abs=0.05)
    assert found[0] < found[1] < found[2]


def test_a_large_field_of_view_gives_the_same_bias_field() -> None:
    field = 1 + 0.4 * GRID[2] / 11
    large = np.kron(noisy(2.0) * field, np.ones((3, 3, 3)))
    small = bias_field_strength(noisy(2.0) * field, BODY, SPACING)
    assert bias_field_strength(large, np.kron(BODY, np.ones((3, 3, 3), bool)), (1 / 3,) * 3) == pytest.approx(
        small, abs=0.03
    )


def test_sharpness_falls_with_blur_and_does_not_rise_with_noise() -> None:
    sharp, blurred = tissue(), ndimage.gaussian_filter(tissue(), 1.5)
    noise = np.random.default_rng(1).normal(0, 3, SHAPE)
    values = [quality(image)["quality_sharpness_per_mm"] for image in (sharp, blurred, sharp + noise)]
    assert values[1] < 0.75 * values[0]
    assert values[2] == pytest.approx(values[0], rel=0.05)


def test_sharpness_is_per_mm() -> None:
    fine = quality(tissue(), spacing_mm=(0.5, 0.5, 0.5))["quality_sharpness_per_mm"]
    assert fine == pytest.approx(2 * quality(tissue())["quality_sharpness_per_mm"])


def test_a_gain_changes_no_feature() -> None:
    first, second = quality(noisy(3.0)), quality(40 * noisy(3.0))
    assert second == pytest.approx(first, rel=1e-2)


def test_air_that_was_blanked_is_not_measured() -> None:
    found = quality(np.where(BODY, noisy(3.0), 0.0))
    for name in ("noise_air", "cnr_air", "fber_db"):
        assert math.isnan(found[f"quality_{name}"])
    assert found["quality_noise"] > 0


def test_geometry_is_told_by_axis_and_a_slice_has_two() -> None:
    found = quality(noisy(3.0), spacing_mm=(3.0, 0.5, 0.8))
    assert found["quality_spacing_z_mm"] == 3.0
    assert found["quality_coverage_y_mm"] == pytest.approx(0.5 * SHAPE[1])
    assert found["quality_body_share"] == pytest.approx(BODY.mean())
    flat = image_quality(noisy(3.0)[13], BODY[13], [], (0.5, 0.8))
    assert [name for name in flat if "spacing" in name] == ["quality_spacing_y_mm", "quality_spacing_x_mm"]
    assert all(math.isfinite(flat[f"quality_{name}"]) for name in ("noise", "bias_field", "sharpness_per_mm"))


def test_values_below_zero_are_counted_from_the_smallest() -> None:
    image = np.where(BODY, (noisy(3.0) - 100) / 20, 0.0)
    assert all(math.isfinite(quality(image)[f"quality_{name}"]) for name in ("snr", "bias_field", "efc"))


def test_entropy_focus_is_zero_for_one_voxel_and_one_for_a_flat_image() -> None:
    assert entropy_focus(np.eye(1, 100)) == pytest.approx(0)
    assert entropy_focus(np.ones((10, 10))) == pytest.approx(1)


def test_every_feature_is_defined_in_the_documentation() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "reference" / "site-features.md"
    defined = set(re.findall(r"`([a-z_*]+)`", page.read_text()))
    names = {re.sub("_[zyx]_mm$", "_*_mm", name.removeprefix("quality_")) for name in quality(noisy(3.0))}
    assert names <= defined
