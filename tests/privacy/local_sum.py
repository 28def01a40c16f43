"""A secure sum in one process: sites and server as they are, and hands that drop or change what travels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.privacy.fixed_point import Sum
from nnunet_fedharm.privacy.secure_aggregation import Locked, Terms
from nnunet_fedharm.privacy.secure_server import ServerSession
from nnunet_fedharm.privacy.secure_site import SiteSession

Values = Mapping[str, npt.ArrayLike]


@dataclass
class LocalSum:
    """One session.

    Attributes:
        terms: site -> terms.
        values: site -> its arrays.
        weights: site -> its weight; 1 where missing.
        lost: step -> sites whose answer to it never comes, and none after it.
        tamper: changes what travels: (step, site, answer) -> answer.
        secret: of the sites.
    """

    terms: Mapping[str, Terms]
    values: Mapping[str, Values]
    weights: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, Iterable[str]] = field(default_factory=dict)
    tamper: Callable[[str, str, object], object] = lambda step, site, answer: answer
    secret: bytes = b""

    def __post_init__(self) -> None:
        self.sites = {site: SiteSession.start(terms, secret=self.secret) for site, terms in self.terms.items()}
        self.server = ServerSession(dict(self.terms))
        self.masked: dict[str, bytes] = {}

    def run(self) -> Sum:
        keys = self.server.keys_for(self._ask("setup", dict.fromkeys(self.sites), lambda site, _: site.setup()))
        inbox = self.server.shares_for(self._ask("share", keys, lambda site, adverts: site.share(adverts)))
        self.masked = self._ask("mask", inbox, self._mask)
        for site, masked in self.masked.items():
            self.server.add(site, masked)
        answered, silent = self.server.close()
        locked: dict[str, Locked] = self._ask(
            "unmask", dict.fromkeys(answered), lambda site, _: site.unmask(answered, silent)
        )
        return self.server.open(locked)

    def _mask(self, site: SiteSession, inbox: dict[str, bytes]) -> bytes:
        name = site.terms.site
        vector = site.terms.layout.encode(self.values[name], self.weights.get(name, 1))
        return site.mask(inbox, vector)

    def _ask(self, step: str, requests: Mapping[str, object], work: Callable[..., object]) -> dict:  # type: ignore[type-arg]
        order = ("setup", "share", "mask", "unmask")
        gone = {site for former in order[: order.index(step) + 1] for site in self.lost.get(former, ())}
        answers = {}
        for name, request in requests.items():
            if name in gone:
                continue
            # As between two messages of a deployment: the process ends, the file stays.
            session = SiteSession.from_dict(self.sites[name].to_dict())
            answers[name] = self.tamper(step, name, work(session, request))
            self.sites[name] = session
        return answers


def plain_sum(values: Mapping[str, Values], weights: Mapping[str, int], name: str, sites: Iterable[str]) -> np.ndarray:
    """The same without any protocol."""
    return np.sum([weights.get(site, 1) * np.asarray(values[site][name], dtype=np.float64) for site in sites], axis=0)
