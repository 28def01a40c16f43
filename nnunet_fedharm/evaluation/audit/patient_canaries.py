"""One-run audit with real patients: a coin decides for each whether the private training has them.

The auditor sees every step and knows every patient's images and labels, as differential privacy allows. With G the clipped
gradients of all patients at the weights of step t and r the released gradient, both on the same random coordinates, patient i's
score is the sum over the steps of

| score | of step t | best where |
|---|---|---|
| inner product | (G r)_i less its mean over the patients, whose gradients have much in common | there is noise |
| least squares | coefficient of patient i in the fit of r by the rows of G | there is none |

There are as many canaries as patients, so the bound is weak: `OneRun.most` says how weak.

References:
    Steinke, Nasr, Jagielski, NeurIPS 2023, section 6 (input canaries); Nasr et al., USENIX Security 2023 (gradients as scores).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.gradient_canaries import private_parameters
from nnunet_fedharm.evaluation.audit.one_run import CONFIDENCE, OneRun, audit_scores, audited_delta
from nnunet_fedharm.evaluation.audit.site import claim_of
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.patient_loader import Cases, PatientLoader

COORDINATES = 2**20
"""Of the gradients, at most, so that those of all patients fit into memory."""


@dataclass(frozen=True)
class PatientAudit:
    """The claim beside what was found.

    Attributes:
        found: bound of the patients.
        claimed: epsilon of the observed steps by the accountant, at the same delta.
        steps: observed.
        scores: of each patient, and whether they were in; for a picture.
    """

    found: OneRun
    claimed: float
    steps: int
    scores: list[tuple[float, bool]]

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong, with the audit's confidence."""
        return self.found.epsilon_low > self.claimed

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "refuted": self.refuted}


def audit_patients(
    trainer: nnUNetTrainerFedHarm,
    *,
    steps: int,
    delta: float,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    progress: bool = False,
) -> PatientAudit:
    """Train half of the patients privately, and guess who they are from the released gradients.

    Args:
        trainer: under differential privacy, ready for `train_step`; its weights move.
        steps: to run and observe.
        delta: of the claim; the audit takes a smaller one if it has to, see `audited_delta`.
        confidence: of the bound.
        seed: of the coins.
        progress: show a bar.

    Raises:
        PrivacyError: no differential privacy, or too few patients.
    """
    noise, rate = claim_of(trainer)
    loader = trainer.dataloader_train
    patients: list[Cases] = list(loader.patients)
    if len(patients) < 4:
        raise PrivacyError(f"An audit with real patients needs at least 4 of them, this site trains {len(patients)}.")
    delta = audited_delta(delta, len(patients))
    included = np.random.default_rng(seed).random(len(patients)) < 0.5
    chosen = [patient for patient, inside in zip(patients, included, strict=True) if inside]
    private = PatientLoader(chosen, loader.sample_rate, loader._load)
    # Every score sees the same patches in every step: what differs between steps is the release.
    candidates = [loader._load(patient) for patient in patients]
    scores = {name: np.zeros(len(patients)) for name in ("inner product", "least squares")}
    where = _coordinates(private_parameters(trainer), seed)

    def observe(*_: Any) -> None:
        # Before the optimizer moves the weights: the candidates' gradients are those of the step's own weights.
        released = _values([parameter.grad for parameter in private_parameters(trainer)], where)
        gradients = torch.stack([_clipped_gradient(trainer, candidate, where) for candidate in candidates])
        products = gradients @ released
        scores["inner product"] += (products - products.mean()).numpy()
        gram = gradients @ gradients.T
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        scores["least squares"] += torch.linalg.solve(gram + ridge, products).numpy()

    hook = trainer.optimizer.register_step_pre_hook(observe)
    try:
        for _ in tqdm(range(steps), desc="patients as canaries", unit="step", disable=not progress):
            trainer.train_step(next(private))
    finally:
        hook.remove()
    found = audit_scores(scores, included, delta=delta, confidence=confidence)
    claimed = epsilon_of([Noise(noise, rate, steps)], delta)
    return PatientAudit(found, claimed, steps, list(zip(scores[found.score].tolist(), included.tolist(), strict=True)))


@torch.enable_grad()
def _clipped_gradient(trainer: nnUNetTrainerFedHarm, batch: dict[str, Any], where: Sequence[Tensor]) -> Tensor:
    """A candidate's clipped gradient at the weights of now, at the watched coordinates; float64."""
    assert trainer.private is not None
    target, clip = batch["target"], trainer.private.options.clip
    trainer.tell_sites(batch)
    on_device = [t.to(trainer.device) for t in (target if isinstance(target, list) else [target])]
    output = trainer.network(batch["data"].to(trainer.device))
    loss = trainer.loss(output, on_device if isinstance(target, list) else on_device[0])
    gradients = torch.autograd.grad(loss, private_parameters(trainer), allow_unused=True)
    norm = math.sqrt(sum(float(g.float().square().sum()) for g in gradients if g is not None))
    return _values(gradients, where) * min(1.0, clip / (norm + 1e-6))


def _coordinates(parameters: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Watched coordinates of each tensor: all, or as large a share of each as COORDINATES allows."""
    share = min(1.0, COORDINATES / sum(parameter.numel() for parameter in parameters))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(p.numel(), generator=generator)[: math.ceil(share * p.numel())] for p in parameters]


def _values(gradients: Sequence[Tensor | None], where: Sequence[Tensor]) -> Tensor:
    """The watched coordinates as one float64 vector on the CPU; a tensor without a gradient counts as zeros."""
    return torch.cat(
        [
            torch.zeros(len(index))
            if gradient is None
            else gradient.detach().float().flatten()[index.to(gradient.device)].cpu()
            for gradient, index in zip(gradients, where, strict=True)
        ]
    ).double()
