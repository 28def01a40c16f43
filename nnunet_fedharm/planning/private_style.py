"""A site's style with noise: what leaves a site that trains under differential privacy.

A patient's quantile function is written as its difference from the normal distribution's, a polynomial in the normal quantile as
in the Cornish-Fisher expansion, orthonormal over QUANTILE_LEVELS: few numbers need little noise. Z-scored MR volumes differ
mostly in skewness and tails; N_TERMS terms describe each hippocampus site to 0.1 standard deviations at every level.

    style = normal + B mean_p(c_p) + N(0, (sigma R / N)^2)        c_p = clip(B^T (quantiles_p - normal), R)

| symbol | here |
|---|---|
| c_p | coefficients of patient p, and the offset, all channels together |
| R | CLIP sqrt(C), bound on their L2 norm |
| sigma | `noise_multiplier` |
| N | patients of the site, which is not kept secret |

References:
    Cornish, Fisher, "Moments and cumulants in the specification of distributions", Rev. Int. Stat. Inst. 1938.
    Balle, Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.stats import norm

from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, STYLE_CLIP, FloatArray, Style
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.releases import GAUSSIAN, NONE, Release

N_TERMS = 6
CLIP = 2.0
"""Norm of one channel's coefficients: the hippocampus sites' own are 1 to 1.3, single patients' up to about 2."""
OFFSET, OFFSET_WEIGHT = 2.2, 0.5
"""Usual distance from a volume's mean to raw zero, in standard deviations, and its weight beside the coefficients."""


@cache
def smooth_functions() -> FloatArray:
    """(Q, N_TERMS), orthonormal columns."""
    normal = norm.ppf(QUANTILE_LEVELS)
    basis: FloatArray = np.linalg.qr(np.stack([normal**degree for degree in range(N_TERMS)], axis=1))[0]
    return basis


def private_style(quantiles: FloatArray, offsets: FloatArray, *, noise_multiplier: float, noise: SecureNoise) -> Style:
    """Noisy style of a site.

    Args:
        quantiles: (N, C, Q), one row per patient (mean over the patient's volumes).
        offsets: (N, C).
        noise_multiplier: sigma; 0 leaves the smoothing and the bound on each patient.
        noise: secure source of normal numbers.

    Returns:
        Non-decreasing quantiles within STYLE_CLIP; offsets not below 0.
    """
    patients, channels, _ = quantiles.shape
    basis, normal = smooth_functions(), norm.ppf(QUANTILE_LEVELS)
    terms = np.einsum("qk,ncq->nck", basis, quantiles - normal)
    told = np.concatenate([terms, OFFSET_WEIGHT * (offsets - OFFSET)[..., None]], axis=2).reshape(patients, -1)
    bound = CLIP * math.sqrt(channels)
    told *= np.minimum(1, bound / np.maximum(np.linalg.norm(told, axis=1), 1e-12))[:, None]
    total = told.sum(axis=0)
    if noise_multiplier > 0:
        total = noise.hide(total, noise_multiplier * bound)
    mean = (total / patients).reshape(channels, N_TERMS + 1)
    smooth = np.sort(normal + mean[:, :N_TERMS] @ basis.T, axis=1)
    return Style(
        quantiles=np.clip(smooth, -STYLE_CLIP, STYLE_CLIP),
        offset=np.clip(OFFSET + mean[:, N_TERMS] / OFFSET_WEIGHT, 0, STYLE_CLIP),
        n_cases=patients,
    )


def neutral_style(channels: int, n_cases: int) -> Style:
    """Of no image at all: normally distributed intensities. It stands in plans whose harmonizer reads no style."""
    normal = np.clip(norm.ppf(QUANTILE_LEVELS), -STYLE_CLIP, STYLE_CLIP)
    return Style(quantiles=np.tile(normal, (channels, 1)), offset=np.full(channels, OFFSET), n_cases=n_cases)


def style_release(site: str, noise_multiplier: float) -> Release:
    """Entry in the ledger; without noise it has no epsilon."""
    mechanism = GAUSSIAN if noise_multiplier else NONE
    return Release(what=f"style of {site}", mechanism=mechanism, noise_multiplier=noise_multiplier)
