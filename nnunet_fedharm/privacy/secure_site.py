"""The site's side of a secure sum: a state machine that a file carries from one message to the next."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy import primitives
from nnunet_fedharm.privacy.fixed_point import Ring
from nnunet_fedharm.privacy.primitives import SEED_BYTES, PrivateKey
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES, Advert, Locked, Shares, Terms, number_of, sign

STAGES = ("setup", "share", "mask", "unmask", "over")
"""What comes next."""


@dataclass
class SiteSession:
    """One site in one secure sum. Every step is taken once, in order.

    Attributes:
        terms: agreed to.
        seed: b_i.
        share_key, mask_key: private keys c_i and s_i.
        secret: of the sites alone, to know each other's public keys; empty without.
        stage: the step that comes next.
        adverts: neighbour -> what it said in setup.
        own_shares: this site's own shares of its seed and its key.
        held: neighbour -> its shares of seed and key, of those that shared keys.
    """

    terms: Terms
    seed: bytes
    share_key: PrivateKey
    mask_key: PrivateKey
    secret: bytes = b""
    stage: str = "setup"
    adverts: dict[str, Advert] = field(default_factory=dict)
    own_shares: tuple[bytes, bytes] = (b"", b"")
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    @classmethod
    def start(cls, terms: Terms, *, secret: bytes = b"", random: Callable[[int], bytes] = os.urandom) -> SiteSession:
        """A site that agrees to the terms, with fresh keys and seed.

        Args:
            terms: for this site.
            secret: of the sites alone; empty without.
            random: bytes of the operating system; only tests give another source.
        """
        return cls(terms, random(SEED_BYTES), primitives.new_key(), primitives.new_key(), secret)

    def setup(self) -> Advert:
        """Step 1: the public keys."""
        self._take("setup")
        return self._advert()

    def share(self, adverts: Mapping[str, Advert]) -> dict[str, bytes]:
        """Step 2: this site's secrets in shares, each encrypted for its holder.

        Args:
            adverts: neighbour -> what it said, of those that answered setup.

        Returns:
            Neighbour -> sealed shares.

        Raises:
            PrivacyError: too few neighbours, a stranger, two with one key, or a key that its site did not tag.
        """
        self._take("share")
        self._check_adverts(adverts)
        self.adverts = dict(adverts)
        holders, t = self.terms.holders, self.terms.threshold
        seeds = primitives.create_shares(self.seed, t, len(holders))
        keys = primitives.create_shares(primitives.key_to_bytes(self.mask_key), t, len(holders))
        self.own_shares = seeds[0], keys[0]
        sealed = {}
        for holder, seed, key in zip(holders[1:], seeds[1:], keys[1:], strict=True):
            if holder in adverts:
                plain = primitives.address(*self._route(self.terms.site, holder), seed, key)
                sealed[holder] = primitives.seal(self.share_key, adverts[holder].share_key, plain)
        return sealed

    def mask(self, sealed: Mapping[str, bytes], vector: Ring) -> bytes:
        """Step 3: the masked vector.

        Args:
            sealed: neighbour -> its shares for this site, of those that shared keys.
            vector: from `Layout.encode`; changed in place.

        Returns:
            Entries of `width` bytes, uniform to everybody who does not know the masks.

        Raises:
            PrivacyError: shares of a stranger, changed ones, too few, or a vector of another size.
        """
        self._take("mask")
        if vector.shape != (self.terms.layout.size,):
            raise PrivacyError(f"The vector has {vector.size} entries, the secure sum {self.terms.layout.size}.")
        self._check_count(set(sealed), "shared keys")
        self.held = {peer: self._open(peer, data) for peer, data in sealed.items()}
        width = self.terms.layout.width
        primitives.add_mask(vector, self.seed, width, sign=1)
        for peer in sorted(self.held):
            seed = primitives.shared_seed(self.mask_key, self.adverts[peer].mask_key)
            primitives.add_mask(vector, seed, width, sign=sign(self.terms.site, peer))
        return primitives.narrow(vector, width)

    def unmask(self, answered: Iterable[str], silent: Iterable[str]) -> Locked:
        """Step 4: shares of the seeds of those that answered in 3, and of the keys of those that shared keys but did not.

        They are locked until enough holders were told the same.

        Args:
            answered: all sites whose masked vector the server has.
            silent: all sites that shared keys and whose vector it does not have.

        Raises:
            PrivacyError: this would show more than the sum.
        """
        self._take("unmask")
        there, gone = set(answered), set(silent)
        if there & gone or self.terms.site not in there or not set(self.held) <= there | gone:
            raise PrivacyError("The server says of a site that it answered and that it did not; no mask is taken off.")
        everybody = len(self.terms.holders) == self.terms.n_sites
        if len(there) > self.terms.n_sites or (everybody and not there <= {self.terms.site, *self.held}):
            raise PrivacyError("The server says that sites answered which have no part in the secure sum.")
        if len(there) < MIN_SITES:
            raise PrivacyError(
                f"Only {len(there)} sites answered; a sum of fewer than {MIN_SITES} shows one site's part."
            )
        self._check_count(there & set(self.held), "answered")
        told = json.dumps([self.terms.session, sorted(there), sorted(gone)]).encode()
        return self._lock(self._shares(there, gone), told)

    def to_dict(self) -> dict[str, Any]:
        """Everything, secrets included: for a file that only this site can read."""
        return {
            "terms": self.terms.to_dict(),
            "seed": _text(self.seed),
            "share_key": _text(primitives.key_to_bytes(self.share_key)),
            "mask_key": _text(primitives.key_to_bytes(self.mask_key)),
            "secret": _text(self.secret),
            "stage": self.stage,
            "adverts": {peer: advert_to_dict(advert) for peer, advert in self.adverts.items()},
            "own_shares": [_text(share) for share in self.own_shares],
            "held": {peer: [_text(share) for share in shares] for peer, shares in self.held.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteSession:
        """Inverse of `to_dict`."""
        own_seed, own_key = data["own_shares"]
        return cls(
            Terms.from_dict(data["terms"]),
            _data(data["seed"]),
            primitives.key_from_bytes(_data(data["share_key"])),
            primitives.key_from_bytes(_data(data["mask_key"])),
            _data(data["secret"]),
            str(data["stage"]),
            {peer: advert_from_dict(advert) for peer, advert in data["adverts"].items()},
            (_data(own_seed), _data(own_key)),
            {peer: (_data(seed), _data(key)) for peer, (seed, key) in data["held"].items()},
        )

    def _take(self, stage: str) -> None:
        """Leave a stage; it cannot be entered again, even where the step fails."""
        if self.stage != stage:
            raise PrivacyError(
                f"Site {self.terms.site} is asked for the step {stage!r} of a secure sum, but {self.stage!r} comes next; "
                "each step is taken once."
            )
        self.stage = STAGES[STAGES.index(stage) + 1]

    def _advert(self) -> Advert:
        plain = Advert(
            primitives.public_bytes(self.share_key),
            primitives.public_bytes(self.mask_key),
            primitives.commitment(self.seed),
        )
        if not self.secret:
            return plain
        text = plain.signed_text(self.terms.session, self.terms.site)
        return Advert(plain.share_key, plain.mask_key, plain.seed_hash, primitives.tag(self.secret, text))

    def _check_adverts(self, adverts: Mapping[str, Advert]) -> None:
        self._check_count(set(adverts), "sent keys")
        own = self._advert()
        keys = [own.share_key, own.mask_key]
        for peer, advert in adverts.items():
            keys += [advert.share_key, advert.mask_key]
            text = advert.signed_text(self.terms.session, peer)
            if self.secret and not primitives.is_tag(self.secret, text, advert.tag):
                raise PrivacyError(
                    f"The public keys of {peer} are not tagged with the secret of the sites: they were forged, or {peer} has "
                    "another secret."
                )
        if len(set(keys)) != len(keys):
            raise PrivacyError("Two sites of the secure sum have one key; no shares are sent.")

    def _check_count(self, peers: set[str], what: str) -> None:
        """Enough neighbours for the threshold, this site counted, and no strangers."""
        strangers = peers - set(self.terms.neighbours)
        if strangers:
            raise PrivacyError(f"{min(strangers)} is no neighbour of {self.terms.site} in this secure sum.")
        least = max(self.terms.threshold, MIN_SITES)
        if len(peers) + 1 < least:
            raise PrivacyError(
                f"Only {len(peers) + 1} of {len(self.terms.holders)} sites around {self.terms.site} {what}, {least} are needed "
                "for a secure sum."
            )

    def _shares(self, there: set[str], gone: set[str]) -> Shares:
        seeds = {peer: self.held[peer][0] for peer in sorted(there & set(self.held))}
        keys = {peer: self.held[peer][1] for peer in sorted(gone & set(self.held))}
        return Shares(seeds | {self.terms.site: self.own_shares[0]}, keys)

    def _lock(self, shares: Shares, told: bytes) -> Locked:
        key, holders = os.urandom(SEED_BYTES), self.terms.holders
        pieces = primitives.create_shares(key, self.terms.threshold, len(holders))
        own, others = pieces[0], zip(holders[1:], pieces[1:], strict=True)
        return Locked(
            primitives.lock(key, shares_to_bytes(shares)),
            own,
            {
                peer: primitives.lock(self._opener(peer, self.terms.site, peer, told), piece)
                for peer, piece in others
                if peer in self.held
            },
            {peer: self._opener(peer, peer, self.terms.site, told) for peer in sorted(self.held)},
        )

    def _opener(self, peer: str, source: str, target: str, told: bytes) -> bytes:
        """What opens the piece from source to target where both were told the same; the peer, one of both, makes it too."""
        pair = primitives.shared_seed(self.share_key, self.adverts[peer].share_key)
        return primitives.tag(pair, primitives.address(*self._route(source, target), b"opener", told))

    def _route(self, source: str, target: str) -> tuple[int, int]:
        return number_of(self.terms.session, source), number_of(self.terms.session, target)

    def _open(self, peer: str, sealed: bytes) -> tuple[bytes, bytes]:
        if peer not in self.adverts:
            raise PrivacyError(f"{peer} sent shares without keys.")
        try:
            plain = primitives.open_sealed(self.share_key, self.adverts[peer].share_key, sealed)
            source, target, seed, key = primitives.read_address(plain)
            if (source, target) != self._route(peer, self.terms.site):
                raise PrivacyError("is for somebody else")
        except PrivacyError as error:
            raise PrivacyError(f"The share from {peer} for {self.terms.site} {error}; no vector is sent.") from error
        return seed, key


def advert_to_dict(advert: Advert) -> dict[str, str]:
    """As it travels."""
    return {name: _text(getattr(advert, name)) for name in ("share_key", "mask_key", "seed_hash", "tag")}


def advert_from_dict(data: Mapping[str, Any]) -> Advert:
    """Inverse of `advert_to_dict`.

    Raises:
        PrivacyError: it is none.
    """
    try:
        return Advert(*(_data(data[name]) for name in ("share_key", "mask_key", "seed_hash", "tag")))
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError("The public keys of a site cannot be read.") from error


def shares_to_bytes(shares: Shares) -> bytes:
    """As they are locked."""
    return json.dumps(
        [{site: _text(share) for site, share in part.items()} for part in (shares.seeds, shares.keys)]
    ).encode()


def shares_from_bytes(data: bytes) -> Shares:
    """Inverse of `shares_to_bytes`.

    Raises:
        PrivacyError: they are none.
    """
    try:
        seeds, keys = ({str(site): _data(share) for site, share in part.items()} for part in json.loads(data))
    except (ValueError, TypeError, AttributeError) as error:
        raise PrivacyError("are no shares") from error
    return Shares(seeds, keys)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
