"""A site's votes on its polarity with noise: the mean of its patients' votes.

    told = clamp((sum_p v_p + N(0, (sigma sqrt(C))^2)) / N, -1, 1)        v_p in [-1, 1]^C

| symbol | here |
|---|---|
| v_p | `votes`, mean vote of patient p on each of C channels |
| sigma | `noise_multiplier`; one patient moves the sum by sqrt(C) at most |
| N | patients of the site, which is not kept secret |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunet_fedharm.privacy.noise import NoiseSource, hide


def private_votes(votes: Tensor, *, noise_multiplier: float, noise: NoiseSource) -> Tensor:
    """What a site tells of its votes, (C,), between -1 and 1.

    Args:
        votes: (N, C), a row a patient; what is no number counts for nothing, what is beyond -1 or 1 is cut.
        noise_multiplier: sigma; 0 adds nothing.
        noise: secure source of normal numbers.
    """
    patients, channels = votes.shape
    total = torch.nan_to_num(votes).clamp(-1, 1).sum(dim=0)
    if noise_multiplier > 0:
        total = hide(total, noise, noise_multiplier * math.sqrt(channels))
    return (total / patients).clamp(-1, 1)
