"""One-run audit of the private training itself: canary patients whose gradients are known, in the trainer's own steps.

The trainer's loader draws canary patients beside the real ones, with the same chance; the trainer's own step clips and adds
them, adds the noise and hands the result to the optimizer, where the auditor reads it. A canary's loss is linear in one
weight, so its gradient is `norm` clips long in that one coordinate, and its sign changes from step to step by a list that the
auditor knows: noise that comes twice then cancels in the auditor's sum, and a canary does not. This is the strongest adversary
that the proof of DP-SGD covers: it chooses the gradients and sees every step.

| score of canary i | finds |
|---|---|
| sum over t of s_t g_ti | less noise than claimed, no clipping, noise that repeats |
| log likelihood ratio of s_t g_ti under "drawn with chance q" | the same, best for rare draws |
| sum over t of s_t (g_ti - g_tj), j the same place in another tensor of that size | tensors that share their noise |

g_ti is the released gradient in units of the clip, s_t the sign.

References:
    Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, section 6 (gradient canaries);
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023 (white-box adversary).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.measured import Measured, measure
from nnunet_fedharm.evaluation.audit.one_run import CONFIDENCE, OneRun, audit_scores, audited_delta
from nnunet_fedharm.evaluation.audit.site import claim_of
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.patient_loader import PatientLoader
from nnunet_fedharm.trainers.private_sampling import SEGMENTER

Array = npt.NDArray[np.float64]

PREFIX = "canary "
"""Of the names of patients that do not exist."""
USUAL, LEAST = 1000, 10
"""Canaries of an audit, and the fewest that it makes sense with."""


@dataclass(frozen=True, kw_only=True)
class CanaryOptions:
    """Of the audit with gradient canaries."""

    canaries: int = 0
    """Patients whose gradients the audit makes up; the more, the larger the epsilon that can be refuted. 0: 1000, or as many as
    the trained weights have room for."""
    steps: int = 40
    """Steps that are run and observed; the claim is what the accountant says of so many."""
    norm: float = 100.0
    """Length of a canary's gradient, in clips."""
    confidence: float = CONFIDENCE
    """Of the lower bound."""
    seed: int = 0
    """Of coins, coordinates and signs; the noise is the trainer's own and has no seed."""

    def __post_init__(self) -> None:
        if (self.canaries != 0 and self.canaries < LEAST) or self.steps < 1:
            raise PrivacyError(
                f"The audit needs {LEAST} canaries and 1 step at least, got {self.canaries} and {self.steps}."
            )
        if not (self.norm > 0 and 0.5 <= self.confidence < 1):
            raise PrivacyError(
                f"norm must be positive and confidence in [0.5, 1), got {self.norm} and {self.confidence}."
            )


@dataclass(frozen=True)
class GradientAudit:
    """The claim beside what was found.

    Attributes:
        found: bound of the canaries.
        claimed: epsilon of the observed steps by the accountant, at the same delta.
        noise_multiplier, sample_rate, clip, steps: of the claim.
        patients: real ones that trained along.
        measured: hints.
        scores: the best score of each canary, and whether it was in; for a picture.
    """

    found: OneRun
    claimed: float
    noise_multiplier: float
    sample_rate: float
    clip: float
    steps: int
    patients: int
    measured: Measured
    scores: list[tuple[float, bool]]

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong, with the audit's confidence."""
        return self.found.epsilon_low > self.claimed

    @property
    def suspicions(self) -> list[str]:
        """What the released gradients show that the mechanism's description does not."""
        return self.measured.suspicions(self.noise_multiplier, self.sample_rate)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "refuted": self.refuted, "suspicions": self.suspicions}


@dataclass(frozen=True)
class _Place:
    """A canary's coordinate, and the same place in another tensor of that size (or None)."""

    tensor: int
    index: int
    twin: tuple[int, int] | None


class Canaries:
    """Canary patients of one phase: who is in, where their gradients are, and what the steps release there.

    Args:
        parameters: what the steps train.
        clip: of the mechanism.
        options: of the audit.

    Raises:
        PrivacyError: more canaries than weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float, options: CanaryOptions) -> None:
        generator = np.random.default_rng(options.seed)
        included = generator.random(options.canaries or USUAL) < 0.5
        self.signs: Array = generator.permutation(np.resize([1.0, -1.0], options.steps))
        self.parameters = parameters
        self.places = _places(parameters, len(included), generator)
        self.count, least = len(self.places), options.canaries or LEAST
        if self.count < least:
            raise PrivacyError(f"The trained weights have room for {self.count} canaries, not for {least}. Take fewer.")
        self.included = included[: self.count]
        self.clip, self.length = clip, options.norm * clip
        self.step = 0
        self.current: int | None = None
        self.drawn = np.zeros((options.steps, self.count), dtype=bool)
        self.seen: list[Array] = []

    @property
    def names(self) -> list[tuple[str]]:
        """Cases of the canaries that are in."""
        return [(f"{PREFIX}{i}",) for i in np.flatnonzero(self.included)]

    def take(self, cases: Sequence[str]) -> bool:
        """Whose turn it is: a canary's, or a real patient's."""
        self.current = int(cases[0].removeprefix(PREFIX)) if cases[0].startswith(PREFIX) else None
        if self.current is not None:
            self.drawn[self.step, self.current] = True
        return self.current is not None

    def loss(self) -> Tensor:
        """Of the canary whose turn it is: linear in its weight."""
        assert self.current is not None
        place = self.places[self.current]
        return float(self.signs[self.step]) * self.length * self.parameters[place.tensor].flatten()[place.index]

    @torch.no_grad()
    def observe(self, expected: float) -> None:
        """Before the optimizer's step: the released gradient at the canaries' places and at their twins.

        Args:
            expected: patients of a step, by which the released gradient is divided.
        """
        flat = [None if p.grad is None else p.grad.detach().float().flatten().cpu() for p in self.parameters]

        def at(tensor: int, index: int) -> float:
            values = flat[tensor]
            return 0.0 if values is None else float(values[index])

        own = [at(place.tensor, place.index) for place in self.places]
        other = [math.nan if place.twin is None else at(*place.twin) for place in self.places]
        self.seen.append(expected / self.clip * np.array([own, other], dtype=np.float64))
        self.step += 1

    def found(self, *, noise: float, rate: float, delta: float, patients: int, options: CanaryOptions) -> GradientAudit:
        """The bound and the claim.

        Args:
            noise, rate: of the claim. delta: to audit at. patients: real ones that trained along.
        """
        own, twin = np.stack(self.seen).transpose(1, 0, 2)  # (steps, canaries) each
        scores = _scores(own, twin, self.signs, noise=noise, rate=rate)
        found = audit_scores(scores, self.included, delta=delta, confidence=options.confidence)
        return GradientAudit(
            found,
            epsilon_of([Noise(noise, rate, options.steps)], delta),
            noise,
            rate,
            self.clip,
            options.steps,
            patients,
            measure(own, twin, self.signs, self.included, self.drawn),
            list(zip(scores[found.score].tolist(), self.included.tolist(), strict=True)),
        )


class _Bench:
    """What a trainer's loader, network and loss are replaced by while the segmenter's steps are audited."""

    def __init__(self, trainer: nnUNetTrainerFedHarm, canaries: Canaries) -> None:
        self.trainer, self.canaries = trainer, canaries
        self._forward, self._loss = trainer.network.forward, trainer.loss

    def load(self, real: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Batches of real patients by `real`; a canary's is empty but for the case that names its site."""
        some_case = self.trainer.dataloader_train.patients[0][0]

        def batch(cases: Any) -> dict[str, Any]:
            if not self.canaries.take(cases):
                return real(cases)
            return {"data": torch.zeros(1), "target": torch.zeros(1), "keys": [some_case]}

        return batch

    def forward(self, image: Tensor) -> Any:
        return image if self.canaries.current is not None else self._forward(image)

    def loss(self, output: Any, target: Any) -> Tensor:
        loss: Tensor = self._loss(output, target) if self.canaries.current is None else self.canaries.loss()
        return loss

    def observe(self, *_: Any) -> None:
        assert self.trainer.private is not None
        self.canaries.observe(self.trainer.private.phases[SEGMENTER].expected)


def audit_gradients(
    trainer: nnUNetTrainerFedHarm, options: CanaryOptions, *, delta: float, progress: bool = False
) -> GradientAudit:
    """Run `options.steps` private steps of the segmenter with canaries, and bound epsilon from what they release.

    Args:
        trainer: under differential privacy, ready for `train_step`; its weights move.
        delta: of the claim; the audit takes a smaller one if it has to, see `audited_delta`.
        progress: show a bar.

    Raises:
        PrivacyError: no differential privacy, or more canaries than weights.
    """
    noise, rate = claim_of(trainer)
    assert trainer.private is not None
    canaries = Canaries(private_parameters(trainer), trainer.private.options.clip, options)
    bench, loader = _Bench(trainer, canaries), trainer.dataloader_train
    patients = list(loader.patients)
    everybody = PatientLoader([*patients, *canaries.names], loader.sample_rate, bench.load(loader._load))
    _run(trainer, bench, everybody, options.steps, progress)
    delta = audited_delta(delta, canaries.count)
    return canaries.found(noise=noise, rate=rate, delta=delta, patients=len(patients), options=options)


def private_parameters(trainer: nnUNetTrainerFedHarm) -> list[nn.Parameter]:
    """What the private steps train, each once."""
    assert trainer._gradients is not None
    return [parameter for parameter in trainer._gradients.parameters if parameter.requires_grad]


def _run(trainer: nnUNetTrainerFedHarm, bench: _Bench, loader: PatientLoader[Any], steps: int, progress: bool) -> None:
    forward, loss = trainer.network.forward, trainer.loss
    hook = trainer.optimizer.register_step_pre_hook(bench.observe)
    trainer.network.forward = bench.forward
    trainer.loss = bench.loss
    try:
        for _ in tqdm(range(steps), desc="audited steps", unit="step", disable=not progress):
            trainer.train_step(next(loader))
    finally:
        hook.remove()
        trainer.network.forward, trainer.loss = forward, loss


def _places(parameters: Sequence[nn.Parameter], count: int, generator: np.random.Generator) -> list[_Place]:
    """`count` coordinates or all there are, those with a twin first; none is used twice, as a canary's place or as a twin."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for position, parameter in enumerate(parameters):
        by_size[parameter.numel()].append(position)
    partner: dict[int, int | None] = {}
    for same in by_size.values():
        partner |= dict(zip(same[0::2], same[1::2], strict=False))
        partner |= {same[-1]: None} if len(same) % 2 else {}
    paired = [tensor for tensor, other in partner.items() if other is not None]
    single = [tensor for tensor, other in partner.items() if other is None]
    places: list[_Place] = []
    for tensors in (paired, single):
        sizes = [parameters[tensor].numel() for tensor in tensors]
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if sizes else 0
        for flat in generator.choice(total, min(total, count - len(places)), replace=False) if total else []:
            row = int(np.searchsorted(ends, flat, side="right"))
            tensor, index = tensors[row], int(flat - (ends[row] - sizes[row]))
            other = partner[tensor]
            places.append(_Place(tensor, index, None if other is None else (other, index)))
    return places


def _scores(own: Array, twin: Array, signs: Array, *, noise: float, rate: float) -> dict[str, Array]:
    aligned = signs[:, None] * own
    ratio = (2 * aligned - 1) / (2 * noise**2)
    likelihood = np.logaddexp(math.log1p(-rate) if rate < 1 else -math.inf, math.log(rate) + ratio)
    difference = signs[:, None] * np.where(np.isnan(twin), own, own - twin)
    return {
        "likelihood ratio": likelihood.sum(axis=0),
        "sum": aligned.sum(axis=0),
        "difference of tensors": difference.sum(axis=0),
    }
