"""What the arms of a study took: time, traffic, energy and epsilon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_fedharm.study.findings import CostFinding
from nnunet_fedharm.study.matrix import Arm
from nnunet_fedharm.study.results import StudyResults


def cost_of(results: StudyResults, arm: Arm) -> CostFinding:
    """Means over the finished trainings of an arm."""
    costs = [cell.cost for cell in results.by_arm[arm]]
    spent = [cost.epsilon for cost in costs if cost.epsilon is not None]
    deltas = [cost.delta for cost in costs if cost.delta is not None]
    return CostFinding(
        arm=arm.name,
        train_s=float(np.mean([cost.train_s for cost in costs])),
        predict_s=float(np.mean([cost.predict_s for cost in costs])),
        bytes_up=round(float(np.mean([cost.bytes_up for cost in costs]))),
        bytes_down=round(float(np.mean([cost.bytes_down for cost in costs]))),
        epsilon=max(spent, default=None),
        delta=max(deltas, default=None),
        without_noise=tuple(dict.fromkeys(name for cost in costs for name in cost.without_noise)),
        devices=tuple(dict.fromkeys(cost.device for cost in costs)),
        energy_j=_mean_of_known([cost.energy_j for cost in costs]),
        shared_s=_mean_of_known([cost.shared_s for cost in costs]),
        adapt_s=_mean_of_known([cost.adapt_s for cost in costs]),
        counters=tuple(dict.fromkeys(name for cost in costs for name in cost.counters)),
    )


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
