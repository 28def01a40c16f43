"""Who is where: sites by name, whatever node id Flower gives them today.

A restarted SuperNode comes back under a new node id (under the former one where its key is registered), so every unknown node is
asked for its site's name and facts before it takes part; a site that comes back gets the final plans again where its own are
missing or old.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from nnunet_fedharm.errors import FederationError, SiteMismatchError
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import Answers, exchange
from nnunet_fedharm.federation.messages import PREFLIGHT, PREFLIGHT_REPLY, SiteFailure, pack, unpack_reply
from nnunet_fedharm.federation.registered import false_name, still_registered
from nnunet_fedharm.federation.stored_plans import OtherPlansError
from nnunet_fedharm.planning.facts import SiteFacts, check_agreement

T = TypeVar("T")

REJOIN_DEADLINE_S = 120.0
"""How long the run waits for an unknown node to say who it is, once training has begun."""
_ATTEMPTS = 2
"""How often in a row a node that says nothing is asked, while enough sites are there."""
_REFUSED_S = 600.0
"""Until a refused node is asked again: what was wrong with it may have been mended without Flower's seeing it leave."""


@dataclass(frozen=True)
class Hello:
    """A site's answer to preflight."""

    facts: SiteFacts
    plans_hash: str


@dataclass
class Roster:
    """The sites of a run and their present nodes.

    Attributes:
        nodes: site -> node id of the sites that are there now.
        facts: site -> facts; fixed once preflight is over.
        plans_hash: site -> hash of the final plans that it holds ("" for none).
    """

    grid: Grid
    log: EventLog
    run_id: str
    dataset: str
    expected: tuple[str, ...]
    facts: dict[str, SiteFacts] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    plans_hash: dict[str, str] = field(default_factory=dict)
    _attempts: Counter[int] = field(default_factory=Counter)
    _refused: dict[int, float] = field(default_factory=dict)
    """Node -> monotonic time before which it is not asked again."""

    @property
    def missing(self) -> list[str]:
        """Expected sites that are not there."""
        return [site for site in self.expected if site not in self.nodes]

    @property
    def awaited(self) -> list[str]:
        """Missing sites that may still come: the coordinator has not removed them."""
        return still_registered(self.log.path.parent, self.missing)

    def wait_for_all(self, *, seconds: float, check_data: bool, deadline_s: float, strict: bool = True) -> None:
        """Wait until every expected site has answered preflight, or the time is over (then `missing` is not empty).

        Args:
            strict: all sites are needed; else those that refuse or disagree are set aside, as between rounds.

        Raises:
            FederationError: strict, and a site refused, or two nodes have one name.
            SiteMismatchError: strict, and a site disagrees with the others.
        """
        start, announced = time.monotonic(), -1.0
        while True:
            seen = set(self.grid.get_node_ids())
            failures = self.refresh(check_data=check_data, deadline_s=deadline_s, strict=strict)
            if strict and failures:
                raise FederationError(failures[0])
            waited = time.monotonic() - start
            awaited = self.missing if strict else self.awaited
            # Who connected while others were asked, which may take long, is asked too before anybody is given up.
            if not awaited or (waited > seconds and not set(self.grid.get_node_ids()) - seen):
                self.ask_again()  # who was busy with an earlier round has not used up its chances
                return
            if announced < 0 or waited - announced > 15:
                announced = waited
                self.log.write("waiting", what="sites to connect", sites=awaited, seconds=round(waited))
            time.sleep(min(1.0, seconds))

    def refresh(
        self, *, check_data: bool = False, deadline_s: float = REJOIN_DEADLINE_S, strict: bool = False
    ) -> list[str]:
        """Forget nodes that left and identify new ones; returns what sites said that were set aside (dead nodes say nothing)."""
        online = set(self.grid.get_node_ids())
        # Who left and comes back may have been mended.
        self._refused = {node: until for node, until in self._refused.items() if node in online}
        self._attempts = Counter({node: count for node, count in self._attempts.items() if node in online})
        for site in [name for name, node in self.nodes.items() if node not in online]:
            del self.nodes[site]
            self.log.write("site_lost", site=site)
            # Its new node may be among the silent ones: nobody waited for their answer while Flower listed the dead node.
            self.ask_again()
        refused = {node for node, until in self._refused.items() if time.monotonic() < until}
        known = set(self.nodes.values()) | refused
        unknown = sorted(node for node in online - known if self._attempts[node] < _ATTEMPTS)
        if not unknown:
            return []
        answers = self._greet(unknown, check_data, deadline_s)
        honest = {node: hello for node, hello in answers.accepted.items() if not self._is_false(int(node), hello)}
        if strict:
            _refuse_twins(honest)
        failed = {node: text for node, text in answers.failures.items() if node not in answers.undelivered}
        for node in (*answers.accepted, *failed):
            self._attempts.pop(int(node), None)  # it says something
        turned_away = [self._admit(int(node), hello, strict) for node, hello in sorted(honest.items())]
        for text in failed.values():
            self.log.write("node_set_aside", reason=text)
        return [*filter(None, turned_away), *failed.values()]

    def ask_again(self) -> None:
        """Ask nodes that said nothing so far once more: a site is missing, and one of them may be it."""
        self._attempts.clear()

    def refuse_hopeless(self, wanted: Collection[str], quorum: int) -> None:
        """Stop waiting where removed sites would be needed.

        Raises:
            FederationError: fewer than the quorum of these sites are there or may still come.
        """
        awaited = self.awaited
        gone = sorted(site for site in wanted if site not in self.nodes and site not in awaited)
        if gone and len(wanted) - len(gone) < quorum:
            raise FederationError(
                f"A round needs {quorum} of {', '.join(wanted)}; {', '.join(gone)} cannot come, not being registered any more. "
                "Register a new key, or give a smaller --quorum, and run the same command again: it resumes at this round."
            )

    def noting_lost_plans(self, accept: Callable[[str, RecordDict], T]) -> Callable[[str, RecordDict], T]:
        """`accept`, which also hears a site say that it has lost its plans: it gets them again before the next round."""

        def noting(site: str, content: RecordDict) -> T:
            try:
                return accept(site, content)
            except SiteFailure as failure:
                if failure.kind == OtherPlansError.__name__:
                    self.plans_hash[site] = ""
                raise

        return noting

    def _greet(self, nodes: list[int], check_data: bool, deadline_s: float) -> Answers[Hello]:
        values = {"run_id": self.run_id, "dataset": self.dataset, "check_data": check_data}
        requests = {
            str(node): Message(
                pack(PREFLIGHT, values), dst_node_id=node, message_type=f"{MessageType.QUERY}.preflight", ttl=deadline_s
            )
            for node in nodes
        }
        self._attempts.update(nodes)

        def complete(answers: Answers[Hello]) -> bool:
            there = {hello.facts.site for hello in answers.accepted.values()} | set(self.nodes)
            return not still_registered(self.log.path.parent, sorted(set(self.expected) - there))

        return exchange(
            self.grid,
            requests,
            deadline_s=deadline_s,
            accept=_read_hello,
            enough=complete,
            waiting=lambda left, seconds: self.log.write(
                "waiting", what="preflight", sites=self.missing, seconds=round(seconds)
            ),
        )

    def _is_false(self, node: int, hello: Hello) -> bool:
        """Whether a node uses a name that is not its key's; the run goes on without it."""
        reason = false_name(self.log.path.parent, node, hello.facts.site)
        if reason:
            self._refused[node] = time.monotonic() + _REFUSED_S
            self.log.write("node_set_aside", reason=reason)
        return bool(reason)

    def _admit(self, node: int, hello: Hello, strict: bool) -> str:
        """Enter a site; returns why not, or an empty text."""
        site = hello.facts.site
        if site not in self.expected:
            reason = (
                f"Site {site} is not part of this run ({', '.join(self.expected)}). Add it to sites or stop its node."
            )
        else:
            reason = self._disagreement(hello.facts) or ("" if strict else self._change(hello.facts))
        if reason:
            self.log.write("site_refused", site=site, reason=reason)
            if strict:
                raise SiteMismatchError(reason)
            self._refused[node] = time.monotonic() + _REFUSED_S
            return reason
        former = self.nodes.get(site)
        if former is not None:
            # Flower lists a dead node for up to a minute; it must not be asked again for who it is.
            self._refused[former] = math.inf
        self.nodes[site], self.plans_hash[site] = node, hello.plans_hash
        if strict:
            self.facts[site] = hello.facts
        else:
            self.facts.setdefault(site, hello.facts)
        self.log.write("site_joined", site=site, labelled=hello.facts.n_labelled, unlabelled=hello.facts.n_unlabelled)
        return ""

    def _change(self, facts: SiteFacts) -> str:
        """What stands against a site that comes back with other data than at preflight; smaller changes are a warning."""
        former = self.facts.get(facts.site)
        if former is None:
            return ""
        if bool(former.n_labelled) != bool(facts.n_labelled):
            return (
                f"Site {facts.site} had {former.n_labelled} labelled cases at the start of this run, {facts.n_labelled} now. "
                "Look whether its data are all mounted, or start a new run."
            )
        if (former.n_labelled, former.n_unlabelled) != (facts.n_labelled, facts.n_unlabelled):
            words = f"{former.n_labelled} labelled and {former.n_unlabelled} unlabelled cases"
            self.log.write(
                "warning", text=f"Site {facts.site} has other data than at the start of this run; {words} still count."
            )
        return ""

    def _disagreement(self, facts: SiteFacts) -> str:
        others = [known for site, known in self.facts.items() if site != facts.site]
        try:
            # Whether anybody has labels is asked once, when all are there.
            check_agreement([*others, facts])
        except SiteMismatchError as error:
            return "" if "No site has labels" in str(error) else str(error)
        return ""


def _read_hello(node: str, content: RecordDict) -> Hello:
    values: Mapping[str, Any] = unpack_reply(PREFLIGHT_REPLY, content, source=f"node {node}").values
    facts = SiteFacts.from_dict(values["facts"])
    if facts.site != values["site"]:
        raise FederationError(f"Site {values['site']} sent the facts of {facts.site}.")
    return Hello(facts=facts, plans_hash=values["plans_hash"])


def _refuse_twins(accepted: Mapping[str, Hello]) -> None:
    count = Counter(hello.facts.site for hello in accepted.values())
    for site, nodes in count.items():
        if nodes > 1:
            raise FederationError(f"{nodes} nodes call themselves {site}. Give every SuperNode its own site name.")
