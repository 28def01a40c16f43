"""Monotone tone curves as displacements on uniform knots, and the quantile map between two styles.

Symbols: z intensity, T tone curve, d displacement T(z) - z, K knots, Q quantile levels.

A curve is stored as its displacement at K knots spread evenly over [-TONE_RANGE, TONE_RANGE]; between knots it is linear,
outside it keeps the last displacement (slope 1), so a bright outlier is shifted and never stretched. All zeros is the
identity to the last bit, and one kernel serves learned curves and quantile maps alike.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

TONE_RANGE = 6.0
"""Half-width of the knots' interval in standard deviations of the volume."""

MIN_STEP = 1e-3
"""Smallest distance between two landmarks: a spike in the histogram (air) would otherwise make the map vertical."""


def knot_positions(knots: int, like: Tensor) -> Float[Tensor, " k"]:
    """Positions of the knots, (K,), on the device and in the dtype of `like`."""
    return torch.linspace(-TONE_RANGE, TONE_RANGE, knots, device=like.device, dtype=like.dtype)


def apply_displacement(
    image: Float[Tensor, "b c *spatial"], displacement: Float[Tensor, "b c k"]
) -> Float[Tensor, "b c *spatial"]:
    """d(z) voxel by voxel: piecewise linear between the knots, constant outside.

    Args:
        image: z-scored intensities, (B, C, *spatial).
        displacement: (B, C, K), in standard deviations.

    Returns:
        The displacement of each voxel, same shape as `image`; add it to the image to apply the curve.
    """
    knots = displacement.shape[-1]
    flat = rearrange(image, "b c ... -> b c (...)")
    position = (flat.clamp(-TONE_RANGE, TONE_RANGE) + TONE_RANGE) * ((knots - 1) / (2 * TONE_RANGE))
    left = position.detach().floor().clamp(0, knots - 2)
    fraction = position - left
    index = left.nan_to_num(0.0).long()  # NaN stays NaN through the fraction, and is no index
    low = torch.gather(displacement, -1, index)
    high = torch.gather(displacement, -1, index + 1)
    return (low + fraction * (high - low)).reshape(image.shape)


def quantile_map(
    source: Float[Tensor, "b c q"], target: Float[Tensor, "b c q"], knots: int = 257
) -> Float[Tensor, "b c k"]:
    """Displacement of the monotone map that carries the source's quantiles to the target's (Nyul's landmark map).

    Args:
        source: (B, C, Q) non-decreasing.
        target: (B, C, Q) non-decreasing.
        knots: K, resolution of the returned curve.

    Returns:
        (B, C, K). Exactly zero where source equals target.
    """
    grid = knot_positions(knots, source)
    floor = torch.arange(source.shape[-1], device=source.device, dtype=source.dtype) * MIN_STEP
    # Adding the same tiny ramp to both keeps equal styles equal and makes every step at least MIN_STEP.
    source, target = source + floor, target + floor
    difference = target - source
    inside = grid.expand(*source.shape[:-1], -1).contiguous()
    index = (torch.searchsorted(source.contiguous(), inside, right=True) - 1).clamp(0, source.shape[-1] - 2)
    x0, x1 = torch.gather(source, -1, index), torch.gather(source, -1, index + 1)
    d0, d1 = torch.gather(difference, -1, index), torch.gather(difference, -1, index + 1)
    fraction = ((inside - x0) / (x1 - x0)).clamp(0, 1)
    return d0 + fraction * (d1 - d0)


def monotone_displacement(
    slope_logits: Float[Tensor, "b c s"], shift: Float[Tensor, "b c"], max_slope: float
) -> Float[Tensor, "b c k"]:
    """Displacement of a curve whose slopes lie in [1 / max_slope, max_slope]; all-zero inputs give exactly zero.

    slope_j = max_slope ** tanh(u_j), and the curve passes through (0, shift).

    Args:
        slope_logits: u, (B, C, K - 1), one per interval between knots.
        shift: (B, C), displacement at z = 0.
        max_slope: > 1; contrast is never changed by more than this factor, so no lesion can be flattened away.
    """
    intervals = slope_logits.shape[-1]
    width = 2 * TONE_RANGE / intervals
    excess = (torch.expm1(torch.tanh(slope_logits) * torch.log(slope_logits.new_tensor(max_slope)))) * width
    rise = torch.nn.functional.pad(torch.cumsum(excess, dim=-1), (1, 0))
    middle = intervals // 2
    return rise - rise[..., middle : middle + 1] + shift[..., None]
