"""What stands before an arm's segmenter in `private_dice.py`: noisy styles, and `polarity`'s judge and votes in the same budget.

`private_dice.py` goes on with the segmenter, `private_features.py` looks at what is harmonized after this part: there is one way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hippocampus_sites import NAME
from learned_training import SITES, Weights
from private_bench import CONFIGURATION, DELTA, LR_FACTOR, RECIPES, Arm, PrivateBench, Recipe, schedule

from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.section import reads_styles
from nnunet_fedharm.planning.style import site_style
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.shared_steps import HarmonizerSteps, SharedSteps, shared_steps
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights

ROUNDS = 3
"""Of FedAvg, of two local epochs each; with shared noise every step is a round."""
COLLUDING = 1
"""The product's own."""
STYLE_NOISE = 5.0
"""The product's own."""


@dataclass(frozen=True)
class Prepared:
    """An arm when its segmenter's turn comes.

    Attributes:
        plans: of the private training.
        public: the same without privacy, as predictions read them.
        roots: place -> its root with the ledger of its training; centrally one place, whose ledger lacks the styles, though the
        noise of the training leaves room for them.
        trainings: place -> its training.
        shared: the noise of all sites, where they have one.
        weights: the start behind the harmonizer, gate open.
    """

    plans: Any
    public: Any
    roots: dict[str, NnunetRoot]
    trainings: dict[str, LocalTraining]
    weights: Weights
    shared: SharedSteps | None


def prepared(own: PrivateBench, arm: Arm, *, style_noise: float = STYLE_NOISE) -> Prepared:
    """Roots, plans and weights of an arm, after the harmonizer's phase where its recipe has one.

    Args:
        own: folders and plans.
        arm: of `RECIPES`.
        style_noise: noise multiplier of a site's style; 0 tells it as it is.
    """
    recipe = RECIPES[arm.recipe]
    sites = own.world(arm.name, {site: own.bench.own_root(site) for site in recipe.private})
    privacy = PrivacyOptions(
        epsilon=arm.epsilon, delta=DELTA, clip=recipe.clip, patches_per_patient=recipe.patches, style_noise=style_noise,
        # Shared noise counts the patients of all sites, as one place does.
        patients_per_step=recipe.patients / (len(sites) if arm.mode == "federated" else 1),
        fingerprint_noise=0.0 if arm.mode == "central" else -1.0,
    )  # fmt: skip
    planned = schedule(
        recipe.steps, recipe.steps if arm.mode == "shared" else 2 * ROUNDS, recipe.lr * LR_FACTOR.get(arm.epsilon, 1.0),
        recipe.momentum, trained_groups=recipe.groups, harmonizer_lr=recipe.judge_lr,
        harmonizer_epochs=judge_epochs(recipe, arm.mode) or int(recipe.kind == "polarity"),
    )  # fmt: skip
    styles = private_styles(own, sites, privacy) if recipe.kind == "polarity" else {}
    plans = own.plans(recipe.kind, planned, privacy, styles, recipe.judge)
    start, trainer = own.start(recipe.start), trainer_name_for(recipe.kind)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, trainer, arm.seed, start)
    if recipe.kind == "polarity" and not recipe.judge_steps:
        weights = vote(own, plans, arm, sites, weights)
    pooled = arm.mode == "central"
    roots = own.world(arm.name, {"pooled": own.pooled(recipe.private)}) if pooled else sites
    trainings = {
        place: own.training(plans, root, recipe.kind, place, f"{arm.name}-{place}", arm.seed)
        for place, root in roots.items()
    }
    shared = one_noise(own, recipe, privacy, list(sites)) if arm.mode == "shared" else None
    if recipe.judge_steps:
        weights = judged(own, plans, arm, Places(roots, trainings, shared), weights)
    public = own.plans(recipe.kind, planned, None, styles, recipe.judge)
    return Prepared(plans, public, roots, trainings, weights, shared)


def judge_epochs(recipe: Recipe, mode: str) -> int:
    """Epochs of the judge's private training; a quarter of them where four times as many patients are in a step."""
    steps = recipe.judge_steps // (1 if mode == "federated" else 4)
    return steps // (1 if mode == "shared" else recipe.steps // (2 * ROUNDS))


def cases_of(own: PrivateBench, site: str) -> int:
    """Labelled cases, which are as many patients."""
    return len(list((own.bench.own_root(site).raw / NAME / "labelsTr").glob("*.nii.gz")))


def one_noise(own: PrivateBench, recipe: Recipe, options: PrivacyOptions, sites: list[str]) -> SharedSteps:
    """Of all sites together, as `--patient-noise distributed` plans it."""
    steps = judge_epochs(recipe, "shared")
    return shared_steps(
        options,
        styled=reads_styles(recipe.kind),
        patients=sum(cases_of(own, site) for site in sites),
        rounds=recipe.steps,
        least=len(sites),
        colluding=COLLUDING,
        harmonizer=HarmonizerSteps(patients=cases_of(own, "A"), steps=steps, voted=True) if steps else None,
    )


def private_styles(own: PrivateBench, places: Mapping[str, NnunetRoot], privacy: PrivacyOptions) -> dict[str, Style]:
    """Styles of the private sites with noise; those of the plans for the others."""
    plans, noise = own.bench.plans("3d"), privacy.style_noise
    return {site: site_style(root, NAME, plans, CONFIGURATION, noise_multiplier=noise) for site, root in places.items()}


@dataclass(frozen=True)
class Places:
    """Where the harmonizer's phase runs, as `Prepared` has it."""

    roots: Mapping[str, NnunetRoot]
    trainings: Mapping[str, LocalTraining]
    shared: SharedSteps | None


def judged(own: PrivateBench, plans: Any, arm: Arm, places: Places, weights: Weights) -> Weights:
    """With the judge that A's private patients taught, and the other sites' votes."""
    teacher = next(iter(places.trainings.values()))  # A, or the place that has all
    epochs = judge_epochs(RECIPES[arm.recipe], arm.mode)
    reply = teacher.run(
        phase="harmonizer", round_index=0, first_epoch=0, epochs=epochs, weights=weights, shared=places.shared
    )
    if len(places.roots) == 1:
        return opened(reply.weights)  # its last epoch has the votes of all
    others = {site: root for site, root in places.roots.items() if site != "A"}
    return vote(own, plans, arm, others, reply.weights, places.shared)


def vote(
    own: PrivateBench,
    plans: Any,
    arm: Arm,
    places: Mapping[str, NnunetRoot],
    weights: Weights,
    shared: SharedSteps | None = None,
) -> Weights:
    """Each private site's own vote on its polarity, with noise, by the judge that the weights hold."""
    polarity = weights["harmonizer.bank_polarity"].copy()
    for site, root in places.items():
        training = own.training(plans, root, "polarity", site, f"{arm.name}-vote-{site}", arm.seed)
        last = training.section.schedule.harmonizer_epochs - 1
        reply = training.run(
            phase="harmonizer", round_index=0, first_epoch=last, epochs=1, weights=weights, shared=shared
        )
        voted = reply.weights
        row = SITES.index(site)
        polarity[row] = voted["harmonizer.bank_polarity"][row]
    return opened({**weights, "harmonizer.bank_polarity": polarity})


def opened(weights: Weights) -> Weights:
    """With the gate of the harmonizer's phase open, as the server opens it when the phase is over."""
    return {**weights, "harmonizer.gate": np.ones_like(weights["harmonizer.gate"])}


def votes_of(weights: Weights) -> dict[str, float]:
    """What the harmonizer holds of each site's contrast: 1 as at A, -1 its inverse; nothing without one."""
    rows = weights.get("harmonizer.bank_polarity")
    return {} if rows is None else {f"vote_{site}": float(rows[i, 0]) for i, site in enumerate(SITES)}
