"""A site's dataset as a bounded summary: what nnU-Net's fingerprint needs, and no list of cases.

nnU-Net's `DatasetFingerprintExtractor` reads every case, crops it to nonzero, keeps its spacing and shape, and draws the
same number of foreground voxels from every case with replacement; the pooled sample gives mean, std and percentiles. So in
expectation *every case weighs the same, however large its foreground*. The summary computes these expectations exactly:
each foreground voxel weighs 1 / (foreground voxels of its case), nothing is drawn.

| symbol | here | meaning |
|---|---|---|
| w | `n` | cases with foreground |
| mu | `mean` | mean over cases of the cases' foreground means |
| M2 | `m2` | sum of weighted squared deviations; std = sqrt(M2 / w) |

Unlabelled cases contribute spacing, shape and relative size, and no intensities: foreground needs labels.

Size in JSON, whatever the number of cases: 3 geometry histograms of at most 2048 bins, one of 1025 for the relative size,
and 4096 bins a channel: below `MAX_BYTES_BASE + channels * MAX_BYTES_CHANNEL`.

References:
    Isensee et al., "nnU-Net", Nature Methods 2021 (fingerprint).
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979 (merging M2).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.planning.histogram import GEOMETRY, INTENSITY, Histogram, Key, build
from nnunet_fedharm.sites.files import CaseFiles, labelled_cases, read_dataset_json, reader_class, unlabelled_cases
from nnunet_fedharm.sites.parallel import map_cases

SUMMARY_VERSION = 1
RELATIVE_SIZE_BINS = 1024
"""Bins of the relative size after cropping, over [0, 1]; 1 exactly has its own. nnU-Net's threshold 3/4 is an edge."""
Moments = tuple[float, float, float, float]
"""Mean, variance, minimum and maximum of one case's foreground in one channel."""

MAX_BYTES_BASE = 320_000
MAX_BYTES_CHANNEL = 160_000


@dataclass(frozen=True)
class ChannelSummary:
    """Foreground intensities of one channel, every case weighing the same.

    Attributes:
        n: cases with foreground, the total weight.
        mean, m2: weighted mean and sum of squared deviations.
        minimum, maximum: over all foreground voxels; infinite when n is 0.
        histogram: weights on `histogram.INTENSITY`.
    """

    n: int
    mean: float
    m2: float
    minimum: float
    maximum: float
    histogram: Histogram

    def to_dict(self) -> dict[str, Any]:
        # JSON has no infinity: an empty channel has no extremes.
        extremes = {"minimum": self.minimum, "maximum": self.maximum} if self.n else {"minimum": None, "maximum": None}
        return {"n": self.n, "mean": self.mean, "m2": self.m2, **extremes, "histogram": self.histogram.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChannelSummary:
        minimum, maximum = (
            float(data[key]) if data[key] is not None else default
            for key, default in (("minimum", np.inf), ("maximum", -np.inf))
        )
        histogram = Histogram.from_dict(data["histogram"], INTENSITY)
        return cls(int(data["n"]), float(data["mean"]), float(data["m2"]), minimum, maximum, histogram)


@dataclass(frozen=True)
class SiteSummary:
    """What one site tells the server about its cases.

    Attributes:
        site: name of the site.
        n_cases: labelled and unlabelled cases, all of which are in `geometry`.
        n_training: labelled cases (nnU-Net's numTraining).
        geometry: one histogram an axis, in array order, of (spacing in mm, voxels after cropping).
        relative_size: bin index in 0 … RELATIVE_SIZE_BINS -> cases.
        channels: one entry a channel, in channel order.
    """

    site: str
    n_cases: int
    n_training: int
    geometry: tuple[Histogram, ...]
    relative_size: dict[int, int]
    channels: tuple[ChannelSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        bins = sorted(self.relative_size)
        return {
            "version": SUMMARY_VERSION,
            "site": self.site,
            "n_cases": self.n_cases,
            "n_training": self.n_training,
            "geometry": [axis.to_dict() for axis in self.geometry],
            "relative_size": {"bins": bins, "counts": [self.relative_size[index] for index in bins]},
            "channels": [channel.to_dict() for channel in self.channels],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteSummary:
        """Inverse of `to_dict`.

        Raises:
            PlanError: another version, or a damaged summary.
        """
        if data.get("version") != SUMMARY_VERSION:
            raise PlanError(
                f"A site summary has version {data.get('version')!r}; this release reads version {SUMMARY_VERSION}. "
                "Install the same nnunet_fedharm at every site."
            )
        try:
            relative = data["relative_size"]
            return cls(
                site=str(data["site"]),
                n_cases=int(data["n_cases"]),
                n_training=int(data["n_training"]),
                geometry=tuple(Histogram.from_dict(axis, GEOMETRY) for axis in data["geometry"]),
                relative_size={int(k): int(v) for k, v in zip(relative["bins"], relative["counts"], strict=True)},
                channels=tuple(ChannelSummary.from_dict(channel) for channel in data["channels"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"A site summary is damaged ({error}). Let the site summarize again.") from error


@dataclass(frozen=True)
class CaseSummary:
    """One case, kept at the site.

    Attributes:
        spacing_mm, shape: of the three axes, shape after cropping to nonzero.
        relative_size: voxels after cropping / before.
        labelled: False for unlabelled cases.
        channels: (mean, variance, minimum, maximum) of the foreground and bin code -> share of it; empty without any.
    """

    spacing_mm: tuple[float, ...]
    shape: tuple[int, ...]
    relative_size: float
    labelled: bool
    channels: tuple[tuple[Moments, dict[int, float]], ...]


def summarize_site(raw_dataset: Path, *, site: str, num_processes: int = 1) -> SiteSummary:
    """Read every case of a site once.

    Raises:
        DataError: no dataset, no case, a file that cannot be read, NaN.
    """
    description, cases = read_cases(raw_dataset, site=site, num_processes=num_processes)
    summaries = (summary for _, summary in cases)
    return combine_cases(summaries, site=site, n_channels=len(description["channel_names"]))


def read_cases(
    raw_dataset: Path, *, site: str, num_processes: int = 1
) -> tuple[dict[str, Any], Iterator[tuple[str, CaseSummary]]]:
    """The dataset's description, and each case's identifier with its summary, read one after the other.

    Raises:
        DataError: no dataset or no case; while reading: a file that cannot be read, NaN.
    """
    dataset_json = read_dataset_json(raw_dataset, site=site)
    cases = labelled_cases(raw_dataset, dataset_json) + unlabelled_cases(raw_dataset, dataset_json)
    if not cases:
        raise DataError(f"Site {site} is empty: {raw_dataset} has no case. Add cases or leave the site out.")
    reader = reader_class(dataset_json, cases[0].images[0], site=site)
    work = partial(summarize_case, reader=reader, site=site)
    summaries = map_cases(work, cases, num_processes=num_processes, description=f"Summarizing site {site}")
    return dataset_json, zip((files.case for files in cases), summaries, strict=True)


def summarize_case(files: CaseFiles, *, reader: type[Any], site: str) -> CaseSummary:
    """One case by nnU-Net's own reading, cropping and foreground rule (label > 0).

    Raises:
        DataError: a file cannot be read, or image and label differ in shape.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    try:
        with redirect_stdout(StringIO()):
            images, properties = reader().read_images([str(image) for image in files.images])
            label = None if files.label is None else reader().read_seg(str(files.label))[0]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Site {site}, case {files.case}: {files.images[0]} or its label cannot be read. "
            "Run `nnunet-fedharm sites check` for the reason."
        ) from error
    if label is not None and label.shape[1:] != images.shape[1:]:
        raise DataError(
            f"Site {site}, case {files.case}: the label {files.label} has shape {label.shape[1:]}, the image has "
            f"{images.shape[1:]}. Resample the label onto the image."
        )
    cropped, segmentation, _ = crop_to_nonzero(images, label)
    inside = segmentation[0] > 0
    intensities = cropped[:, inside] if label is not None and inside.any() else np.empty((0, 0))
    return CaseSummary(
        spacing_mm=tuple(float(value) for value in properties["spacing"]),
        shape=tuple(int(size) for size in cropped.shape[1:]),
        relative_size=float(np.prod(cropped.shape[1:]) / np.prod(images.shape[1:])),
        labelled=label is not None,
        channels=tuple(_describe(values, site=site, files=files) for values in intensities),
    )


def combine_cases(cases: Iterable[CaseSummary], *, site: str, n_channels: int) -> SiteSummary:
    """A site's summary from its cases; the order of the cases does not matter (moments to rounding)."""
    axes = [Counter[Key]() for _ in range(3)]
    relative: Counter[int] = Counter()
    n_training = 0
    moments: list[list[Moments]] = [[] for _ in range(n_channels)]
    weights = [defaultdict[Key, float](float) for _ in range(n_channels)]
    for case in cases:
        n_training += case.labelled
        relative[int(case.relative_size * RELATIVE_SIZE_BINS)] += 1
        for axis, spacing, size in zip(axes, case.spacing_mm, case.shape, strict=True):
            code = int(GEOMETRY.codes(np.array([spacing]))[0])
            axis[code, min(size, GEOMETRY.largest_size)] += 1
        # Histograms are added at once: holding them for thousands of cases would fill the memory.
        for index, (case_moments, shares) in enumerate(case.channels):
            moments[index].append(case_moments)
            for code, share in shares.items():
                weights[index][code, 0] += share
    return SiteSummary(
        site=site,
        n_cases=sum(relative.values()),
        n_training=n_training,
        geometry=tuple(build(axis, GEOMETRY) for axis in axes),
        relative_size=dict(relative),
        channels=tuple(_combine_channel(*channel) for channel in zip(moments, weights, strict=True)),
    )


def _describe(
    values: npt.NDArray[np.floating[Any]], *, site: str, files: CaseFiles
) -> tuple[Moments, dict[int, float]]:
    if not np.isfinite(values).all():
        raise DataError(
            f"Site {site}, case {files.case}: {files.images[0]} or another channel holds NaN or infinity in the foreground. "
            "Replace these voxels."
        )
    exact = values.astype(np.float64)
    codes, counts = np.unique(INTENSITY.codes(values), return_counts=True)
    shares = {int(code): int(count) / exact.size for code, count in zip(codes, counts, strict=True)}
    return (float(exact.mean()), float(exact.var()), float(exact.min()), float(exact.max())), shares


def _combine_channel(moments: Sequence[Moments], weights: Mapping[Key, float]) -> ChannelSummary:
    if not moments:
        return ChannelSummary(0, 0.0, 0.0, np.inf, -np.inf, Histogram(0, {}))
    means, variances, minima, maxima = np.array(moments).T
    mean = float(means.mean())
    m2 = float(variances.sum() + np.square(means - mean).sum())
    histogram = build(weights, INTENSITY)
    return ChannelSummary(len(moments), mean, m2, float(minima.min()), float(maxima.max()), histogram)
