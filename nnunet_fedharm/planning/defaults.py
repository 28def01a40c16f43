"""Values that `plan` chooses for the data and the device, each with its reason: pure rules.

A rule sees the planned segmenter, the number of training images, and the device. Options that were given win, and the rules of
what depends on them see the given value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nnunet_fedharm.harmonizers import AT_REFERENCE, LEARNED
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.planning.situation import Device, Situation

LARGEST_TRAINING = 1.5
"""A training step behind the frozen harmonizer takes at most so many times the plain segmenter's."""

LARGEST_PREDICTION = 1.3
"""The same for the prediction of a window."""

SHORT_TRAINING = 5000
"""Segmenter steps below which nnU-Net's momentum of 0.99 is too slow; 0.9 and ten times the rate were tried with 640 steps."""

LONG_HARMONIZER = 2000
"""Harmonizer steps above which the learning rate is half of what short experiments used: caution, not a measurement."""


@dataclass(frozen=True)
class Length:
    """How long a harmonizer trains.

    Attributes:
        least: optimizer steps, twice to three times what the experiments on small patches needed.
        patches_per_image: what is wanted where the number of images asks for more.
        lr: learning rate of those experiments.
    """

    least: int
    patches_per_image: int
    lr: float


LENGTHS = {
    "curve": Length(least=500, patches_per_image=25, lr=3e-3),
    "polarity": Length(least=1000, patches_per_image=50, lr=2e-3),
    "cyclegan": Length(least=1200, patches_per_image=100, lr=2e-3),
    "diffusion": Length(least=1000, patches_per_image=100, lr=2e-3),
}
"""By kind; docs/experiments trained 120 to 400 steps each (the judge of polarity needed 120 to 500)."""

LINEAR_JUDGE = Length(least=120, patches_per_image=8, lr=2e-3)
"""Of `polarity` whose judge is linear, three times what docs/experiments/polarity-judge needed."""

PRIVATE_JUDGE = Length(least=24, patches_per_image=0, lr=2e-3)
"""The same under differential privacy, where each step costs the segmenter: docs/experiments/private-harmonizer."""

SEGMENTER_SHARE = 50
"""The harmonizer trains at least this part of the segmenter's steps: beside a long training more costs next to nothing."""

MOST_STEPS = {"cuda": 20_000, "cpu": 5_000}
"""Harmonizer steps at most, by device."""

DIFFUSION_SIZES = [
    (16, 3),
    (32, 3),
    (24, 3),
    (32, 2),
    (24, 2),
    (16, 2),
    (32, 1),
    (24, 1),
    (16, 1),
    (8, 3),
    (8, 2),
    (8, 1),
    (4, 1),
]
"""Width and depth; what was tried in experiments first, then by capacity."""

CYCLEGAN_SIZES: list[tuple[int, tuple[int, ...]]] = [
    (16, (1, 2, 4)), (32, (1, 2, 4)), (24, (1, 2, 4)), (32, (1, 2)), (24, (1, 2)), (16, (1, 2)), (8, (1, 2, 4)), (8, (1, 2)),
    (4, (1, 2)),
]  # fmt: skip
"""Width and dilations, in the same order."""


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen: one clause."""

    value: Any
    reason: str


def suggest_gpu_memory(device: Device) -> Choice:
    """Memory that nnU-Net plans the segmenter for."""
    if device.memory_gb is not None and device.memory_gb < 10:
        return Choice(
            round(0.8 * device.memory_gb, 1),
            f"four fifths of this GPU's {device.memory_gb:.0f} GB; the rest is the harmonizer's",
        )
    return Choice(8.0, "nnU-Net's own target")


def suggest_options(situation: Situation, given: Mapping[str, Any]) -> dict[str, Choice]:
    """What the rules choose of the harmonizer's options; nothing that was given."""
    return {**_sizes(situation, given), **_judge(situation, given)}


def _judge(situation: Situation, given: Mapping[str, Any]) -> dict[str, Choice]:
    if situation.kind not in AT_REFERENCE or "judge" in given:
        return {}
    return {"judge": Choice("linear", "it learns in dozens of steps, also privately; a network needs hundreds")}


def _sizes(situation: Situation, given: Mapping[str, Any]) -> dict[str, Choice]:
    """Width and depth: the first that keeps to the limits of cost, else the cheapest."""
    names, candidates = _candidates(situation.kind)
    free = [size for size in candidates if all(given.get(key, value) == value for key, value in size.items())]
    if not free:  # no size given, or none to choose
        return {}
    costs = []
    for size in free:
        costs.append(situation.cost({**given, **size}))
        if fits := costs[-1].training <= LARGEST_TRAINING and costs[-1].prediction <= LARGEST_PREDICTION:
            break
    index = len(costs) - 1 if fits else min(range(len(costs)), key=lambda i: costs[i].prediction)
    cost = f"a training step about {costs[index].training:.2f} and prediction {costs[index].prediction:.2f} times the segmenter's"
    if fits:
        why = (
            "as in the experiments" if free[index] == candidates[0] else "the largest that keeps to the limits of cost"
        )
    else:
        why = f"the cheapest, and still above {LARGEST_PREDICTION} times: `curve` costs next to nothing"
    return {name: Choice(free[index][name], f"{why}; {cost}") for name in names if name not in given}


def complete_options(situation: Situation, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options of the harmonizer, and the rules' choices where none was given."""
    return {name: choice.value for name, choice in suggest_options(situation, given).items()} | dict(given)


def _candidates(kind: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    if kind == "diffusion":
        return ("width", "depth"), [{"width": width, "depth": depth} for width, depth in DIFFUSION_SIZES]
    if kind == "cyclegan":
        return ("width", "dilations"), [{"width": width, "dilations": list(steps)} for width, steps in CYCLEGAN_SIZES]
    return (), []


def suggest_schedule(situation: Situation, given: Mapping[str, Any]) -> dict[str, Choice]:
    """A choice for every field of `Schedule`; fields in `given` keep that value, with the rule's choice beside it unused.

    Args:
        given: field -> value that was asked for.
    """
    chosen: dict[str, Choice] = {}
    values: dict[str, Any] = dict(given)
    for name, choice in _schedule_rules(situation, values):
        chosen[name] = choice
        values.setdefault(name, choice.value)
    return {item.name: chosen[item.name] for item in fields(Schedule)}


def complete_schedule(situation: Situation, given: Mapping[str, Any]) -> Schedule:
    """The schedule with the given values, and the rules' where nothing was given.

    Raises:
        PlanError: a given value is out of range.
    """
    return Schedule(**{name: choice.value for name, choice in suggest_schedule(situation, given).items()} | dict(given))


def _schedule_rules(situation: Situation, values: Mapping[str, Any]) -> Iterator[tuple[str, Choice]]:
    """Rules in the order in which they need each other; `values` grows with what was chosen."""
    yield "segmenter_epochs", Choice(1000, "nnU-Net's own")
    yield "iterations_per_epoch", Choice(250, "nnU-Net's own")
    steps = values["segmenter_epochs"] * values["iterations_per_epoch"]
    short = steps < SHORT_TRAINING
    share = max(1, values["iterations_per_epoch"] // 5)
    yield "val_iterations_per_epoch", Choice(share, "a fifth of the training steps, as in nnU-Net")
    yield (
        "momentum",
        (
            Choice(0.9, f"{steps} steps are too few for nnU-Net's 0.99, which averages over 100")
            if short
            else Choice(0.99, "nnU-Net's own")
        ),
    )
    yield (
        "initial_lr",
        (
            Choice(0.1, "ten times nnU-Net's, for the same effective step with momentum 0.9")
            if short and values["momentum"] == 0.9
            else Choice(0.01, "nnU-Net's own")
        ),
    )
    yield "harmonizer_epochs", _harmonizer_epochs(situation, values["iterations_per_epoch"], steps)
    yield "harmonizer_lr", _harmonizer_lr(situation, values["harmonizer_epochs"] * values["iterations_per_epoch"])
    yield "phases", Choice("frozen", "works without labels at some sites; the others were not compared on data yet")
    blocks = max(1, values["segmenter_epochs"] // 20)
    yield "alternate_every", Choice(blocks, "20 blocks; read only where phases alternate")
    yield "finetune_lr_factor", Choice(0.1, "small steps for a trained harmonizer; read only with phases finetune")
    yield "augmentation", Choice(True, "nnU-Net's own")
    yield "trained_groups", Choice("", "all of them, as nnU-Net does")
    yield "seed", Choice(None, "nnU-Net's own: every training is another draw")


def _harmonizer_epochs(situation: Situation, iterations: int, segmenter_steps: int) -> Choice:
    if situation.kind not in LEARNED:
        return Choice(0, f"the harmonizer {situation.kind} has nothing to learn")
    length, images = _length(situation), situation.learning_images
    steps, why = (
        length.patches_per_image * images // situation.batch_size,
        f"{length.patches_per_image} patches per image",
    )
    if steps < segmenter_steps // SEGMENTER_SHARE and not _linear(situation):
        steps, why = segmenter_steps // SEGMENTER_SHARE, f"a {SEGMENTER_SHARE}th of the segmenter's"
    if steps < length.least:
        steps, why = length.least, "the least that the experiments call for"
    if steps > MOST_STEPS[situation.device.kind]:
        steps, why = MOST_STEPS[situation.device.kind], f"the most on a {_name(situation.device)}"
    if steps > segmenter_steps:
        steps, why = segmenter_steps, "as many as the segmenter's"
    epochs = max(1, round(steps / iterations))
    taken = epochs * iterations
    each = taken * situation.batch_size / images
    of = "of the reference" if situation.kind in AT_REFERENCE and situation.reference_sites else "of all sites"
    return Choice(epochs, f"{taken} steps, {why}: {each:.0f} patches from each of {images} training images {of}")


def _harmonizer_lr(situation: Situation, steps: int) -> Choice:
    if situation.kind not in LEARNED:
        return Choice(1e-3, "not used")
    lr = _length(situation).lr
    if steps > LONG_HARMONIZER:
        return Choice(lr / 2, f"half of the {lr:g} of the short experiments, as {steps} steps leave time")
    return Choice(lr, "as in the experiments")


def _length(situation: Situation) -> Length:
    if _linear(situation):
        return PRIVATE_JUDGE if situation.private else LINEAR_JUDGE
    return LENGTHS[situation.kind]


def _linear(situation: Situation) -> bool:
    """Whether a linear judge is all that is learned: it needs no share of a long training."""
    return situation.kind == "polarity" and situation.judge == "linear"


def _name(device: Device) -> str:
    return "GPU" if device.kind == "cuda" else "CPU"
