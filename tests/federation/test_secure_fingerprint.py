"""The fingerprint of a private run out of one secure sum: noise of a sum, every site or none, one entry in each ledger."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import Unpacked
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.secure.fingerprint import noise_shares, offer_summary, summed_summaries
from nnunet_fedharm.planning.private_merge import expected_error, merge_private
from nnunet_fedharm.planning.private_summary import PrivateSummary
from nnunet_fedharm.privacy.ledger import Ledger
from tests.federation.test_secure_sum import Bench
from tests.planning.test_private_summary import hippocampi, summary_of

RUN = "aaaaaaaaaaaa-bbbbbb"


def request(noise: float = 2.0, epsilon: float = 9.0) -> Unpacked:
    values = {"run_id": RUN, "dataset_name": "x", "noise": noise, "epsilon": epsilon, "delta": 1e-5}
    return Unpacked({**values, "summed_over": 4, "colluding": 1})


def summed(bench: Bench, noise: float) -> tuple[list[PrivateSummary], np.ndarray]:
    """What the server has after the sum, and the exact sum."""
    exact = {name: summary_of(hippocampi(40, seed), site=name) for seed, name in enumerate(bench.homes)}
    told = [offer_summary(home.site, request(noise), exact[name]) for name, home in bench.homes.items()]
    assert not any(any(summary.sums) for summary in told)
    roster = Roster(bench.grid, bench.log, RUN, "x", tuple(bench.homes), nodes=dict(bench.sum.nodes))
    config = FederateConfig(sites="A,B,C,D", deadline_s=0.3, secure_aggregation="all")
    found = summed_summaries(roster, config, bench.log, RUN, told)
    return found, np.sum([summary.sums for summary in exact.values()], axis=0)


def test_the_sum_has_the_promised_noise_and_the_surplus_of_those_that_answer(tmp_path: Path) -> None:
    found, exact = summed(Bench(tmp_path), 2.0)
    wanted = 2.0 * math.sqrt(4 / 3)
    assert (np.array(found[0].sums) - exact).std() == pytest.approx(wanted, rel=0.25)
    assert math.sqrt(sum(summary.noise_multiplier**2 for summary in found)) == pytest.approx(wanted)
    alone = [summary_of(hippocampi(40), noise=2.0, site=name) for name in "ABCD"]
    assert expected_error(found).octaves == pytest.approx(expected_error(alone).octaves / math.sqrt(3))
    assert np.array_equal(np.median(merge_private(found, n_channels=1)["spacings"], axis=0), [1, 1, 1])


def test_every_site_enters_its_summary_with_the_noise_of_the_sum(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    summed(bench, 2.0)
    for home in bench.homes.values():
        (entry,) = Ledger(home.site.folder).releases()
        assert (entry.what, entry.noise_multiplier) == ("fingerprint summary", 2.0)
        assert "inside a secure sum" in entry.note
    assert noise_shares(request(2.0).values).share == pytest.approx(2.0 / math.sqrt(3))


def test_without_one_site_nothing_is_opened(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.homes["C"].silent_from = "mask"
    with pytest.raises(PrivacyError, match="Only 3 of 4"):
        summed(bench, 2.0)


def test_what_the_budget_does_not_hold_is_not_offered(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(PrivacyError, match="The budget is epsilon"):
        offer_summary(bench.homes["A"].site, request(epsilon=0.1), summary_of(hippocampi(5)))
