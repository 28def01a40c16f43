"""Seeds derived from (run seed, site, round, purpose): a repeated or resumed round draws the same numbers.

Under differential privacy the patches and their augmentation are drawn from a seed of the operating system instead: all patients
share one stream, so for whoever knows it one patient more or less would change what every later patient contributes.
"""

from __future__ import annotations

import hashlib
import random
import secrets

import numpy as np
import torch


def derive_seed(run_seed: int, *names: str) -> int:
    """A 63-bit seed; different names give independent streams (SHA-256)."""
    text = "/".join([str(run_seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def patch_seed(run_seed: int | None, *, private: bool) -> int:
    """Seed of the streams that patches and augmentation are drawn from: the run's, or under differential privacy a secret one."""
    return secrets.randbits(63) if private else run_seed or 0


def torch_generator(run_seed: int, *names: str) -> torch.Generator:
    """A CPU generator seeded with `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(run_seed, *names))


def seed_everything(run_seed: int, *names: str) -> None:
    """Seed the global generators that nnU-Net's augmentation draws from."""
    seed = derive_seed(run_seed, *names)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
