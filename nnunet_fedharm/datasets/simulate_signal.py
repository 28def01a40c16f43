"""MR signal equations on tissue maps: the same anatomy under another pulse sequence.

    spin echo      S = PD (1 - exp(-TR/T1)) exp(-TE/T2)
    gradient echo  S = PD sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE/T2*),  E1 = exp(-TR/T1)
    FLAIR          S = PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)

Tissue maps p_k(x) come from the dataset's labels where these are tissues, else from a mixture of three Gaussians of the
intensities. With mu_k the mean intensity of tissue k, the new image is u(x) * sum_k p_k S_k / sum_k p_k mu_k: tissues get the
sequence's signal and voxels keep their native texture. The maps are averaged over 3 voxels per axis. Air (u < 0.1) is left as
it is.

References:
    Kwan, Evans, Pike, IEEE TMI 1999, and BrainWeb: relaxation times at 1.5 T (other tissues or fields: give your own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import uniform_filter
from sklearn.mixture import GaussianMixture

from nnunet_fedharm.datasets.site_effects import FloatVolume
from nnunet_fedharm.errors import DataError

AIR = (0.05, 0.10)
"""u below the first is air, above the second tissue, between them a mixture."""
TEXTURE = (0.5, 2.0)
"""Limits of u / expected u that is taken for texture."""
SMOOTHING = 3
"""Voxels per axis that tissue maps are averaged over, so that edges have partial volumes."""
MIXTURE_SAMPLES = 20_000


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms, proton density relative to water."""

    t1: float
    t2: float
    t2_star: float
    density: float


BRAINWEB = {
    "csf": Tissue(2569, 329, 58, 1.0),
    "grey": Tissue(833, 83, 69, 0.86),
    "white": Tissue(500, 70, 61, 0.77),
}
ORDER = {
    "T1w": ("csf", "grey", "white"),
    "T2w": ("white", "grey", "csf"),
    "FLAIR": ("csf", "white", "grey"),
}
"""Tissues from dark to bright in the image that is rendered anew."""


@dataclass(frozen=True, kw_only=True)
class PulseSequence:
    """What the simulated scanner runs."""

    kind: Literal["spin_echo", "gradient_echo", "flair"]
    tr_ms: float
    te_ms: float
    ti_ms: float | None = None
    """Inversion time, FLAIR only."""
    flip_degrees: float | None = None
    """Flip angle, gradient echo only."""

    def __post_init__(self) -> None:
        if self.kind not in ("spin_echo", "gradient_echo", "flair"):
            raise DataError(f"Unknown pulse sequence {self.kind!r}. Choose spin_echo, gradient_echo or flair.")
        if self.tr_ms <= 0 or self.te_ms < 0:
            raise DataError(f"A pulse sequence needs tr_ms > 0 and te_ms >= 0, got {self.tr_ms} and {self.te_ms}.")
        for kind, name, value in (
            ("flair", "ti_ms", self.ti_ms),
            ("gradient_echo", "flip_degrees", self.flip_degrees),
        ):
            if (self.kind == kind) != (value is not None):
                raise DataError(f"{name} belongs to {kind} and to nothing else; this sequence is {self.kind}.")


def tissue_signal(tissue: Tissue, sequence: PulseSequence) -> float:
    """Signal of one tissue, relative to full magnetisation of water."""
    recovery = np.exp(-sequence.tr_ms / tissue.t1)
    if sequence.kind == "gradient_echo":
        angle = np.deg2rad(sequence.flip_degrees or 0.0)
        steady = np.sin(angle) * (1 - recovery) / (1 - np.cos(angle) * recovery)
        return float(tissue.density * steady * np.exp(-sequence.te_ms / tissue.t2_star))
    longitudinal = 1 - recovery
    if sequence.kind == "flair":
        longitudinal = abs(1 - 2 * np.exp(-(sequence.ti_ms or 0.0) / tissue.t1) + recovery)
    return float(tissue.density * longitudinal * np.exp(-sequence.te_ms / tissue.t2))


def label_maps(label: npt.NDArray[np.integer], tissues: Mapping[str, tuple[int, ...]]) -> dict[str, FloatVolume]:
    """Tissue -> map from label values."""
    return {name: np.isin(label, values).astype(np.float64) for name, values in tissues.items()}


def mixture_maps(signal: FloatVolume, generator: np.random.Generator, *, contrast: str) -> dict[str, FloatVolume]:
    """Tissue -> posterior of a mixture of three Gaussians fitted to the voxels that are no air.

    Args:
        signal: u, 1 = bright tissue.
        generator: draws the voxels that are fitted and the start of the fit.
        contrast: key of ORDER; which class is which tissue.

    Raises:
        DataError: fewer than 30 different intensities.
    """
    tissue = signal[signal >= AIR[1]]
    if np.unique(tissue).size < 30:
        raise DataError("A tissue mixture needs at least 30 different intensities above air; this volume has fewer.")
    sample = generator.choice(tissue, size=min(tissue.size, MIXTURE_SAMPLES), replace=False)
    mixture = GaussianMixture(3, random_state=int(generator.integers(2**31))).fit(sample[:, None])
    posterior = mixture.predict_proba(signal.reshape(-1, 1))
    order = np.argsort(mixture.means_[:, 0])
    return {name: posterior[:, index].reshape(signal.shape) for name, index in zip(ORDER[contrast], order, strict=True)}


def render_sequence(signal: FloatVolume, maps: Mapping[str, FloatVolume], sequence: PulseSequence) -> FloatVolume:
    """The image under another sequence, 1 = the brightest tissue; see the module's docstring.

    Args:
        signal: u >= 0.
        maps: tissue -> map of the same shape; where they sum to 0 the image is left as it is.

    Raises:
        DataError: a tissue that BRAINWEB does not know, or none of its voxels.
    """
    unknown = sorted(set(maps) - set(BRAINWEB))
    if unknown:
        raise DataError(f"Unknown tissue {unknown[0]!r}. Known tissues: {', '.join(BRAINWEB)}.")
    strengths = {name: tissue_signal(BRAINWEB[name], sequence) for name in maps}
    solid = (signal >= AIR[1]).astype(np.float64)
    total, before, after = (np.zeros(signal.shape) for _ in range(3))
    for name, share in maps.items():
        inside = share * solid
        mean = float((inside * signal).sum()) / max(float(inside.sum()), 1e-12)
        smooth = uniform_filter(inside, size=SMOOTHING)
        total += smooth
        before += smooth * mean
        after += smooth * strengths[name] / max(strengths.values())
    if not total.any():
        raise DataError("The tissue maps are empty. Check the label values of the tissues.")
    known = np.clip(_ratio(total, uniform_filter(solid, size=SMOOTHING)), 0.0, 1.0)
    texture = np.clip(_ratio(signal * total, before), *TEXTURE)
    rendered = known * texture * _ratio(after, total) + (1 - known) * signal
    air = np.clip((AIR[1] - signal) / (AIR[1] - AIR[0]), 0.0, 1.0)
    return np.asarray(air * signal + (1 - air) * rendered)


def _ratio(above: FloatVolume, below: FloatVolume) -> FloatVolume:
    """0 where there is nothing to divide by; running sums of the filter leave rounding there."""
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 1e-9))
