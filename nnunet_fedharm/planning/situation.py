"""What is known when defaults are chosen: data, planned segmenter, device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import AT_REFERENCE
from nnunet_fedharm.harmonizers.style import Style, average_styles
from nnunet_fedharm.planning.cost import (
    Convolution,
    CostRatio,
    cost_ratio,
    harmonizer_convolutions,
    segmenter_convolutions,
)
from nnunet_fedharm.planning.section import CONSENSUS

TWO_CLASSES = 2
"""Classes that the cost of the planned network is counted with: their number hardly matters."""


@dataclass(frozen=True)
class Device:
    """What a training will run on.

    Attributes:
        kind: "cuda" or "cpu".
        memory_gb: of the GPU; None on a CPU, or where the GPU is not in this machine.
        cores: CPU cores.
    """

    kind: str
    memory_gb: float | None = None
    cores: int = 1

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"CPU with {self.cores} cores"
        return f"GPU with {self.memory_gb:.0f} GB" if self.memory_gb else "GPU"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the rules look at.

    Attributes:
        kind: harmonizer.
        patch_size: of the planned network.
        batch_size: of the planned network.
        channels: of the images.
        segmenter: convolutions of the planned network.
        images: site -> training images, with and without labels.
        reference_sites: sites whose images are the reference's.
        device: what the training will run on.
        private: whether the training is under differential privacy.
        judge: of contrast, one of `harmonizers.judges.JUDGES`, where there is one.
    """

    kind: str
    patch_size: tuple[int, ...]
    batch_size: int
    channels: int
    segmenter: Sequence[Convolution]
    images: Mapping[str, int]
    reference_sites: tuple[str, ...]
    device: Device
    private: bool = False
    judge: str = "network"

    @property
    def learning_images(self) -> int:
        """Images that the harmonizer learns from: many kinds from the reference's alone."""
        sites = self.reference_sites if self.kind in AT_REFERENCE and self.reference_sites else tuple(self.images)
        return max(1, sum(self.images[site] for site in sites))

    def cost(self, sizes: Mapping[str, Any]) -> CostRatio:
        """Expected cost of the harmonizer with these options."""
        added = harmonizer_convolutions(self.kind, sizes, channels=self.channels, patch_size=self.patch_size)
        return cost_ratio(self.segmenter, added, batch_size=self.batch_size, cpu=self.device.kind == "cpu")


def find_device(name: str) -> Device:
    """The device `cpu`, `cuda` (here or, with unknown memory, where the training will run), or `auto`: a GPU if there is one.

    Raises:
        PlanError: another name.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if name not in ("auto", "cpu", "cuda"):
        raise PlanError(f"--device is {name!r}; choose auto, cpu or cuda.")
    if name != "cpu" and torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_properties(0).total_memory / 2**30, cores)
    return Device("cuda" if name == "cuda" else "cpu", None, cores)


def situation_of(
    configuration: Mapping[str, Any],
    *,
    kind: str,
    reference: str,
    styles: Mapping[str, Style],
    device: Device,
    private: bool = False,
) -> Situation:
    """Read the situation from a planned configuration and the style bank, which counts the sites' images."""
    channels = len(configuration["normalization_schemes"])
    return Situation(
        kind=kind,
        patch_size=tuple(int(size) for size in configuration["patch_size"]),
        batch_size=int(configuration["batch_size"]),
        channels=channels,
        segmenter=segmenter_convolutions(configuration, channels, TWO_CLASSES),
        images={site: style.n_cases for site, style in styles.items()},
        reference_sites=_reference_sites(reference, styles),
        device=device,
        private=private,
    )


def _reference_sites(reference: str, styles: Mapping[str, Style]) -> tuple[str, ...]:
    if reference != CONSENSUS or not styles:
        return (reference,) if reference in styles else ()
    centre = average_styles(list(styles.values())).quantiles
    return (min(styles, key=lambda site: float(np.abs(styles[site].quantiles - centre).mean())),)
