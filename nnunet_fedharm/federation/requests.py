"""What a round's requests say, beside the weights."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, RecordDict

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import TRAIN, json_hash, pack
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of
from nnunet_fedharm.federation.site_privacy import site_privacy_of
from nnunet_fedharm.federation.state import ServerState
from nnunet_fedharm.privacy.site_level import SitePrivacy


def scaffolds(config: FederateConfig, phase: str) -> bool:
    """Whether control variates travel in a phase."""
    return config.strategy == "scaffold" and phase == "segmenter"


def promise_of(config: FederateConfig, state: ServerState, phase: str) -> SitePrivacy | None:
    """Privacy of sites in a phase; None without."""
    facts = state.facts.values()
    return site_privacy_of(config, sum(phase == "harmonizer" or fact["n_labelled"] > 0 for fact in facts))


def common_values(config: FederateConfig, state: ServerState, trainer_name: str) -> dict[str, Any]:
    """What training and finishing have in common."""
    return {
        "run_id": state.run_id,
        "dataset_name": state.dataset_name,
        "configuration": config.configuration,
        "fold": config.fold,
        "trainer_name": trainer_name,
        "plans_hash": json_hash(state.plans),
        "seed": config.seed,
        "local_groups": ",".join(config.own_groups),
    }


def train_request(
    config: FederateConfig, state: ServerState, trainer_name: str, phase: str, number: int, record: ArrayRecord
) -> RecordDict:
    """The request to train round `number` (from 0) of a phase."""
    values = common_values(config, state, trainer_name) | {
        "phase": phase,
        "round": number,
        "first_epoch": number * config.local_epochs,
        "epochs": config.local_epochs,
        "fp16": config.fp16,
        "proximal_mu": config.proximal_mu,
        "scaffold": scaffolds(config, phase),
        "counted": state.memory.numbers.get("counted", {}) if scaffolds(config, phase) else {},
    }
    promised, shared = promise_of(config, state, phase), shared_steps_of(config, state.facts)
    values["site_dp"] = {} if promised is None else promised.to_dict()
    values["shared_steps"] = {} if shared is None else shared.to_dict()
    return pack(TRAIN, values, record)
