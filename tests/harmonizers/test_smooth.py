"""The banded-matrix Gaussian against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter as scipy_gaussian

from nnunet_fedharm.harmonizers.smooth import TRUNCATE, MaskedBlur, gaussian_filter, random_log_gain


@pytest.mark.parametrize("shape", [(30, 21), (14, 18, 11)])
def test_the_filter_equals_scipys(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours = gaussian_filter(torch.from_numpy(image)[None, None], 2.0)[0, 0].numpy()
    theirs = scipy_gaussian(image, 2.0, truncate=TRUNCATE, mode="constant")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_constant_inside_the_mask_stays_constant_whatever_lies_outside() -> None:
    image, inside = torch.full((1, 1, 20, 20), 7.0), torch.ones(1, 1, 20, 20)
    image[..., :8], inside[..., :8] = 1000.0, 0.0
    blurred = MaskedBlur(inside, 2.0)(image)
    torch.testing.assert_close(blurred[..., 8:], torch.full((1, 1, 20, 12), 7.0))


def test_random_gains_have_zero_mean_and_follow_the_generator() -> None:
    image = torch.zeros(2, 3, 16, 16)
    first = random_log_gain(image, 0.2, torch.Generator().manual_seed(1))
    again = random_log_gain(image, 0.2, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.mean(dim=(2, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert first.std() > 0.05
