"""What the first screen may say: never more than the tests allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.study.findings import ArmFinding, Comparison, CostFinding, Equivalence, GapFinding, StudyFindings
from nnunet_fedharm.study.report.answers import (
    answer_all,
    how_close,
    how_different,
    what_central_gives,
    what_privacy_costs,
)

NONE = Estimate(None)


def arm(
    name: str,
    *,
    kind: str = "none",
    mode: str = "central",
    epsilon: float | None = None,
    site: str = "",
    gap: float = -1,
) -> ArmFinding:
    share = Estimate(gap, gap - 0.1, gap + 0.1) if gap >= 0 else None
    return ArmFinding(
        name, name, kind, mode, True, epsilon, site, 3, {"A": Estimate(0.8), "B": Estimate(0.5)}, {}, "B", Estimate(0.5),
        Estimate(0.5), GapFinding(("B",), share, Estimate(0.3, 0.2, 0.4)),
    )  # fmt: skip


def change(
    first: str,
    second: str,
    value: float,
    *,
    p: float = 0.001,
    half: float = 0.01,
    seeds: int = 3,
    equal: Equivalence | None = None,
) -> Comparison:
    difference = Estimate(value, value - half, value + half)
    return Comparison("family", first, second, ("B",), difference, p, p, 20, seeds, equal)


def equivalent(p: float, value: float, half: float, *, p_low: float | None = None) -> Equivalence:
    return Equivalence(0.02, p, p if p_low is None else p_low, Estimate(value, value - half, value + half))


@pytest.fixture
def bare() -> StudyFindings:
    """Arms without any comparison."""
    arms = [
        arm("central_none"),
        arm("central_augment", kind="augment"),
        arm("central_polarity", kind="polarity", gap=0.8),
        arm("federated_polarity", kind="polarity", mode="federated"),
        arm("central_none_epsilon-8", epsilon=8.0),
    ]
    cost = CostFinding("central_none_epsilon-8", 1.0, 1.0, 0, 0, 7.93, 1e-5, ("facts",), ("cpu",))
    return StudyFindings(
        name="s", dataset="D", created="2026-01-01", configuration="2d", sites=("A", "B"), labelled=("A",), reference="A",
        targets=("B",), patients={"A": 10, "B": 20}, patients_total=30, control="central_none",
        oracles={}, arms=arms, gaps={"B": Estimate(0.3, 0.2, 0.4)}, against_control=[], at_each_site=[], against_augment=[],
        gap_tests=[change("local_B_none", "central_none", 0.3)],
        federated=[], points={}, private=[], at_reference=[], controls=[], costs=[cost], quality={}, epsilons=(),
        modes=("central",), missing=[], settings={"margin": 0.02, "least_dice": 0.3},
    )  # fmt: skip


def central(found: StudyFindings, *items: Comparison, **others: Any) -> str:
    answer = what_central_gives(replace(found, against_control=list(items), **others))
    return " ".join([answer.headline, *answer.support])


def test_what_has_no_result_is_called_not_measured(bare: StudyFindings) -> None:
    answers = answer_all(bare, None)
    assert len(answers) == 4
    for answer in answers[1:]:
        assert "not measured in this study" in answer.headline
        assert not answer.measured
    assert "not measured in this study" in " ".join(answers[0].support)
    assert "reaches Dice 0.80 at A and 0.50 at B" in answers[0].headline


def test_a_clear_gain_is_said_with_its_size(bare: StudyFindings) -> None:
    said = central(bare, change("central_polarity", "central_none", 0.2))
    assert said.startswith(
        "Polarity raises mean Dice at B (labels withheld) over plain nnU-Net with its own augmentation by 0.200"
    )
    assert "it recovers 80%" in said
    assert "Exploratory" not in said


@pytest.mark.parametrize(("p", "half"), [(0.2, 0.01), (0.001, 0.3), (0.05, 0.01)])
def test_a_gain_that_one_test_does_not_carry_is_not_said(bare: StudyFindings, p: float, half: float) -> None:
    said = central(bare, change("central_polarity", "central_none", 0.2, p=p, half=half))
    assert "was not shown to change mean Dice" in said
    for word in ("raises", "better", "higher"):
        assert word not in said


def test_held_out_sites_are_named_as_new_hospitals_once(bare: StudyFindings) -> None:
    held_out = replace(bare, sites=("A", "B", "C"), targets=("B", "C"), held_out=("C",))
    gain = replace(change("central_polarity", "central_none", 0.2), sites=("B", "C"))
    equal = replace(
        change("federated_polarity", "central_polarity", 0.0, equal=equivalent(0.001, 0.0, 0.005)), sites=("B", "C")
    )
    answers = answer_all(replace(held_out, against_control=[gain], federated=[equal]), None)
    assert "at B (labels withheld) and C (new hospital, held out of all training) over plain" in answers[1].headline
    said = (
        "C took part in no central or federated training and stands for a new hospital: harmonizers were adapted there"
    )
    assert [any(line.startswith(said) for line in answer.support) for answer in answers] == [False, True, False, False]
    alone = replace(held_out, targets=("B", "C"), labelled=("A",), held_out=("B", "C"))
    answers = answer_all(replace(alone, federated=[equal]), None)
    assert "at B and C (new hospitals, held out of all training)" in " ".join(answers[2].support)
    assert any("B and C took part in no" in line and "stand for new hospitals" in line for line in answers[2].support)
    assert not any("took part in no" in line for line in answer_all(replace(bare, federated=[equal]), None)[2].support)


def test_a_loss_is_called_a_loss(bare: StudyFindings) -> None:
    assert "lowers mean Dice" in central(bare, change("central_polarity", "central_none", -0.2))


def test_few_trainings_make_a_sentence_exploratory(bare: StudyFindings) -> None:
    said = central(bare, change("central_polarity", "central_none", 0.2, seeds=2))
    assert said.startswith("Exploratory, 2 trainings of each arm: Polarity raises")
    one = what_central_gives(replace(bare, against_control=[change("central_polarity", "central_none", 0.2, seeds=1)]))
    assert one.headline.startswith("Exploratory, 1 training of each arm")


def test_strong_augmentation_and_baselines_that_do_as_well_are_told(bare: StudyFindings) -> None:
    gain = change("central_polarity", "central_none", 0.2)
    other = change("central_augment", "central_none", 0.15)
    said = central(bare, gain, other, against_augment=[change("central_polarity", "central_augment", 0.01, p=0.4)])
    assert "was not shown to change mean Dice against strong random augmentation" in said
    assert "Without any network in front, strong augmentation raises mean Dice too" in said
    assert "Strong random augmentation was not measured in this study" in central(bare, gain)


def test_the_gain_is_placed_site_by_site(bare: StudyFindings) -> None:
    wide = replace(bare, targets=("B", "C"))
    gain = change("central_polarity", "central_none", 0.2)
    sites = [replace(gain, sites=("B",)), replace(change("central_polarity", "central_none", 0.0, p=1.0), sites=("C",))]
    assert "at B Dice is higher; at C no change was shown" in central(wide, gain, at_each_site=sites)


@pytest.mark.parametrize(
    ("equal", "value", "words", "never"),
    [
        (equivalent(0.001, 0.0, 0.005), 0.0, "is as good as central within 0.02 Dice", "not shown"),
        (equivalent(0.2, 0.0, 0.005), 0.0, "was not shown to be as good as central", "is as good"),
        (equivalent(0.001, 0.0, 0.03), 0.0, "was not shown to be as good as central", "is as good"),
        (equivalent(0.9, 0.05, 0.01, p_low=0.001), 0.05, "is not worse than central by 0.02 Dice or more", "as good as central"),
        (equivalent(0.9, -0.05, 0.01), -0.05, "is worse than central, by 0.050", "as good as central within"),
    ],
)  # fmt: skip
def test_as_good_as_needs_both_one_sided_tests_and_the_interval(
    bare: StudyFindings, equal: Equivalence, value: float, words: str, never: str
) -> None:
    item = change(
        "federated_polarity", "central_polarity", value, equal=equal, half=0.01, p=0.9 if not value else 0.001
    )
    answer = how_close(replace(bare, federated=[item]))
    assert words in answer.headline
    assert never not in answer.headline
    assert "what is federated is the harmonizer" in " ".join(answer.support)
    assert "times as many patches" not in " ".join(answer.support)
    both = how_close(replace(bare, federated=[item], labelled=("A", "B")))
    assert "sees 2 times as many patches" in " ".join(both.support)


def test_a_federation_with_two_trainings_is_exploratory(bare: StudyFindings) -> None:
    item = change("federated_polarity", "central_polarity", 0.0, seeds=2, equal=equivalent(0.001, 0.0, 0.005))
    assert how_close(replace(bare, federated=[item])).headline.startswith("Exploratory, 2 trainings")


def test_two_arms_that_failed_alike_are_not_as_good_as_each_other(bare: StudyFindings) -> None:
    arms = [replace(item, target=Estimate(0.01), dice={"A": Estimate(0.02), "B": Estimate(0.01)}) for item in bare.arms]
    item = change("federated_polarity", "central_polarity", 0.0, p=1.0, equal=equivalent(0.001, 0.0, 0.005))
    answer = answer_all(replace(bare, arms=arms, federated=[item]), None)[2]
    assert answer.headline.startswith("The control did not learn to segment (Dice 0.02 at A): train longer first.")
    assert "too badly (mean Dice below 0.3) to call federated as good" in answer.headline
    assert "is as good" not in answer.headline


def test_a_site_where_central_failed_is_named_and_proves_no_equality(bare: StudyFindings) -> None:
    """Plain nnU-Net at .05 at D in both modes: their mean over B and D is no equality at D, whatever it is."""
    dice = {"A": Estimate(0.8), "B": Estimate(0.7), "D": Estimate(0.05)}
    both = [replace(arm("central_none"), dice=dice), replace(arm("federated_none", mode="federated"), dice=dice)]
    good = [replace(item, dice={**dice, "D": Estimate(0.7)}) for item in bare.arms if item.kind == "polarity"]
    found = replace(bare, sites=("A", "B", "D"), targets=("B", "D"), arms=[*both, *good])
    plain = change("federated_none", "central_none", 0.0, p=1.0, equal=equivalent(0.001, 0.0, 0.005))
    polarity = replace(
        change("federated_polarity", "central_polarity", 0.0, p=1.0, equal=plain.equivalence), sites=("B", "D")
    )
    answer = how_close(replace(found, federated=[plain]))
    assert answer.headline == (
        "Federated plain nnU-Net is as good as central within 0.02 Dice at B alone. At D central plain nnU-Net segments too "
        "badly (mean Dice below 0.3) to call federated as good."
    )
    assert "+0.000 (-0.005 to +0.005) plain nnU-Net at B alone" in answer.support[0]
    said = how_close(replace(found, federated=[plain, polarity]))
    assert said.headline == "Federated polarity is as good as central within 0.02 Dice."


def test_a_price_is_told_at_the_sites_that_were_learned_without_privacy(bare: StudyFindings) -> None:
    dice = {"A": Estimate(0.8), "B": Estimate(0.7), "D": Estimate(0.05)}
    arms = [replace(item, dice=dice) for item in bare.arms]
    item = change("central_none_epsilon-8", "central_none", -0.3)
    answer = what_privacy_costs(replace(bare, sites=("A", "B", "D"), targets=("B", "D"), arms=arms, private=[item]))
    assert answer.headline == "Epsilon 8 costs 0.300 Dice (central plain nnU-Net at B alone)."
    assert (
        "At D central plain nnU-Net segments too badly without privacy too (mean Dice below 0.3) to tell what privacy costs."
        in answer.support
    )


def test_privacy_has_a_price_at_each_epsilon_and_what_has_none_is_named(bare: StudyFindings) -> None:
    answer = what_privacy_costs(replace(bare, private=[change("central_none_epsilon-8", "central_none", -0.04)]))
    assert answer.headline == "Epsilon 8 costs 0.040 Dice."
    support = " ".join(answer.support)
    assert "each patient" in support
    assert "8 asked, 7.93 spent" in support
    assert "left: facts" in support


def test_a_loss_that_was_not_shown_is_no_proof_of_no_loss(bare: StudyFindings) -> None:
    item = change("central_none_epsilon-8", "central_none", -0.01, p=0.3, half=0.03)
    said = what_privacy_costs(replace(bare, private=[item])).headline
    assert "no change was shown" in said
    assert "a loss of up to 0.040 remains possible" in said
    assert "costs" not in said


def test_privacy_is_not_free_where_nothing_was_learned_without_it(bare: StudyFindings) -> None:
    """Labels at A alone: at B the control fails, with noise and without; at A noise costs what it costs."""
    arms = [replace(item, dice={"A": Estimate(0.8), "B": Estimate(0.05)}) for item in bare.arms]
    there = change("central_none_epsilon-8", "central_none", 0.0, p=0.9, half=0.001)
    home = replace(change("central_none_epsilon-8", "central_none", -0.55), sites=("A",))
    answer = what_privacy_costs(replace(bare, arms=arms, private=[there], private_at_labels=[home]))
    assert "no change was shown" not in answer.headline
    assert "too badly" in answer.headline
    assert (
        "At A, whose labels were used, privacy costs 0.550 Dice (epsilon 8, central plain nnU-Net)." in answer.support
    )


def test_a_gap_that_may_be_none_is_not_called_one(bare: StudyFindings) -> None:
    unsure = change("local_B_none", "central_none", 0.1, p=0.2)
    answer = how_different(replace(bare, gap_tests=[unsure]), None)
    assert "At B no gap to a training on the site's own labels was shown." in answer.support
