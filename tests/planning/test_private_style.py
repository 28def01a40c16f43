"""A noisy style: close to the exact one for little noise, bounded per patient, and still a style."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.planning.private_style import CLIP, private_style, smooth_functions
from nnunet_fedharm.privacy.noise import SecureNoise

LEVELS = np.asarray(QUANTILE_LEVELS)


def patients(count: int, channels: int = 2, *, skew: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Quantile functions like those of MR volumes: normal ones, skewed, each a little different."""
    generator = np.random.default_rng(0)
    normal = norm.ppf(LEVELS)
    bend = skew + 0.02 * generator.standard_normal((count, channels, 1))
    return normal + bend * (normal**2 - 1), 2.2 + 0.1 * generator.standard_normal((count, channels))


def test_without_noise_the_mean_up_to_smoothing() -> None:
    quantiles, offsets = patients(20)
    style = private_style(quantiles, offsets, noise_multiplier=0, noise=SecureNoise())
    assert np.abs(style.quantiles - quantiles.mean(0)).max() < 1e-9
    assert style.offset == pytest.approx(offsets.mean(0), abs=1e-9)
    assert style.n_cases == 20


def test_the_noise_is_as_large_as_the_formula_says_and_falls_with_the_patients() -> None:
    quantiles, offsets = patients(40, 1)
    exact = private_style(quantiles, offsets, noise_multiplier=0, noise=SecureNoise()).offset
    drawn = [private_style(quantiles, offsets, noise_multiplier=2, noise=SecureNoise()).offset for _ in range(400)]
    assert np.std(np.array(drawn) - exact) == pytest.approx(2 * CLIP / 40 / 0.5, rel=0.15)


def test_one_patient_moves_the_terms_by_no_more_than_the_bound() -> None:
    quantiles, offsets = patients(10, 1)
    wild = quantiles.copy()
    wild[0] = 10 * np.sign(wild[0])
    basis = smooth_functions()
    terms = [
        basis.T @ private_style(q[1:], offsets[1:], noise_multiplier=0, noise=SecureNoise()).quantiles[0] * 9
        - basis.T @ private_style(q, offsets, noise_multiplier=0, noise=SecureNoise()).quantiles[0] * 10
        + basis.T @ norm.ppf(LEVELS)
        for q in (quantiles, wild)
    ]
    assert all(np.linalg.norm(moved) <= CLIP * 1.01 for moved in terms)


def test_it_stays_a_style_however_large_the_noise() -> None:
    quantiles, offsets = patients(3)
    style = private_style(quantiles, offsets, noise_multiplier=100, noise=SecureNoise())
    assert (np.diff(style.quantiles, axis=1) >= 0).all()
    assert (style.offset >= 0).all()
