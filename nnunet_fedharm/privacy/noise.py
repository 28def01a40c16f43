"""Normal numbers from a cryptographic stream: an attacker who sees some of the noise cannot compute the rest.

Bits are ChaCha20's under a key of the operating system, made into normal numbers by the Box-Muller transform in double
precision. The four-fold mean follows Holohan and Braghin: a single sample's floating-point pattern can betray the value that it
hides, and a sum of four makes that search infeasible. The noise is added in double precision and the sum rounded once, to a grid
that does not depend on the value: float32 noise on a double (or on a sum of float32 numbers) leaves digits that only the true
value explains.

References:
    Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012.
    Box, Muller, "A Note on the Generation of Random Normal Deviates", Annals of Mathematical Statistics 1958.
    Holohan, Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021.
"""

from __future__ import annotations

import math
import secrets
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

PARTS = 4
"""Independent normal numbers behind each one that is handed out."""
GRID = 1024
"""Steps of the grid in one standard deviation, at least; what is rounded there is below a thousandth of the noise."""
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
        """Float64 tensor of that shape on that device."""
        return torch.from_numpy(self.wide(int(np.prod(shape, dtype=np.int64)))).reshape(shape).to(device)

    def wide(self, count: int) -> npt.NDArray[np.float64]:
        """So many numbers."""
        values = np.empty(count)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            values[start:stop] = self._normal(stop - start)
        return values

    def hide(self, values: npt.NDArray[Any], sigma: float) -> npt.NDArray[np.float64]:
        """Values of any shape with noise of standard deviation `sigma`, on the grid; unchanged where sigma is 0."""
        if not sigma:
            return np.asarray(values, dtype=np.float64)
        step = grid_of(sigma)
        noisy = np.asarray(values, dtype=np.float64) + sigma * self.wide(values.size).reshape(values.shape)
        return np.asarray(np.round(noisy / step) * step)

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


class NoiseSource(Protocol):
    """Standard normal numbers of a shape, on a device."""

    def __call__(self, shape: torch.Size, device: torch.device) -> Tensor: ...


def grid_of(sigma: float) -> float:
    """Step of the grid for noise of that standard deviation: a power of two, so that rounding to it is exact."""
    return float(2.0 ** math.floor(math.log2(sigma / GRID)))


def hide(values: Tensor, noise: NoiseSource, sigma: float) -> Tensor:
    """Values with noise of standard deviation `sigma`, summed in double precision and rounded once, to the grid.

    Returns:
        Same shape, dtype and device.
    """
    # Apple's GPUs have no double precision.
    device = torch.device("cpu") if values.device.type == "mps" else values.device
    step = grid_of(sigma)
    noisy = values.to(device, torch.float64) + sigma * noise(values.shape, device)
    return (torch.round(noisy / step) * step).to(values)
