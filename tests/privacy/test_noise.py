"""Noise that leaves no digit of what it hides, and streams that nobody but the site can know."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_fedharm.privacy.noise import GRID, SecureNoise, grid_of, hide
from nnunet_fedharm.trainers.seeds import patch_seed

SIGMA = 139**0.5


def possible(told: float, candidates: range, sigma: float) -> list[int]:
    """Whole numbers that float32 noise of that deviation could have made this of: the attack on low digits."""
    noise = [(told - number) / sigma for number in candidates]
    return [number for number, one in zip(candidates, noise, strict=True) if float(np.float32(one)) == one]


def test_float32_noise_on_a_double_gives_the_value_away_and_ours_does_not() -> None:
    source, counts = SecureNoise(), np.array([13.0, 7.0, 0.0, 22.0])
    careless = counts + SIGMA * source.wide(4).astype(np.float32).astype(np.float64)
    assert [possible(told, range(40), SIGMA) for told in careless] != [[]] * 4
    hidden = source.hide(counts, SIGMA)
    assert [possible(told, range(40), SIGMA) for told in hidden] == [[]] * 4
    neighbours = [hidden - counts + other for other in (counts, counts + 1)]
    for values in neighbours:  # what was told is on one grid, whoever was there
        np.testing.assert_array_equal(values / grid_of(SIGMA), np.round(values / grid_of(SIGMA)))


@pytest.mark.parametrize("sigma", [1e-7, 0.3, SIGMA, 4096.0])
def test_the_grid_is_a_power_of_two_and_far_below_the_noise(sigma: float) -> None:
    step = grid_of(sigma)
    assert np.log2(step) == int(np.log2(step))
    assert sigma / GRID / 2 < step <= sigma / GRID
    drawn = SecureNoise().hide(np.zeros(200_000), sigma)
    assert drawn.std() == pytest.approx(sigma, rel=0.01)
    assert abs(drawn.mean()) < 5 * sigma / np.sqrt(drawn.size)


def test_gradients_get_their_noise_in_double_precision_and_keep_dtype_and_shape() -> None:
    values = torch.randn(300, 7)
    noisy = hide(values, SecureNoise(), 2.0)
    assert (noisy.dtype, noisy.shape) == (torch.float32, values.shape)
    steps = noisy.double() / grid_of(2.0)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0)
    assert float((noisy - values).std()) == pytest.approx(2.0, rel=0.1)


def test_nothing_is_added_without_noise() -> None:
    np.testing.assert_array_equal(SecureNoise().hide(np.array([0.1, 2.0]), 0.0), [0.1, 2.0])


def test_patches_of_a_private_training_follow_no_seed_that_somebody_else_knows() -> None:
    assert patch_seed(5, private=False) == 5
    assert patch_seed(None, private=False) == 0
    drawn = {patch_seed(5, private=True) for _ in range(20)}
    assert len(drawn) == 20
    assert 5 not in drawn
