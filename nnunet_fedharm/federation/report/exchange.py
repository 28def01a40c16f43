"""The sites of a report: who is there, who was left out and why, and what each exchange brought.

A site that fails, refuses, or does not answer in time is left out from then on and named in the report; the rest goes on as long
as there are two. A report is short, so nothing is resumed: a second run finds the features in the sites' caches.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from nnunet_fedharm.errors import FederationError, SiteMismatchError
from nnunet_fedharm.federation.codec import Weights, payload_bytes
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import WAITING_EVERY_S, Answers, exchange
from nnunet_fedharm.federation.messages import Schema, Unpacked, pack, unpack_reply
from nnunet_fedharm.federation.registered import false_name, registered_site
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.messages import HELLO, HELLO_REPLY
from nnunet_fedharm.federation.secure.sum import SecureSum
from nnunet_fedharm.privacy.fixed_point import Field, Layout

T = TypeVar("T")

_AGREED = ("channels", "labels", "versions")
_GREETING_S = 120.0
_ATTEMPTS = 3
_WIDTH = 8
"""Bytes of an entry in a secure sum: rank sums need all the precision there is."""


@dataclass
class Sites:
    """The sites of one report.

    Attributes:
        nodes: site -> Flower node, of the sites that are in.
        descriptions: site -> what it said in `hello`.
        left_out: site -> why.
        sent: message -> site -> bytes that it sent, over all messages of that kind.
    """

    grid: Grid
    config: SiteReportConfig
    log: EventLog
    run_id: str
    nodes: dict[str, int] = field(default_factory=dict)
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    sent: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    _heard: set[int] = field(default_factory=set)
    _asked: Counter[int] = field(default_factory=Counter)
    """Nodes that have said nothing so far, and how often they were asked."""

    @property
    def names(self) -> list[str]:
        """Sites that are in, sorted."""
        return sorted(self.nodes)

    @property
    def least(self) -> int:
        """Sites that it takes."""
        return 3 if self.config.secure_sums else 2

    def gather(self) -> None:
        """Wait for the expected sites; after the waiting time those who came have to do.

        Raises:
            FederationError: too few came, or two nodes have one name.
            SiteMismatchError: sites describe different data or run different versions.
        """
        start, announced = time.monotonic(), -WAITING_EVERY_S
        while True:
            self._greet()
            waited = time.monotonic() - start
            if not self._missing or (waited > self.config.join_wait_s and not self._came_meanwhile()):
                break
            if waited - announced >= WAITING_EVERY_S:
                announced = waited
                self.log.write("waiting", what="sites to connect", sites=self._missing, seconds=round(waited))
            time.sleep(min(1.0, self.config.join_wait_s))
        silent = {self._name_of(node) for node in self._asked}
        for site in self._missing:
            what = "is connected, but did not answer" if site in silent else "did not connect"
            self.leave_out(site, f"{what} within {waited:.0f} s")
        self._require_enough()
        self._check_agreement()

    def ask(
        self,
        action: str,
        schema: Schema,
        values: Mapping[str, Any],
        reply_schema: Schema,
        read: Callable[[str, Unpacked], T],
        *,
        arrays: ArrayRecord | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, T]:
        """Ask every site the same; sites that do not answer as they should are left out.

        Args:
            action: Flower's query action.
            read: makes something of a checked reply; a FedHarmError from it leaves the site out.

        Returns:
            Site -> what `read` made of its answer, in the order of names.

        Raises:
            FederationError: fewer sites are left than a report needs.
        """
        wait = deadline_s or self.config.deadline_s
        content = pack(schema, values, arrays)
        requests = {
            site: Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.{action}", ttl=wait)
            for site, node in self.nodes.items()
        }
        what = str(values.get("step", action.removeprefix("report_")))
        self.log.write("step", step=what)

        def accept(site: str, answer: RecordDict) -> T:
            message = unpack_reply(reply_schema, answer, source=site)
            if message.values["site"] != site:
                raise FederationError(f"The reply of {site} carries the name {message.values['site']}.")
            value = read(site, message)
            self.sent[what][site] += size_of(answer)
            return value

        answers = exchange(
            self.grid,
            requests,
            deadline_s=wait,
            accept=accept,
            waiting=lambda left, seconds: self.log.write(
                "waiting", what=what, sites=sorted(left), seconds=round(seconds)
            ),
        )
        for site, reason in answers.failures.items():
            self.leave_out(site, reason)
        self._require_enough()
        return {site: answers.accepted[site] for site in sorted(answers.accepted)}

    def secure_sum(self, key: str, like: Weights, *, clip: float, integer: bool, what: str) -> Weights:
        """Sum of the arrays that the sites offered under a key; sites that take no part in it are left out.

        Args:
            like: arrays of the sum's shapes.
            clip: largest value of an entry of one site.
            integer: counts, summed exactly.

        Raises:
            PrivacyError: too few sites took part; nothing was seen then.
        """
        fields = tuple(Field(name, value.shape, clip, weighted=False, integer=integer) for name, value in like.items())
        layout = Layout(fields, sites=len(self.nodes), width=_WIDTH)
        summing = SecureSum(self.grid, self.log, nodes=dict(self.nodes), deadline_s=self.config.deadline_s)
        result = summing.run(key, layout, least=self.least)
        for site in sorted(set(self.nodes) - set(result.sites)):
            self.leave_out(site, result.failures.get(site, "took no part in a secure sum"))
        for site in result.sites:
            self.sent[f"{what}, masked"][site] += result.bytes_up // max(len(result.sites), 1)
        return dict(result.sum.values)

    def leave_out(self, site: str, reason: str) -> None:
        """Go on without a site; it is named in the report."""
        self.nodes.pop(site, None)
        self.left_out[site] = reason
        self.log.write("report_site_left_out", site=site, reason=reason)

    @property
    def _missing(self) -> list[str]:
        """Expected sites of which nothing has been heard."""
        return sorted(set(self.config.site_names) - set(self.nodes) - set(self.left_out))

    def _came_meanwhile(self) -> bool:
        """Whether a node has connected while others were asked."""
        return bool(set(self.grid.get_node_ids()) - self._heard - set(self._asked))

    def _name_of(self, node: int) -> str:
        """The site to which the coordinator gave the node's key; empty where nobody registered it."""
        return registered_site(self.log.path.parent, node)

    def _greet(self) -> None:
        """Ask every node that has not said who it is; one that stays silent again, as a busy site's first answer takes long."""
        online = set(self.grid.get_node_ids())
        self._heard &= online  # who left and comes back may have been mended
        self._asked = Counter({node: count for node, count in self._asked.items() if node in online})
        nodes = sorted(node for node in online - self._heard if self._asked[node] < _ATTEMPTS)
        if not nodes:
            return
        self._asked.update(nodes)
        content = pack(HELLO, {"run_id": self.run_id, "dataset": self.config.dataset})
        requests = {
            str(node): Message(
                content, dst_node_id=node, message_type=f"{MessageType.QUERY}.report_hello", ttl=_GREETING_S
            )
            for node in nodes
        }

        def waiting(left: set[str], seconds: float) -> None:
            named = sorted(filter(None, (self._name_of(int(node)) for node in left)))
            self.log.write("waiting", what="a first answer", sites=named or self._missing, seconds=round(seconds))

        def complete(answers: Answers[tuple[str, dict[str, Any]]]) -> bool:
            return {site for site, _ in answers.accepted.values()} >= set(self._missing)

        answers = exchange(
            self.grid, requests, deadline_s=_GREETING_S, accept=_read_hello, waiting=waiting, enough=complete
        )
        for node in (*answers.accepted, *(set(answers.failures) - answers.undelivered)):
            self._heard.add(int(node))
            del self._asked[int(node)]
        for node, (site, description) in sorted(answers.accepted.items()):
            reason = false_name(self.log.path.parent, int(node), site)
            if reason:
                self.log.write("node_set_aside", reason=reason)
            elif site not in self.config.site_names:
                self.log.write("site_refused", site=site, reason=f"Site {site} is not part of this report.")
            elif site in self.nodes:
                raise FederationError(f"Two nodes call themselves {site}. Give every SuperNode its own site name.")
            else:
                self.nodes[site], self.descriptions[site] = int(node), description
        for node, reason in answers.failures.items():
            if node in answers.undelivered and not self._missing:
                continue  # nobody waited for it
            name = self._name_of(int(node))
            self.log.write("node_set_aside", reason=reason if name in reason else f"{name}: {reason}")
            named = [site for site in self.config.site_names if f"Site {site}" in reason]
            if node not in answers.undelivered and named:
                self.leave_out(max(named, key=len), reason)

    def _require_enough(self) -> None:
        if len(self.nodes) < self.least:
            reasons = "; ".join(f"{site}: {text.rstrip('.')}" for site, text in sorted(self.left_out.items()))
            raise FederationError(
                f"A report needs {self.least} sites, {len(self.nodes)} of {len(self.config.site_names)} can take part. "
                f"Left out: {reasons or 'none'}."
            )

    def _check_agreement(self) -> None:
        for key in _AGREED:
            values = {site: self.descriptions[site].get(key) for site in self.names}
            disagreement(values, key)


def size_of(answer: RecordDict) -> int:
    """Bytes of the text and arrays of a message."""
    text = sum(len(str(value)) for record in answer.config_records.values() for value in record.values())
    return text + sum(payload_bytes(record) for record in answer.array_records.values())


def disagreement(values: Mapping[str, Any], what: str) -> None:
    """All sites say the same.

    Raises:
        SiteMismatchError: one differs from most; the message names it and both values.
    """
    texts = {site: json.dumps(value, sort_keys=True) for site, value in values.items()}
    usual = max(texts.values(), key=lambda text: sum(text == other for other in texts.values()))
    for site, text in texts.items():
        if text != usual:
            raise SiteMismatchError(
                f"Site {site} disagrees on {what}: it has {_difference(text, usual)}. Features are comparable only where "
                "these are the same; mend the site or leave it out of sites."
            )


def _difference(own: str, usual: str) -> str:
    mine, others = json.loads(own), json.loads(usual)
    if isinstance(mine, dict) and isinstance(others, dict):
        keys = [key for key in sorted({*mine, *others}) if mine.get(key) != others.get(key)]
        return f"{keys[0]} = {mine.get(keys[0])!r}, the others {others.get(keys[0])!r}"
    return f"{mine!r}, the others {others!r}"


def _read_hello(node: str, answer: RecordDict) -> tuple[str, dict[str, Any]]:
    values = unpack_reply(HELLO_REPLY, answer, source=f"node {node}").values
    lacking = sorted({"dataset", "versions", "unlabelled", *_AGREED} - set(values["description"]))
    if lacking:
        raise FederationError(
            f"The hello of {values['site']} lacks {lacking[0]!r}. Install the same nnunet_fedharm everywhere."
        )
    return str(values["site"]), dict(values["description"])
