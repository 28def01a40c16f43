"""Normal numbers from a cryptographic stream: an attacker who sees some of the noise cannot compute the rest.

Bits are ChaCha20's under a key of the operating system, made into normal numbers by the Box-Muller transform in double
precision. The four-fold mean follows Holohan and Braghin: a single sample's floating-point pattern can betray the value that it
hides, and a sum of four makes that search infeasible.

References:
    Box, Muller, "A Note on the Generation of Random Normal Deviates", Annals of Mathematical Statistics 1958.
    Holohan, Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

PARTS = 4
"""Independent normal numbers behind each one that is handed out."""
_BLOCK = 2**18
"""Normal numbers made at a time, so that memory stays small."""


class SecureNoise:
    """Standard normal numbers.

    Args:
        key: 32 secret bytes; None takes new ones from the operating system. Only tests give one.
    """

    def __init__(self, key: bytes | None = None) -> None:
        # ChaCha20 counts 2**32 blocks of 64 bytes under one nonce; a fresh nonce per call stays far away from that.
        self._key = secrets.token_bytes(32) if key is None else key
        self._calls = 0

    def __call__(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Float32 tensor of that shape on that device."""
        wanted = int(np.prod(shape, dtype=np.int64))
        values = np.empty(wanted, dtype=np.float32)
        for start in range(0, wanted, _BLOCK):
            stop = min(start + _BLOCK, wanted)
            values[start:stop] = self._normal(stop - start)
        return torch.from_numpy(values).reshape(shape).to(device)

    def wide(self, count: int) -> npt.NDArray[np.float64]:
        """The same numbers in double precision, where values finer than float32 have to be hidden to their last digit."""
        return np.concatenate(
            [self._normal(min(_BLOCK, count - start)) for start in range(0, count, _BLOCK)] or [np.empty(0)]
        )

    def _normal(self, count: int) -> npt.NDArray[np.float64]:
        pairs = -(-count * PARTS // 2)
        self._calls += 1
        # 16 bytes: the block counter (from zero), then a nonce that no other call of this key uses.
        start = bytes(8) + self._calls.to_bytes(8, "little")
        encryptor = Cipher(algorithms.ChaCha20(self._key, start), mode=None).encryptor()
        integers = np.frombuffer(encryptor.update(bytes(16 * pairs)), dtype=np.uint64).reshape(2, pairs)
        # 53 bits, shifted into (0, 1]: the logarithm of 0 does not exist.
        first, second = ((integers >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
        radius = np.sqrt(-2 * np.log(first))
        normal = np.concatenate([radius * np.cos(2 * math.pi * second), radius * np.sin(2 * math.pi * second)])
        parts: npt.NDArray[np.float64] = normal[: count * PARTS].reshape(PARTS, count).sum(axis=0) / math.sqrt(PARTS)
        return parts
