"""Gradient inversion: can the receiver of one update draw the patch that it was made from?

    x* = argmin over x of 1 - cos(gradient at (x, y), update) + lambda TV(x)

by Adam on the input with the sign of its gradient, from almost nothing. The attacker knows weights, optimizer, plans, and - a
strong assumption - the labels y of the patch; of the site's images it knows nothing. The update is the trainer's own: one
optimizer step, several of them on other patches too, or one private step in which the patient was drawn alone, so that noise
is all that hides it.

A patch of an organ looks like every other patch of it. So each reconstruction is compared with its own patch and with patches of
other cases, and counts as recognized only if its own is the nearest; with P patches that happens by luck in one of P.

References:
    Geiping et al., "Inverting Gradients - How Easy Is It to Break Privacy in Federated Learning?", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.audit.updates import (
    Gradients,
    KnownPatch,
    kinds_of_update,
    known_patches,
    patch_loss,
    trained_parameters,
)
from nnunet_fedharm.evaluation.fidelity import SSIM_WINDOW, foreground_mask, psnr, windowed_ssim, zscore_inside
from nnunet_fedharm.evaluation.structure import correlation
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

Image = npt.NDArray[np.float32]

START = 0.01
"""Standard deviation of the noise that the attack starts from; a loud start is never smoothed away."""


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """Of the attack."""

    targets: int = 1
    """Patches that are attacked, each of another case."""
    others: int = 11
    """Patches of further cases that each reconstruction is compared with, at most."""
    iterations: int = 1000
    """Of the attack on one update."""
    restarts: int = 1
    """Attacks on each update; the attacker keeps the one that fits the update best."""
    local_steps: int = 4
    """Steps of the update of several local steps; 1 leaves it out."""
    smoothness: float = 0.05
    """Weight of the total variation."""
    rate: float = 0.1
    """Adam's learning rate."""
    patch_size: tuple[int, ...] | None = None
    """Size of the attacked patches; smaller ones are easier. Default: the plans'."""
    seed: int = 0
    """Of patches and starts."""

    def __post_init__(self) -> None:
        for name in ("targets", "others", "iterations", "restarts", "local_steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One update's.

    Attributes:
        update: what was attacked, in words.
        image: (C, *patch).
        fit: 1 - cosine that the attack ended with; what the attacker sees.
        correlation, psnr_db, ssim: with the true patch; the last two after both were z-scored. SSIM is None of tiny patches.
        nearest_other: largest correlation with another case's patch.
        recognized: the true patch is the nearest.
    """

    update: str
    image: Image
    fit: float
    correlation: float
    psnr_db: float
    ssim: float | None
    nearest_other: float
    recognized: bool

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "image"}


@dataclass(frozen=True, eq=False)
class Target:
    """One attacked patch.

    Attributes:
        truth: (C, *patch).
        likeness: largest correlation of another case's patch with it: what one gets without any update.
        reconstructions: one per update.
    """

    truth: Image
    likeness: float
    reconstructions: tuple[Reconstruction, ...]


@dataclass(frozen=True, eq=False)
class InversionAudit:
    """All targets; `patches` in the comparison, their size, and what differential privacy was asked for."""

    targets: tuple[Target, ...]
    patches: int
    patch_size: tuple[int, ...]
    epsilon: float | None
    noise_multiplier: float | None
    options: InversionOptions

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without images."""
        return {
            "patches_compared": self.patches,
            "patch_size": list(self.patch_size),
            "epsilon_of_the_training": self.epsilon,
            "noise_multiplier": self.noise_multiplier,
            "labels_known_to_the_attacker": True,
            "options": asdict(self.options),
            "targets": [
                {"likeness_of_another_patch": t.likeness, "updates": [r.to_dict() for r in t.reconstructions]}
                for t in self.targets
            ],
        }

    def by_update(self) -> dict[str, list[Reconstruction]]:
        """Reconstructions of each kind of update, over the targets."""
        found: dict[str, list[Reconstruction]] = {}
        for target in self.targets:
            for reconstruction in target.reconstructions:
                found.setdefault(reconstruction.update, []).append(reconstruction)
        return found


def invert_updates(
    trainer: nnUNetTrainerFedHarm, options: InversionOptions, *, progress: bool = False
) -> InversionAudit:
    """Attack updates of this trainer; its private ones too if it has differential privacy.

    Args:
        trainer: ready for `train_step`; its weights are as before afterwards.
        options: of the attack.
        progress: show bars.

    Raises:
        DataError: fewer than two cases.
        PlanError: a patch that the network cannot take.
    """
    patches = known_patches(trainer, count=options.targets + options.others, size=options.patch_size, seed=options.seed)
    updates = kinds_of_update(trainer, options.local_steps)
    targets = []
    for number in range(min(options.targets, len(patches) - 1)):
        own = [patches[number], *(patch for index, patch in enumerate(patches) if index != number)]
        found = []
        for name, make in updates.items():
            image, fit = _invert(trainer, own[0], make(own), options, name if progress else None)
            found.append(_compare(name, image, fit, own))
        truth = own[0].image[0].cpu().numpy()
        likeness = max(_alike(truth, other.image[0].cpu().numpy()) for other in own[1:])
        targets.append(Target(truth, likeness, tuple(found)))
    private = trainer.private
    return InversionAudit(
        targets=tuple(targets),
        patches=len(patches),
        patch_size=tuple(patches[0].image.shape[2:]),
        epsilon=None if private is None else private.options.epsilon,
        noise_multiplier=None if private is None else private.noise_multiplier,
        options=options,
    )


def _invert(
    trainer: nnUNetTrainerFedHarm, patch: KnownPatch, update: Gradients, options: InversionOptions, bar: str | None
) -> tuple[Image, float]:
    """The reconstruction that fits best, and how well."""
    best: tuple[float, Image] | None = None
    norm = torch.stack([u.norm() for u in update if u is not None]).norm()
    for restart in range(options.restarts):
        generator = torch.Generator().manual_seed(options.seed + restart)
        image = (START * torch.randn(patch.image.shape, generator=generator)).to(trainer.device).requires_grad_(True)
        adam = torch.optim.Adam([image], lr=options.rate)
        falls = [int(options.iterations * part) for part in (3 / 8, 5 / 8, 7 / 8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, falls, gamma=0.1)
        fit = 1.0
        for _ in tqdm(range(options.iterations), desc=bar or "", unit="it", disable=bar is None):
            adam.zero_grad()
            gradients = torch.autograd.grad(
                patch_loss(trainer, image, patch), trained_parameters(trainer), create_graph=True, allow_unused=True
            )
            distance = _distance(gradients, update, norm)
            (distance + options.smoothness * _variation(image)).backward()
            assert image.grad is not None
            image.grad.sign_()
            adam.step()
            schedule.step()
            fit = float(distance.detach())
        if best is None or fit < best[0]:
            best = (fit, image.detach()[0].cpu().numpy())
    assert best is not None
    return best[1], best[0]


def _distance(gradients: Sequence[Tensor | None], update: Gradients, norm: Tensor) -> Tensor:
    pairs = [(g, u) for g, u in zip(gradients, update, strict=True) if g is not None and u is not None]
    product = torch.stack([(g * u).sum() for g, u in pairs]).sum()
    length = torch.stack([g.square().sum() for g, _ in pairs]).sum().sqrt()
    return 1 - product / (length * norm + 1e-12)


def _variation(image: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, summed over the axes."""
    return torch.stack([image.diff(dim=axis).abs().mean() for axis in range(2, image.ndim)]).sum()


def _compare(name: str, image: Image, fit: float, own: Sequence[KnownPatch]) -> Reconstruction:
    truth, *others = (patch.image[0].cpu().numpy() for patch in own)
    mask = np.stack([foreground_mask(channel) for channel in truth])
    mask = mask if mask.any() else np.ones_like(mask)
    z_truth, z_image = zscore_inside(truth, mask), zscore_inside(image, mask)
    alike, nearest = _alike(truth, image), max(_alike(other, image) for other in others)
    large = min(truth.shape[1:]) >= SSIM_WINDOW and truth.shape[0] == 1
    return Reconstruction(
        update=name,
        image=image,
        fit=fit,
        correlation=alike,
        psnr_db=psnr(z_truth, z_image, mask),
        ssim=windowed_ssim(z_truth[0], z_image[0], mask[0]) if large else None,
        nearest_other=nearest,
        recognized=bool(alike > nearest),
    )


def _alike(first: Image, second: Image) -> float:
    return correlation(first.ravel(), second.ravel())
