"""The server's side of secure sums over Flower's message API.

    result = SecureSum(grid, log, nodes={"A": 11, "B": 12, "C": 13}, deadline_s=60).run("run/what/0", layout)
    result.sum.values["x"]          # sum over result.sites, exact to the layout's step

Before, every site has to have offered its part under that key (`secure_home.offer`), in answer to a message of the caller. The
server never has a site's part: it gets masked vectors, and shares of the masks of the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from nnunet_fedharm.errors import FederationError, PrivacyError
from nnunet_fedharm.federation.asking import join_reasons
from nnunet_fedharm.federation.codec import decode, payload_bytes
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import exchange
from nnunet_fedharm.federation.messages import Schema, Unpacked, pack, unpack_reply
from nnunet_fedharm.federation.secure import messages
from nnunet_fedharm.federation.secure.home import ONE
from nnunet_fedharm.privacy.fixed_point import Layout, Sum
from nnunet_fedharm.privacy.secure_aggregation import COLLUDING, MIN_SITES, make_terms
from nnunet_fedharm.privacy.secure_server import ServerSession
from nnunet_fedharm.privacy.secure_site import advert_from_dict, advert_to_dict

T = TypeVar("T")
STEP_S = 900.0
"""No step waits longer: sites have trained already, and what is left are seconds of work and the upload."""


@dataclass
class SecureResult:
    """What came of a secure sum.

    Attributes:
        sum: over `sites`.
        sites: whose vectors are in it.
        failures: site -> why it is not, or why it gave no shares.
        bytes_down, bytes_up: of all messages, as they travel.
    """

    sum: Sum
    sites: tuple[str, ...]
    failures: dict[str, str]
    bytes_down: int
    bytes_up: int


@dataclass
class SecureSum:
    """Secure sums over some sites.

    Attributes:
        nodes: site -> Flower node.
        deadline_s: seconds that each of the four steps waits, at most `STEP_S`.
        threshold: shares that make a secret; 0 = the least that is safe.
        colluding: sites that may be the server's.
        failures, bytes_down, bytes_up: of the last sum.
    """

    grid: Grid
    log: EventLog
    nodes: Mapping[str, int]
    deadline_s: float
    threshold: int = 0
    colluding: int = COLLUDING
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def run(self, key: str, layout: Layout, *, weight: str = ONE, least: int = MIN_SITES) -> SecureResult:
        """One sum over all sites of `nodes` that answer, from setup to the opened sum.

        Args:
            key: under which the sites made their offers.
            layout: of the vector; for at least as many sites.
            weight: which of their weights the sites use.
            least: answers below which the sum stays closed; at least three.

        Raises:
            PrivacyError: too few sites, or shares that do not fit; nothing but masked vectors was seen then.
        """
        self.failures, self.bytes_down, self.bytes_up = {}, 0, 0
        try:
            return self._run(key, layout, weight, max(least, MIN_SITES))
        except PrivacyError as error:
            if not self.failures:
                raise
            raise PrivacyError(f"{error} The sites: {join_reasons(self.failures)}.") from error

    def _run(self, key: str, layout: Layout, weight: str, least: int) -> SecureResult:
        start = time.monotonic()
        server = ServerSession(
            make_terms(sorted(self.nodes), layout, threshold=self.threshold, colluding=self.colluding)
        )
        terms = server.terms
        session = next(iter(terms.values())).session
        adverts = self._ask(
            "setup",
            {site: {"key": key, "terms": terms[site].to_dict(), "weight": weight} for site in terms},
            (messages.SETUP, messages.SETUP_REPLY),
            lambda site, answer: advert_from_dict(answer.values["advert"]),
        )
        known = {
            site: {peer: advert_to_dict(advert) for peer, advert in around.items()}
            for site, around in server.keys_for(adverts).items()
        }
        sealed = self._ask(
            "share",
            {site: {"session": session, "adverts": around} for site, around in known.items()},
            (messages.SHARE, messages.SHARE_REPLY),
            lambda site, answer: messages.to_bytes(answer.values["sealed"], source=site),
        )
        inbox = server.shares_for(sealed)
        like = {messages.MASKED: np.broadcast_to(np.uint8(0), layout.size * layout.width)}

        def add(site: str, answer: Unpacked) -> None:
            server.add(site, decode(answer.weights, like=like, source=site)[messages.MASKED].tobytes())

        self._ask(
            "mask",
            {site: {"session": session, "sealed": messages.to_text(shares)} for site, shares in inbox.items()},
            (messages.MASK, messages.MASK_REPLY),
            add,
        )
        total = self._open(server, session, least)
        sites = tuple(sorted(server.answered))
        self.log.write(
            "secure_sum",
            key=key,
            sites=list(sites),
            clipped=total.clipped,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=round(time.monotonic() - start, 3),
        )
        return SecureResult(total, sites, dict(self.failures), self.bytes_down, self.bytes_up)

    def _open(self, server: ServerSession, session: str, least: int) -> Sum:
        answered, silent = server.close()
        if len(answered) < least:
            raise PrivacyError(f"Only {len(answered)} of {least} needed sites answered; the secure sum stays closed.")
        answers = {"answered": answered, "silent": silent}
        shares = self._ask(
            "unmask",
            {site: {"session": session, "answers": answers} for site in answered},
            (messages.UNMASK, messages.UNMASK_REPLY),
            lambda site, answer: messages.shares_from_dict(answer.values["shares"], source=site),
        )
        return server.open(shares)

    def _ask(
        self,
        step: str,
        requests: Mapping[str, Mapping[str, Any]],
        schemas: tuple[Schema, Schema],
        read: Callable[[str, Unpacked], T],
    ) -> dict[str, T]:
        """One step with each site; those that fail are named in the log and left out of the next."""
        wait_s = min(self.deadline_s, STEP_S)
        contents = {site: pack(schemas[0], values) for site, values in requests.items()}
        self.bytes_down += sum(size_of(content) for content in contents.values())

        def accept(site: str, content: RecordDict) -> T:
            answer = unpack_reply(schemas[1], content, source=site)
            if answer.values["site"] != site:
                raise FederationError(f"The reply of {site} carries the name {answer.values['site']}.")
            value = read(site, answer)
            self.bytes_up += size_of(content)
            return value

        answers = exchange(
            self.grid,
            {
                site: Message(
                    content,
                    dst_node_id=self.nodes[site],
                    message_type=f"{MessageType.QUERY}.secure_{step}",
                    ttl=wait_s,
                )
                for site, content in contents.items()
            },
            deadline_s=wait_s,
            accept=accept,
            waiting=lambda left, seconds: self.log.write(
                "waiting", what=f"the secure sum ({step})", sites=sorted(left), seconds=round(seconds)
            ),
        )
        for site, reason in sorted(answers.failures.items()):
            self.failures[site] = reason
            self.log.write("site_set_aside", site=site, phase=f"secure sum ({step})", round=0, reason=reason)
        return answers.accepted


def size_of(content: RecordDict) -> int:
    """Bytes of a message's text and arrays."""
    text = sum(len(str(value)) for record in content.config_records.values() for value in record.values())
    return text + sum(payload_bytes(record) for record in content.array_records.values())
