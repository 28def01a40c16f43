"""Style: what a site's images look like, as a handful of numbers and never an image.

A style is, per channel, the quantiles of the z-scored intensities at fixed levels, averaged over a site's patients (the
average of quantile functions is the Wasserstein-2 barycentre of the patients' histograms), and the z-value at which the raw
signal is zero. Nyul landmarks are the same numbers at other levels.

References:
    Nyul, Udupa, Zhang, "New variants of a method of MRI scale standardization", IEEE TMI 2000.
    Agueh, Carlier, "Barycenters in the Wasserstein space", SIAM J. Math. Anal. 2011 (the one-dimensional case).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import PlanError, ShapeError

QUANTILE_LEVELS: tuple[float, ...] = tuple(float(level) for level in np.linspace(0.01, 0.99, 33))
"""Levels at which every style is sampled; changing them changes the meaning of every stored style."""

STYLE_CLIP = 10.0
"""A patient's quantiles are clipped to +-10 standard deviations: the bound on what one patient can move."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """Appearance of a site.

    Attributes:
        quantiles: (C, Q) non-decreasing along Q = len(QUANTILE_LEVELS), in standard deviations of the volume.
        offset: (C,) distance from the volume's mean down to raw signal zero (mu / sigma), in standard deviations.
        n_cases: patients averaged.
    """

    quantiles: FloatArray
    offset: FloatArray
    n_cases: int

    def __post_init__(self) -> None:
        levels = len(QUANTILE_LEVELS)
        if (
            self.quantiles.ndim != 2
            or self.quantiles.shape[1] != levels
            or self.offset.shape != self.quantiles.shape[:1]
        ):
            raise ShapeError(
                f"A style needs quantiles (C, {levels}) and offset (C,), got {self.quantiles.shape} and {self.offset.shape}."
            )
        if not (np.isfinite(self.quantiles).all() and np.isfinite(self.offset).all()):
            raise PlanError("A style holds NaN or infinity; check the site's images with `nnunet-fedharm sites check`.")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in the plans and travels in messages."""
        return {"quantiles": self.quantiles.tolist(), "offset": self.offset.tolist(), "n_cases": self.n_cases}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Style:
        """Inverse of `to_dict`.

        Raises:
            PlanError: a key is missing.
        """
        try:
            return cls(
                quantiles=np.asarray(data["quantiles"], dtype=np.float64),
                offset=np.asarray(data["offset"], dtype=np.float64),
                n_cases=int(data["n_cases"]),
            )
        except KeyError as error:
            raise PlanError(f"A style lacks the key {error}; it needs quantiles, offset and n_cases.") from error


def volume_quantiles(image: npt.NDArray[np.floating[Any]]) -> tuple[FloatArray, FloatArray]:
    """Quantiles and offset of one preprocessed volume.

    Voxels that are exactly zero are padding or lie outside nnU-Net's nonzero mask and do not count.

    Args:
        image: (C, *spatial), z-scored.

    Returns:
        quantiles (C, Q) and offset (C,), clipped to STYLE_CLIP.
    """
    quantiles = np.zeros((image.shape[0], len(QUANTILE_LEVELS)))
    offset = np.zeros(image.shape[0])
    for channel, values in enumerate(image.reshape(image.shape[0], -1)):
        inside = values[values != 0]
        if inside.size:
            quantiles[channel] = np.quantile(inside.astype(np.float64), QUANTILE_LEVELS)
            offset[channel] = -float(inside.min())
    return np.clip(quantiles, -STYLE_CLIP, STYLE_CLIP), np.clip(offset, 0.0, STYLE_CLIP)


def average_styles(styles: Sequence[Style], weights: Sequence[float] | None = None) -> Style:
    """Weighted barycentre of styles.

    Args:
        styles: at least one, same number of channels.
        weights: non-negative, one per style; None weighs all the same (a big hospital does not define the reference).

    Raises:
        PlanError: no style is given.
    """
    if not styles:
        raise PlanError("A reference style needs at least one site's style, got none.")
    share = np.ones(len(styles)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    return Style(
        quantiles=np.einsum("k,kcq->cq", share, np.stack([style.quantiles for style in styles])),
        offset=np.einsum("k,kc->c", share, np.stack([style.offset for style in styles])),
        n_cases=sum(style.n_cases for style in styles),
    )
