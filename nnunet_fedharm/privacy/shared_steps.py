"""DP-SGD whose noise is added once for all sites: every site adds a share of it, inside a secure sum.

    w <- w - lr (C (sum over sites of S_i) + N(0, sigma^2 C^2) at least) / (q sum of N_i),  S_i = sum of clipped gradients over C

| symbol | here |
|---|---|
| q | `sample_rate`: each patient of each site is drawn with it, by their own site, which tells nobody |
| sigma | `noise` |
| k, t | `least` sites in every sum; `colluding` sites that may tell others their own share |
| sigma^2 / (k - t) | variance of a site's share, in squared clips |

A harmonizer in front learns in rounds of its own before these, in which every site that trains it adds all of the noise, sigma
too, and a site that votes tells its votes once; sigma is such that a patient who pays for all of it stays within the budget.

**What it takes.** What leaves the sites is a function of the sum of the S_i, at weights that all have in common. That holds for
one step a round whose update is linear in the gradient: after a second local step the sites stand at different weights, which
hold but a share of the noise, and their sum is no sum of one mechanism; a momentum that a site keeps would bring a gradient into
later sums, with the noise of other sites. So a round is one step (DP-FedSGD), and momentum, Adam and the learning rate are the
server's, on the noisy sum.

**Trust.** Against the server and t sites together a patient has the epsilon of the subsampled Gaussian mechanism with sigma and
q, because the shares of the other k - t sites add up to sigma^2 at least; n sites give n / (k - t) times as much. Who stays away
takes no noise with them: below k the sum stays closed. If all other sites and the server work together, a patient is left with
their own site's share, sigma / sqrt(k - t); the ledger has both. The masks of secure aggregation hide a site's sum
computationally, under the conditions of secure aggregation (threshold, honest keys).

**Once.** A draw of patients is opened once: two looks at the same draw with new noise would cost more than two draws. A round
whose sum was opened, or may have been, is drawn anew.

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (FedSGD).
    Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
    ICML 2021. Rounding: `site_level`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.accounting import Noise
from nnunet_fedharm.privacy.options import VOTE_NOISE, PrivacyOptions, common_noise
from nnunet_fedharm.privacy.releases import GAUSSIAN, SUBSAMPLED, Release
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, SitePrivacy


@dataclass(frozen=True, kw_only=True)
class SharedSteps:
    """One noise for all sites.

    Attributes:
        noise: sigma, in clips. sample_rate: q. rounds: planned. delta: of the budget.
        least, colluding: k and t.
        harmonizer_rate: chance of a patient in a step of the harmonizer, whose noise each site adds by itself, sigma too; 0: the
            run has no such steps.
    """

    noise: float
    sample_rate: float
    rounds: int
    delta: float
    least: int
    colluding: int
    harmonizer_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"sample rate must be above 0 and at most 1, got {self.sample_rate}.")
        if not 0 <= self.harmonizer_rate <= 1:
            raise PrivacyError(f"sample rate of the harmonizer must be from 0 to 1, got {self.harmonizer_rate}.")
        _ = self.shares  # refuses the rest

    @property
    def shares(self) -> SitePrivacy:
        """The noise of one site, in clips; counts how often a site lets a sum be opened."""
        return SitePrivacy(
            mode=DISTRIBUTED, clip=1.0, noise=self.noise, delta=self.delta, rounds=self.rounds, least=self.least,
            colluding=self.colluding, unit="patient",
        )  # fmt: skip

    def release(self, what: str, *, steps: int, run_id: str) -> Release:
        """Entry in a site's ledger."""
        return Release(
            what=what,
            mechanism=SUBSAMPLED if self.sample_rate < 1 else GAUSSIAN,
            noise_multiplier=self.noise,
            sample_rate=self.sample_rate,
            steps=steps,
            run_id=run_id,
            noise_alone=self.shares.share,
        )

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharedSteps:
        """Inverse of `to_dict`.

        Raises:
            PrivacyError: it is none.
        """
        try:
            return cls(
                noise=float(data["noise"]),
                sample_rate=float(data["sample_rate"]),
                rounds=int(data["rounds"]),
                delta=float(data["delta"]),
                least=int(data["least"]),
                colluding=int(data["colluding"]),
                harmonizer_rate=float(data["harmonizer_rate"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError("What the run says about shared noise cannot be read.") from error


@dataclass(frozen=True, kw_only=True)
class HarmonizerSteps:
    """Rounds of the harmonizer before the shared ones: each site adds the whole noise of its own.

    Attributes:
        patients: fewest of a site that trains it, who are drawn most often.
        steps: of a site, over all rounds.
        voted: whether sites tell votes, with noise, when the rounds are over.
    """

    patients: int
    steps: int
    voted: bool


def shared_steps(
    options: PrivacyOptions,
    *,
    styled: bool,
    patients: int,
    rounds: int,
    least: int,
    colluding: int,
    harmonizer: HarmonizerSteps | None = None,
) -> SharedSteps:
    """The noise with which `rounds` steps and the statistics stay within the budget.

    Args:
        styled: whether the harmonizer reads styles, which then have a part of the budget.
        options: `patients_per_step` counts those of all sites together.
        patients: of all sites; a public number.
        harmonizer: rounds of the harmonizer before them; None: there are none.

    Raises:
        PrivacyError: no noise is enough, or a delta too large for so many patients.
    """
    options.check_delta(patients, who="All sites together")
    rate = options.sample_rate(patients)
    settled = options.statistics_part(styled=styled)
    noise = common_noise(options.epsilon, options.delta, ((rate, rounds),), settled)
    before = 0.0
    if harmonizer is not None:
        # A patient pays for steps at a site that trains it, for votes at one that votes, or for both where sites do both.
        before = options.sample_rate(harmonizer.patients)
        parts = ((rate, rounds), (before, harmonizer.steps))
        votes = (Noise(VOTE_NOISE),) if harmonizer.voted else ()
        noise = common_noise(options.epsilon, options.delta, parts, (*settled, *votes))
    return SharedSteps(
        noise=noise,
        sample_rate=rate,
        rounds=rounds,
        delta=options.delta,
        least=least,
        colluding=colluding,
        harmonizer_rate=before,
    )


def surplus(shared: SharedSteps, sites: int) -> float:
    """Standard deviation of the noise of a sum over `sites`, in sigmas: 1 would be the noise of a central training."""
    return math.sqrt(sites / (shared.least - shared.colluding))
