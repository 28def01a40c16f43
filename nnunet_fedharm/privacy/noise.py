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
        """Float64 tensor of that shape on that device, which does all of the work but the cipher's."""
        return self._numbers(int(np.prod(shape, dtype=np.int64)), device).reshape(shape)

    def wide(self, count: int) -> npt.NDArray[np.float64]:
        """So many numbers."""
        numbers: npt.NDArray[np.float64] = self._numbers(count, torch.device("cpu")).numpy()
        return numbers

    def _numbers(self, count: int, device: torch.device) -> Tensor:
        values = torch.empty(count, dtype=torch.float64, device=device)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            values[start:stop] = self._normal(stop - start, device)
        return values

    def hide(self, values: npt.NDArray[Any], sigma: float) -> npt.NDArray[np.float64]:
        """Values of any shape with noise of standard deviation `sigma`, on the grid; unchanged where sigma is 0."""
        if not sigma:
            return np.asarray(values, dtype=np.float64)
        step = grid_of(sigma)
        noisy = np.asarray(values, dtype=np.float64) + sigma * self.wide(values.size).reshape(values.shape)
        return np.asarray(np.round(noisy / step) * step)

    def _normal(self, count: int, device: torch.device) -> Tensor:
        pairs = -(-count * PARTS // 2)
        self._calls += 1
        # 16 bytes: the block counter (from zero), then a nonce that no other call of this key uses.
        start = bytes(8) + self._calls.to_bytes(8, "little")
        stream = bytearray(16 * pairs)
        Cipher(algorithms.ChaCha20(self._key, start), mode=None).encryptor().update_into(bytes(16 * pairs), stream)
        integers = torch.frombuffer(stream, dtype=torch.int64).to(device).reshape(2, pairs)
        # 53 bits (the shift keeps a sign), moved into (0, 1]: the logarithm of 0 does not exist.
        first, second = ((integers >> 11) & (2**53 - 1)).double().add_(1).mul_(2.0**-53)
        radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()])
        return normal[: count * PARTS].reshape(PARTS, count).sum(dim=0) / math.sqrt(PARTS)


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
