"""The fingerprint of a private run out of one secure sum: the server sees no site's summary, and the noise is that of the sum.

Every site offers the sum of its patients' bounded vectors (`planning.private_summary`) and adds a share of the noise,
N(0, sigma^2 / (n - t)). All n sites have to be in the sum, because one plan needs all. The shares of those that tell nobody
theirs are sigma^2 at least, all of them n / (n - t) of it; noise at each site would be n times as much. Rounding
(`privacy.site_level`) changes epsilon by less than 1e-9 in vectors of so few entries; it is not entered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import Unpacked, json_hash
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.secure.home import NOISY, ONE, Offer, offer
from nnunet_fedharm.federation.secure.sum import SecureSum
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_budget import ledger_within
from nnunet_fedharm.planning.private_summary import PrivateSummary, fingerprint_release, length
from nnunet_fedharm.privacy.fixed_point import Field, Layout
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, REACH, SitePrivacy

_SUMS = NOISY + "sums"


def key_of_fingerprint(run_id: str) -> str:
    """Under which the summaries of a run are summed."""
    return f"{run_id}/fingerprint/0"


def noise_shares(values: Mapping[str, Any]) -> SitePrivacy:
    """The shares that a request for summaries in a sum asks for.

    Args:
        values: of the request.
    """
    return SitePrivacy(
        mode=DISTRIBUTED,
        clip=1.0,  # a patient's vector
        noise=values["noise"],
        delta=values["delta"],
        rounds=1,
        least=values["summed_over"],
        colluding=values["colluding"],
    )


def offer_summary(site: Site, request: Unpacked, exact: PrivateSummary) -> PrivateSummary:
    """Keep a site's summary for the sum.

    Args:
        exact: without noise.

    Returns:
        What the server may see beforehand: the public numbers, and the size of this site's share.

    Raises:
        PrivacyError: the site's budget does not hold it.
    """
    values = request.values
    shares, run_id = noise_shares(values), values["run_id"]
    release = replace(fingerprint_release(values["noise"], run_id=run_id), noise_alone=shares.share)
    ledger_within(site, [release], values)
    arrays = {_SUMS: np.array(exact.sums)}
    key, counted = key_of_fingerprint(run_id), f"{run_id}/fingerprint"
    offer(site.folder, Offer(key, arrays, {ONE: 1}, release, json_hash(values), None, shares, counted))
    return replace(exact, noise_multiplier=shares.share, sums=(0.0,) * len(exact.sums))


def summed_summaries(
    roster: Roster, config: FederateConfig, log: Any, run_id: str, told: Sequence[PrivateSummary]
) -> list[PrivateSummary]:
    """What the sites told, the first of them with the sum of all.

    Raises:
        PrivacyError: a site is missing in the sum.
    """
    size, cases = length(len(told[0].measured)), max(summary.n_cases for summary in told)
    room = cases + REACH * max(summary.noise_multiplier for summary in told)
    layout = Layout((Field(_SUMS, (size,), room, weighted=False),), len(told), 1, config.secure_bytes)
    nodes = {site: roster.nodes[site] for site in roster.expected}
    summing = SecureSum(roster.grid, log, nodes, config.deadline_s, config.secure_threshold, config.site_colluding)
    total = summing.run(key_of_fingerprint(run_id), layout, least=len(told)).sum.values[_SUMS]
    return [replace(told[0], sums=tuple(total.tolist())), *told[1:]]
