"""Differential privacy of whole sites: one site's updates hardly change what the others, or the server, get to see.

A site's update of a round, all trained tensors together, is clipped to the L2 norm S; Gaussian noise hides it. Neighbouring
federations differ by one site's updates, replaced by nothing, in every round; who takes part is no secret.

| mode | noise | hidden from |
|---|---|---|
| `server` | N(0, z^2 S^2) on the sum, by the server | whoever gets a model or a checkpoint; not from the server |
| `distributed` | N(0, z^2 S^2 / (k - t)) by each site, inside a secure sum | the server too, and t sites with it |
| `local` | N(0, z^2 S^2) by each site on its own update | everybody; neighbours are any two updates, 2 S apart |

**Distributed**: a secure sum is opened over k sites or more, of which at most t tell others their own share (each site knows its
own). The shares of the others add up to z^2 S^2 at least; n sites give n / (k - t) times as much, which nothing takes off.
Weights w_i in [0, 1] multiply the clipped updates; they are public, so the sensitivity of the sum stays S.

**Rounding**: in the ring, update and share are rounded to a grid of step g, so the sum holds integers. Rounding moves an update
by at most g sqrt(d) / 2, which is added to S. The chances of a rounded normal number and of a discrete Gaussian of the same
s = sigma / g differ by a factor of e^(8 / s^2) at most, up to REACH sigma (s >= 16; beyond lies a chance of 10^-38). A sum of
discrete Gaussians is one of their summed variance up to a term of 10 n exp(-pi^2 s^2) (Kairouz, Liu, Steinke 2021, on sums of
discrete Gaussians), which is 0 in double precision here. And an integer plus a rounded normal number is a rounded sum, as private
as the continuous mechanism. So with eta = 8 d T (n + 1) / s^2, over d entries, n sites and T openings, the sum is
(epsilon + 2 eta, e^eta delta)-private. A grid for which eta is above `MOST_ETA` is refused, and `epsilon` has this much added.

References:
    McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (clipped updates).
    Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
    ICML 2021.
    Ponomareva et al., "How to DP-fy ML", JAIR 2023 (a record replaced by nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon

SERVER, DISTRIBUTED, LOCAL = "server", "distributed", "local"
MODES = (SERVER, DISTRIBUTED, LOCAL)
RESERVE = 0.05
"""Share of further openings that are paid for, at least one: a crash at the worst moment repeats a round."""
REACH = 13.0
"""Standard deviations that an entry has room for."""
MOST_ETA = 5e-4
_INFLATION = 1.001
"""Most that rounding may add to S, as a factor; `epsilon` has it."""
_NEGLIGIBLE = 1e-6
"""The same, and eta, by patient: below the last digit of any epsilon that is printed."""

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class SitePrivacy:
    """What a run promises each site.

    Attributes:
        mode: of `MODES`.
        clip: S.
        noise: z.
        delta: of the promise.
        rounds: planned, of both phases.
        least: k, sites below which a secure sum stays closed; 1 in the other modes.
        colluding: t, sites that may tell others their own share of the noise; 0 in the other modes.
        unit: whose part in a secure sum has the length S at most: a site's update, or a patient's (`shared_steps`). Neighbours by
            patient are two sums that are both rounded, and nothing is added to their epsilon for it: the grid has to be finer.
    """

    mode: str
    clip: float
    noise: float
    delta: float
    rounds: int
    least: int = 1
    colluding: int = 0
    unit: str = "site"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PrivacyError(f"Privacy of sites is {self.mode!r}; choose one of {', '.join(MODES)}.")
        for name in ("clip", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise PrivacyError(f"site-{name} must be a positive number, got {getattr(self, name)}.")
        if not 0 < self.delta < 1 or self.rounds < 1:
            raise PrivacyError(
                f"Privacy of sites needs a delta between 0 and 1 and rounds, got {self.delta}, {self.rounds}."
            )
        if self.mode == DISTRIBUTED and not 0 <= self.colluding < self.least:
            raise PrivacyError(
                f"A sum of {self.least} sites of which {self.colluding} may collude has no noise that anybody can rely on. "
                "Raise quorum, or lower site-colluding."
            )

    @property
    def releases(self) -> int:
        """How often the noise is seen at most: the server's once a round, the sites' also where a round is repeated."""
        return self.rounds if self.mode == SERVER else self.rounds + max(1, math.ceil(RESERVE * self.rounds))

    @property
    def share(self) -> float:
        """Standard deviation of the noise that each site adds; 0 where the server adds it."""
        if self.mode == SERVER:
            return 0.0
        return self.noise * self.clip / math.sqrt(self.least - self.colluding)

    def epsilon(self) -> float:
        """What all releases together cost a site: plain Gaussians without any sampling, rounding included."""
        reach = (2.0 if self.mode == LOCAL else 1.0) * math.sqrt(self.releases)
        if self.mode != DISTRIBUTED:
            return gaussian_epsilon(self.noise, self.delta, reach)
        return gaussian_epsilon(self.noise, self.delta * math.exp(-MOST_ETA), reach * _INFLATION) + 2 * MOST_ETA

    def eta(self, entries: int, sites: int, step: float) -> float:
        """Largest logarithm of a ratio of chances between sums of rounded shares and rounded normal numbers, in all openings."""
        return 8 * entries * self.releases * (sites + 1) * (step / self.share) ** 2

    def check_grid(self, entries: int, sites: int, step: float) -> None:
        """Refuse a grid that is too coarse for the promise.

        Args:
            entries: of an update.
            sites: largest number in the sum.
            step: of the grid.

        Raises:
            PrivacyError: it is.
        """
        by_site = self.unit == "site"
        moved = step * math.sqrt(entries) / self.clip * (0.5 if by_site else 1.0)
        most_moved, most_eta = (_INFLATION - 1, MOST_ETA) if by_site else (_NEGLIGIBLE, _NEGLIGIBLE)
        if self.share < 16 * step or self.eta(entries, sites, step) > most_eta or moved > most_moved:
            raise PrivacyError(
                f"The grid of the secure sum, {step:.2g} wide, is too coarse for noise shares of {self.share:.2g} on {entries} "
                "entries. Use more secure-bytes."
            )

    @property
    def room(self) -> float:
        """Largest size of an entry with its share."""
        return self.clip + REACH * self.share

    def statement(self, *, sites: int, without_noise: Iterable[str] = ()) -> dict[str, Any]:
        """The promise in JSON: for events, and for the results folder.

        Args:
            sites: that take part.
            without_noise: what tells about sites beside the updates.
        """
        neighbours = "any two updates of a site" if self.mode == LOCAL else "a site's updates, replaced by nothing"
        said: dict[str, Any] = {
            "unit": "site",
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "mode": self.mode,
            "neighbours": neighbours,
            "hidden_from": _HIDDEN_FROM[self.mode],
            "clip": self.clip,
            "noise_multiplier": self.noise,
            "releases": self.releases,
            "sites": sites,
            "noise_of_mean": self.noise_of_mean(sites),
            "not_covered": list(without_noise),
        }
        if self.mode == DISTRIBUTED:
            said |= {"least_sites": self.least, "colluding": self.colluding, "noise_share": self.share}
            said["surplus_of_variance"] = sites / (self.least - self.colluding) - 1
        return said

    def noise_of_mean(self, sites: int) -> float:
        """Standard deviation of the noise on an entry of the mean over sites of equal weights."""
        total = self.noise * self.clip if self.mode == SERVER else self.share * math.sqrt(sites)
        return total / sites

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SitePrivacy:
        """Inverse of `to_dict`.

        Raises:
            PrivacyError: it is none.
        """
        try:
            return cls(
                mode=str(data["mode"]),
                clip=float(data["clip"]),
                noise=float(data["noise"]),
                delta=float(data["delta"]),
                rounds=int(data["rounds"]),
                least=int(data["least"]),
                colluding=int(data["colluding"]),
                unit=str(data["unit"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError("What the run says about the privacy of sites cannot be read.") from error


_HIDDEN_FROM = {
    SERVER: "everybody who gets a model or a checkpoint; the server itself sees every update",
    DISTRIBUTED: "the server and everybody who gets a model or a checkpoint",
    LOCAL: "everybody outside the site",
}


def clipped(change: Tensors, clip: float) -> dict[str, npt.NDArray[np.float64]]:
    """Tensors whose L2 norm, all together, is at most `clip`.

    Args:
        change: name -> array.
        clip: S.

    Raises:
        PrivacyError: NaN or infinity, which no clipping bounds.
    """
    wide = {name: np.asarray(value, dtype=np.float64) for name, value in sorted(change.items())}
    norm = math.sqrt(math.fsum(float(np.sum(value**2)) for value in wide.values()))
    if not math.isfinite(norm):
        raise PrivacyError("An update holds NaN or infinity, so it cannot be clipped; nothing of it was used.")
    # A hair below 1, or rounding could leave the norm a hair above the bound.
    factor = 1.0 if norm <= clip else clip / norm * (1 - 1e-12)
    return {name: value * factor for name, value in wide.items()}
