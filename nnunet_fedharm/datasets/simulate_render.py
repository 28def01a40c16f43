"""One volume as a simulated scanner would show it, on its own grid.

In the order of the physics: pulse sequence (signal equations on tissue maps), receive field, point spread, k-space truncation,
Rician noise; then the vendor's tone curve and raw scale. Air stays exactly 0 where the source's air is exactly 0 (skull-stripped
or masked images); else it gets noise as everything does.

How this differs from what harmonizers are trained with (`harmonizers/appearance.py`), so that none is examined on its own
augmentation: there, random splines and quantile maps of z-scores; here, an exponential of raw intensities, or tissue signals of
MR physics on spatial tissue maps. There, a gain blurred from random values; here, a polynomial of degree 3. There, blending with
a Gaussian blur in space; here, a periodic Gaussian in k-space and a box in k-space with ringing, per axis. There, additive normal
noise on z-scores; here, Rician noise on magnitudes, before the tone curve. Both blur and both change tones: a harmonizer may well
have learnt something that helps, it has just not seen these operators. Tissue maps of the mixture are functions of the
intensities of a voxel and its neighbours; those of labels are not.

Every draw depends on (seed, site, case, channel, purpose) only: not on order, processes or which other effects are on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.datasets.simulate_config import SiteEffects
from nnunet_fedharm.datasets.simulate_signal import label_maps, mixture_maps, render_sequence
from nnunet_fedharm.datasets.site_effects import (
    FloatVolume,
    add_rician_noise,
    blur_point_spread,
    receive_field,
    tone_curve,
    truncate_k_space,
)
from nnunet_fedharm.errors import DataError

MASKED_SHARE = 0.2
"""An image with at least this share of exact zeros is masked: they stay 0."""
BRIGHT = 0.99
"""u = 1 at this quantile of the voxels above the mean."""


def generator_for(*parts: Any) -> np.random.Generator:
    """Generator of (seed, site, case, channel, purpose)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw_effects(effects: SiteEffects, *, seed: int, site: str, case: str, channel: int) -> dict[str, float]:
    """This case's parameters, uniform in the ranges; each has a generator of its own."""
    found = {}
    for name in ("tone", "bias", "point_spread_mm", "noise", "scale"):
        limits = getattr(effects, name)
        if limits is not None:
            found[name] = float(generator_for(seed, site, case, channel, name).uniform(*limits))
    return found


def render(
    volume: npt.NDArray[np.generic],
    spacing_mm: tuple[float, ...],
    effects: SiteEffects,
    *,
    seed: int,
    site: str,
    case: str,
    channel: int,
    label: npt.NDArray[np.generic] | None = None,
    tissues: Mapping[str, tuple[int, ...]] | None = None,
    contrast: str = "T1w",
) -> npt.NDArray[np.float32]:
    """The volume at a site.

    Args:
        volume: raw intensities, (X, Y, Z).
        spacing_mm: one per axis.
        effects: ranges; nothing in them returns the volume itself, as float32.
        label: segmentation on the same grid, needed with `tissues`.
        tissues: tissue -> label values; None fits a mixture.
        contrast: of the volume, for the mixture.

    Raises:
        DataError: NaN, infinity or a constant volume, or tissues without a label.
    """
    if effects.is_control:
        return volume.astype(np.float32)
    raw = volume.astype(np.float64)
    draw = draw_effects(effects, seed=seed, site=site, case=case, channel=channel)
    offset, unit = signal_unit(raw)
    signal = (raw - offset) / unit
    if effects.pulse_sequence is not None and channel in effects.sequence_channels:
        if tissues is None:
            maps = mixture_maps(signal, generator_for(seed, case, channel, "mixture"), contrast=contrast)
        elif label is None:
            raise DataError(f"Case {case} has no label, but its tissues are to come from labels. Leave `tissues` out.")
        else:
            maps = label_maps(label.astype(np.int64), tissues)
        signal = render_sequence(signal, maps, effects.pulse_sequence)
    seen = acquire(signal, spacing_mm, effects, draw, seed=seed, site=site, case=case, channel=channel)
    made = seen * draw["scale"] if "scale" in draw else seen * unit + offset
    if np.mean(raw == 0) >= MASKED_SHARE:
        made = np.where(raw == 0, 0.0, made)
    return made.astype(np.float32)


def acquire(
    signal: FloatVolume,
    spacing_mm: tuple[float, ...],
    effects: SiteEffects,
    draw: Mapping[str, float],
    *,
    seed: int,
    site: str,
    case: str,
    channel: int,
) -> FloatVolume:
    """Receive field, point spread, truncation, noise and tone on u >= 0; the result is >= 0."""
    if draw["bias"] > 0:
        signal = signal * receive_field(
            signal.shape, draw["bias"], generator_for(seed, site, case, channel, "receive field")
        )
    if draw["point_spread_mm"] > 0:
        signal = blur_point_spread(signal, draw["point_spread_mm"], spacing_mm)
    if effects.resolution_loss is not None:
        signal = truncate_k_space(signal, effects.resolution_loss)
    signal = np.abs(signal)
    if draw["noise"] > 0:
        signal = add_rician_noise(signal, draw["noise"], generator_for(seed, site, case, channel, "rician"))
    return tone_curve(signal, draw["tone"])


def signal_unit(raw: FloatVolume) -> tuple[float, float]:
    """Raw value of u = 0 (0, or the minimum of images with negative values) and the raw length of u = 1 (bright tissue).

    Raises:
        DataError: NaN, infinity or a constant volume.
    """
    if not np.isfinite(raw).all() or raw.min() == raw.max():
        raise DataError("It holds NaN or infinity, or is constant. Mend the file or remove the case.")
    offset = min(0.0, float(raw.min()))
    return offset, float(np.quantile(raw[raw > raw.mean()], BRIGHT)) - offset
