"""What a finished harmonizer phase of a federation has against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.harmonizers import doubt
from nnunet_fedharm.planning.section import read_section

POLARITY = "harmonizer.bank_polarity"


def doubt_of(config: FederateConfig, plans: Mapping[str, Any], loss: float | None, weights: Weights) -> str:
    """A sentence, or nothing.

    Args:
        loss: of the last round; None where it is not known, as under differential privacy.
        weights: after it.
    """
    votes: dict[str, float] = {}
    if POLARITY in weights:
        sites = read_section(plans["configurations"][config.configuration]).styles
        votes = {site: float(row.min()) for site, row in zip(sites, weights[POLARITY], strict=True)}
    return doubt(config.harmonizer, {"loss": math.nan if loss is None else loss}, votes)
