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
from nnunet_fedharm.trainers.private_training import SEGMENTER

Array = npt.NDArray[np.float64]

PREFIX = "canary "
"""Of the names of patients that do not exist."""


@dataclass(frozen=True, kw_only=True)
class CanaryOptions:
    """Of the audit with gradient canaries."""

    canaries: int = 1000
    """Patients whose gradients the audit makes up; the more, the larger the epsilon that can be refuted."""
    steps: int = 40
    """Steps that are run and observed; the claim is what the accountant says of so many."""
    norm: float = 100.0
    """Length of a canary's gradient, in clips."""
    confidence: float = CONFIDENCE
    """Of the lower bound."""
    seed: int = 0
    """Of coins, coordinates and signs; the noise is the trainer's own and has no seed."""

    def __post_init__(self) -> None:
        if self.canaries < 10 or self.steps < 1:
            raise PrivacyError(
                f"The audit needs 10 canaries and 1 step at least, got {self.canaries} and {self.steps}."
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


class _Bench:
    """Canary patients inside a trainer: what its loader, network and loss are replaced by while the audit runs."""

    def __init__(self, trainer: nnUNetTrainerFedHarm, places: Sequence[_Place], signs: Array, norm: float) -> None:
        assert trainer.private is not None
        self.trainer = trainer
        self.parameters = private_parameters(trainer)
        self.places, self.signs = places, signs
        self.length = norm * trainer.private.options.clip
        self.step = 0
        self.current: int | None = None
        self.drawn = np.zeros((len(signs), len(places)), dtype=bool)
        self.seen: list[Array] = []
        self._forward, self._loss = trainer.network.forward, trainer.loss

    def load(self, real: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Batches of real patients by `real`; a canary's is empty but for the case that names its site."""
        some_case = self.trainer.dataloader_train.patients[0][0]

        def batch(cases: Any) -> dict[str, Any]:
            if not cases[0].startswith(PREFIX):
                self.current = None
                return real(cases)
            self.current = int(cases[0].removeprefix(PREFIX))
            self.drawn[self.step, self.current] = True
            return {"data": torch.zeros(1), "target": torch.zeros(1), "keys": [some_case]}

        return batch

    def forward(self, image: Tensor) -> Any:
        return image if self.current is not None else self._forward(image)

    def loss(self, output: Any, target: Any) -> Tensor:
        if self.current is None:
            return self._loss(output, target)
        place = self.places[self.current]
        sign = float(self.signs[self.step])
        return sign * self.length * self.parameters[place.tensor].flatten()[place.index]

    @torch.no_grad()
    def observe(self, *_: Any) -> None:
        """Before the optimizer's step: the released gradient at the canaries' places and at their twins."""
        assert self.trainer.private is not None
        flat = [None if p.grad is None else p.grad.detach().float().flatten().cpu() for p in self.parameters]

        def at(tensor: int, index: int) -> float:
            values = flat[tensor]
            return 0.0 if values is None else float(values[index])

        scale = self.trainer.private.phases[SEGMENTER].expected / self.trainer.private.options.clip
        own = [at(place.tensor, place.index) for place in self.places]
        other = [math.nan if place.twin is None else at(*place.twin) for place in self.places]
        self.seen.append(scale * np.array([own, other], dtype=np.float64))
        self.step += 1


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
    delta = audited_delta(delta, options.canaries)
    generator = np.random.default_rng(options.seed)
    included = generator.random(options.canaries) < 0.5
    signs = generator.permutation(np.resize([1.0, -1.0], options.steps))
    places = _places(private_parameters(trainer), options.canaries, generator)
    bench = _Bench(trainer, places, signs, options.norm)
    loader = trainer.dataloader_train
    patients = list(loader.patients)
    everybody = [*patients, *((f"{PREFIX}{i}",) for i in np.flatnonzero(included))]
    _run(trainer, bench, PatientLoader(everybody, loader.sample_rate, bench.load(loader._load)), progress)
    own, twin = np.stack(bench.seen).transpose(1, 0, 2)  # (steps, canaries) each
    scores = _scores(own, twin, signs, noise=noise, rate=rate)
    found = audit_scores(scores, included, delta=delta, confidence=options.confidence)
    return GradientAudit(
        found,
        epsilon_of([Noise(noise, rate, options.steps)], delta),
        noise,
        rate,
        trainer.private.options.clip,
        options.steps,
        len(patients),
        measure(own, twin, signs, included, bench.drawn),
        list(zip(scores[found.score].tolist(), included.tolist(), strict=True)),
    )


def private_parameters(trainer: nnUNetTrainerFedHarm) -> list[nn.Parameter]:
    """What the private steps train, each once."""
    assert trainer._gradients is not None
    return [parameter for parameter in trainer._gradients.parameters if parameter.requires_grad]


def _run(trainer: nnUNetTrainerFedHarm, bench: _Bench, loader: PatientLoader[Any], progress: bool) -> None:
    forward, loss = trainer.network.forward, trainer.loss
    hook = trainer.optimizer.register_step_pre_hook(bench.observe)
    trainer.network.forward = bench.forward
    trainer.loss = bench.loss
    try:
        for _ in tqdm(range(len(bench.signs)), desc="audited steps", unit="step", disable=not progress):
            trainer.train_step(next(loader))
    finally:
        hook.remove()
        trainer.network.forward, trainer.loss = forward, loss


def _places(parameters: Sequence[nn.Parameter], count: int, generator: np.random.Generator) -> list[_Place]:
    """`count` coordinates, those with a twin first; no coordinate is used twice, as a canary's place or as a twin.

    Raises:
        PrivacyError: there are fewer weights than that.
    """
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
    if len(places) < count:
        raise PrivacyError(f"The trained weights have room for {len(places)} canaries, not for {count}. Take fewer.")
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
