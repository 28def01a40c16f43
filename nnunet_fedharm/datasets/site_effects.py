"""How a scanner changes an image: tone, receive field, point spread and noise, each a pure function.

Used to simulate hospitals. The operators differ on purpose from those that the harmonizers train with (quantile maps
and blurred random gains), so that a harmonizer is not examined on its own training augmentation.

Symbols: u signal with 1 = bright white matter of the reference scanner, x position in [-1, 1] per axis.

References:
    Gudbjartsson, Patz, "The Rician distribution of noisy MRI data", MRM 1995.
    Kwan, Evans, Pike, "MRI simulation-based evaluation of image-processing and classification methods", IEEE TMI 1999.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError

FloatVolume = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScannerRange:
    """Ranges that a scanner's parameters are drawn from, one draw per case.

    Attributes:
        tone: k of `tone_curve`; > 0 compresses bright tissue, < 0 compresses dark tissue.
        bias: largest log gain of the receive field.
        point_spread_mm: full width at half maximum of the point spread.
        noise: standard deviation of the complex noise per channel, in units of u.
        scale: raw value of u = 1; every vendor has its own.
    """

    tone: tuple[float, float]
    bias: tuple[float, float]
    point_spread_mm: tuple[float, float]
    noise: tuple[float, float]
    scale: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ScannerDraw:
    """One case's parameters; see `ScannerRange`."""

    tone: float
    bias: float
    point_spread_mm: float
    noise: float
    scale: float


def draw_scanner(ranges: ScannerRange, generator: np.random.Generator) -> ScannerDraw:
    """Draw each parameter uniformly from its range."""
    return ScannerDraw(**{name: float(generator.uniform(*limits)) for name, limits in vars(ranges).items()})


def tone_curve(signal: FloatVolume, tone: float) -> FloatVolume:
    """T(u) = (1 - exp(-k u)) / (1 - exp(-k)), k = tone; T(0) = 0, T(1) = 1, increasing; k -> 0 is the identity.

    Args:
        signal: u >= 0, any shape.
        tone: k, of either sign.
    """
    return signal.copy() if abs(tone) < 1e-6 else np.expm1(-tone * signal) / np.expm1(-tone)


def receive_field(shape: Sequence[int], strength: float, generator: np.random.Generator) -> FloatVolume:
    """Multiplicative field exp(strength * p(x) / max|p|), p a random polynomial of degree 1 to 3 in x.

    Args:
        shape: of the volume.
        strength: largest |log gain|; 0 gives ones.
        generator: draws the coefficients, standard normal divided by the degree.
    """
    axes = np.meshgrid(*(np.linspace(-1.0, 1.0, size) for size in shape), indexing="ij", sparse=True)
    polynomial = np.zeros(tuple(shape))
    for powers in itertools.product(range(4), repeat=len(shape)):
        degree = sum(powers)
        if 1 <= degree <= 3:
            term: Any = generator.normal() / degree
            for axis, power in zip(axes, powers, strict=True):
                term = term * axis**power
            polynomial = polynomial + term
    return np.asarray(np.exp(strength * polynomial / np.abs(polynomial).max()))


def blur_point_spread(signal: FloatVolume, width_mm: float, spacing_mm: Sequence[float]) -> FloatVolume:
    """Gaussian point spread by k-space weighting: F(y) = F(u) * exp(-2 pi^2 s^2 |f|^2), s = width / (2 sqrt(2 ln 2)).

    The field of view wraps around, as in a scanner; the sum of the signal is kept.

    Args:
        signal: u, any shape.
        width_mm: full width at half maximum; 0 returns a copy.
        spacing_mm: one per axis.
    """
    if width_mm == 0:
        return signal.copy()
    sigma_mm = width_mm / (2 * np.sqrt(2 * np.log(2)))
    frequencies = [np.fft.fftfreq(size, d=step) for size, step in zip(signal.shape, spacing_mm, strict=True)]
    squared = sum(axis**2 for axis in np.meshgrid(*frequencies, indexing="ij", sparse=True))
    weight = np.exp(-2 * np.pi**2 * sigma_mm**2 * squared)
    return np.asarray(np.fft.ifftn(np.fft.fftn(signal) * weight).real)


def truncate_k_space(signal: FloatVolume, loss: Sequence[float]) -> FloatVolume:
    """Lower resolution on the same grid: F(y) = F(u) where |f| <= 1 / (2 loss) cycles per voxel on every axis, else 0.

    A box in k-space, as a scanner that samples fewer lines and interpolates: edges ring (Gibbs). Different losses per axis
    give thick slices. The mean of the signal is kept; the result may be negative beside edges.

    Args:
        signal: u, any shape.
        loss: per axis, how many voxels of this grid a voxel of the scanner spans; 1 keeps the axis.
    """
    spectrum = np.fft.fftn(signal)
    for axis, (size, factor) in enumerate(zip(signal.shape, loss, strict=True)):
        keep = np.abs(np.fft.fftfreq(size)) <= 0.5 / factor
        spectrum *= keep.reshape([-1 if other == axis else 1 for other in range(signal.ndim)])
    return np.asarray(np.fft.ifftn(spectrum).real)


def add_rician_noise(signal: FloatVolume, sigma: float, generator: np.random.Generator) -> FloatVolume:
    """Magnitude of the signal with complex Gaussian noise: sqrt((u + n1)^2 + n2^2), n1 and n2 ~ N(0, sigma^2).

    Args:
        signal: u >= 0, any shape.
        sigma: in units of u; 0 returns |u|.
        generator: draws n1, then n2.
    """
    real, imaginary = generator.normal(0.0, sigma, size=(2, *signal.shape))
    return np.hypot(signal + real, imaginary)


def scan(
    signal: FloatVolume,
    mask: npt.NDArray[np.bool_],
    spacing_mm: Sequence[float],
    draw: ScannerDraw,
    generator: np.random.Generator,
) -> npt.NDArray[np.int16]:
    """One acquisition, in the order of the physics: receive field, point spread, Rician noise, then the vendor's tone
    curve and raw scale, then brain extraction.

    Args:
        signal: u >= 0, the anatomy's true signal.
        mask: brain; the result is 0 outside and at least 1 inside, as after brain extraction.
        spacing_mm: one per axis.
        draw: this case's parameters.
        generator: draws the field and the noise.

    Raises:
        DataError: the mask has another shape than the signal.
    """
    if mask.shape != signal.shape:
        raise DataError(f"The brain mask {mask.shape} and the signal {signal.shape} have different shapes.")
    received = signal * receive_field(signal.shape, draw.bias, generator)
    blurred = np.clip(blur_point_spread(received, draw.point_spread_mm, spacing_mm), 0.0, None)
    raw = tone_curve(add_rician_noise(blurred, draw.noise, generator), draw.tone) * draw.scale
    return np.where(mask, np.clip(np.rint(raw), 1, np.iinfo(np.int16).max), 0).astype(np.int16)
