"""Weights as they travel and are averaged: each tensor once, under one name, without pickle.

nnU-Net's state dicts hold a tensor under several keys (`encoder.…`, `decoder.encoder.…`), and a compiled network prefixes
them with `_orig_mod.`; averaging, clipping or counting bytes on that would be wrong by the number of aliases.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_fedharm.errors import CheckpointError, ShapeError
from nnunet_fedharm.harmonizers import SITE_LOCAL

Weights = dict[str, npt.NDArray[np.generic]]


def bare_module(module: nn.Module) -> nn.Module:
    """The network inside DDP and torch.compile wrappers."""
    if isinstance(module, DistributedDataParallel):
        module = module.module
    inner = getattr(module, "_orig_mod", module) if isinstance(module, OptimizedModule) else module
    return inner if isinstance(inner, nn.Module) else module


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every shared tensor of the state dict once, under its first name in sorted order; site-local buffers left out."""
    seen: dict[tuple[int, torch.Size, int], str] = {}
    unique: dict[str, Tensor] = {}
    for name, tensor in sorted(bare_module(module).state_dict(keep_vars=True).items()):
        if name.rsplit(".", 1)[-1] in SITE_LOCAL:
            continue
        # An empty tensor has no storage to compare; its name is its identity.
        key = (tensor.data_ptr(), tensor.shape, tensor.numel())
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        unique[name] = tensor
    return unique


def export_weights(module: nn.Module) -> Weights:
    """Copies of the unique tensors as numpy arrays, sorted by name."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in unique_tensors(module).items()}


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write weights into a network of the same architecture; all or nothing.

    Raises:
        CheckpointError: names are missing or unknown, or a value is NaN or infinite.
        ShapeError: a tensor has another shape.
    """
    own = unique_tensors(module)
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or unknown:
        what = f"lack {missing[0]!r}" if missing else f"have the unknown tensor {unknown[0]!r}"
        raise CheckpointError(
            f"The weights {what} ({len(missing)} missing, {len(unknown)} unknown). "
            "They belong to another architecture or harmonizer; check that all sites use the same plans."
        )
    for name, tensor in own.items():
        value = weights[name]
        if tuple(value.shape) != tuple(tensor.shape):
            raise ShapeError(
                f"The weights hold {name!r} as {tuple(value.shape)}, the network needs {tuple(tensor.shape)}."
            )
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise CheckpointError(f"The weights hold NaN or infinity in {name!r}; they were not loaded.")
    for name, tensor in own.items():
        tensor.copy_(
            torch.from_numpy(np.ascontiguousarray(weights[name]).reshape(weights[name].shape)).to(tensor.dtype)
        )
