"""What privacy costs, in sentences: Dice that is lost, where nothing can be told, and the epsilon that was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.words import number, scientific
from nnunet_fedharm.study.findings import BETTER, UNCLEAR, WORSE, Comparison, StudyFindings
from nnunet_fedharm.study.report.names import kind_name, only_at
from nnunet_fedharm.study.report.phrases import exploratory


def price(found: StudyFindings, epsilon: float, items: Sequence[Comparison]) -> str:
    """One epsilon, every arm that was trained with it; empty where none of them learned without privacy either."""
    items = [item for item in items if not found.failed(item.second)]
    if not items:
        return ""
    lost = [item for item in items if item.verdict == WORSE]
    gained = [item for item in items if item.verdict == BETTER]
    unclear = [item for item in items if item.verdict == UNCLEAR]
    said = []
    if lost:
        everywhere = len(lost) == len(items) and not any(only_at(found, item) for item in items)
        whose = "" if everywhere else f" ({joined([compared(found, item) for item in lost])})"
        said.append(f"costs {_range([item.difference.value for item in lost])} Dice{whose}")
    if unclear:
        ends = [item.difference.low for item in unclear]
        known = [low for low in ends if low is not None]
        bound = f", where a loss of up to {-min(known):.3f} remains possible" if known and min(known) < 0 else ""
        said.append(f"no change was shown for {joined([compared(found, item) for item in unclear])}{bound}")
    if gained:
        named = joined([compared(found, item) for item in gained])
        why = (
            "which noise does not explain but another training may"
            if _changed(found)
            else "which noise does not explain"
        )
        said.append(f"Dice is higher, {why}, for {named}")
    return f"Epsilon {epsilon:g}{' ' if lost else ': '}{'; '.join(said)}."


def another_training(found: StudyFindings) -> str:
    """That private arms differ from their counterparts in more than privacy; empty where they do not."""
    changed = dict(_changed(found))
    augmentation = ["without nnU-Net's augmentation"] if changed.pop("augmentation", None) else []
    shown = [f"{_KEYS[name]} {private:g} instead of {plain:g}" for name, (plain, private) in changed.items()]
    shown += augmentation
    if not shown:
        return ""
    return (
        f"Private arms were trained otherwise in more than clipping and noise ({'; '.join(shown)}): what is told is the price "
        "of private training as it was done."
    )


_KEYS = {
    "harmonizer_epochs": "epochs of the harmonizer",
    "segmenter_epochs": "epochs of the segmenter",
    "iterations_per_epoch": "steps of an epoch",
    "initial_lr": "initial learning rate",
}


def _changed(found: StudyFindings) -> Mapping[str, tuple[float, float]]:
    changed: Mapping[str, tuple[float, float]] = found.settings.get("private_training") or {}
    return changed


def price_at_labels(found: StudyFindings) -> list[str]:
    """The price where the arms learned: at the sites whose labels were used."""
    lost = [item for item in found.private_at_labels if item.verdict == WORSE]
    unclear = [item for item in found.private_at_labels if item.verdict == UNCLEAR]
    where, said = joined(found.labelled), []
    if lost:
        shown = [
            f"{_range([item.difference.value])} Dice (epsilon {found.arm(item.first).epsilon:g}, {arm_and_mode(found, item)})"
            for item in lost
        ]
        said.append(f"{exploratory(lost)}At {where}, whose labels were used, privacy costs {joined(shown)}.")
    if unclear:
        shown = [f"epsilon {found.arm(item.first).epsilon:g}, {arm_and_mode(found, item)}" for item in unclear]
        said.append(f"At {where} no change was shown ({'; '.join(shown)}).")
    return said


def price_untold(found: StudyFindings) -> list[str]:
    """Target sites where no price can be told, of arms that learned at others."""
    said = []
    for name in dict.fromkeys(item.second for item in found.private):
        sites = () if found.failed(name) else found.failed_at(name)
        if sites:
            arm = found.arm(name)
            said.append(
                f"At {joined(sites)} {arm.mode} {kind_name(arm.kind)} segments too badly without privacy too (mean Dice below "
                f"{found.least_dice:g}) to tell what privacy costs."
            )
    return said


def spent(found: StudyFindings) -> list[str]:
    """What was spent, per patient, and what left without noise."""
    private = [cost for cost in found.costs if found.arm(cost.arm).epsilon is not None]
    known = [cost for cost in private if cost.epsilon is not None]
    said = []
    if known:
        shown = dict.fromkeys(
            f"{found.arm(cost.arm).epsilon:g} asked, {cost.epsilon:.2f} spent" for cost in known if cost.epsilon
        )
        deltas = sorted({cost.delta for cost in known if cost.delta is not None})
        words = f" at delta {' and '.join(scientific(delta) for delta in deltas)}" if deltas else ""
        said.append(f"Epsilon holds for each patient, at the site that spent most{words}: {'; '.join(shown)}.")
    bare = list(dict.fromkeys(name for cost in private for name in cost.without_noise))
    if bare:
        said.append(f"Without noise, so without any epsilon, left: {joined(bare)}.")
    return said


def compared(found: StudyFindings, item: Comparison) -> str:
    """The arm, and where it was compared if not at all target sites."""
    return arm_and_mode(found, item) + only_at(found, item)


def arm_and_mode(found: StudyFindings, item: Comparison) -> str:
    arm = found.arm(item.first)
    return f"{arm.mode} {kind_name(arm.kind)}"


def _range(values: Sequence[float | None]) -> str:
    """ "0.018", "0.018 to 0.020", without signs."""
    shown = sorted({number(abs(value), 3) for value in values if value is not None})
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
