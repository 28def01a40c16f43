"""From preflight to final plans: each step is saved, so a restarted run does not repeat what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from flwr.app import MessageType, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.asking import ask, join_reasons
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.messages import (
    PREPARE,
    PREPARE_REPLY,
    SUMMARIZE,
    SUMMARIZE_REPLY,
    Schema,
    pack,
    unpack_reply,
)
from nnunet_fedharm.federation.roster import REJOIN_DEADLINE_S, Roster
from nnunet_fedharm.federation.secure.checks import check_secure_sites
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of
from nnunet_fedharm.federation.state import ServerState
from nnunet_fedharm.federation.strategy_checks import check_sites, noise_warnings
from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.facts import SiteFacts, check_agreement, federation_dataset_json
from nnunet_fedharm.planning.section import FedHarmSection, reads_styles, with_section
from nnunet_fedharm.planning.summary import SiteSummary

T = TypeVar("T")


@dataclass(frozen=True)
class Preparation:
    """Everything before the first round.

    Attributes:
        root: the server's nnU-Net root.
        save: stores the state after each step.
    """

    roster: Roster
    config: FederateConfig
    log: EventLog
    root: NnunetRoot
    save: Callable[[ServerState], None]

    def run(self, state: ServerState) -> ServerState:
        """Preflight, fingerprint, plans, preprocessing, style bank: whatever is not done yet.

        Raises:
            FederationError: a site is missing or failed; all of them are needed for one common plan.
            SiteMismatchError: a site disagrees with the others.
        """
        self._gather(state)
        for step, is_done in (
            (self._preflight, bool(state.facts)),
            (self._plan, bool(state.planned)),
            (self._styles, bool(state.plans)),
        ):
            if not is_done:
                state = step(state)
                self.save(state)
        return state

    def _gather(self, state: ServerState) -> None:
        """Wait for the sites; before the first round all of them have to come, later they are taken as between rounds."""
        started = bool(state.plans)
        self.roster.facts |= {site: SiteFacts.from_dict(facts) for site, facts in state.facts.items()}
        wait_s = self.config.join_wait_s
        self.roster.wait_for_all(
            seconds=wait_s,
            check_data=not state.facts,
            deadline_s=max(wait_s, REJOIN_DEADLINE_S) if started else self.config.prepare_deadline_s,
            strict=not started,
        )
        missing = self.roster.missing
        if not missing:
            return
        if not started:
            raise FederationError(
                f"These sites did not connect within {self.config.join_wait_s:.0f} s: {', '.join(missing)}. "
                "Start their SuperNodes (or correct sites) and run the same command again."
            )
        self.log.write("sites_missing", sites=missing)

    def _preflight(self, state: ServerState) -> ServerState:
        from nnunet_fedharm.sites.checks import check_fold

        facts = [self.roster.facts[site] for site in self.roster.expected]
        check_agreement(facts)
        check_sites(self.config, facts)
        check_secure_sites(self.config, facts)
        told = {fact.site: fact.to_dict() for fact in facts}
        shared_steps_of(self.config, told)  # refuses a delta or a budget that noise of all sites together cannot keep
        for fact in facts:
            if fact.n_labelled:
                check_fold(fact.n_labelled, self.config.fold, site=fact.site)
        self.log.write("preflight_passed", sites=list(self.roster.expected), dataset=facts[0].dataset_name)
        if own := {fact.site: fact.own_privacy for fact in facts if fact.own_privacy}:
            self.log.write("private_by_own_policy", sites=own)
        for text in noise_warnings(self.config, facts):
            self.log.write("warning", text=text)
        return replace(
            state,
            facts=told,
            dataset_name=facts[0].dataset_name,
            dataset_json=_plain_json(federation_dataset_json(facts)),
        )

    def _plan(self, state: ServerState) -> ServerState:
        from nnunet_fedharm.planning.planner import PlanOptions, plan_federation, require_configuration
        from nnunet_fedharm.planning.start import with_networks_of

        config = self.config
        noise = config.privacy.fingerprint_multiplier if config.privacy else 0.0
        summed = len(self.roster.expected) if noise and config.secure_aggregation == "all" else 0
        asked = self._statistics(state, noise) | {"summed_over": summed, "colluding": config.site_colluding}
        request = pack(SUMMARIZE, asked)
        replies = self._from_all("summarize", request, SUMMARIZE_REPLY, lambda values: values["summary"])
        fingerprint = _plain_json(self._merged([replies[site] for site in self.roster.expected], state, noise))
        options = PlanOptions(
            gpu_memory_gb=config.gpu_memory_gb,
            base_features=config.base_features,
            max_features=config.max_features or None,
            batch_size=config.batch_size or None,
            patch_size=config.patch_shape,
            plans_name=config.plans_name,
        )
        reader = self.roster.facts[self.roster.expected[0]].reader
        plans = plan_federation(
            fingerprint,
            state.dataset_json,
            dataset_name=state.dataset_name,
            reader=reader,
            root=self.root,
            options=options,
        )
        require_configuration(plans, config.configuration)
        plans = with_networks_of(config.start_from, plans, (config.configuration,), options)
        chosen = plans["configurations"][config.configuration]
        self.log.write(
            "planned", patch_size=chosen["patch_size"], batch_size=chosen["batch_size"], spacing=chosen["spacing"]
        )
        return replace(state, fingerprint=fingerprint, planned=_plain_json(plans))

    def _styles(self, state: ServerState) -> ServerState:
        from nnunet_fedharm.planning.defaults import complete_options
        from nnunet_fedharm.planning.explain import write_explanation
        from nnunet_fedharm.planning.preprocess import write_descriptions
        from nnunet_fedharm.planning.situation import Device, situation_of
        from nnunet_fedharm.planning.start import models_behind
        from nnunet_fedharm.trainers.start_weights import with_judge_of

        config = self.config
        values = {
            **self._statistics(state, config.privacy.style_noise if config.privacy else 0.0),
            "styled": config.privacy is None or reads_styles(config.harmonizer),
            "configuration": config.configuration,
            "plans": state.planned,
            "dataset_json": state.dataset_json,
            "fingerprint": state.fingerprint,
        }
        replies = self._from_all("prepare", pack(PREPARE, values), PREPARE_REPLY, lambda values: values["style"])
        styles = {site: Style.from_dict(replies[site]) for site in self.roster.expected}
        device = Device("cpu" if config.device == "cpu" else "cuda")
        planned = state.planned["configurations"][config.configuration]
        situation = situation_of(
            planned,
            kind=config.harmonizer,
            reference=config.reference,
            styles=styles,
            device=device,
        )
        options = with_judge_of(config.start_from, config.harmonizer, config.harmonizer_settings)
        section = FedHarmSection(
            kind=config.harmonizer,
            harmonizer=complete_options(situation, options),
            reference=config.reference,
            styles=styles,
            schedule=config.schedule,
            privacy=config.privacy,
            starts=models_behind(config.start_from),
        )
        plans = _plain_json(with_section(state.planned, section, (config.configuration,)))
        write_descriptions(
            self.root, state.dataset_name, plans, dataset_json=state.dataset_json, fingerprint=state.fingerprint
        )
        write_explanation(self.root, plans, device)
        self.log.write("style_bank", sites=list(self.roster.expected), reference=config.reference)
        return replace(state, plans=plans)

    def _statistics(self, state: ServerState, noise: float) -> dict[str, Any]:
        """What every request for statistics says."""
        privacy = self.config.privacy
        budget = {"epsilon": privacy.epsilon, "delta": privacy.delta} if privacy else {"epsilon": 0.0, "delta": 0.0}
        return {"run_id": state.run_id, "dataset_name": state.dataset_name, "noise": noise, **budget}

    def _merged(self, replies: list[dict[str, Any]], state: ServerState, noise: float) -> dict[str, Any]:
        """The fingerprint of all sites."""
        from nnunet_fedharm.federation.secure.fingerprint import summed_summaries
        from nnunet_fedharm.planning.merge import merge_summaries
        from nnunet_fedharm.planning.private_merge import expected_error, merge_private
        from nnunet_fedharm.planning.private_summary import PrivateSummary

        if not noise:
            return merge_summaries([SiteSummary.from_dict(reply) for reply in replies])
        noisy = [PrivateSummary.from_dict(reply) for reply in replies]
        if self.config.secure_aggregation == "all":
            noisy = summed_summaries(self.roster, self.config, self.log, state.run_id, noisy)
        self.log.write("fingerprint_noise", noise_multiplier=noise, **expected_error(noisy).to_dict())
        return merge_private(noisy, n_channels=len(state.dataset_json["channel_names"]))

    def _from_all(
        self, action: str, request: RecordDict, schema: Schema, read: Callable[[dict[str, Any]], T]
    ) -> dict[str, T]:
        """Ask every site; a site that fails stops the run by name, because the common plan needs all of them."""

        def accept(site: str, content: RecordDict) -> T:
            value = read(unpack_reply(schema, content, source=site).values)
            self.log.write("site_ready", site=site, step=action)
            return value

        self.log.write("step", step=action)
        answers = ask(
            self.roster,
            self.log,
            list(self.roster.expected),
            request,
            f"{MessageType.QUERY}.{action}",
            deadline_s=self.config.prepare_deadline_s,
            accept=accept,
            what=action,
        )
        if answers.failures:
            raise FederationError(
                f"The step {action!r} failed: {join_reasons(answers.failures)}. Mend it and run the same command again."
            )
        return dict(answers.accepted)


def _plain_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after a journey through JSON: string keys, lists, so that hashes agree everywhere."""
    return dict(json.loads(json.dumps(data, allow_nan=False)))
