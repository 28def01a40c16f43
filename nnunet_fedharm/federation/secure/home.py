"""A site's side of secure sums: what it offers to a sum, and the four steps in which it gives it away masked.

A site offers arrays under a key (`offer`), with the weights that it could have and the entry for its ledger. When the server asks
for a sum under that key, the session's secrets lie in `fedharm/secure-sums/`, which only the site's own user can read, from
setup to unmask. Where `fedharm/secure-aggregation.key` exists, its content is the secret by which the sites know each other's
public keys: give the same file to every site, by another way than the server.

Of one key only one sum is ever opened: asked to open it over other sites, the site refuses, because the difference of the two
sums would show the sites that are in one of them only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from safetensors.numpy import load, save

from nnunet_fedharm.errors import DataError, PrivacyError
from nnunet_fedharm.federation.codec import encode
from nnunet_fedharm.federation.durable import read_json, write_bytes, write_json
from nnunet_fedharm.federation.messages import Unpacked, reply
from nnunet_fedharm.federation.secure import messages
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_counts import count_release
from nnunet_fedharm.privacy.fixed_point import Share
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import PATIENT, Release
from nnunet_fedharm.privacy.secure_aggregation import Terms
from nnunet_fedharm.privacy.secure_site import SiteSession, advert_from_dict, advert_to_dict
from nnunet_fedharm.privacy.site_level import SitePrivacy

SECRET_FILE = "secure-aggregation.key"
_FOLDER = "secure-sums"
_OFFER, _ARRAYS, _SESSION, _OPENED = "offer.json", "offer.safetensors", "session.json", "opened.json"
_GIVEN = "given.json"
"""The noisy vector that left last, until this site has seen its sum opened."""
ONE = "one"
"""The weight of a sum without weights."""

NOISY = "tensor:"
"""Beginning of the names of the arrays that get noise, where an offer has any."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Offer:
    """What a site would add to a sum.

    Attributes:
        key: of the sum.
        arrays: name -> array.
        weights: name of a weighting -> this site's weight, a whole number.
        release: entry for the ledger, made when the masked vector leaves; None where it is entered already.
        question: SHA-256 of the request that it answers; the same one need not be worked on again.
        beside: arrays that travel in the open, as the answer to that request.
        shares: noise that this site adds to the arrays, all of them together one update; None adds nothing.
        run_id: whose openings are counted where there is noise.
        used: whether it was a draw of patients and has left, masked: whoever has the other shares may have opened the sum.
    """

    key: str
    arrays: Arrays
    weights: Mapping[str, int]
    release: Release | None = None
    question: str = ""
    beside: Arrays | None = None
    shares: SitePrivacy | None = None
    run_id: str = ""
    used: bool = False

    @property
    def noisy(self) -> list[str]:
        """Names of the arrays that noise is added to."""
        return sorted(name for name in self.arrays if name.startswith(NOISY)) if self.shares is not None else []

    @property
    def entries(self) -> int:
        """Of those arrays."""
        return sum(self.arrays[name].size for name in self.noisy)


def offer(folder: Path, what: Offer) -> None:
    """Keep an offer in place of the former one; a site is in one sum at a time.

    Args:
        folder: the site's own folder.
        what: the offer.
    """
    home = _home(folder)
    beside = what.beside or {}
    arrays = {f"sum:{name}": value for name, value in what.arrays.items()}
    arrays |= {f"beside:{name}": value for name, value in beside.items()}
    write_bytes(home / _ARRAYS, save({name: np.asarray(value, order="C") for name, value in arrays.items()}))
    head: dict[str, Any] = {
        "key": what.key,
        "weights": dict(what.weights),
        "question": what.question,
        "run_id": what.run_id,
    }
    head["release"] = None if what.release is None else asdict(what.release)
    write_json(home / _OFFER, head | {"shares": None if what.shares is None else what.shares.to_dict()})


def offered(folder: Path, key: str) -> Offer:
    """The offer under a key.

    Raises:
        DataError: there is none.
    """
    home = _home(folder)
    head = read_json(home / _OFFER) if (home / _OFFER).is_file() else {}
    if head.get("key") != key:
        raise DataError(
            "This site has nothing to add to the secure sum that it is asked for. Repeat the step before it."
        )
    arrays = load((home / _ARRAYS).read_bytes())
    return Offer(
        key,
        {name[4:]: value for name, value in arrays.items() if name.startswith("sum:")},
        {str(name): int(weight) for name, weight in head["weights"].items()},
        None if head["release"] is None else Release(**head["release"]),
        str(head["question"]),
        {name[7:]: value for name, value in arrays.items() if name.startswith("beside:")},
        None if head["shares"] is None else SitePrivacy.from_dict(head["shares"]),
        str(head["run_id"]),
        bool(head.get("used", False)),
    )


def setup(site: Site, request: Unpacked) -> RecordDict:
    """Step 1: agree to the terms, or refuse them."""
    values = request.values
    terms = Terms.from_dict(values["terms"])
    if terms.site != site.name:
        raise PrivacyError(f"The terms of the secure sum are for {terms.site}.")
    own = offered(site.folder, values["key"])
    if own.used:
        raise DataError("This site's draw of patients was in a secure sum before. Repeat the step before it.")
    if values["weight"] not in own.weights:
        raise PrivacyError(f"This site has no weight {values['weight']!r} for the secure sum.")
    _check_shares(terms, own)
    _encode(terms, own, values["weight"], None)  # refuses NaN and what does not fit before anybody counts on this site
    session = SiteSession.start(terms, secret=_secret(site.folder))
    advert = session.setup()
    _keep(site, session, values["key"], values["weight"])
    return reply(messages.SETUP_REPLY, {"site": site.name, "advert": advert_to_dict(advert)})


def share(site: Site, request: Unpacked) -> RecordDict:
    """Step 2: secrets in sealed shares."""
    adverts = {peer: advert_from_dict(data) for peer, data in request.values["adverts"].items()}
    sealed = _step(site, request, lambda session, own: session.share(adverts))
    return reply(messages.SHARE_REPLY, {"site": site.name, "sealed": messages.to_text(sealed)})


def mask(site: Site, request: Unpacked) -> RecordDict:
    """Step 3: the masked vector, entered in the ledger before it leaves."""
    sealed = messages.to_bytes(request.values["sealed"], source="the server")

    def work(session: SiteSession, own: Mapping[str, Any]) -> bytes:
        given = offered(site.folder, own["key"])
        vector = _encode(session.terms, given, own["weight"], _share_of(given))
        if given.release is not None:
            note = f"inside a secure sum of at most {session.terms.n_sites} sites"
            Ledger(site.folder).record(replace(given.release, note=note))
        _give(site, given)
        return session.mask(sealed, vector)

    masked = np.frombuffer(_step(site, request, work), dtype=np.uint8)
    return reply(messages.MASK_REPLY, {"site": site.name}, encode({messages.MASKED: masked}))


def unmask(site: Site, request: Unpacked) -> RecordDict:
    """Step 4: shares that take the masks off the sum, and off nothing else."""
    answered = messages.names_of(request.values["answers"], "answered")
    silent = messages.names_of(request.values["answers"], "silent")

    def work(session: SiteSession, own: Mapping[str, Any]) -> Any:
        shares = session.unmask(answered, silent)
        _count_noisy(site, own["key"], len(answered))
        _note_opened(site, own["key"], sorted(answered))
        return shares

    shares = _step(site, request, work)
    (_home(site.folder) / _SESSION).unlink(missing_ok=True)
    return reply(messages.UNMASK_REPLY, {"site": site.name, "shares": messages.shares_to_dict(shares)})


ACTIONS = {
    "secure_setup": (messages.SETUP, setup),
    "secure_share": (messages.SHARE, share),
    "secure_mask": (messages.MASK, mask),
    "secure_unmask": (messages.UNMASK, unmask),
}
"""Flower's query action -> request and what answers it."""


def _step(site: Site, request: Unpacked, work: Callable[[SiteSession, Mapping[str, Any]], Any]) -> Any:
    """Take one step of the session on file; it counts as taken even where it fails."""
    path = _home(site.folder) / _SESSION
    own = read_json(path) if path.is_file() else {}
    if own.get("session", {}).get("terms", {}).get("session") != request.values["session"]:
        raise PrivacyError(f"Site {site.name} does not take part in this secure sum (any more). Start a new one.")
    session = SiteSession.from_dict(own["session"])
    try:
        return work(session, own)
    finally:
        _keep(site, session, own["key"], own["weight"])


def _keep(site: Site, session: SiteSession, key: str, weight: str) -> None:
    write_json(_home(site.folder) / _SESSION, {"key": key, "weight": weight, "session": session.to_dict()})


def _encode(terms: Terms, own: Offer, weight: str, share: Share | None) -> npt.NDArray[np.uint64]:
    """The vector; an update that gets noise is multiplied by the site's weight over the largest one, so it grows no longer."""
    amount = own.weights[weight]
    scaled = {name: own.arrays[name] * (amount / terms.layout.max_weight) for name in own.noisy}
    return terms.layout.encode({**own.arrays, **scaled}, amount, share)


def _check_shares(terms: Terms, own: Offer) -> None:
    """Refuse terms under which the noise would not be what it has to be.

    Raises:
        PrivacyError: a threshold with which the sites that may collude open single vectors, a grid too coarse, no room for the
            noise, or an update that would be multiplied by a weight.
    """
    if own.shares is None:
        return
    terms.check_colluding(own.shares.colluding)
    for field in terms.layout.fields:
        if field.name in own.noisy:
            own.shares.check_grid(own.entries, terms.n_sites, terms.layout.step(field))
            if field.weighted or field.clip < own.shares.room:
                raise PrivacyError(
                    f"The secure sum has no room for the noise of {field.name}, or multiplies it by a weight."
                )


def _share_of(own: Offer) -> Share | None:
    if own.shares is None:
        return None
    from nnunet_fedharm.privacy.noise import SecureNoise  # imports torch

    return Share(frozenset(own.noisy), own.shares.share, SecureNoise().wide)


def _count_noisy(site: Site, key: str, answered: int) -> None:
    """Before a sum with shares of noise is opened.

    Raises:
        PrivacyError: over fewer sites than the shares are made for, or oftener than the run has paid for.
    """
    own = offered(site.folder, key)
    if own.shares is None:
        return
    if answered < own.shares.least:
        raise PrivacyError(
            f"Only {answered} sites answered; the noise needs the shares of {own.shares.least}. The sum stays closed."
        )
    count_release(site, own.run_id, own.shares)
    (_home(site.folder) / _GIVEN).unlink(missing_ok=True)


def _give(site: Site, own: Offer) -> None:
    """Before a vector with a share of noise leaves.

    An earlier one whose sum this site did not see opened may have been opened by the others: it counts.

    Raises:
        PrivacyError: with it the run has shown more than it has paid for.
    """
    if own.shares is None:
        return
    home = _home(site.folder)
    if (home / _GIVEN).is_file():
        former = read_json(home / _GIVEN)
        count_release(site, str(former["run_id"]), SitePrivacy.from_dict(former["shares"]))
    write_json(home / _GIVEN, {"run_id": own.run_id, "shares": own.shares.to_dict()})
    if own.shares.unit == PATIENT:
        # Seen twice, one draw of patients costs more than two draws: it is used up, whatever becomes of this sum.
        write_json(home / _OFFER, read_json(home / _OFFER) | {"used": True})


def _note_opened(site: Site, key: str, answered: list[str]) -> None:
    """Remember over which sites the sum of a key was opened.

    Raises:
        PrivacyError: it was opened over others before.
    """
    path = _home(site.folder) / _OPENED
    opened = read_json(path) if path.is_file() else {}
    if opened.setdefault(key, answered) != answered:
        raise PrivacyError(
            f"The secure sum {key} was opened over {', '.join(opened[key])} before; the difference to a second one would show "
            "single sites. Bring the same sites together, or start a new run with another seed."
        )
    write_json(path, opened)


def _secret(folder: Path) -> bytes:
    path = folder / SECRET_FILE
    if not path.is_file():
        return b""
    secret = path.read_bytes().strip()
    if len(secret) < 16:
        raise PrivacyError(f"{SECRET_FILE} is too short; it takes at least 16 bytes that nobody can guess.")
    return secret


def _home(folder: Path) -> Path:
    home = folder / _FOLDER
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home
