"""A harmonizer on whole volumes, in the patches that its segmenter sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nnunet_fedharm.harmonizers import Harmonizer

VOXELS_AT_ONCE = 2**20
"""Voxels of a channel that are harmonized at once, but always one patch."""


@torch.no_grad()
def harmonize_in_patches(
    harmonizer: Harmonizer, volume: Tensor, patch_size: Sequence[int], *, site: int | None = None
) -> Tensor:
    """H of a whole volume in patches of the planned size, as the segmenter sees them; 2d slice by slice.

    Args:
        volume: (C, D, H, W), z-scored, on the CPU.
        patch_size: (H, W) or (D, H, W).
        site: whose style in the bank; None: the one that the harmonizer has now.

    Returns:
        Same shape, on the CPU.
    """
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    padded, inside = pad_nd_image(volume, patch_size, "constant", {"value": 0}, True, None)
    changed = padded.clone()
    windows = list(_windows(tuple(padded.shape[1:]), tuple(patch_size)))
    at_once = max(1, VOXELS_AT_ONCE // math.prod(patch_size))
    for first in range(0, len(windows), at_once):
        chosen = windows[first : first + at_once]
        batch = torch.stack([padded[window] for window in chosen]).to(harmonizer.gate.device)
        if site is not None:
            harmonizer.set_batch_styles(torch.full((len(batch),), site))
        for window, patch in zip(chosen, harmonizer(batch).cpu(), strict=True):
            changed[window] = patch
    if site is not None:
        harmonizer.set_batch_styles(None)
    harmonized: Tensor = changed[(slice(None), *inside[1:])]
    return harmonized


def _windows(spatial: tuple[int, ...], patch_size: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """nnU-Net's windows, side by side; those at the far border overlap their neighbours."""
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    flat = len(patch_size) < len(spatial)
    corners = list(product(*compute_steps_for_sliding_window(spatial[-len(patch_size) :], patch_size, 1.0)))
    for slice_index in range(spatial[0]) if flat else [None]:
        lead = () if slice_index is None else (slice_index,)
        for corner in corners:
            yield (slice(None), *lead, *(slice(a, a + size) for a, size in zip(corner, patch_size, strict=True)))
