"""What report and cards say of sites that were held out of all training."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.study.data import ADAPT_VOLUMES

ADAPTED_WITH = f"on at most {ADAPT_VOLUMES} volumes without labels that are no test cases"


def left_out(sites: Sequence[str]) -> str:
    """ "E took part in no central or federated training and stands for a new hospital"."""
    stands = "stands for a new hospital" if len(sites) == 1 else "stand for new hospitals"
    return f"{joined(sites)} took part in no central or federated training and {stands}"
