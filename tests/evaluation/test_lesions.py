"""Contrast-to-noise ratio and lesion-wise counts of volumes whose lesions are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import ShapeError
from nnunet_fedharm.evaluation.lesions import contrast_to_noise, count_lesions, surroundings


def boxes(*corners: tuple[int, int, int], size: int = 3, shape: tuple[int, int, int] = (20, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(start, start + size) for start in corner)] = True
    return mask


def test_surroundings_are_a_shell_inside_what_is_allowed() -> None:
    lesion = boxes((8, 8, 8))
    shell = surroundings(lesion, np.ones_like(lesion), thickness=2)
    assert shell.sum() == 7**3 - 3**3
    assert not (shell & lesion).any()
    half = np.ones_like(lesion)
    half[10:] = False
    assert surroundings(lesion, half, thickness=2).sum() == 4 * 7 * 7 - 2 * 9


def test_contrast_to_noise_is_the_formula_and_signed() -> None:
    lesion = boxes((8, 8, 8))
    around = surroundings(lesion, np.ones_like(lesion))
    image = np.random.default_rng(0).normal(10, 2, lesion.shape)
    image[lesion] = 16
    expected = (16 - np.mean(image[around])) / np.std(image[around])
    assert contrast_to_noise(image, lesion, around) == pytest.approx(expected)
    assert contrast_to_noise(-image, lesion, around) == pytest.approx(-expected)


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.01, 100), offset=st.floats(-1000, 1000))
def test_contrast_to_noise_ignores_gain_and_offset(gain: float, offset: float) -> None:
    lesion = boxes((8, 8, 8))
    around = surroundings(lesion, np.ones_like(lesion))
    image = np.random.default_rng(0).normal(size=lesion.shape) + 2 * lesion
    assert contrast_to_noise(gain * image + offset, lesion, around) == pytest.approx(
        contrast_to_noise(image, lesion, around)
    )


def test_a_flattened_lesion_loses_its_contrast_and_an_empty_one_has_none() -> None:
    lesion = boxes((8, 8, 8))
    around = surroundings(lesion, np.ones_like(lesion))
    image = np.random.default_rng(0).normal(size=lesion.shape)
    flattened = np.where(lesion, image[around].mean(), image)
    assert contrast_to_noise(flattened, lesion, around) == pytest.approx(0)
    assert math.isnan(contrast_to_noise(image, np.zeros_like(lesion), around))
    assert math.isnan(contrast_to_noise(np.ones(lesion.shape), lesion, around))


def test_found_missed_and_false_lesions_are_counted() -> None:
    reference = boxes((1, 1, 1), (8, 8, 8), (15, 1, 1))
    prediction = boxes((2, 1, 1), (15, 15, 15), (1, 15, 15))
    prediction[8, 8, 8] = True  # one voxel of 27 is less than the tenth that counts as detected
    found = count_lesions(reference, prediction)
    assert (found.lesions, found.found, found.false_lesions) == (3, 1, 2)
    assert found.recall == pytest.approx(1 / 3)


def test_components_touch_by_corners_and_small_ones_may_be_left_out() -> None:
    reference = np.zeros((6, 6, 6), bool)
    reference[1, 1, 1] = reference[2, 2, 2] = True
    prediction = np.zeros_like(reference)
    prediction[5, 5, 5] = True
    assert count_lesions(reference, prediction).lesions == 1
    assert count_lesions(reference, prediction).false_lesions == 1
    assert count_lesions(reference, prediction, min_voxels=2).false_lesions == 0


def test_a_lesion_free_volume_has_false_lesions_only() -> None:
    empty = np.zeros((20, 20, 20), bool)
    found = count_lesions(empty, boxes((1, 1, 1), (9, 9, 9)))
    assert (found.lesions, found.found, found.false_lesions) == (0, 0, 2)
    assert math.isnan(found.recall)
    perfect = count_lesions(empty, empty)
    assert (perfect.lesions, perfect.found, perfect.false_lesions) == (0, 0, 0)
    with pytest.raises(ShapeError, match="different shapes"):
        count_lesions(empty, empty[1:])
