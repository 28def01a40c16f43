"""`privacy.json` beside checkpoints: what a place's patients have paid, by its own ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from nnunet_fedharm.sites.files import write_json


def write_privacy_card(folder: Path, ledger: Ledger, delta: float, facts: Mapping[str, Any]) -> None:
    """Write epsilon, delta and unit; see `privacy_card`.

    Args:
        folder: of the fold.
    """
    write_json(privacy_card(ledger, delta, facts), folder / PRIVACY_FILE)


def privacy_card(ledger: Ledger, delta: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Epsilon, delta and unit of what a place has released.

    Args:
        ledger: of the place.
        delta: at which epsilon is told.
        facts: of the training, told too.

    Raises:
        PrivacyError: the ledger is damaged.
    """
    cost = ledger.spent(delta)
    said: dict[str, Any] = {
        "unit": "patient",
        "epsilon": cost.epsilon,
        "delta": delta,
        "of": "all noisy releases of this place's ledger so far, this training among them",
        "without_noise": list(cost.unbounded),
        **facts,
    }
    if cost.alone > cost.epsilon:
        said["epsilon_alone"] = cost.alone
        said["epsilon_alone_means"] = (
            "if all other sites and the server work together; epsilon is by the run's trust model"
        )
    return said
