"""A noisy summary among exact ones: it is merged as the cases that it describes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.noisy_cases import as_site_summary
from nnunet_fedharm.planning.private_merge import merge_private
from nnunet_fedharm.planning.private_summary import PrivateSummary, private_summary
from nnunet_fedharm.planning.summary import CaseSummary, SiteSummary, combine_cases
from nnunet_fedharm.privacy.noise import SecureNoise

CT = (((40.0, 100.0, -100.0, 300.0), {0: 1.0}),)


def cases(spacing: float, count: int = 40, labelled: int = 40) -> list[CaseSummary]:
    return [
        CaseSummary((spacing, 1.0, 1.0), (64, 128, 128), 1.0, index < labelled, CT if index < labelled else ())
        for index in range(count)
    ]


def noisy(
    site: str, spacing: float, *, measured: tuple[int, ...] = (), sigma: float = 0.0, **counts: int
) -> PrivateSummary:
    named = [(f"{site}{index}", case) for index, case in enumerate(cases(spacing, **counts))]
    return private_summary(named, {}, site=site, measured=measured, noise_multiplier=sigma, noise=SecureNoise())


def exact(site: str, spacing: float, **counts: int) -> SiteSummary:
    return combine_cases(cases(spacing, **counts), site=site, n_channels=1)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_alone_it_gives_the_fingerprint_of_a_private_run(sigma: float) -> None:
    told = noisy("B", 2.0, measured=(0,), sigma=sigma)
    private, merged = merge_private([told], n_channels=1), merge_summaries([as_site_summary(told, n_channels=1)])
    np.testing.assert_allclose(merged["spacings"], private["spacings"], rtol=1e-6)
    assert merged["shapes_after_crop"] == private["shapes_after_crop"]
    assert merged["median_relative_size_after_cropping"] == private["median_relative_size_after_cropping"]
    found, wanted = (part["foreground_intensity_properties_per_channel"]["0"] for part in (merged, private))
    for name in ("mean", "std", "min", "max", "percentile_00_5", "percentile_99_5"):
        assert found[name] == pytest.approx(wanted[name], rel=0.01, abs=1.0), name


def test_among_exact_ones_its_cases_count_as_cases() -> None:
    among = [exact("A", 1.0, count=30, labelled=30), as_site_summary(noisy("B", 4.0), n_channels=1)]
    first_axis = [spacing[0] for spacing in merge_summaries(among)["spacings"]]
    assert first_axis == pytest.approx([1.0] * 30 + [4.0] * 40, rel=0.05)


def test_it_travels_as_every_summary_does_and_has_no_more_than_the_noisy_numbers() -> None:
    told = noisy("B", 2.0, sigma=1.0)
    summary = as_site_summary(told, n_channels=2)
    assert SiteSummary.from_dict(summary.to_dict()) == summary
    assert summary == as_site_summary(PrivateSummary.from_dict(told.to_dict()), n_channels=2)
    assert (summary.n_cases, summary.n_training) == (40, 40)


def test_sites_that_are_all_private_can_be_planned_and_one_without_labels_tells_no_intensity() -> None:
    summary = as_site_summary(noisy("B", 2.0, labelled=0), n_channels=1)
    assert [channel.n for channel in summary.channels] == [0]
    both = [summary, as_site_summary(replace(noisy("C", 2.0), site="C"), n_channels=1)]
    assert set(merge_summaries(both)["foreground_intensity_properties_per_channel"]) == {"0"}
