"""Membership inference on a trained model: was this case in its training?

| attack | score of a case, higher for members | needs |
|---|---|---|
| loss | -loss | the model |
| calibrated loss | -loss, less what the case's size, labels, contrast and edges explain of it | the model |
| noise response | log of the loss under a little noise over the loss | the model |
| gradient norm | -log of the norm of the loss' gradient | the model's weights |
| reference models | (mean loss of models that never saw the case - loss) / their spread | such models |

The spread is that of each case with three reference models or more, else one for all cases. All attacks that can be run are
run and reported; the bound on epsilon is corrected for their number. `blind` is the control: how well the same features,
without any model, tell the two sets apart, by logistic regression on cases left out. If that succeeds, the sets differ in more
than membership.

References:
    Yeom et al., "Privacy Risk in Machine Learning", CSF 2018 (loss);
    Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022;
    Jayaraman et al., "Revisiting Membership Inference Under Realistic Assumptions", PoPETs 2021 (noise);
    Nasr, Shokri, Houmansadr, S&P 2019 (gradients); Carlini et al., S&P 2022 (LiRA, offline);
    Das, Zhang, Tramer, "Blind Baselines Beat Membership Inference Attacks for Foundation Models", 2024 (the control).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.audit.model import AttackedModel, CasePatches, patches_of
from nnunet_fedharm.evaluation.audit.rates import Separation, largest_bound, separation
from nnunet_fedharm.sites.files import CaseFiles

Values = npt.NDArray[np.float64]

NOISE = 0.1
"""Standard deviations of the image that the noise response adds."""
NOISY_COPIES = 4
SHRINKAGE = 1.0
"""Weight of the ridge in the regression of losses on features."""


@dataclass(frozen=True, kw_only=True)
class MembershipOptions:
    """Of the attack."""

    patches: int = 4
    """Patches of each case, about its labels."""
    confidence: float = 0.95
    """Of the lower bound on epsilon."""
    seed: int = 0
    """Of patches, noise, bootstrap and permutations."""

    def __post_init__(self) -> None:
        if self.patches < 1 or not 0.5 <= self.confidence < 1:
            raise DataError(
                f"patches must be at least 1 and confidence in [0.5, 1), got {self.patches} and {self.confidence}."
            )


@dataclass(frozen=True)
class MembershipAudit:
    """What the attacks found.

    Attributes:
        model: name.
        members, others: numbers of cases.
        references: number of reference models.
        attacks: in the table's order.
        blind: AUC of the features alone, folds left out, and its permutation's p-value.
        losses: mean loss of members and of non-members.
        claimed: epsilon and delta of the model's card; None without one.
        most: largest lower bound that a perfect attack on so many cases would show.
        delta, confidence: of the bounds.
        scores: attack -> (scores of members, of non-members), for a picture; no names of cases.
    """

    model: str
    members: int
    others: int
    references: int
    attacks: tuple[Separation, ...]
    blind: Separation
    losses: tuple[float, float]
    claimed: tuple[float, float] | None
    most: float
    delta: float
    confidence: float
    scores: dict[str, tuple[list[float], list[float]]]

    @property
    def best(self) -> Separation:
        """The attack with the highest AUC; chosen after the fact."""
        return max(self.attacks, key=lambda attack: attack.auc)

    @property
    def epsilon_low(self) -> float:
        """Over all attacks, which share the error."""
        return max(attack.epsilon_low for attack in self.attacks)

    @property
    def refuted(self) -> bool:
        """Whether the card's epsilon is wrong, if cases were independent."""
        return self.claimed is not None and self.epsilon_low > self.claimed[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "model": self.model,
            "members": self.members,
            "non_members": self.others,
            "reference_models": self.references,
            "attacks": [attack.to_dict() for attack in self.attacks],
            "blind_control": self.blind.to_dict(),
            "mean_loss": {"members": self.losses[0], "non_members": self.losses[1]},
            "claimed": None if self.claimed is None else {"epsilon": self.claimed[0], "delta": self.claimed[1]},
            "epsilon_low": self.epsilon_low,
            "largest_possible_bound": self.most,
            "confidence": self.confidence,
            "delta": self.delta,
            "refuted": self.refuted,
            "scores": {name: {"members": a, "non_members": b} for name, (a, b) in self.scores.items()},
        }


def attack_membership(
    model: AttackedModel,
    members: Sequence[CaseFiles],
    others: Sequence[CaseFiles],
    *,
    references: Sequence[AttackedModel] = (),
    claimed: tuple[float, float] | None = None,
    options: MembershipOptions,
    progress: bool = False,
) -> MembershipAudit:
    """Run every attack.

    Args:
        model: the attacked one.
        members: cases of its training; others: held-out cases of the same kind.
        references: models that were trained on neither.
        claimed: (epsilon, delta) of the model.
        options: of the attack.
        progress: show a bar.

    Raises:
        DataError: fewer than two cases on a side, a case on both, or files that cannot be read.
    """
    both = {case.case for case in members} & {case.case for case in others}
    if both:
        raise DataError(f"Case {min(both)} is given as a member and as a non-member.")
    rows = []
    for case in tqdm([*members, *others], desc="attacked cases", unit="case", disable=not progress):
        patches = patches_of(model, case, count=options.patches, seed=options.seed)
        rows.append((_observe(model, patches, options.seed), [_loss(other, patches) for other in references], patches))
    seen = np.array([row[0] for row in rows])  # loss, noise response, gradient norm
    features = np.array([list(row[2].features.values()) for row in rows])
    scores = {
        "loss": -seen[:, 0],
        "calibrated loss": -_residual(seen[:, 0], features),
        "noise response": seen[:, 1],
        "gradient norm": -seen[:, 2],
    }
    if references:
        scores["reference models"] = _against_references(seen[:, 0], np.array([row[1] for row in rows]))
    return _judge(model.name, scores, seen[:, 0], features, len(members), len(references), claimed, options)


def _judge(
    name: str,
    scores: dict[str, Values],
    losses: Values,
    features: Values,
    n: int,
    references: int,
    claimed: tuple[float, float] | None,
    options: MembershipOptions,
) -> MembershipAudit:
    delta = claimed[1] if claimed is not None else 0.0
    attacks = tuple(
        separation(
            attack,
            values[:n],
            values[n:],
            delta=delta,
            confidence=options.confidence,
            tests=len(scores),
            seed=options.seed,
        )
        for attack, values in scores.items()
    )
    blind = _blind(features, n, options.seed)
    each = 1 - (1 - options.confidence) / len(scores)
    return MembershipAudit(
        model=name,
        members=n,
        others=len(losses) - n,
        references=references,
        attacks=attacks,
        blind=separation("features alone", blind[:n], blind[n:], delta=delta, seed=options.seed),
        losses=(float(losses[:n].mean()), float(losses[n:].mean())),
        claimed=claimed,
        most=largest_bound(n, len(losses) - n, delta=delta, confidence=each),
        delta=delta,
        confidence=options.confidence,
        scores={attack: (values[:n].tolist(), values[n:].tolist()) for attack, values in scores.items()},
    )


@torch.no_grad()
def _loss(model: AttackedModel, patches: CasePatches) -> float:
    return float(model.loss(model.network(patches.images.to(model.device)), patches.labels.to(model.device)))


def _observe(model: AttackedModel, patches: CasePatches, seed: int) -> tuple[float, float, float]:
    """(loss, log ratio of the loss under noise, log norm of the gradient) of one case."""
    parameters = [p for name, p in model.network.named_parameters() if name.startswith("segmenter.")]
    for parameter in parameters:
        parameter.requires_grad_(True)
    images, labels = patches.images.to(model.device), patches.labels.to(model.device)
    loss = model.loss(model.network(images), labels)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None))
    generator = torch.Generator().manual_seed(seed)
    inside = images != 0  # what nnU-Net masked or padded stays zero
    noisy = []
    for _ in range(NOISY_COPIES):
        noise = NOISE * torch.randn(images.shape, generator=generator).to(model.device)
        with torch.no_grad():
            noisy.append(float(model.loss(model.network(images + inside * noise), labels)))
    value = float(loss.detach())
    # nnU-Net's loss is cross entropy minus Dice: from -1 upwards.
    return value, math.log((np.mean(noisy) + 1 + 1e-3) / (value + 1 + 1e-3)), math.log(norm + 1e-12)


def _residual(losses: Values, features: Values) -> Values:
    """Losses less their ridge regression on standardized features; who is a member is not used."""
    scaled = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-12)
    centred = losses - losses.mean()
    weights = np.linalg.solve(scaled.T @ scaled + SHRINKAGE * np.eye(scaled.shape[1]), scaled.T @ centred)
    return np.asarray(centred - scaled @ weights, dtype=np.float64)


def _against_references(losses: Values, references: Values) -> Values:
    """z-score of the loss among losses of models that never saw the case; references: (cases, models)."""
    mean = references.mean(axis=1)
    if references.shape[1] >= 3:
        spread = references.std(axis=1, ddof=1)
        spread = np.maximum(spread, np.median(spread))  # a few models can agree by chance
    else:
        spread = np.full(len(losses), max(float((mean - losses).std()), 1e-12))
    return np.asarray((mean - losses) / np.maximum(spread, 1e-12), dtype=np.float64)


def _blind(features: Values, n: int, seed: int) -> Values:
    """Log odds of membership from features alone, of cases left out of the fit."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    truth = np.arange(len(features)) < n
    folds = StratifiedKFold(max(2, min(5, n, len(features) - n)), shuffle=True, random_state=seed)
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=1.0))
    return np.asarray(cross_val_predict(fit, features, truth, cv=folds, method="decision_function"), dtype=np.float64)
