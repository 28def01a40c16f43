"""What travels in a round, how many replies it needs, and how a reply is read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Tensors, Weights, bundle, decode, encode, payload_bytes
from nnunet_fedharm.federation.exchange import Answers
from nnunet_fedharm.federation.messages import TRAIN_REPLY, unpack_reply
from nnunet_fedharm.federation.ownership import GATE
from nnunet_fedharm.federation.robust import norm_outliers, update_norms

CONTROL = "control:"
"""Before the names of control variates (SCAFFOLD), which travel in the same record as the weights."""


@dataclass(frozen=True)
class Asked:
    """What a round asked its sites for; a reply has to be the answer to it.

    Attributes:
        phase, round: the round, from 0.
        plans_hash: of the final plans.
        steps: optimizer steps that every site was asked for.
        cases: site -> cases that it has, by its facts.
    """

    phase: str
    round: int
    plans_hash: str
    steps: int
    cases: Mapping[str, int]


def travelling(phase: str, weights: Weights) -> Weights:
    """Tensors that a phase sends to its sites: only the harmonizer's while the segmenter rests, all of them otherwise."""
    if phase == "segmenter":
        return weights
    return {name: value for name, value in weights.items() if name.startswith("harmonizer.")}


def with_open_gate(weights: Weights) -> Weights:
    """The weights after the harmonizer phase: its own gate open, as `Harmonizer.open_gate` does in a training in one place.

    Sites open it for their own segmenter rounds but send nothing that no training changes, so the server has to.
    """
    return {name: np.ones_like(value) if name == GATE else value for name, value in weights.items()}


def quorum_of(quorum: int, n_sites: int) -> int:
    """Replies that a round of `n_sites` needs: the configured number, or more than half of them where it is 0.

    Raises:
        FederationError: nobody can take part.
    """
    if n_sites == 0:
        raise FederationError(
            "No site can take part in this phase. The segmenter phase needs at least one site with labels."
        )
    return min(quorum, n_sites) if quorum else n_sites // 2 + 1


def encode_with_control(weights: Weights, control: Weights, *, fp16: bool) -> ArrayRecord:
    """Weights, and beside them control variates under their prefix; these stay float32, since their errors would add up."""
    record = encode(weights, fp16=fp16)
    record.update(encode(with_prefix(control)))
    return bundle(record)


def with_prefix(control: Tensors) -> Weights:
    """Control variates under their names on the wire."""
    return {CONTROL + name: value for name, value in control.items()}


def split_control(received: Weights) -> tuple[Weights, Weights]:
    """Weights and control variates of a decoded record, each by the names of their tensors."""
    weights = {name: value for name, value in received.items() if not name.startswith(CONTROL)}
    control = {name[len(CONTROL) :]: value for name, value in received.items() if name.startswith(CONTROL)}
    return weights, control


def read_update(
    site: str, content: RecordDict, like: Weights, asked: Asked, control_like: Weights | None = None
) -> tuple[SiteUpdate, int]:
    """A site's reply as an update, and its bytes.

    Args:
        site: who was asked.
        content: what came.
        like: the tensors that this site has to send.
        asked: the round.
        control_like: control variates that it has to send; none where the strategy has none.

    Raises:
        SiteFailure: the site says that it failed.
        FederationError, ShapeError: the reply does not follow the schema, belongs to another round or other plans, claims more
            work than was asked for, or its weights do not fit.
    """
    message = unpack_reply(TRAIN_REPLY, content, source=site)
    values = message.values
    if values["site"] != site:
        raise FederationError(f"The reply of {site} carries the name {values['site']}.")
    if (values["phase"], values["round"]) != (asked.phase, asked.round):
        raise FederationError(
            f"The reply of {site} is of {values['phase']} round {values['round'] + 1}, asked was for {asked.phase} round "
            f"{asked.round + 1}."
        )
    if values["plans_hash"] != asked.plans_hash:
        raise FederationError(f"The reply of {site} was trained with other plans. Start its SuperNode again.")
    if asked.phase == "segmenter" and not values["n_steps"]:
        raise FederationError(f"The reply of {site} says that it took no step.")
    for name, most in (("n_steps", asked.steps), ("n_cases", asked.cases[site])):
        if values[name] > most:
            # Both are weights in the mean: a site must not give itself any weight it likes.
            raise FederationError(f"The reply of {site} claims {name} {values[name]}; at most {most} is possible.")
    expected = like | with_prefix(control_like or {})
    weights, control = split_control(decode(message.weights, like=expected, source=site))
    metrics = {
        name: float(value)
        for name, value in values["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    update = SiteUpdate(weights, values["n_steps"], values["n_cases"], metrics, control)
    return update, payload_bytes(message.weights)


def set_outliers_aside(
    answers: Answers[tuple[SiteUpdate, int]], former: Weights, names: Iterable[str], factor: float
) -> None:
    """Move replies that change what all sites train, or their control variate, far more than the others from accepted to failed.

    A control variate steers every other site, so a false one is as bad as a false weight.

    Args:
        answers: of a round; changed in place.
        former: what the sites were given.
        names: the tensors that every site trains.
        factor: times the median norm; 0 = off.
    """
    if not factor:
        return
    working = {site: update for site, (update, _) in answers.accepted.items() if update.n_steps}
    weights = update_norms({site: update.weights for site, update in working.items()}, former, names)
    controlled = sorted({name for update in working.values() for name in update.control})
    unmoved = {name: np.zeros_like(former[name]) for name in controlled}
    controls = update_norms({site: update.control for site, update in working.items()}, unmoved, controlled)
    found = norm_outliers(controls, factor, what="The change of its control variate")
    for site, reason in (found | norm_outliers(weights, factor)).items():
        del answers.accepted[site]
        answers.failures[site] = reason
