"""Regions: labels of dataset.json, the foreground, and a body that fits crops, skull-stripped volumes and bodies in air."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_fedharm.sites.features.regions import body_mask, bounding_box, central_part, label_regions

GRID = np.indices((40, 44, 48)) - np.array([20, 22, 24]).reshape(3, 1, 1, 1)
BALL = (GRID**2).sum(axis=0) < 15**2


def in_air(sigma: float, seed: int = 0) -> np.ndarray:
    """A textured ball in Rician air."""
    rng = np.random.default_rng(seed)
    tissue = np.where(BALL, 100 + 30 * np.sin(GRID[0] / 3), 0.0)
    real, imaginary = rng.normal(0, sigma, (2, *BALL.shape))
    return np.hypot(tissue + real, imaginary)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_every_label_and_their_union_are_regions_without_background_and_ignore() -> None:
    assert label_regions({"background": 0, "core": 1, "rim": 2, "ignore": 3}) == {
        "label core": (1,),
        "label rim": (2,),
        "foreground": (1, 2),
    }


def test_region_based_labels_keep_their_values_and_the_largest_is_the_foreground() -> None:
    nested = {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    assert label_regions(nested) == {"label core": (2, 3), "label enhancing": (3,), "foreground": (1, 2, 3)}


def test_a_single_label_is_measured_once_as_the_foreground() -> None:
    assert label_regions({"background": 0, "lesion": 1}) == {"foreground": (1,)}
    assert label_regions({"background": 0}) == {}


@pytest.mark.parametrize("sigma", [2.0, 8.0, 20.0])
def test_a_body_in_noisy_air_is_found(sigma: float) -> None:
    assert overlap(body_mask(in_air(sigma)[None]), BALL) > 0.95


def test_a_body_with_something_far_brighter_in_it_is_found_whole() -> None:
    image = in_air(4.0)
    bright = (GRID**2).sum(axis=0) < 5**2
    assert overlap(body_mask((image + 900 * bright)[None]), BALL) > 0.9


@pytest.mark.parametrize("blank", [0.0, -3.5])
def test_a_skull_stripped_volume_is_everything_that_was_not_blanked(blank: float) -> None:
    image = np.where(BALL, np.random.default_rng(0).normal(1.0, 0.5, BALL.shape), blank)
    image[20, 22, 24] = blank  # a hole is inside
    assert np.array_equal(body_mask(image[None]), BALL)


def test_a_crop_without_air_is_body_everywhere() -> None:
    rng = np.random.default_rng(0)
    tissue = ndimage.gaussian_filter(rng.normal(size=BALL.shape), 3)
    image = 300 + 100 * tissue / tissue.std() + rng.normal(0, 10, BALL.shape)
    assert body_mask(image[None]).all()
    assert body_mask(np.clip(image, 100, None)[None]).all()


def test_a_body_seen_in_one_channel_is_body_in_all() -> None:
    half = np.where(GRID[0] > 0, 1.0, 0.0) * BALL * 50
    assert np.array_equal(body_mask(np.stack([BALL * 70.0, half])), BALL)


def test_a_slice_has_a_body_too() -> None:
    assert overlap(body_mask(in_air(5.0)[None, 20]), BALL[20]) > 0.9


def test_the_central_part_is_a_full_box_of_at_most_so_many_voxels() -> None:
    region = np.ones((20, 40, 60), bool)
    part = central_part(region, 6_000)
    box = bounding_box(part)
    assert 4_000 < part.sum() <= 6_000
    assert part[box].all()
    assert abs((box[0].start + box[0].stop) / 2 - 10) <= 0.5
    assert central_part(region, 48_000) is region


def test_a_bounding_box_has_its_margin_inside_the_volume() -> None:
    region = np.zeros((6, 7), bool)
    region[1:3, 4] = True
    assert bounding_box(region) == (slice(1, 3), slice(4, 5))
    assert bounding_box(region, margin=2) == (slice(0, 5), slice(2, 7))
