"""A small convolutional network that tells the site from slices: what features may have missed.

Three strided convolutions, a mean over the slice and a linear layer (about six thousand weights). The mean and the spread of
the training slices are the only normalization: no layer takes a slice's own contrast away, since that is what sites differ in.

References:
    Kingma, Ba, "Adam: A method for stochastic optimization", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.cross_validation import Codes, Predict
from nnunet_fedharm.differences.findings import ClassifierFinding
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import Panel
from nnunet_fedharm.differences.site_classifier import classify
from nnunet_fedharm.errors import DataError, ShapeError

Slices = npt.NDArray[np.floating[Any]]

METHOD = "CNN on slices"
SMALLEST = 12
"""Voxels of a slice's shorter side, below which three strided convolutions leave nothing to average."""
_FOLDS = 3
_CHANNELS = (8, 16, 32)
_BATCH = 16
_RATE = 0.01


@dataclass(frozen=True)
class SliceSet:
    """Slices of one channel.

    Attributes:
        panel: a row per slice; `cases` may repeat, and there are no features.
        images: (n, H, W) finite, already cropped and resampled to one size.
    """

    panel: Panel
    images: Slices


def slice_set(panel: Panel, slices: Mapping[tuple[str, str], Slices], channel: str) -> SliceSet | None:
    """The slices of a panel's cases; None where no case has any.

    Args:
        panel: cases, patients and sites.
        slices: (case, channel) -> (s, H, W), or (H, W) for one.
        channel: which channel.

    Raises:
        ShapeError: slices of different sizes, or no slices at all by their shape.
        DataError: an intensity is not finite.
    """
    rows: list[int] = []
    images: list[npt.NDArray[np.float32]] = []
    for index, case in enumerate(panel.cases):
        own = slices.get((case, channel))
        if own is None:
            continue
        stack = np.asarray(own, dtype=np.float32)
        stack = stack[None] if stack.ndim == 2 else stack
        if stack.ndim != 3 or min(stack.shape[1:]) < SMALLEST or (images and stack.shape[1:] != images[0].shape[1:]):
            raise ShapeError(
                f"Slices need one size (s, H, W) of at least {SMALLEST} x {SMALLEST}, got {stack.shape} in {channel}."
            )
        if not np.isfinite(stack).all():
            raise DataError(f"Slices in {channel} hold values that are not finite. Leave these cases out.")
        rows += [index] * len(stack)
        images.append(stack)
    if not images:
        return None
    chosen = np.array(rows, dtype=np.intp)
    sites = np.unique(panel.codes[chosen])
    own_panel = Panel(
        tuple(panel.sites[code] for code in sites),
        np.searchsorted(sites, panel.codes[chosen]),
        tuple(panel.cases[row] for row in chosen),
        tuple(panel.patients[row] for row in chosen),
        (),
        np.zeros((len(chosen), 0)),
    )
    return SliceSet(own_panel, np.concatenate(images))


def slice_finding(
    slices: SliceSet, options: StatisticsOptions, *, purpose: str, tick: Callable[[], object] = lambda: None
) -> ClassifierFinding:
    """Cross-validated accuracy in three folds of patients, against `options.slice_permutations` permutations.

    Args:
        slices: of sites with three patients or more each.
        options: seed, epochs, permutations.
        purpose: of the random draws.
        tick: called after each cross-validation.
    """
    seed = int(options.generator(purpose, "weights").integers(2**31))
    return classify(
        network(slices.images, classes=len(slices.panel.sites), epochs=options.slice_epochs, seed=seed),
        slices.panel,
        method=METHOD,
        permutations=options.slice_permutations,
        options=replace(options, folds=_FOLDS),
        purpose=purpose,
        tick=tick,
    )


def network(images: Slices, *, classes: int, epochs: int, seed: int) -> Predict:
    """Classifier of rows of (n, H, W) images, on the CPU; the same seed gives the same predictions."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))[:, None]

    def predict(train: Codes, sites: Codes, test: Codes) -> Codes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, spread = pixels[train].mean(), pixels[train].std().clamp_min(1e-6)
            scaled = ((pixels - mean) / spread).clamp(-6, 6)
            model = _train(scaled[train], torch.from_numpy(np.asarray(sites, dtype=np.int64)), classes, epochs)
            with torch.no_grad():
                predicted: Codes = model(scaled[test]).argmax(1).numpy().astype(np.intp)
        return predicted

    return predict


def _train(images: Any, sites: Any, classes: int, epochs: int) -> Any:
    """Network trained with Adam at a falling rate; every site has the same say."""
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    for before, after in zip((1, *_CHANNELS), _CHANNELS, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_CHANNELS[-1], classes))
    counts = torch.bincount(sites, minlength=classes).float()
    loss = nn.CrossEntropyLoss(weight=torch.where(counts > 0, len(sites) / counts.clamp_min(1), 0.0))
    steps = epochs * -(-len(images) // _BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=max(steps, 2))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            loss(model(images[batch]), sites[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
