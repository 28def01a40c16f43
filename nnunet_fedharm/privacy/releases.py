"""Releases about patients, budgets, and what releases cost together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of

GAUSSIAN, SUBSAMPLED, NONE = "gaussian", "subsampled gaussian", "none"
ANNOUNCED = "announced"
"""What is public by agreement and the same for neighbouring data sets: numbers of cases and patients, names, versions."""
MECHANISMS = (GAUSSIAN, SUBSAMPLED, NONE, ANNOUNCED)
PATIENT = "patient"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Something about patients that leaves the site.

    Attributes:
        what: name of the release, "segmenter round 3" for instance; no case identifier.
        mechanism: "gaussian", "subsampled gaussian", "none" where no noise is added, or "announced" where nothing is hidden.
        noise_multiplier: sigma / L2 sensitivity to one patient; 0 with "none" and "announced".
        sample_rate: probability of a patient to be drawn in a step; below 1 with "subsampled gaussian" only.
        steps: how many equal releases this entry stands for.
        run_id: the run that it belongs to; empty outside of one.
        unit: whose presence the epsilon hides.
        note: anything that helps to read the entry, "inside a secure sum of 4 sites" for instance.
        digest: SHA-256 of the released bytes where known; the very same bytes once more cost nothing.
        time: when, UTC, ISO 8601; empty is filled in by `Ledger.record`.
        noise_alone: noise multiplier against all other sites and the server together, where they add the rest of the noise;
            0: the same as `noise_multiplier`.
    """

    what: str
    mechanism: str
    noise_multiplier: float = 0.0
    sample_rate: float = 1.0
    steps: int = 1
    run_id: str = ""
    unit: str = PATIENT
    note: str = ""
    digest: str = ""
    time: str = ""
    noise_alone: float = 0.0

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise PrivacyError(f"{self.what}: mechanism is {self.mechanism!r}; choose one of {', '.join(MECHANISMS)}.")
        if self.unit != PATIENT:
            raise PrivacyError(f"{self.what}: the unit is {self.unit!r}; a site's ledger counts by {PATIENT}.")
        if not self.bounded and (self.noise_multiplier != 0 or self.sample_rate != 1):
            raise PrivacyError(f"{self.what}: without a mechanism there is neither noise nor sampling to enter.")
        if self.mechanism == GAUSSIAN and self.sample_rate != 1:
            raise PrivacyError(f"{self.what}: sampling at rate {self.sample_rate} is the mechanism {SUBSAMPLED!r}.")
        if self.bounded:
            Noise(self.noise_multiplier, self.sample_rate, self.steps)
        if not 0 <= self.noise_alone <= self.noise_multiplier:
            raise PrivacyError(
                f"{self.what}: a site alone cannot add {self.noise_alone} of noise {self.noise_multiplier}."
            )

    @property
    def bounded(self) -> bool:
        """Whether it has noise, and so a finite epsilon."""
        return self.mechanism in (GAUSSIAN, SUBSAMPLED)

    @property
    def unbounded(self) -> bool:
        """Whether it tells about patients without any bound."""
        return self.mechanism == NONE

    @property
    def noise(self) -> Noise:
        """For the accountants.

        Raises:
            PrivacyError: there is none.
        """
        return Noise(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def own_noise(self) -> Noise:
        """What hides the patients from everybody outside the site, all others together; see `noise`."""
        return Noise(self.noise_alone or self.noise_multiplier, self.sample_rate, self.steps)


@dataclass(frozen=True)
class Budget:
    """What a site is willing to spend on all releases together.

    Attributes:
        epsilon, delta: of the total.
        allow_unbounded: count only the releases that have noise, whatever else has left the site; off, one release without noise
            is above any budget.
    """

    epsilon: float
    delta: float
    allow_unbounded: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise PrivacyError(f"epsilon must be a positive number, got {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise PrivacyError(f"delta must lie between 0 and 1, got {self.delta}.")


def check_delta(delta: float, members: int, *, who: str, mend: str, unit: str = PATIENT) -> None:
    """Refuse a delta that would allow to publish one of them outright.

    Args:
        delta: of the promise.
        members: whose data the releases are about; a public number.
        who: begins the sentence, "Site B" for instance.
        mend: where another delta is given, "Give --delta" for instance.
        unit: what a member is.

    Raises:
        PrivacyError: delta is not below 1 / members.
    """
    if delta * members >= 1:
        raise PrivacyError(
            f"{who}: delta {delta:g} is no guarantee for {members} {unit}{'s' * (members != 1)}, as publishing one of them at "
            f"random would fulfil it. {mend} well below {1 / members:.2g}."
        )


@dataclass(frozen=True)
class Spent:
    """What a set of releases costs together.

    Attributes:
        epsilon: of the releases that have noise.
        delta: at which.
        unbounded: names of the releases that have none, each once, in order of time.
        alone: epsilon against all other sites and the server together; more than `epsilon` where noise was shared with them.
    """

    epsilon: float
    delta: float
    unbounded: tuple[str, ...] = ()
    alone: float = 0.0

    @property
    def total(self) -> float:
        """Epsilon of everything: infinite as soon as one release has no noise."""
        return math.inf if self.unbounded else self.epsilon


def spent(releases: Sequence[Release], delta: float) -> Spent:
    """Composition of releases about the same patients.

    Raises:
        PrivacyError: delta is out of range.
    """
    bounded = [release for release in releases if release.bounded]
    epsilon = alone = epsilon_of([release.noise for release in bounded], delta)
    if any(release.noise_alone for release in bounded):
        alone = epsilon_of([release.own_noise for release in bounded], delta)
    names = dict.fromkeys(release.what for release in releases if release.unbounded)
    return Spent(epsilon, delta, tuple(names), alone)
