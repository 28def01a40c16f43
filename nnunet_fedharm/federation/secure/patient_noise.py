"""Noise of DP-SGD that all sites add together, inside the secure sum of a round (DP-FedSGD); see `privacy.shared_steps`.

A segmenter round is one step: every site offers the sum of its drawn patients' clipped gradients and the number of its patients,
adds its share of the noise in the ring, and the server steps from the opened sum as nnU-Net's optimizer would, without momentum;
what comes out goes to the strategy, which has momentum or Adam of its own. Rounds of a harmonizer come before: its optimizers are
not linear in the gradient, so there each site adds all of its noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import as_dtype
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.federation.secure.checks import SUMMED, check_colluding
from nnunet_fedharm.federation.secure.home import NOISY, ONE, Offer
from nnunet_fedharm.federation.secure.update import MeanUpdate
from nnunet_fedharm.federation.updates import quorum_of
from nnunet_fedharm.planning.section import reads_styles
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Sum
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES
from nnunet_fedharm.privacy.shared_steps import HarmonizerSteps, SharedSteps, shared_steps, surplus
from nnunet_fedharm.privacy.site_level import REACH

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.clipped_sum import ClippedSum

LOCAL, DISTRIBUTED = "local", "distributed"
PLACES = (LOCAL, DISTRIBUTED)
"""Where the noise of a private step is whole: at each site, or in the sum over sites."""
PATIENTS = "patients"


def check_patient_noise(config: RunOptions) -> None:
    """Check everything about shared noise that the configuration alone can tell.

    Raises:
        FederationError: unknown value, or an option with which a round is not one sum of clipped gradients.
    """
    if config.patient_noise not in PLACES:
        raise FederationError(f"patient-noise is {config.patient_noise!r}; choose one of {', '.join(PLACES)}.")
    if config.patient_noise == LOCAL:
        return
    needed = (
        (config.epsilon > 0, "there is no epsilon to add noise for. Give --epsilon"),
        (config.secure_aggregation != "off", "the server would see each site's part. Use secure-aggregation segmenter or all"),
        (config.local_epochs * config.iterations_per_epoch == 1, "steps of different sites stand at different weights after the "
         "first one, and their sum is no sum of one mechanism. Use local-epochs 1 and iterations-per-epoch 1"),
        (config.phases == "frozen", "the harmonizer is moved at another rate. Use phases frozen"),
        (config.site_dp == "off", "site-dp adds shares of its own. Use one of both"),
        (config.proximal_mu == 0 and not config.own_groups, "it takes neither proximal-mu nor local-groups. Leave them out"),
    )  # fmt: skip
    for holds, reason in needed:
        if not holds:
            raise FederationError(f"patient-noise distributed: {reason}.")
    check_colluding(config, opens="part")


def shared_steps_of(config: RunOptions, facts: Mapping[str, Mapping[str, Any]]) -> SharedSteps | None:
    """What the segmenter's rounds promise; None where every site adds all of its noise.

    Args:
        facts: site -> its facts.

    Raises:
        PrivacyError: no noise keeps the run within its budget.
    """
    if config.patient_noise == LOCAL or config.privacy is None:
        return None
    cases = [fact["n_labelled"] for fact in facts.values() if fact["n_labelled"]]
    least = max(quorum_of(config.quorum, len(cases)), MIN_SITES)
    return shared_steps(
        config.privacy,
        styled=reads_styles(config.harmonizer),
        patients=sum(cases),
        rounds=config.segmenter_rounds,
        least=least,
        colluding=config.site_colluding,
        harmonizer=_harmonizer_steps(config, facts) if config.harmonizer_rounds else None,
    )


def _harmonizer_steps(config: RunOptions, facts: Mapping[str, Mapping[str, Any]]) -> HarmonizerSteps:
    """Of the site with the fewest patients that trains the harmonizer: the reference alone where it is not averaged."""
    judged = config.harmonizer not in SUMMED
    trained = [config.reference] if judged and config.reference in facts else list(facts)
    return HarmonizerSteps(
        patients=min(facts[site]["n_labelled"] + facts[site]["n_unlabelled"] for site in trained),
        steps=config.harmonizer_rounds,
        voted=judged,
    )


def statement(shared: SharedSteps, sites: int) -> dict[str, Any]:
    """For events, and for the server's privacy.json."""
    return {
        "patient_noise": DISTRIBUTED,
        "hidden_from": "the server, and as many sites with it as may collude; from all other sites together a site's own share "
        "hides, and its ledger has that epsilon too",
        "noise_multiplier": shared.noise,
        "sample_rate": shared.sample_rate,
        "noise_share": shared.shares.share,
        "least_sites": shared.least,
        "colluding": shared.colluding,
        "noise_over_central": surplus(shared, sites),
    }


@dataclass(frozen=True)
class StepSum:
    """The sum of one round, and the step from it.

    Attributes:
        names: tensors that are trained.
        clip: C. rate: learning rate of the round. decay: weight decay.
        cases: largest number of labelled cases of a site.
        width: bytes of an entry.
    """

    shared: SharedSteps
    names: frozenset[str]
    clip: float
    rate: float
    decay: float
    cases: int
    width: int

    def layout(self, part: Weights, sites: int) -> Layout:
        """Fields of the sum; an entry is at most one clip a patient.

        Raises:
            PrivacyError: these do not fit together.
        """
        room = self.cases + REACH * self.shared.shares.share
        fields = [Field(NOISY + name, part[name].shape, room, weighted=False) for name in sorted(self.names)]
        fields.append(Field(PATIENTS, (), self.cases, weighted=False, integer=True))
        return Layout(tuple(fields), sites, 1, self.width)

    def mean(self, total: Sum, part: Weights) -> MeanUpdate:
        """Weights after the step w <- w - lr (C S / (q N) + decay w)."""
        patients = float(total.values[PATIENTS])
        if patients < 1:
            raise FederationError("The sites of a private step say that they have no patient.")
        scale = self.clip / (self.shared.sample_rate * patients)
        weights: Weights = {}
        for name in sorted(self.names):
            former = part[name].astype(np.float64)
            gradient = scale * total.values[NOISY + name] + self.decay * former
            weights[name] = as_dtype(former - self.rate * gradient, part[name].dtype)
        return MeanUpdate(weights, {}, total.weight, total.clipped)


def step_sum_of(
    config: RunOptions,
    shared: SharedSteps,
    facts: Mapping[str, Mapping[str, Any]],
    names: frozenset[str],
    number: int,
) -> StepSum:
    """The sum of round `number`, from 0."""
    from nnunet_fedharm.trainers.clipped_sum import WEIGHT_DECAY, learning_rate

    return StepSum(
        shared=shared,
        names=names,
        clip=config.clip,
        rate=learning_rate(config.schedule, number),
        decay=WEIGHT_DECAY,
        cases=max(fact["n_labelled"] for fact in facts.values()),
        width=config.secure_bytes,
    )


def step_offer(key: str, question: str, values: Mapping[str, Any], shared: SharedSteps, found: ClippedSum) -> Offer:
    """What a site adds to the sum.

    Args:
        key: of the sum. question: digest of the request.
        values: of the request.
        found: the site's part, without noise.
    """
    from nnunet_fedharm.trainers.private_sampling import SEGMENTER

    arrays = {NOISY + name: value for name, value in found.sums.items()}
    release = shared.release(SEGMENTER, steps=1, run_id=values["run_id"])
    return Offer(
        key,
        {**arrays, PATIENTS: np.array(float(found.patients))},
        {ONE: 1},
        release,
        question,
        None,
        shared.shares,
        values["run_id"],
    )
