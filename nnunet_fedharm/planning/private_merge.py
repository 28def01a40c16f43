"""The fingerprint of all sites out of noisy summaries (`private_summary`): one that can be planned, whatever the noise.

Histograms with noise show values that many share (the spacings of protocols), means show the middle of anything, each where the
other one drowns: so the mean says where to look, and the histogram there says which spacing. What noise leaves of a histogram
is the nearest one that has no negative bin and as many patients as there are. Everything is cut to announced ranges.

Differences from an exact fingerprint, beside the noise: spacings are those of the bins (within 4.5 %), and the shape of a case is
the geometric mean extent of all cases over its spacing.

References:
    Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008 (nearest histogram).
    Biswas et al., "CoinPress: Practical Private Mean and Covariance Estimation", NeurIPS 2020 (a rough mean first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_fedharm.errors import PlanError, SiteMismatchError
from nnunet_fedharm.planning.private_summary import (
    AXES,
    BIN_WEIGHT,
    CT_VALUES,
    HU_REACH,
    REACH,
    SPACINGS,
    USUAL_EXTENT_MM,
    PrivateSummary,
    Vector,
    sensitivity,
)

EXTENT_MM, SHAPE = (8.0, 1024.0), (8, 1024)
"""What a noisy extent of an axis, and the number of its voxels, are cut to."""
_SMALLEST_WINDOW = 1.0
"""Octaves on each side of the mean in which the median spacing is looked for."""
USUAL_SPREAD = 1.5
"""Octaves: how far spacings and extents of MR volumes lie around 1 mm and USUAL_EXTENT_MM; noisy means are drawn there."""
DROWNED = 1 / 3
"""Noise of a bin, over all patients, above which histograms are not looked at."""
UNREAD = {
    "mean": 0.0,
    "median": 0.0,
    "std": 1.0,
    "min": -1.0,
    "max": 1.0,
    "percentile_00_5": -1.0,
    "percentile_99_5": 1.0,
}
"""In place of the intensities of a channel that nnU-Net does not normalize as CT."""


def merge_private(summaries: Sequence[PrivateSummary], *, n_channels: int) -> dict[str, Any]:
    """nnU-Net's dataset_fingerprint.json of all sites together, with one entry a case.

    Args:
        summaries: one a site.
        n_channels: of the images.

    Raises:
        PlanError: no summary.
        SiteMismatchError: sites measured other channels.
    """
    if not summaries:
        raise PlanError("Planning needs at least one site's summary, got none.")
    first = summaries[0]
    for summary in summaries:
        if summary.measured != first.measured:
            raise SiteMismatchError(
                f"Site {summary.site} measured the channels {list(summary.measured)}, site {first.site} "
                f"{list(first.measured)}. Compare the dataset.json files of both sites."
            )
    scale = sensitivity(len(first.measured))
    total = scale * np.sum([summary.sums for summary in summaries], axis=0)
    logs, bins, whole, intensities = np.split(total, np.cumsum([2 * AXES, AXES * len(SPACINGS), 1]))
    labelled = max(1, sum(summary.n_labelled for summary in summaries))
    spacings, shapes = _geometry(summaries, logs, bins.reshape(AXES, -1) / BIN_WEIGHT)
    measured = intensities.reshape(-1, len(CT_VALUES)) * HU_REACH / labelled
    properties = {str(channel): dict(UNREAD) for channel in range(n_channels)}
    properties |= {str(channel): _properties(row) for channel, row in zip(first.measured, measured, strict=True)}
    return {
        "spacings": spacings.tolist(),
        "shapes_after_crop": shapes.tolist(),
        "foreground_intensity_properties_per_channel": properties,
        "median_relative_size_after_cropping": 1.0 if whole[0] >= 0 else 0.5,
    }


def nearest_histogram(counts: Vector, total: float) -> Vector:
    """The histogram without negative bins and of this total that is nearest (L2) to noisy counts."""
    ordered = np.sort(counts)[::-1]
    excess = np.cumsum(ordered) - total
    kept = np.nonzero(ordered - excess / np.arange(1, counts.size + 1) > 0)[0][-1]
    nearest: Vector = np.maximum(counts - excess[kept] / (kept + 1), 0.0)
    return nearest


@dataclass(frozen=True)
class ExpectedError:
    """Standard deviations of the noise.

    Attributes:
        octaves: on the mean logarithm of an axis's spacing or extent.
        bin: on a bin of an axis's histogram of spacings, over all patients.
    """

    octaves: float
    bin: float

    @property
    def drowned(self) -> bool:
        """Whether even a spacing that all patients share is not seen; the mean stands alone then."""
        return self.bin > DROWNED

    def to_dict(self) -> dict[str, Any]:
        return {"octaves": self.octaves, "bin": self.bin, "drowned": self.drowned}


def expected_error(summaries: Sequence[PrivateSummary]) -> ExpectedError:
    """What noise does to the fingerprint of these sites."""
    patients = sum(summary.n_patients for summary in summaries)
    noise = math.sqrt(sum(summary.noise_multiplier**2 for summary in summaries))
    entry = noise * sensitivity(len(summaries[0].measured)) / patients
    return ExpectedError(REACH * entry, entry / BIN_WEIGHT)


def _geometry(summaries: Sequence[PrivateSummary], logs: Vector, bins: Vector) -> tuple[Vector, Vector]:
    """Spacings and shapes, (cases, 3) each, out of the sums of logarithms and the counts of each axis."""
    patients = sum(summary.n_patients for summary in summaries)
    cases = sum(summary.n_cases for summary in summaries)
    error = expected_error(summaries)
    # The linear estimate that is best where the true values are USUAL_SPREAD around the usual ones.
    means = np.clip(REACH * logs / patients * USUAL_SPREAD**2 / (USUAL_SPREAD**2 + error.octaves**2), -10, 10)
    window = max(_SMALLEST_WINDOW, 2 * error.octaves)
    if error.drowned:
        spacings = np.clip(np.tile(2.0 ** means[:AXES], (cases, 1)), SPACINGS[0], SPACINGS[-1])
    else:
        rows = [_spacings(row, at, window, patients, cases) for row, at in zip(bins, means[:AXES], strict=True)]
        spacings = np.stack(rows, axis=1)
    extents = np.clip(USUAL_EXTENT_MM * 2.0 ** means[AXES:], *EXTENT_MM)
    return spacings, np.clip(np.rint(extents / spacings), *SHAPE).astype(np.int64)


def _spacings(counts: Vector, middle: float, window: float, patients: int, cases: int) -> Vector:
    """One spacing a case, sorted, out of an axis's noisy counts near the mean (octaves from 1 mm)."""
    octaves = np.log2(SPACINGS)
    near = np.abs(octaves - np.clip(middle, octaves[0], octaves[-1])) <= window
    shares = np.cumsum(nearest_histogram(counts[near], patients)) / patients
    places = np.searchsorted(shares, (np.arange(cases) + 0.5) / cases)
    chosen: Vector = SPACINGS[near][np.minimum(places, shares.size - 1)]
    return chosen


def _properties(values: Vector) -> dict[str, float]:
    mean, std, low, high = (float(value) for value in values)
    std, high = max(std, 1.0), max(high, low + 1.0)
    mean = min(max(mean, low), high)
    return {
        "mean": mean,
        "median": mean,
        "std": std,
        "min": low,
        "max": high,
        "percentile_00_5": low,
        "percentile_99_5": high,
    }
