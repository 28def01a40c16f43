"""The arm `shared` of `private_dice.py`: one noise for all sites, one step a round (`--patient-noise distributed`).

Everything is the product's own: noise and sample rate (`shared_steps`), each site's clipped sum, offer, share of the noise and
entry in its ledger, the integers of the sum, the server's step and momentum. The masks alone are left out: they cancel in the sum
to the last bit (tests/privacy/test_secure_aggregation.py), so the model would be the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from learned_training import Weights
from private_bench import CONFIGURATION, DELTA, RECIPES, Arm, PrivateBench
from private_polarity import Prepared, cases_of, votes_of

from nnunet_fedharm.federation.secure.patient_noise import StepSum, step_offer
from nnunet_fedharm.federation.server_steps import momentum_step
from nnunet_fedharm.privacy.fixed_point import Share
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.trainers.clipped_sum import WEIGHT_DECAY, clipped_sum, learning_rate
from nnunet_fedharm.trainers.groups import trained_names
from nnunet_fedharm.trainers.names import trainer_name_for

WIDTH = 5
"""Bytes of an entry; the product's own."""


def train_shared(own: PrivateBench, arm: Arm, ready: Prepared) -> tuple[Weights, dict[str, Any]]:
    """DP-FedSGD: as many rounds as the recipe has steps, momentum at the server."""
    recipe, trainer = RECIPES[arm.recipe], trainer_name_for(RECIPES[arm.recipe].kind)
    sites, weights = ready.trainings, ready.weights
    section = next(iter(sites.values())).section
    options = section.privacy
    assert options is not None
    cases, shared = {site: cases_of(own, site) for site in sites}, ready.shared
    assert shared is not None
    with next(iter(ready.roots.values())).activate():
        names = trained_names(ready.plans, own.bench.description(), CONFIGURATION, trainer)
    velocity: Weights = {}
    for number in range(recipe.steps):
        step = StepSum(
            shared=shared, names=names, clip=options.clip, rate=learning_rate(section.schedule, number),
            decay=WEIGHT_DECAY, cases=max(cases.values()), width=WIDTH,
        )  # fmt: skip
        former = {name: weights[name] for name in sorted(names)}
        layout = step.layout(former, len(sites))
        total = np.zeros(layout.size, dtype=np.uint64)
        for site, training in sites.items():
            found = clipped_sum(training, weights, shared, round_index=number)
            assert found.patients == cases[site]
            offer = step_offer("", "", {"run_id": f"{arm.name}-{site}"}, shared, found)
            for field in layout.fields:
                if field.name in offer.noisy:
                    shared.shares.check_grid(offer.entries, len(sites), layout.step(field))
            share = Share(frozenset(offer.noisy), shared.shares.share, SecureNoise().wide)
            assert offer.release is not None
            Ledger(ready.roots[site].path / "fedharm").record(offer.release)
            total += layout.encode(offer.arrays, 1, share)
        mean = step.mean(layout.decode(total), former)
        assert not mean.clipped
        moved, velocity = momentum_step(former, mean.weights, velocity, lr=1.0, momentum=recipe.momentum)
        weights = {**weights, **moved}
    alone = max(Ledger(root.path / "fedharm").spent(DELTA).alone for root in ready.roots.values())
    spent = max(Ledger(root.path / "fedharm").spent(DELTA).epsilon for root in ready.roots.values())
    return weights, {
        "epsilon_spent": spent,
        "epsilon_alone": alone,
        "noise_multiplier": shared.noise,
        **votes_of(weights),
    }
