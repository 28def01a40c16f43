"""The server's side of a secure sum: who is still there, the running sum of masked vectors, and the masks of those that left."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy import primitives
from nnunet_fedharm.privacy.fixed_point import Layout, Ring, Sum
from nnunet_fedharm.privacy.primitives import SEED_BYTES
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES, Advert, Locked, Shares, Terms, sign
from nnunet_fedharm.privacy.secure_site import shares_from_bytes

_INDEX_BYTES = 4
"""Before a share: whose it is, counted from 1."""


@dataclass
class ServerSession:
    """One secure sum as the server sees it. It never holds two vectors: a masked one is added up as soon as it comes.

    Attributes:
        terms: site -> what it agreed to.
        adverts: site -> its answer to setup.
        shared: sites whose shares are on their way.
        answered: sites whose masked vector is in the sum.
        total: sum of the masked vectors.
    """

    terms: dict[str, Terms]
    adverts: dict[str, Advert] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    total: Ring = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.layout.size, dtype=np.uint64)

    @property
    def layout(self) -> Layout:
        """Of the vector."""
        return next(iter(self.terms.values())).layout

    def keys_for(self, adverts: Mapping[str, Advert]) -> dict[str, dict[str, Advert]]:
        """After setup: what each site that answered is told about its neighbours.

        Raises:
            PrivacyError: fewer than three sites, or one with fewer neighbours than the threshold needs.
        """
        self.adverts = dict(adverts)
        self._require(set(adverts), "sent keys")
        return {site: {peer: adverts[peer] for peer in self._around(site, set(adverts))} for site in sorted(adverts)}

    def shares_for(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """After share: the sealed shares that each site gets, of the neighbours that sent theirs.

        Args:
            sealed: site -> (neighbour -> share for it).

        Raises:
            PrivacyError: fewer than three sites, or one with fewer neighbours than the threshold needs.
        """
        self.shared = {site for site in sealed if set(sealed[site]) == set(self._around(site, set(self.adverts)))}
        self._require(self.shared, "shared keys")
        return {site: {peer: sealed[peer][site] for peer in self._around(site, self.shared)} for site in self.shared}

    def add(self, site: str, masked: bytes) -> None:
        """Take a site's masked vector into the sum.

        Raises:
            PrivacyError: it is not part of the sum, is there already, or sent a vector of another size.
        """
        if site not in self.shared or site in self.answered:
            raise PrivacyError(f"{site} sent a masked vector that is not waited for.")
        if len(masked) != self.layout.size * self.layout.width:
            raise PrivacyError(f"{site} sent {len(masked)} bytes, expected {self.layout.size * self.layout.width}.")
        self.total += primitives.widen(masked, self.layout.width)
        self.answered.add(site)

    def close(self) -> tuple[list[str], list[str]]:
        """No vector comes any more: who answered, and who shared keys but did not.

        Raises:
            PrivacyError: fewer than three sites, fewer than the threshold around one of them, or they fall into groups.
        """
        self._require(self.answered, "answered")
        self._require_one_group()
        return sorted(self.answered), sorted(self.shared - self.answered)

    def open(self, locked: Mapping[str, Locked]) -> Sum:
        """Take the masks off.

        Args:
            locked: site -> its answer to unmask.

        Raises:
            PrivacyError: fewer shares of a secret than the threshold, or false ones; the message names the site whose mask stays.
        """
        width, shares = self.layout.width, self.unlock(locked)
        for site in sorted(self.answered):
            seed = self._seed_of(site, shares)
            primitives.add_mask(self.total, seed, width, sign=-1)
        for site in sorted(self.shared - self.answered):
            peers = self._around(site, self.answered)
            if not peers:
                continue  # its masks are in no vector that came
            key = primitives.key_from_bytes(self._key_of(site, shares))
            for peer in peers:
                seed = primitives.shared_seed(key, self.adverts[peer].mask_key)
                primitives.add_mask(self.total, seed, width, sign=-sign(peer, site))
        return self.layout.decode(self.total)

    def unlock(self, locked: Mapping[str, Locked]) -> dict[str, Shares]:
        """The shares of those of whose holders enough were told the same; those of others stay closed.

        Raises:
            PrivacyError: nobody's open.
        """
        opened: dict[str, Shares] = {}
        failures: list[PrivacyError] = []
        for site, answer in sorted(locked.items()):
            try:
                opened[site] = self._unlocked(site, answer, locked)
            except PrivacyError as error:
                failures.append(error)
        if failures and not opened:
            raise failures[0]
        return opened

    def _unlocked(self, site: str, answer: Locked, locked: Mapping[str, Locked]) -> Shares:
        pieces = {site: answer.piece}
        for peer in self._around(site, set(locked) & set(answer.pieces)):
            with suppress(PrivacyError):  # it was told something else, or lies
                pieces[peer] = primitives.unlock(locked[peer].openers.get(site, b""), answer.pieces[peer])

        def holds(key: bytes) -> bool:
            try:
                primitives.unlock(key, answer.shares)
            except PrivacyError:
                return False
            return True

        return shares_from_bytes(primitives.unlock(self._recover(site, pieces, holds, "lock"), answer.shares))

    def _seed_of(self, site: str, shares: Mapping[str, Shares]) -> bytes:
        wanted = self.adverts[site].seed_hash

        def holds(seed: bytes) -> bool:
            return len(seed) == SEED_BYTES and primitives.commitment(seed) == wanted

        given = {holder: answer.seeds[site] for holder, answer in shares.items() if site in answer.seeds}
        return self._recover(site, given, holds, "seed")

    def _key_of(self, site: str, shares: Mapping[str, Shares]) -> bytes:
        wanted = self.adverts[site].mask_key

        def holds(data: bytes) -> bool:
            try:
                return primitives.public_bytes(primitives.key_from_bytes(data)) == wanted
            except PrivacyError:
                return False

        given = {holder: answer.keys[site] for holder, answer in shares.items() if site in answer.keys}
        return self._recover(site, given, holds, "key")

    def _recover(self, site: str, given: Mapping[str, bytes], holds: primitives.Check, what: str) -> bytes:
        terms = self.terms[site]
        # A share carries its holder's number; one with another number is false, and two with one number break Shamir's sum.
        usable = [
            given[holder]
            for number, holder in enumerate(terms.holders, start=1)
            if holder in given and given[holder][:_INDEX_BYTES] == number.to_bytes(_INDEX_BYTES, "little")
        ]
        try:
            return primitives.recover(usable, terms.threshold, holds)
        except PrivacyError as error:
            raise PrivacyError(f"The sum stays closed: the {what} of {site} {error}.") from error

    def _around(self, site: str, there: set[str]) -> list[str]:
        return [peer for peer in self.terms[site].neighbours if peer in there]

    def _require(self, there: set[str], what: str) -> None:
        if len(there) < MIN_SITES:
            raise PrivacyError(
                f"Only {len(there)} of {len(self.terms)} sites {what}; a secure sum needs at least {MIN_SITES}. Nothing was "
                "shown."
            )
        for site in sorted(there):
            found, least = len(self._around(site, there)) + 1, self.terms[site].threshold
            if found < least:
                raise PrivacyError(
                    f"Only {found} of {len(self.terms[site].holders)} sites {what}; the secure sum needs {least}. Nothing was "
                    "shown."
                )

    def _require_one_group(self) -> None:
        """Where the answers fall into groups without a common neighbour, the sum of each group would be bare."""
        reached, border = set[str](), {min(self.answered)}
        while border:
            reached |= border
            border = {peer for site in border for peer in self._around(site, self.answered)} - reached
        if reached != self.answered:
            raise PrivacyError("The sites that answered fall into groups that share no masks; the sum stays closed.")
