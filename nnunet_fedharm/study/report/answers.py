"""The four questions in plain words, made from the numbers by rules; nothing is said that the tests do not carry.

| words | said when |
|---|---|
| raises, lowers | Holm-adjusted Wilcoxon p < .05, and the 95% interval over patients and trainings lies on one side of 0 |
| was not shown to change | either of the two is missing |
| as good as | TOST p < .05 (Holm), and the 90% interval lies within the margin on both sides |
| not worse | the lower half of that only |
| not shown to be as good | neither |
| too badly to call federated as good | central's mean Dice at that site is below least_dice of [report]: both may have failed |
| at B alone | the arm to compare with segments the other target sites too badly, so that no test is over them |
| did not learn | the control's mean Dice on its own labels' sites is below least_dice of [report] |
| Exploratory, N trainings | a compared arm has fewer than three trainings; it stands before the sentence |
| has no result yet | cells of the question's arms wait |
| not measured in this study | an arm of the question has no result, and none is to come |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.differences.summary import describe
from nnunet_fedharm.evaluation.words import number, percent
from nnunet_fedharm.study.findings import BETTER, UNCLEAR, WORSE, Comparison, StudyFindings
from nnunet_fedharm.study.report.names import held_out_words, place
from nnunet_fedharm.study.report.phrases import (
    amount,
    amounts,
    arm_name,
    arm_names,
    changes,
    closeness,
    differences,
    everywhere,
    exploratory,
    is_harmonizer,
    signed,
)
from nnunet_fedharm.study.report.prices import (
    another_training,
    arm_and_mode,
    compared,
    price,
    price_at_labels,
    price_untold,
    spent,
)
from nnunet_fedharm.study.study_tables import BASELINES, CONTROL

QUESTIONS = (
    "How different are the sites?",
    "What does centralized harmonization give against nnU-Net's augmentation?",
    "How close does federated training come?",
    "What does privacy cost?",
)
NOT_MEASURED = "not measured in this study"


@dataclass(frozen=True)
class Answer:
    """One question.

    Attributes:
        headline: one or two sentences.
        support: sentences in smaller letters.
        measured: whether the study has anything to say.
    """

    question: str
    headline: str
    support: tuple[str, ...] = ()
    measured: bool = True


def answer_all(found: StudyFindings, sites: Findings | None) -> list[Answer]:
    """The answers, in the order of QUESTIONS.

    Args:
        found: the study's numbers.
        sites: the site report of the same dataset, where there is one.
    """
    asked = [what_central_gives(found), how_close(found), what_privacy_costs(found)]
    first = next((index for index, item in enumerate(asked) if item.measured), None)
    if first is not None:  # once is enough: every headline names the sites
        asked[first] = replace(asked[first], support=(*held_out_words(found), *asked[first].support))
    return [how_different(found, sites), *(_with_warning(found, item) for item in asked)]


def _with_warning(found: StudyFindings, answer: Answer) -> Answer:
    """The answer, behind the sentence that the control did not learn where it did not: then nothing below means much."""
    reached = found.control_dice
    if not answer.measured or reached is None or reached >= found.least_dice:
        return answer
    words = f"The control did not learn to segment (Dice {number(reached)} at {joined(found.labelled)}): train longer first."
    return replace(answer, headline=f"{words} {answer.headline}")


def how_different(found: StudyFindings, sites: Findings | None) -> Answer:
    """From the site report, and from what plain nnU-Net loses away from its labels."""
    own, more = _plain(found), _gaps(found)
    if sites is None:
        missing = f"Differences between the images were {NOT_MEASURED}: `nnunet-fedharm study run` measures them."
        return Answer(QUESTIONS[0], own or missing, (*([missing] if own else []), *more), measured=bool(own))
    said = describe(sites)
    return Answer(QUESTIONS[0], said[0], (*said[1:3], *([own] if own else []), *more))


def what_central_gives(found: StudyFindings) -> Answer:
    """Central harmonizers against plain nnU-Net, then against strong augmentation."""
    asked = [
        item for item in found.against_control if is_harmonizer(found, item) and found.arm(item.first).mode == "central"
    ]
    if not asked or found.arm(found.control).mode != "central":
        kinds = (CONTROL, *BASELINES)
        how = _open(found, lambda mode, kind: mode == "central" and kind not in kinds)
        return Answer(QUESTIONS[1], f"Centralized harmonization {how}.", measured=False)
    where, control = place(found), "plain nnU-Net with its own augmentation"
    headline = changes(found, asked, f"mean Dice {where} over {control}", f"mean Dice {where} against {control}")
    support = [
        *_by_site(found, asked),
        *_recovered(found, asked),
        *_augment(found),
        *_intervals(found, asked),
        *_baselines(found),
    ]
    return Answer(QUESTIONS[1], headline, tuple(support))


def how_close(found: StudyFindings) -> Answer:
    """Federated against central, harmonizers first; plain nnU-Net where no harmonizer was trained both ways."""
    asked = [item for item in found.federated if is_harmonizer(found, item)]
    plain = [item for item in found.federated if not is_harmonizer(found, item)]
    if not asked and not plain:
        how = _open(found, lambda mode, _: mode == "federated")
        return Answer(QUESTIONS[2], f"Federated beside central training {how}.", measured=False)
    first, rest = (asked, plain) if asked else (plain, [])
    headline, margin = closeness(found, first), float(found.settings["margin"])
    tested = [item for item in first if item.equivalence is not None]
    support = [differences(found, tested, "Federated less central", level=90)] if tested else []
    if rest:
        support.append(closeness(found, rest))
    if len(found.labelled) == 1 and asked:
        support.append(
            f"Labels of {found.labelled[0]} alone are used, so the segmenter is trained there in both modes; what is federated "
            "is the harmonizer."
        )
    if len(found.labelled) > 1:
        support.append(
            f"With as many steps at each of the {len(found.labelled)} labelled sites as in central training, a federated "
            f"segmenter sees {len(found.labelled)} times as many patches."
        )
    support.append(
        f"As good means: within {margin:g} Dice on both sides, by two one-sided tests and by the 90% interval over patients and "
        "trainings."
    )
    return Answer(QUESTIONS[2], headline, tuple(support))


def what_privacy_costs(found: StudyFindings) -> Answer:
    """Every epsilon, the largest first: the price of each private arm against the same without privacy."""
    if not found.private:
        how = _open(found, lambda mode, _: mode != "local", private=True)
        words = f"Differential privacy {how}: no private arm and its counterpart have a result."
        return Answer(QUESTIONS[3], words, measured=False)
    by_epsilon: dict[float, list[Comparison]] = {}
    for item in found.private:
        by_epsilon.setdefault(found.arm(item.first).epsilon or 0.0, []).append(item)
    order = sorted(by_epsilon, reverse=True)
    said = [price(found, epsilon, by_epsilon[epsilon]) for epsilon in order]
    if not any(said):
        arms = joined(list(dict.fromkeys(arm_and_mode(found, item) for item in found.private)))
        words = f"{arms[0].upper()}{arms[1:]} segments too badly {place(found)}, without privacy too, to tell what it costs."
        said = [words]
    each = [
        f"Epsilon {epsilon:g}, change of mean Dice{everywhere(found, by_epsilon[epsilon])} with 95% interval: "
        f"{joined([f'{signed(item.difference)} {compared(found, item)}' for item in by_epsilon[epsilon]])}."
        for epsilon in order
    ]
    return Answer(
        QUESTIONS[3],
        exploratory(found.private) + " ".join(filter(None, said)),
        tuple(
            filter(None, (another_training(found), *price_untold(found), *price_at_labels(found), *spent(found), *each))
        ),
    )


def _open(found: StudyFindings, of: Callable[[str, str], bool], *, private: bool = False) -> str:
    """ "has no result yet" where cells of such arms wait, by mode and kind; else "was not measured in this study"."""
    waiting = [name for name in found.missing if ("_epsilon-" in name) == private]
    parts = [name.split("_") for name in waiting]
    return "has no result yet" if any(of(*part[:2]) for part in parts) else f"was {NOT_MEASURED}"


def _plain(found: StudyFindings) -> str:
    """What the control reaches at each site."""
    dice = found.arm(found.control).dice
    shown = [
        f"{number(dice[site].value)} at {site}" for site in found.sites if site in dice and dice[site].value is not None
    ]
    if not shown:
        return ""
    return f"Plain nnU-Net, trained with the labels of {joined(found.labelled)}, reaches Dice {joined(shown)}."


def _gaps(found: StudyFindings) -> list[str]:
    sure = [item for item in found.gap_tests if item.verdict == BETTER]
    unsure = [item.sites[0] for item in found.gap_tests if item.verdict != BETTER and item.difference.value is not None]
    said = []
    if sure:
        shown = [f"{amount(item.difference)} at {item.sites[0]}" for item in sure]
        said.append(f"{exploratory(sure)}A training on the site's own labels would add {joined(shown)}.")
    if unsure:
        said.append(f"At {joined(unsure)} no gap to a training on the site's own labels was shown.")
    return said


def _intervals(found: StudyFindings, items: Sequence[Comparison]) -> list[str]:
    """Changes with their intervals, where the headline has no room for them."""
    clear = [item for item in items if item.verdict != UNCLEAR]
    if len(clear) < 2:
        return []
    return [f"With 95% intervals: {joined([f'{signed(item.difference)} {arm_name(found, item)}' for item in clear])}."]


def _recovered(found: StudyFindings, items: Sequence[Comparison]) -> list[str]:
    shown_at = {item.sites[0] for item in found.gap_tests if item.verdict == BETTER}
    shares = [
        (item, gap.recovered)
        for item in items
        if item.verdict == BETTER  # a share of the gap is a gain
        and (gap := found.arm(item.first).gap)
        and gap.recovered
        and shown_at.intersection(gap.sites)
    ]
    if not shares:
        return []
    shown = [
        f"{percent(share.value)} ({percent(share.low)} to {percent(share.high)}, {arm_name(found, item)})"
        for item, share in shares
    ]
    return [f"Of the gap to a training on the sites' own labels they recover {joined(shown)}." if len(shown) > 1 else
            f"Of the gap to a training on the sites' own labels it recovers {shown[0]}."]  # fmt: skip


def _by_site(found: StudyFindings, items: Sequence[Comparison]) -> list[str]:
    """Where the change is, if it is not everywhere."""
    if len(found.targets) < 2:
        return []
    names = {item.first for item in items}
    own = [item for item in found.at_each_site if item.first in names]
    said = []
    verdicts = {site: {item.verdict for item in own if item.sites == (site,)} for site in found.targets}
    for verdict, words in ((BETTER, "higher with all of them"), (WORSE, "lower with all of them")):
        sites = [site for site in found.targets if verdicts[site] == {verdict}]
        if sites:
            said.append(f"at {joined(sites)} Dice is {words if len(names) > 1 else words.split()[0]}")
    sites = [site for site in found.targets if verdicts[site] == {UNCLEAR}]
    if sites:
        said.append(f"at {joined(sites)} no change was shown")
    mixed = [site for site in found.targets if len(verdicts[site]) > 1]
    for site in mixed:
        better = [item for item in own if item.sites == (site,) and item.verdict == BETTER]
        worse = [item for item in own if item.sites == (site,) and item.verdict == WORSE]
        parts = [f"higher with {arm_names(found, better)}"] if better else []
        parts += [f"lower with {arm_names(found, worse)}"] if worse else []
        said.append(f"at {site} Dice is {joined(parts)}")
    return [f"Site by site: {'; '.join(said)}."] if said else []


def _augment(found: StudyFindings) -> list[str]:
    """Harmonizers against strong random augmentation, which needs no harmonizer."""
    items = found.against_augment
    if not items:
        return [f"Strong random augmentation was {NOT_MEASURED}."]
    words = "mean Dice over strong random augmentation", "mean Dice against strong random augmentation"
    return [changes(found, items, *words)]


def _baselines(found: StudyFindings) -> list[str]:
    """Arms without a harmonizer that beat the control: then the control is not the strongest baseline."""
    items = [
        item
        for item in found.against_control
        if not is_harmonizer(found, item) and found.arm(item.first).mode == "central" and item.verdict == BETTER
    ]
    if not items:
        return []
    words = (
        f"{arm_names(found, items)} raise{'s' if len(items) == 1 else ''} mean Dice too, by {amounts(found, items)}."
    )
    return [f"{exploratory(items)}Without any network in front, {words}"]
