"""The device that a command was asked to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_fedharm.errors import SetupError

if TYPE_CHECKING:
    import torch


def torch_device(name: str) -> torch.device:
    """The device, after a look whether it is there.

    Raises:
        SetupError: unknown name, or no such device.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SetupError(f"Unknown device {name!r}. Use --device cpu, cuda, cuda:1 or mps.") from error
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise SetupError(f"There is no device {name!r} here. Use --device cpu.")
    return device
