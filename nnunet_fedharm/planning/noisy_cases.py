"""A noisy summary in the form of an exact one: of a site whose own policy keeps it private, among sites that are not.

`private_merge` makes the cases that fit to what a site told, and these are summarized as if they had been read. It is a function
of the noisy numbers alone, so it costs no privacy. Intensities of channels that nnU-Net does not read weigh as one case: they
tell nothing, and without any a federation of such sites could not be planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nnunet_fedharm.planning.histogram import INTENSITY, Histogram
from nnunet_fedharm.planning.private_merge import merge_private
from nnunet_fedharm.planning.private_summary import PrivateSummary
from nnunet_fedharm.planning.summary import CaseSummary, ChannelSummary, SiteSummary, combine_cases

_OUTER = 0.01
"""Share of the voxels at each outer percentile, twice what lies beyond it."""


def as_site_summary(noisy: PrivateSummary, *, n_channels: int) -> SiteSummary:
    """The summary of cases that fit to a noisy one.

    Args:
        n_channels: of the images.
    """
    fitting = merge_private([noisy], n_channels=n_channels)
    relative = fitting["median_relative_size_after_cropping"]
    pairs = zip(fitting["spacings"], fitting["shapes_after_crop"], strict=True)
    cases = [
        CaseSummary(tuple(spacing), tuple(shape), relative, labelled=index < noisy.n_labelled, channels=())
        for index, (spacing, shape) in enumerate(pairs)
    ]
    summary = combine_cases(cases, site=noisy.site, n_channels=n_channels)
    properties = fitting["foreground_intensity_properties_per_channel"]
    weights = [noisy.n_labelled if index in noisy.measured else min(1, noisy.n_labelled) for index in range(n_channels)]
    channels = (_channel(properties[str(index)], weight) for index, weight in enumerate(weights))
    return replace(summary, channels=tuple(channels))


def _channel(values: Mapping[str, float], n: int) -> ChannelSummary:
    """Intensities of n cases with this mean, deviation and these outer percentiles."""
    if not n:
        return ChannelSummary(0, 0.0, 0.0, np.inf, -np.inf, Histogram(0, {}))
    low, mean, high = (values[name] for name in ("percentile_00_5", "mean", "percentile_99_5"))
    bins: dict[tuple[int, int], float] = {}
    for value, share in ((low, _OUTER), (mean, 1 - 2 * _OUTER), (high, _OUTER)):
        key = (int(INTENSITY.codes(np.array([value]))[0]), 0)
        bins[key] = bins.get(key, 0.0) + n * share
    return ChannelSummary(n, mean, n * values["std"] ** 2, low, high, Histogram(0, bins))
