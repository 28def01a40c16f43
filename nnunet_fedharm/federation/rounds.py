"""The round loop: broadcast, train at the sites, average, checkpoint; with deadline, quorum and rejoining sites.

Flower's own strategies begin at round 1 after every start, wait for a fixed number of nodes and stop on one bad reply; a
federation of hospitals needs the opposite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import MessageType, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.asking import ask, join_reasons
from nnunet_fedharm.federation.codec import Weights, bundle, encode, payload_bytes
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import Answers
from nnunet_fedharm.federation.later import Later
from nnunet_fedharm.federation.messages import (
    FINISH,
    FINISH_REPLY,
    STORE_PLANS,
    STORE_PLANS_REPLY,
    json_hash,
    pack,
    unpack_reply,
)
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.phase_end import doubt_of
from nnunet_fedharm.federation.requests import common_values, promise_of, scaffolds, train_request
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.secure.checks import secures
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of, step_sum_of
from nnunet_fedharm.federation.secure.rounds import SecureRound
from nnunet_fedharm.federation.site_privacy import privacy_statement, protect
from nnunet_fedharm.federation.spool import SPOOL, Spool, spooled
from nnunet_fedharm.federation.state import ServerState
from nnunet_fedharm.federation.strategy import controlled, current_control, next_model, strategy_of, trains_together
from nnunet_fedharm.federation.updates import (
    Asked,
    encode_with_control,
    quorum_of,
    read_update,
    set_outliers_aside,
    travelling,
)

METRICS = ("train_loss", "val_loss", "dice")


@dataclass(frozen=True)
class RoundLoop:
    """Everything that all rounds of a run share.

    Attributes:
        trainer_name: nnU-Net trainer class that the sites use.
        batch_size: of the plans.
        ownership: phase -> whose word counts for which tensor.
        stepped: tensors that private steps with one noise for all sites train; empty where every site adds its own.
        checkpoint: called after each round with state, weights and whether it is the best so far.
        later: what `checkpoint` leaves until the sites train, or the phase ends.
    """

    roster: Roster
    config: FederateConfig
    log: EventLog
    trainer_name: str
    batch_size: int
    ownership: Mapping[str, Ownership]
    checkpoint: Callable[[ServerState, Weights, bool], None]
    stepped: frozenset[str] = frozenset()
    later: Later = field(default_factory=Later)

    def run_phase(self, phase: str, rounds: int, state: ServerState, weights: Weights) -> tuple[ServerState, Weights]:
        """Run the rounds of a phase that are not done yet.

        Raises:
            FederationError: a round has no quorum after all retries.
        """
        try:
            while state.rounds_done[phase] < rounds:
                state, weights = self._run_round(phase, rounds, state, weights)
        finally:
            self.later.do()
        return state, weights

    def sites_of(self, phase: str) -> tuple[str, ...]:
        """Sites that take part: in the harmonizer phase all that train or vote, in the segmenter phase those with labels."""
        if phase == "harmonizer":
            return tuple(site for site in self.roster.expected if site not in self.ownership[phase].idle)
        return tuple(site for site in self.roster.expected if self.roster.facts[site].n_labelled)

    def _run_round(self, phase: str, rounds: int, state: ServerState, weights: Weights) -> tuple[ServerState, Weights]:
        start = time.monotonic()
        number = state.rounds_done[phase]
        self.log.write("round_start", phase=phase, round=number + 1, rounds=rounds)
        strategy = strategy_of(self.config)
        with spooled(self.log.path.parent / state.run_id / SPOOL) as spool:
            updates, traffic = self._collect(phase, number, state, weights, spool)
            self._report_missing_reference(phase, number, updates)
            part = self._part(phase, weights)
            updates = protect(promise_of(self.config, state, phase), part, self.ownership[phase], updates)
            made = next_model(
                strategy,
                part,
                updates,
                self.ownership[phase],
                state.memory,
                phase=phase,
                number=number,
                weighting=self.config.weighting,
                batch_size=self.batch_size,
            )
        metrics = {name: strategy.metric(updates, made.share, name) for name in METRICS}
        dice = metrics["dice"]
        is_best = phase == "segmenter" and dice is not None and (state.best_dice is None or dice > state.best_dice)
        seconds = round(time.monotonic() - start, 3)
        entry = {
            "phase": phase,
            "round": number + 1,
            "seconds": seconds,
            **metrics,
            **traffic,
            "sites": sorted(updates),
            "left_out": list(made.left_out),
        }
        state = replace(state.with_round(phase, entry, dice if is_best else state.best_dice), memory=made.memory)
        weights = weights | made.weights
        self.checkpoint(state, weights, is_best)
        self.log.write("round_end", rounds=rounds, best=is_best, **entry)
        ends = phase == "harmonizer" and number + 1 == rounds
        if ends and (against := doubt_of(self.config, state.plans, metrics["train_loss"], weights)):
            self.log.write("warning", text=against)
        return state, weights

    def _part(self, phase: str, weights: Weights) -> Weights:
        """What travels in a phase."""
        return self.ownership[phase].shared(travelling(phase, weights))

    def _report_missing_reference(self, phase: str, number: int, updates: Mapping[str, SiteUpdate]) -> None:
        ownership = self.ownership[phase]
        if ownership.reference_only and not ownership.reference_sites & set(updates):
            self.log.write("reference_missing", phase=phase, round=number + 1, sites=sorted(ownership.reference_sites))

    def _collect(
        self, phase: str, number: int, state: ServerState, weights: Weights, spool: Spool
    ) -> tuple[dict[str, SiteUpdate], dict[str, int]]:
        """Updates of at least a quorum, and the bytes of all attempts."""
        wanted = self.sites_of(phase)
        quorum = quorum_of(self.config.quorum, len(wanted))
        part = self._part(phase, weights)
        if trains_together(self.ownership[phase], part):
            quorum = max(quorum, strategy_of(self.config).least_replies)
        if secures(self.config, phase):
            plain, where = bundle(encode(part)), (state.run_id, phase, number, json_hash(state.plans))
            promised = promise_of(self.config, state, phase)
            shared = shared_steps_of(self.config, state.facts)
            step = None if shared is None else step_sum_of(self.config, shared, state.facts, self.stepped, number)
            secure = SecureRound(
                self.roster, self.config, self.log, self.ownership[phase], *where, part, promised, step, self.later.do
            )
            request = train_request(self.config, state, self.trainer_name, phase, number, plain)
            return secure.collect(request, lambda least: self._wait_for(wanted, least, state), quorum)
        control = current_control(state.memory, self._controlled(phase, part))
        record = encode_with_control(part, control, fp16=self.config.fp16)
        down, up = 0, 0
        for attempt in range(self.config.max_retries + 1):
            there = self._wait_for(wanted, quorum, state)
            request = train_request(self.config, state, self.trainer_name, phase, number, record)
            answers = self._train(there, request, phase, number, part, state, spool, payload_bytes(record))
            down += payload_bytes(record) * len(there)
            up += sum(size for _, size in answers.accepted.values())
            if len(answers.accepted) >= quorum:
                return {site: update for site, (update, _) in answers.accepted.items()}, {
                    "bytes_down": down,
                    "bytes_up": up,
                }
            self.log.write(
                "round_repeated",
                phase=phase,
                round=number + 1,
                attempt=attempt + 1,
                replies=len(answers.accepted),
                quorum=quorum,
            )
        reasons = join_reasons(answers.failures)
        raise FederationError(
            f"Round {number + 1} of the {phase} phase got {len(answers.accepted)} of {quorum} needed replies ({reasons}). "
            "Mend the sites, or give them longer with --deadline-s, and run the same command again: it resumes at this round."
        )

    def _wait_for(self, wanted: tuple[str, ...], quorum: int, state: ServerState) -> list[str]:
        """Sites of the phase that are there now, at least a quorum of them.

        Raises:
            FederationError: too few for as long as a round may last.
        """
        start = reported = time.monotonic()
        while True:
            self.roster.refresh()
            self._give_plans(state)
            there = [site for site in wanted if site in self.roster.nodes]
            if len(there) >= quorum:
                return there
            self.roster.refuse_hopeless(wanted, quorum)
            self.later.do()
            self.roster.ask_again()
            if time.monotonic() - start > self.config.deadline_s:
                absent = sorted(set(wanted) - set(there))
                raise FederationError(
                    f"Only {len(there)} of {quorum} needed sites are connected; missing: {', '.join(absent)}. "
                    "Start their SuperNodes and run the same command again: it resumes at this round."
                )
            if time.monotonic() - reported > 15:
                reported = time.monotonic()
                absent = sorted(set(wanted) - set(there))
                self.log.write("waiting", what="sites to come back", sites=absent, seconds=round(reported - start))
            time.sleep(1.0)

    def _controlled(self, phase: str, part: Weights) -> Weights:
        return controlled(self.ownership[phase], part) if scaffolds(self.config, phase) else {}

    def _train(
        self,
        sites: list[str],
        request: RecordDict,
        phase: str,
        number: int,
        like: Weights,
        state: ServerState,
        spool: Spool,
        bytes_down: int,
    ) -> Answers[tuple[SiteUpdate, int]]:
        start = time.monotonic()
        ownership, control = self.ownership[phase], self._controlled(phase, like)
        asked = Asked(
            phase,
            number,
            json_hash(state.plans),
            self.config.local_epochs * self.config.iterations_per_epoch,
            {site: facts.n_labelled + facts.n_unlabelled for site, facts in self.roster.facts.items()},
        )

        def accept(site: str, content: RecordDict) -> tuple[SiteUpdate, int]:
            update, size = read_update(site, content, ownership.contribution(site, like), asked, control)
            self.log.write(
                "site_trained",
                site=site,
                phase=phase,
                round=number + 1,
                seconds=round(time.monotonic() - start, 3),
                bytes_down=bytes_down,
                bytes_up=size,
                n_steps=update.n_steps,
                metrics=update.metrics,
            )
            return spool.keep(site, update), size

        answers = self._ask(
            sites, request, MessageType.TRAIN, self.config.deadline_s, accept, f"{phase} round {number + 1}"
        )
        set_outliers_aside(answers, like, ownership.common(like), self.config.norm_bound)
        for site, reason in sorted(answers.failures.items()):
            self.log.write("site_set_aside", site=site, phase=phase, round=number + 1, reason=reason)
        return answers

    def _give_plans(self, state: ServerState) -> None:
        """Send the final plans to present sites that do not hold them (they were away, or lost them)."""
        wanted = json_hash(state.plans)
        stale = [site for site in self.roster.nodes if self.roster.plans_hash[site] != wanted]
        if not stale:
            return
        keys = ("run_id", "dataset_name", "plans", "dataset_json", "fingerprint")
        request = pack(STORE_PLANS, {key: getattr(state, key) for key in keys})

        def accept(site: str, content: RecordDict) -> None:
            self.roster.plans_hash[site] = unpack_reply(STORE_PLANS_REPLY, content, source=site).values["plans_hash"]

        answers = self._ask(stale, request, f"{MessageType.QUERY}.plans", self.config.deadline_s, accept, "plans")
        for site, reason in sorted(answers.failures.items()):
            del self.roster.nodes[site]  # a node that cannot hold the plans is asked again as an unknown one
            self.log.write("site_set_aside", site=site, phase="plans", round=0, reason=reason)

    def finish(self, state: ServerState, weights: Weights) -> ServerState:
        """Send the final weights to every site that is there; each writes its nnU-Net results folder."""
        self.roster.refresh()
        self._give_plans(state)
        sites = [site for site in self.roster.nodes if site not in state.finished_sites]
        epoch = max(0, state.rounds_done["segmenter"] * self.config.local_epochs - 1)
        shared = self.ownership["segmenter"].shared(weights)
        promised = privacy_statement(self.config, state.facts)
        values = common_values(self.config, state, self.trainer_name) | {"epoch": epoch, "privacy": promised}
        request = pack(FINISH, values, bundle(encode(shared)))

        def accept(site: str, content: RecordDict) -> None:
            unpack_reply(FINISH_REPLY, content, source=site)
            self.log.write("site_finished", site=site)

        answers = self._ask(
            sites, request, f"{MessageType.QUERY}.finish", self.config.deadline_s, accept, "the final model"
        )
        for site, reason in sorted(answers.failures.items()):
            self.log.write("site_set_aside", site=site, phase="finish", round=0, reason=reason)
        return replace(state, finished_sites=sorted({*state.finished_sites, *answers.accepted}))

    def _ask(
        self,
        sites: list[str],
        content: RecordDict,
        message_type: str,
        deadline_s: float,
        accept: Callable[[str, RecordDict], Any],
        what: str,
    ) -> Answers[Any]:
        return ask(
            self.roster,
            self.log,
            sites,
            content,
            message_type,
            deadline_s=deadline_s,
            accept=accept,
            what=what,
            meanwhile=self.later.do,
        )
