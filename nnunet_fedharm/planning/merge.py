"""Site summaries -> nnU-Net's dataset fingerprint, as if the data had been in one place.

`pool` adds summaries; it does not depend on their order or grouping. `fingerprint` writes the sum in the form of
`dataset_fingerprint.json`. The lists `spacings` and `shapes_after_crop` are rebuilt from the histograms, one entry a case:
along each axis every (spacing, shape) pair appears as often as at the sites, so each axis-wise median, percentile and
median resampled shape, which is all that nnU-Net's planner computes, is that of the pooled data. Which values of *different*
axes belonged to one case is unknown and left so: each axis is sorted, coarse spacing with coarse spacing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_fedharm.errors import PlanError, SiteMismatchError
from nnunet_fedharm.planning.histogram import GEOMETRY, INTENSITY, Histogram, add, percentile
from nnunet_fedharm.planning.summary import RELATIVE_SIZE_BINS, ChannelSummary, SiteSummary


def merge_summaries(summaries: Sequence[SiteSummary]) -> dict[str, Any]:
    """The fingerprint of all sites' cases together.

    Raises:
        PlanError: no summary, or no foreground voxel anywhere.
        SiteMismatchError: a site has another number of channels or axes.
    """
    return fingerprint(pool(summaries))


def pool(summaries: Sequence[SiteSummary]) -> SiteSummary:
    """One summary of several; `pool([pool([a, b]), c])` equals `pool([a, b, c])`.

    Raises:
        PlanError: no summary is given.
        SiteMismatchError: a site has another number of channels or axes.
    """
    if not summaries:
        raise PlanError("Planning needs at least one site's summary, got none.")
    first = summaries[0]
    for summary in summaries:
        for what, here, there in (
            ("channels", len(summary.channels), len(first.channels)),
            ("image axes", len(summary.geometry), len(first.geometry)),
        ):
            if here != there:
                raise SiteMismatchError(
                    f"Site {summary.site} summarized {here} {what}, site {first.site} {there}. "
                    "Compare the dataset.json files of both sites."
                )
    relative: Counter[int] = Counter()
    for summary in summaries:
        relative.update(summary.relative_size)
    return SiteSummary(
        site="+".join(summary.site for summary in summaries),
        n_cases=sum(summary.n_cases for summary in summaries),
        n_training=sum(summary.n_training for summary in summaries),
        geometry=tuple(add(axes, GEOMETRY) for axes in zip(*(s.geometry for s in summaries), strict=True)),
        relative_size=dict(relative),
        channels=tuple(_pool_channel(parts) for parts in zip(*(s.channels for s in summaries), strict=True)),
    )


def fingerprint(summary: SiteSummary) -> dict[str, Any]:
    """nnU-Net's `dataset_fingerprint.json` from one (pooled) summary.

    Raises:
        PlanError: no foreground voxel anywhere.
    """
    axes = [_pairs(axis) for axis in summary.geometry]
    return {
        "spacings": [[axis[case][0] for axis in axes] for case in range(summary.n_cases)],
        "shapes_after_crop": [[axis[case][1] for axis in axes] for case in range(summary.n_cases)],
        "foreground_intensity_properties_per_channel": {
            str(index): _properties(channel, index) for index, channel in enumerate(summary.channels)
        },
        "median_relative_size_after_cropping": _median_relative_size(summary.relative_size),
    }


def _pool_channel(parts: Sequence[ChannelSummary]) -> ChannelSummary:
    n = sum(part.n for part in parts)
    mean = sum(part.n * part.mean for part in parts) / n if n else 0.0
    return ChannelSummary(
        n=n,
        mean=mean,
        m2=sum(part.m2 + part.n * (part.mean - mean) ** 2 for part in parts),
        minimum=min(part.minimum for part in parts),
        maximum=max(part.maximum for part in parts),
        histogram=add((part.histogram for part in parts), INTENSITY),
    )


def _pairs(axis: Histogram) -> list[tuple[float, int]]:
    """(spacing, shape) of one axis, sorted, each as often as it occurs."""
    step = GEOMETRY.levels[axis.level][1]
    pairs: list[tuple[float, int]] = []
    for code, size in sorted(axis.bins):
        shape = max(1, size + (step - 1) // 2)
        pairs += [(GEOMETRY.centre(code, axis.level), shape)] * round(axis.bins[code, size])
    return pairs


def _properties(channel: ChannelSummary, index: int) -> dict[str, float]:
    if channel.n == 0:
        raise PlanError(
            f"No site has foreground voxels in channel {index}, so nnU-Net cannot plan. Check that labelsTr holds labels above 0."
        )
    low, median, high = (
        percentile(channel.histogram, INTENSITY, percent, minimum=channel.minimum, maximum=channel.maximum)
        for percent in (0.5, 50.0, 99.5)
    )
    return {
        "mean": channel.mean,
        "median": median,
        "std": float(np.sqrt(channel.m2 / channel.n)),
        "min": channel.minimum,
        "max": channel.maximum,
        "percentile_99_5": high,
        "percentile_00_5": low,
    }


def _median_relative_size(bins: dict[int, int]) -> float:
    centres = [min((index + 0.5) / RELATIVE_SIZE_BINS, 1.0) for index in sorted(bins)]
    return float(np.median(np.repeat(centres, [bins[index] for index in sorted(bins)])))
