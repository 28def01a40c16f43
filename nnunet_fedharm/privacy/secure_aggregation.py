"""Secure sums: a server learns the sum of the sites' vectors and no single one of them. The protocol, and its terms.

One session sums one vector of each site, in four exchanges with the server (SecAgg+; the graph is complete up to 64 sites):

1. **setup**: site i makes two key pairs (c_i for shares, s_i for masks) and a seed b_i; it sends the public keys and a hash of
   b_i.
2. **share**: it splits s_i and b_i among its neighbours and itself, t of which make them again, and sends each neighbour its
   shares, encrypted so that the server cannot read them.
3. **mask**: it sends y_i = x_i + G(b_i) + sum over neighbours j of +-G(s_ij) modulo 2^(8 w), where s_ij is what i and j agree
   on and the sign is + for the one of them that comes first. The masks of pairs cancel in the sum.
4. **unmask**: the server says who answered in 3. Each site gives its shares of b_j for those, and of s_j for those that shared
   keys but did not answer, whose half of the masks has to be taken away. Never both for one site, and only once.

What holds: a server that keeps to the protocol but reads all it gets, together with fewer than t sites, learns nothing of
another site's vector but what the sum tells; y_i alone is uniform. A site refuses terms under which this would not hold: fewer
than three sites, a threshold that is too low, a sum with fewer than three answers, a second unmasking.

A server may tell different sites different things about who answered, to get the shares of b_j of some and those of s_j of
others, or to open a sum over fewer sites than it told anybody. So a site locks its shares with a fresh key, of which each of its
h holders has a piece, and a holder gives what opens its piece for the list that it was told itself. Shares of those that were
told a list open with t pieces for this list. Only the c sites that collude with the server give openers for more than one, so
two lists open only if 2 t <= h + c. Hence 2 t > h + c, which a site requires for one colluding site, or for as many as its noise
is made for. Then one list opens at most, and no sum but that over its sites (beyond 65 sites this holds among the holders of
each). The least such t, floor((h + c) / 2) + 1, is the default; h - t of the holders may then fall silent: nobody of 3, 1 of 4
and 5, 9 of 20.

A server that forges public keys or invents sites is stopped by `secret`, a key that
the sites give each other outside of Flower; without it, the server has to be trusted not to. Only noise can hide what the sum
itself tells of a site, and what two sums tell that differ by one site. What a site sends cannot be inspected, so one site can
spoil a sum.

| symbol | here |
|---|---|
| n, t | `Terms.n_sites`, `Terms.threshold` |
| w, x_i | `Layout.width`, `Layout.encode` |
| G | `primitives.add_mask` |

References:
    Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017.
    Bell, Bonawitz et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.fixed_point import Layout

MIN_SITES = 3
"""Of a sum: of two, each site would know the other's vector."""
COMPLETE_UP_TO = 64
"""Sites that are all each other's neighbours; beyond, each has this many."""
COLLUDING = 1
"""Sites that every sum is safe against beside the server: a server needs but one friend."""


@dataclass(frozen=True)
class Terms:
    """What a site is asked to agree to.

    Attributes:
        session: 32 hexadecimal digits, drawn for this sum.
        site: whom these terms are for.
        neighbours: sites that it exchanges keys and shares with, sorted.
        n_sites: sites of the sum.
        threshold: t, shares that make a secret.
        layout: of the vector.
    """

    session: str
    site: str
    neighbours: tuple[str, ...]
    n_sites: int
    threshold: int
    layout: Layout

    def __post_init__(self) -> None:
        holders = len(self.neighbours) + 1
        if self.n_sites < MIN_SITES or holders < MIN_SITES:
            raise PrivacyError(
                f"A secure sum needs at least {MIN_SITES} sites, here are {min(self.n_sites, holders)}: of fewer, the sum shows "
                "one site's part. Let more sites take part, or turn secure aggregation off."
            )
        if not re.fullmatch("[0-9a-f]{32}", self.session):
            raise PrivacyError("The name of the secure sum's session is none.")
        if self.site in self.neighbours or tuple(sorted(set(self.neighbours))) != self.neighbours:
            raise PrivacyError("The neighbours of a site in a secure sum are not a list of other sites.")
        if self.layout.sites < self.n_sites:
            raise PrivacyError(f"The sum is laid out for {self.layout.sites} sites, {self.n_sites} take part.")
        if holders != holders_of(self.n_sites):
            # Among fewer, names of sites that nobody shared keys with would not be noticed.
            raise PrivacyError(
                f"The terms of a secure sum of {self.n_sites} sites name {holders - 1} neighbours of {self.site}, not "
                f"{holders_of(self.n_sites) - 1}."
            )
        if self.threshold > holders:
            raise PrivacyError(f"A threshold of {self.threshold} for {holders} holders can never be reached.")
        self.check_colluding(COLLUDING)

    def check_colluding(self, colluding: int) -> None:
        """Refuse a threshold with which so many sites and a server that lies about who answered open one vector.

        Raises:
            PrivacyError: it is too low.
        """
        holders = len(self.holders)
        if not is_safe(self.threshold, holders, colluding):
            raise PrivacyError(
                f"A threshold of {self.threshold} for {holders} holders is not safe against the server and {colluding} "
                f"of them; it must be at least {default_threshold(holders, colluding)}."
            )

    @property
    def holders(self) -> tuple[str, ...]:
        """Who gets a share of this site's secrets, in the order of the shares: itself first."""
        return (self.site, *self.neighbours)

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return {
            "session": self.session,
            "site": self.site,
            "neighbours": list(self.neighbours),
            "n_sites": self.n_sites,
            "threshold": self.threshold,
            "layout": self.layout.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Terms:
        """Inverse of `to_dict`.

        Raises:
            PrivacyError: they are none, or not safe.
        """
        try:
            return cls(
                session=str(data["session"]),
                site=str(data["site"]),
                neighbours=tuple(str(name) for name in data["neighbours"]),
                n_sites=int(data["n_sites"]),
                threshold=int(data["threshold"]),
                layout=Layout.from_dict(data["layout"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError("The terms of the secure sum cannot be read.") from error


@dataclass(frozen=True)
class Advert:
    """What a site tells the others in setup.

    Attributes:
        share_key, mask_key: public keys c_i and s_i as PEM.
        seed_hash: SHA-256 of b_i.
        tag: HMAC of the rest under the sites' own secret; empty where they have none.
    """

    share_key: bytes
    mask_key: bytes
    seed_hash: bytes
    tag: bytes = b""

    def signed_text(self, session: str, site: str) -> bytes:
        """What the tag covers."""
        parts = (session.encode(), site.encode(), self.share_key, self.mask_key, self.seed_hash)
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


@dataclass(frozen=True)
class Shares:
    """What a site gives in unmask, once t sites were told the same.

    Attributes:
        seeds: site that answered -> share of its b.
        keys: site that did not -> share of its s.
    """

    seeds: dict[str, bytes]
    keys: dict[str, bytes]


@dataclass(frozen=True)
class Locked:
    """A site's answer to unmask: shares that open where t of their holders were told the same about who answered.

    Attributes:
        shares: encrypted under a key of its own.
        piece: this site's own share of that key.
        pieces: neighbour -> its share of the key, encrypted for the pair and for what this site was told.
        openers: neighbour -> the key of the neighbour's piece for this site, for what this site was told.
    """

    shares: bytes
    piece: bytes
    pieces: dict[str, bytes]
    openers: dict[str, bytes]


def new_session() -> str:
    """A name that no other sum has."""
    return secrets.token_hex(16)


def is_safe(threshold: int, holders: int, colluding: int) -> bool:
    """Whether those who hold a secret's shares cannot be made to give both of a site's secrets; see the head of the module."""
    return 2 * threshold > holders + colluding


def default_threshold(holders: int, colluding: int = COLLUDING) -> int:
    """The least that is safe, which allows the most dropouts; all holders where there are no more than the colluding sites."""
    return min(holders, (holders + max(colluding, COLLUDING)) // 2 + 1)


def holders_of(sites: int) -> int:
    """How many hold the shares of each of so many sites, itself among them."""
    return min(sites, COMPLETE_UP_TO + 1)


def sign(site: str, other: str) -> int:
    """Of the mask of a pair at `site`; the other one has the other sign."""
    return 1 if site < other else -1


def number_of(session: str, site: str) -> int:
    """A site as the number that Flower's share messages carry; another one in every session."""
    return int.from_bytes(hashlib.sha256(f"{session} {site}".encode()).digest()[:8], "little")


def make_terms(
    sites: Sequence[str], layout: Layout, *, threshold: int = 0, colluding: int = COLLUDING
) -> dict[str, Terms]:
    """Terms of a new session for every site.

    Args:
        sites: who takes part.
        layout: of the vector.
        threshold: t; 0 = the least that is safe.
        colluding: sites that may be the server's; at least one is counted.

    Raises:
        PrivacyError: too few sites, or a threshold that is not safe.
    """
    session, names = new_session(), sorted(set(sites))
    neighbours = neighbourhoods(names, COMPLETE_UP_TO)
    terms = {}
    for site in names:
        holders = len(neighbours[site]) + 1
        t = threshold or default_threshold(holders, colluding)
        terms[site] = Terms(session, site, neighbours[site], len(names), t, layout)
    if not terms:
        raise PrivacyError(f"A secure sum needs at least {MIN_SITES} sites, here are 0.")
    return terms


def neighbourhoods(sites: Sequence[str], degree: int) -> dict[str, tuple[str, ...]]:
    """All are neighbours, or beyond `degree` sites a random ring whose members know the nearest ones on each side."""
    if len(sites) <= degree + 1:
        return {site: tuple(sorted(set(sites) - {site})) for site in sites}
    ring = list(sites)
    secrets.SystemRandom().shuffle(ring)
    half, count = max(1, degree // 2), len(ring)
    return {
        site: tuple(sorted(ring[(place + step) % count] for step in range(-half, half + 1) if step))
        for place, site in enumerate(ring)
    }
