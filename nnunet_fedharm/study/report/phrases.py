"""What may be said of a comparison: parts of sentences by the rules that `answers` lists."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.words import count, number, probability
from nnunet_fedharm.study.findings import BETTER, UNCLEAR, WORSE, Comparison, StudyFindings
from nnunet_fedharm.study.report.names import kind_name, only_at, place
from nnunet_fedharm.study.study_tables import BASELINES, CONTROL


def exploratory(items: Sequence[Comparison]) -> str:
    """The words before a sentence that rests on few trainings; empty with enough."""
    trainings = {item.seeds for item in items}
    if not any(item.exploratory for item in items):
        return ""
    fewest = count(min(trainings), "training")
    return f"Exploratory, {fewest} of each arm: " if len(trainings) == 1 else f"Exploratory, {fewest} of some arms: "


def amount(estimate: Estimate) -> str:
    """ "0.268 (0.257 to 0.279)", of a change without its sign."""
    values = [estimate.value, estimate.low, estimate.high]
    if estimate.value is not None and estimate.value < 0:
        values = [None if value is None else -value for value in (estimate.value, estimate.high, estimate.low)]
    shown = [number(value, 3) for value in values]
    return shown[0] if values[1] is None else f"{shown[0]} ({shown[1]} to {shown[2]})"


def signed(estimate: Estimate) -> str:
    """ "+0.002 (-0.001 to +0.005)"."""
    shown = ["-" if value is None else f"{value:+.3f}" for value in (estimate.value, estimate.low, estimate.high)]
    return shown[0] if estimate.low is None else f"{shown[0]} ({shown[1]} to {shown[2]})"


def changes(found: StudyFindings, items: Sequence[Comparison], raised: str, against: str) -> str:
    """Better, unclear and worse arms, a sentence each."""
    said = []
    for verdict, verb in ((BETTER, ("raises", "raise")), (WORSE, ("lowers", "lower"))):
        own = [item for item in items if item.verdict == verdict]
        if own:
            target = raised if verdict == BETTER else against
            said.append(f"{_sentence(arm_names(found, own))} {verb[len(own) > 1]} {target} by {amounts(found, own)}.")
    unclear = [item for item in items if item.verdict == UNCLEAR]
    if unclear:
        said.append(
            f"{_sentence(arm_names(found, unclear))} {'was' if len(unclear) == 1 else 'were'} not shown to change {against} "
            f"({_untold(found, unclear)})."
        )
    return exploratory(items) + " ".join(said)


def closeness(found: StudyFindings, items: Sequence[Comparison]) -> str:
    """As good, not worse, or not shown, a sentence each; then where central failed, so that nothing is as good as it."""
    learned = [item for item in items if not found.failed(item.second)]
    said = []
    for sites in dict.fromkeys(item.sites for item in learned):
        said += _as_good(found, [item for item in learned if item.sites == sites])
    failed = {item.first: found.failed_at(item.second) for item in items}
    for sites in dict.fromkeys(filter(None, failed.values())):
        own = [item for item in items if failed[item.first] == sites]
        said.append(
            f"At {joined(sites)} central {arm_names(found, own)} {'segments' if len(own) == 1 else 'segment'} too badly (mean "
            f"Dice below {found.least_dice:g}) to call federated as good."
        )
    return exploratory(items) + " ".join(said)


def _as_good(found: StudyFindings, items: Sequence[Comparison]) -> list[str]:
    """Of arms that were compared at the same sites."""
    groups: dict[str, list[Comparison]] = {"equal": [], "not worse": [], "worse": [], "unclear": []}
    for item in items:
        equal = item.equivalence
        otherwise = "worse" if item.verdict == WORSE else "unclear"
        groups["equal" if equal and equal.shown else "not worse" if equal and equal.not_worse else otherwise].append(
            item
        )
    margin = float(found.settings["margin"])
    where = only_at(found, items[0])
    said = []
    if own := groups["equal"]:
        said.append(f"{_federated(found, own, 'is')} as good as central within {margin:g} Dice{where}.")
    if own := groups["not worse"]:
        said.append(f"{_federated(found, own, 'is')} not worse than central by {margin:g} Dice or more{where}.")
    if own := groups["worse"]:
        said.append(f"{_federated(found, own, 'is')} worse than central{where}, by {amounts(found, own)}.")
    if own := groups["unclear"]:
        said.append(
            f"{_federated(found, own, 'was')} not shown to be as good as central within {margin:g} Dice{where}."
        )
    return said


def _federated(found: StudyFindings, items: Sequence[Comparison], verb: str) -> str:
    """ "Federated polarity is", "Federated polarity and diffusion are each"."""
    verb = verb if len(items) == 1 else {"is": "are each", "was": "were each"}[verb]
    return f"Federated {arm_names(found, items)} {verb}"


def differences(found: StudyFindings, items: Sequence[Comparison], what: str, *, level: int) -> str:
    def of(item: Comparison) -> str:
        shown = Estimate(item.difference.value, item.equivalence.interval.low, item.equivalence.interval.high) \
            if item.equivalence else item.difference  # fmt: skip
        return f"{signed(shown)} {arm_name(found, item)}{only_at(found, item)}"

    return (
        f"{what}, mean Dice{everywhere(found, items)} with {level}% interval: {joined([of(item) for item in items])}."
    )


def everywhere(found: StudyFindings, items: Sequence[Comparison]) -> str:
    """ " at B and C", where each of the comparisons is over these; else each one names its own."""
    return "" if any(only_at(found, item) for item in items) else f" {place(found)}"


def arm_name(found: StudyFindings, item: Comparison) -> str:
    arm = found.arm(item.first)
    return kind_name(arm.kind, augmentation=arm.augmentation)


def arm_names(found: StudyFindings, items: Sequence[Comparison]) -> str:
    return joined([arm_name(found, item) for item in items])


def _untold(found: StudyFindings, items: Sequence[Comparison]) -> str:
    """ "+0.020, 95% interval -0.007 to +0.032, p 0.21", with the names of the arms where there are several.

    With p, for an interval that excludes 0 is not enough.
    """

    def of(item: Comparison) -> str:
        value, low, high = (
            "-" if part is None else f"{part:+.3f}"
            for part in (item.difference.value, item.difference.low, item.difference.high)
        )
        ends = "" if item.difference.low is None else f", 95% interval {low} to {high}"
        return f"{value}{ends}, p {probability(item.adjusted)}"

    return "; ".join(of(item) if len(items) == 1 else f"{arm_name(found, item)} {of(item)}" for item in items)


def amounts(found: StudyFindings, items: Sequence[Comparison]) -> str:
    if len(items) == 1:
        return amount(items[0].difference)
    shown = [_short(item.difference.value) for item in items]
    return f"{shown[0]} each" if len(set(shown)) == 1 else joined(shown)


def _short(value: float | None) -> str:
    return number(None if value is None else abs(value), 2 if value is not None and abs(value) >= 0.1 else 3)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def is_harmonizer(found: StudyFindings, item: Comparison) -> bool:
    return found.arm(item.first).kind not in (CONTROL, *BASELINES)
