"""Random appearance changes: what the same anatomy could look like at another scanner.

Small pure functions; every draw comes from a `torch.Generator` on the CPU, so a run can be repeated on any device.

Symbols: z intensity in standard deviations of the volume, T tone curve, d displacement T(z) - z at K knots, Q quantile levels.

A tone curve acts on voxels one by one, so what it does to a style is known exactly: the new quantiles are T of the old ones,
sorted, and their mean and standard deviation are what nnU-Net's z-score would have taken out. No patch has to be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nnunet_fedharm.harmonizers.smooth import MaskedBlur, random_log_gain
from nnunet_fedharm.harmonizers.tone import apply_displacement, knot_positions, quantile_map

KNOTS = 129
"""Resolution of random tone curves over [-6, 6] standard deviations."""

CONTROL_POINTS = 6
"""Values a random curve is splined through: few, so that tissues move and noise is not torn apart."""

MIN_STD = 1e-2
"""A curve that flattens everything is not blown up by more than a hundred."""


@dataclass(frozen=True, kw_only=True)
class AppearanceOptions:
    """How often and how far images are changed.

    The four shares are the chances of the kinds of tone curves; what is missing to 1 leaves the tones alone.
    """

    bank_share: float = 0.3
    """Monotone map to a style of the bank, or to a mixture of two."""
    monotone_share: float = 0.2
    """Random rising curve."""
    inverted_share: float = 0.25
    """Random falling curve: what is bright at the reference is dark here."""
    free_share: float = 0.15
    """Random curve that may rise and fall: tissues swap their order."""
    gain: float = 0.15
    """Standard deviation of the log of the smooth multiplicative gain."""
    blur_sigma: float = 1.0
    """Gaussian, in voxels, that an image is blended with (blur) or away from (sharpening)."""
    blur: float = 1.0
    """Largest blending weight towards the blurred image; half as far away from it."""
    noise: float = 0.15
    """Largest standard deviation of added noise, in standard deviations of the volume."""


def random_rising_curve(
    count: int, channels: int, generator: torch.Generator, *, roughness: float = 0.8
) -> Float[Tensor, "b c m"]:
    """Control values of increasing curves: running sums of log-normal steps, from -1 to 1."""
    steps = torch.exp(roughness * torch.randn(count, channels, CONTROL_POINTS - 1, generator=generator))
    rise = functional.pad(torch.cumsum(steps, dim=-1), (1, 0))
    return 2 * rise / rise[..., -1:] - 1


def random_free_curve(count: int, channels: int, generator: torch.Generator) -> Float[Tensor, "b c m"]:
    """Control values without any order: independent normal draws."""
    return torch.randn(count, channels, CONTROL_POINTS, generator=generator)


def spline_displacement(
    controls: Float[Tensor, "b c m"], low: Float[Tensor, "b c"], high: Float[Tensor, "b c"]
) -> Float[Tensor, "b c k"]:
    """Displacement of the Catmull-Rom spline through control values spread evenly over [low, high].

    Outside, the curve goes on straight with its slope at the end, so a falling curve keeps falling.

    Args:
        controls: T at the control points, any unit (the result is standardised later).
        low: lower end of the style's intensities, e.g. its 1% quantile.
        high: upper end.

    References:
        Catmull, Rom, "A class of local interpolating splines", Computer Aided Geometric Design 1974.
    """
    intervals = controls.shape[-1] - 1
    grid = knot_positions(KNOTS, controls)
    place = (grid - low[..., None]) / (high - low).clamp(min=MIN_STD)[..., None] * intervals
    inside = place.clamp(0, intervals)
    left = inside.floor().clamp(0, intervals - 1)
    u, index = inside - left, left.long()
    before, after = 2 * controls[..., :1] - controls[..., 1:2], 2 * controls[..., -1:] - controls[..., -2:-1]
    padded = torch.cat([before, controls, after], dim=-1)
    p0, p1, p2, p3 = (torch.gather(padded, -1, index + step) for step in range(4))
    cubic = ((3 * (p1 - p2) + p3 - p0) * u + 2 * p0 - 5 * p1 + 4 * p2 - p3) * u + p2 - p0
    slope = torch.where(place < 0, controls[..., 1:2] - controls[..., :1], controls[..., -1:] - controls[..., -2:-1])
    return p1 + 0.5 * cubic * u + slope * (place - inside) - grid


def standardised(
    displacement: Float[Tensor, "b c k"], quantiles: Float[Tensor, "b c q"]
) -> tuple[Float[Tensor, "b c k"], Float[Tensor, "b c q"]]:
    """The curve followed by the z-score of its result, and the style that an image of style `quantiles` then has.

    Returns:
        Displacement of z -> (T(z) - mean) / std, and the new quantiles, sorted.
    """
    moved = quantiles + apply_displacement(quantiles, displacement)
    mean = moved.mean(dim=-1, keepdim=True)
    std = moved.std(dim=-1, keepdim=True).clamp(min=MIN_STD)
    # The 33 levels end at 1% and 99%: relating both ends to the old spread keeps an untouched style untouched.
    own_std = quantiles.std(dim=-1, keepdim=True).clamp(min=MIN_STD)
    own_mean = quantiles.mean(dim=-1, keepdim=True)
    grid = knot_positions(displacement.shape[-1], displacement)
    curve = (grid + displacement - mean) / std * own_std + own_mean
    new_quantiles = (moved - mean) / std * own_std + own_mean
    return curve - grid, new_quantiles.sort(dim=-1).values


def random_tone(
    own: Float[Tensor, "b c q"], bank: Float[Tensor, "s c q"], options: AppearanceOptions, generator: torch.Generator
) -> tuple[Float[Tensor, "b c k"], Float[Tensor, "b c q"]]:
    """A random tone curve per sample and channel.

    Args:
        own: style of each sample.
        bank: styles that monotone maps lead to.

    Returns:
        Displacement (K = KNOTS) and the style that the changed image has.
    """
    count, channels = own.shape[:2]
    rising = random_rising_curve(count, channels, generator)
    falling = -random_rising_curve(count, channels, generator)
    free = random_free_curve(count, channels, generator)
    low, high = own[..., 0], own[..., -1]
    candidates = torch.stack(
        [
            quantile_map(own, draw_styles(bank, count, generator), KNOTS),
            *(spline_displacement(controls.to(own), low, high) for controls in (rising, falling, free)),
            torch.zeros(count, channels, KNOTS, device=own.device, dtype=own.dtype),
        ]
    )
    shares = [options.bank_share, options.monotone_share, options.inverted_share, options.free_share]
    shares.append(max(0.0, 1 - math.fsum(shares)))
    kind = torch.multinomial(torch.tensor(shares), count * channels, replacement=True, generator=generator)
    index = kind.reshape(1, count, channels, 1).to(own.device).expand(-1, -1, -1, KNOTS)
    return standardised(torch.gather(candidates, 0, index)[0], own)


def draw_styles(bank: Float[Tensor, "s c q"], count: int, generator: torch.Generator) -> Float[Tensor, "b c q"]:
    """Styles (count, C, Q): half of them of the bank, half mixtures of two, for sites not seen yet."""
    first, second = torch.randint(bank.shape[0], (2, count), generator=generator).to(bank.device)
    share = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    return torch.lerp(bank[first], bank[second], share.to(bank)[:, None, None])


def random_gain(
    image: Float[Tensor, "b c *spatial"],
    offset: Float[Tensor, "b c"],
    options: AppearanceOptions,
    generator: torch.Generator,
) -> Float[Tensor, "b c *spatial"]:
    """(z + mu / sigma) exp(b) - mu / sigma with b random and smooth: multiplicative in raw units, and of random strength."""
    strength = torch.rand(image.shape[0], generator=generator).to(image)
    log_gain = random_log_gain(image, options.gain, generator) * _per_sample(strength, image)
    raw_zero = rearrange(offset.to(image), f"b c -> b c {' '.join('1' * (image.ndim - 2))}")
    return image + (image + raw_zero) * torch.expm1(log_gain)


def random_sharpness(
    image: Float[Tensor, "b c *spatial"], mask: Tensor, options: AppearanceOptions, generator: torch.Generator
) -> Float[Tensor, "b c *spatial"]:
    """Blend with the blurred image: weights from -blur / 2 (sharper) to blur (blurred)."""
    if options.blur == 0 or options.blur_sigma == 0:
        return image
    weight = options.blur * (1.5 * torch.rand(image.shape[0], generator=generator) - 0.5)
    blurred = MaskedBlur(mask.to(image), options.blur_sigma)(image)
    return torch.lerp(image, blurred, _per_sample(weight.to(image), image))


def random_noise(
    image: Float[Tensor, "b c *spatial"], options: AppearanceOptions, generator: torch.Generator
) -> Float[Tensor, "b c *spatial"]:
    """Add normal noise of a standard deviation drawn from [0, noise]."""
    level = options.noise * torch.rand(image.shape[0], generator=generator)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return image + _per_sample(level.to(image), image) * noise


def random_appearance(
    image: Float[Tensor, "b c *spatial"],
    mask: Tensor,
    own: Float[Tensor, "b c q"],
    bank: Float[Tensor, "s c q"],
    bank_offset: Float[Tensor, "s c"],
    options: AppearanceOptions,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b c *spatial"], Float[Tensor, "b c q"]]:
    """The same anatomy as another scanner could show it: tone, then gain, sharpness, noise.

    Args:
        image: z-scored patch.
        mask: True where voxels count; the others stay exactly as they are.
        own: style of each sample.
        bank: all known styles.
        bank_offset: mu / sigma of each of them.

    Returns:
        The changed patch and its style.
    """
    displacement, style = random_tone(own, bank, options, generator)
    changed = image + apply_displacement(image, displacement)
    offset = bank_offset[torch.randint(bank.shape[0], (image.shape[0],), generator=generator).to(bank.device)]
    changed = random_gain(changed, offset, options, generator)
    changed = random_sharpness(changed, mask, options, generator)
    changed = random_noise(changed, options, generator)
    return torch.where(mask, changed, image), style


def _per_sample(values: Float[Tensor, " b"], like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))
