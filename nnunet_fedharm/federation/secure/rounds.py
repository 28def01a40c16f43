"""Rounds whose updates the server never sees: sites train, keep what they learnt, and give it to a secure sum.

The opened sum becomes one reply, `SECURE_SUM`, so that the strategies that step from a mean (FedAvg, FedAvgM, FedAdam, FedYogi)
work as they are. Rows of tables belong to one site each and everybody gets them with the model: they travel in the open, as
without secure aggregation, in replies that have no part in the mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from nnunet_fedharm.errors import DataError, FederationError, PrivacyError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.asking import join_reasons
from nnunet_fedharm.federation.codec import Weights, decode, encode, payload_bytes
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.entries import digest_of
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import Answers, exchange
from nnunet_fedharm.federation.messages import Unpacked, json_hash, reply, unpack_reply
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.secure import messages
from nnunet_fedharm.federation.secure.home import NOISY, ONE, Offer, offer, offered
from nnunet_fedharm.federation.secure.patient_noise import StepSum
from nnunet_fedharm.federation.secure.sum import SecureSum
from nnunet_fedharm.federation.secure.update import mean_update, site_arrays, update_layout
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_privacy import own_release, trained_tensors
from nnunet_fedharm.planning.facts import SiteFacts
from nnunet_fedharm.privacy.fixed_point import Layout
from nnunet_fedharm.privacy.releases import NONE, Release
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES
from nnunet_fedharm.privacy.site_level import SitePrivacy, clipped

SECURE_SUM = "secure sum"
"""Name of the one reply that the mean of a round is."""


@dataclass(frozen=True)
class SecureRound:
    """One round as its server sees it.

    Attributes:
        ownership: of the phase.
        run_id, phase, number, plans_hash: which round it is, from 0.
        part: the travelling tensors as they are sent.
        promised: privacy of sites; None without.
        step: of a round whose noise all sites add together; None for other rounds.
        meanwhile: called once the sites have their request to train.
    """

    roster: Roster
    config: FederateConfig
    log: EventLog
    ownership: Ownership
    run_id: str
    phase: str
    number: int
    plans_hash: str
    part: Weights
    promised: SitePrivacy | None = None
    step: StepSum | None = None
    meanwhile: Callable[[], None] = lambda: None

    @property
    def common(self) -> Weights:
        """What is summed."""
        if self.step is not None:
            return {name: self.part[name] for name in sorted(self.step.names)}
        if self.promised is not None:
            return {name: self.part[name] for name in trained_tensors(self.ownership, self.part)}
        return {name: self.part[name] for name in sorted(self.ownership.common(self.part))}

    def collect(
        self, request: RecordDict, wait: Callable[[int], list[str]], quorum: int
    ) -> tuple[dict[str, SiteUpdate], dict[str, int]]:
        """Train at the sites and open the sum of their updates.

        Args:
            request: as of plain rounds.
            wait: waits for that many sites and names those that are there.
            quorum: sites that the sum needs; at least three are taken.

        Returns:
            The mean under `SECURE_SUM` beside the rows of each site in it, and the bytes of all attempts.

        Raises:
            FederationError: no sum was opened in any attempt.
        """
        least = max(quorum, MIN_SITES)
        traffic = {"bytes_down": 0, "bytes_up": 0}
        for attempt in range(self.config.max_retries + 1):
            sites = wait(least)
            trained = self._train(sites, request, traffic)
            reason = join_reasons(trained.failures)
            if len(trained.accepted) >= least:
                try:
                    return self._sum(trained.accepted, least, traffic), traffic
                except PrivacyError as error:
                    reason = str(error)
            where = {"phase": self.phase, "round": self.number + 1}
            self.log.write(
                "round_repeated",
                **where,
                attempt=attempt + 1,
                replies=len(trained.accepted),
                quorum=least,
                reason=reason,
            )
        raise FederationError(
            f"Round {self.number + 1} of the {self.phase} phase opened no secure sum of at least {least} sites "
            f"({reason.rstrip('.')}). Mend the sites and run the same command again: it resumes at this round."
        )

    def _train(self, sites: list[str], request: RecordDict, traffic: dict[str, int]) -> Answers[Weights]:
        """Local training; only the sites' own rows come back."""
        start, down = time.monotonic(), payload_bytes(request.array_records["weights"])

        def accept(site: str, content: RecordDict) -> Weights:
            rows = self._read(site, unpack_reply(messages.TRAIN_REPLY, content, source=site))
            up = sum(value.nbytes for value in rows.values())
            traffic["bytes_up"] += up
            where = {"phase": self.phase, "round": self.number + 1, "seconds": round(time.monotonic() - start, 3)}
            self.log.write("site_trained", site=site, **where, bytes_down=down, bytes_up=up, metrics={})
            return rows

        wait_s = self.config.deadline_s
        requests = {
            site: Message(
                request, dst_node_id=self.roster.nodes[site], message_type=f"{MessageType.TRAIN}.secure", ttl=wait_s
            )
            for site in sites
        }
        what = f"{self.phase} round {self.number + 1}"
        answers = exchange(
            self.roster.grid,
            requests,
            deadline_s=wait_s,
            accept=self.roster.noting_lost_plans(accept),
            waiting=lambda left, seconds: self.log.write(
                "waiting", what=what, sites=sorted(left), seconds=round(seconds)
            ),
            meanwhile=self.meanwhile,
        )
        traffic["bytes_down"] += down * len(sites)
        for site, reason in sorted(answers.failures.items()):
            self.log.write("site_set_aside", site=site, phase=self.phase, round=self.number + 1, reason=reason)
        return answers

    def _read(self, site: str, answer: Unpacked) -> Weights:
        values = answer.values
        asked = {"site": site, "phase": self.phase, "round": self.number, "plans_hash": self.plans_hash}
        wrong = [key for key, value in asked.items() if values[key] != value]
        if wrong:
            raise FederationError(f"The reply of {site} has the {wrong[0]} {values[wrong[0]]}, not {asked[wrong[0]]}.")
        rows = {name: self.part[name] for name in self.ownership.rows & set(self.part)}
        return decode(answer.weights, like=self.ownership.contribution(site, rows), source=site)

    def _sum(self, trained: Mapping[str, Weights], least: int, traffic: dict[str, int]) -> dict[str, SiteUpdate]:
        config, common = self.config, self.common
        layout = self._layout(common, len(trained))
        weight = config.weighting if self.step is None else ONE
        nodes = {site: self.roster.nodes[site] for site in trained if site in self.roster.nodes}
        summing = SecureSum(
            self.roster.grid, self.log, nodes, config.deadline_s, config.secure_threshold, config.site_colluding
        )
        key = key_of_round(self.run_id, self.phase, self.number)
        try:
            result = summing.run(key, layout, weight=weight, least=least)
        finally:
            traffic["bytes_down"] += summing.bytes_down
            traffic["bytes_up"] += summing.bytes_up
        summed = result.sum
        mean = self.step.mean(summed, common) if self.step else mean_update(summed, common, layout.max_weight)
        if mean.clipped:
            text = f"{mean.clipped} entries of the updates were cut to secure-clip {config.secure_clip:g}; raise it."
            self.log.write("warning", text=text)
        kept = {name: self.part[name] for name in self.ownership.common(self.part) if name not in common}
        updates = {SECURE_SUM: SiteUpdate({**kept, **mean.weights}, 1, 1, mean.metrics)}
        return updates | {site: SiteUpdate(trained[site], 0, 0, {}) for site in result.sites}

    def _layout(self, common: Weights, sites: int) -> Layout:
        config = self.config
        if self.step is not None:
            return self.step.layout(common, sites)
        return update_layout(
            common,
            sites=sites,
            max_weight=largest_weight(config, self.roster.facts),
            clip=config.secure_clip,
            width=config.secure_bytes,
            room=None if self.promised is None else self.promised.room,
        )


def largest_weight(config: FederateConfig, facts: Mapping[str, SiteFacts]) -> int:
    """Bound on a site's weight that the server knows without asking."""
    if config.weighting == "steps":
        return config.local_epochs * config.iterations_per_epoch
    if config.weighting == "cases":
        return max(1, *(fact.n_labelled + fact.n_unlabelled for fact in facts.values()))
    return 1


def key_of_round(run_id: str, phase: str, number: int) -> str:
    """Under which a round's updates are summed."""
    return f"{run_id}/{phase}/{number}"


@dataclass(frozen=True)
class Trained:
    """What a site learnt in a round.

    Attributes:
        received: tensors as they came from the server.
        weights: those that the site may change, after training; of tables its own rows.
        ownership: of the phase.
        n_steps, n_cases, metrics: as in a plain reply.
        private: under differential privacy, entered in the ledger already.
    """

    received: Weights
    weights: Weights
    ownership: Ownership
    n_steps: int
    n_cases: int
    metrics: Mapping[str, float]
    private: bool


def train_for_sum(site: Site, request: Unpacked, make: Callable[[str, str], Offer]) -> RecordDict:
    """A site's answer to a secure round: train, keep the update for the sum, send the own rows.

    Args:
        request: as of plain rounds; the very same one again is not trained again, unless what was made is used up.
        make: trains, and makes the offer under a key in answer to a request of that digest.
    """
    values = request.values
    key = key_of_round(values["run_id"], values["phase"], values["round"])
    question = digest_of(RecordDict({"config": _config(values), "weights": request.weights}))
    try:
        kept = offered(site.folder, key)
        known = kept.question == question and not kept.used
    except DataError:
        known = False
    if not known:
        kept = make(key, question)
        offer(site.folder, kept)
    answer = {"site": site.name, **{name: values[name] for name in ("phase", "round", "plans_hash")}}
    return reply(messages.TRAIN_REPLY, answer, encode(kept.beside or {}))


def offer_of(key: str, question: str, values: Mapping[str, Any], trained: Trained) -> Offer:
    """What a site adds to the sum of a round's updates.

    Args:
        key: of the sum. question: digest of the request.
        values: of the request.
        trained: what was learnt.
    """
    names = trained.ownership.common(trained.weights)
    name = f"weights and metrics, {values['phase']} round {values['round'] + 1}"
    promised = SitePrivacy.from_dict(values["site_dp"]) if values["site_dp"] else None
    release = Release(what=name, mechanism=NONE, run_id=values["run_id"])
    if promised is None:
        arrays = site_arrays(trained.received, trained.weights, trained.metrics, names)
    else:
        release = own_release(promised, name, values["run_id"])
        floats = trained_tensors(trained.ownership, trained.received, trained.weights)
        arrays = site_arrays(trained.received, trained.weights, {}, floats)
        arrays |= clipped({name: arrays[name] for name in arrays if name.startswith(NOISY)}, promised.clip)
    return Offer(
        key,
        arrays,
        {
            "steps": trained.n_steps,
            "cases": trained.n_cases if trained.n_steps else 0,
            "sites": int(trained.n_steps > 0),
        },
        None if trained.private else release,
        question,
        {name: value for name, value in trained.weights.items() if name in trained.ownership.rows},
        promised,
        values["run_id"],
    )


def _config(values: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({"values": json_hash(values)})
