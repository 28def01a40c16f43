"""Paired tests, bootstrap draws and everything that is computed from a study's cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_fedharm.differences.evidence import holm
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.study.draws import Draws
from nnunet_fedharm.study.findings import BETTER, UNCLEAR, WORSE, StudyFindings
from nnunet_fedharm.study.matrix import Arm
from nnunet_fedharm.study.report.page import limits
from nnunet_fedharm.study.settings import settings_of
from nnunet_fedharm.study.signed_rank import EXACT_UP_TO, equivalence, signed_rank
from nnunet_fedharm.study.statistics import analyse, study_draws, target_sites
from tests.study.cells import Study


def by_every_sign(differences: np.ndarray) -> float:
    """Two-sided p of Pratt's signed ranks by trying every sign."""
    kept = differences != 0
    ranks = stats.rankdata(np.abs(differences))[kept]
    signs = (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1
    sums, seen = signs @ ranks, ranks[differences[kept] > 0].sum()
    centre = ranks.sum() / 2
    return float(np.mean(np.abs(sums - centre) >= abs(seen - centre) - 1e-9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 5), min_size=1, max_size=11))
def test_signed_rank_is_exact_with_any_zeros_and_ties(values: list[int]) -> None:
    found = signed_rank(np.array(values) / 10)
    assert found == pytest.approx(by_every_sign(np.array(values)) if any(values) else 1.0)


def test_signed_rank_agrees_with_scipy_where_scipy_is_exact() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    assert signed_rank(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)
    many = np.random.default_rng(1).normal(0.02, 1, EXACT_UP_TO)
    near = stats.wilcoxon(many, method="approx").pvalue
    assert signed_rank(many) == pytest.approx(near, rel=0.02)
    assert signed_rank(np.append(many, 0.1)) == pytest.approx(near, rel=0.1)


def test_signed_rank_of_nothing_is_no_test() -> None:
    assert signed_rank(np.array([])) is None
    assert signed_rank(np.zeros(5)) == 1.0


def test_equivalence_is_two_one_sided_t_tests() -> None:
    values = np.random.default_rng(0).normal(0.001, 0.01, 20)
    found = equivalence(values, 0.02)
    assert found is not None
    assert found.above == pytest.approx(stats.ttest_1samp(values, -0.02, alternative="greater").pvalue)
    assert found.below == pytest.approx(stats.ttest_1samp(values, 0.02, alternative="less").pvalue)
    assert found.both == max(found.above, found.below) < 0.05
    assert equivalence(np.array([0.0]), 0.02) is None
    same, off = equivalence(np.zeros(4), 0.02), equivalence(np.full(4, 0.02), 0.02)
    assert same is not None
    assert off is not None
    assert (same.both, off.both) == (0.0, 1.0)


def test_holm_multiplies_the_smallest_most_and_never_falls() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_a_patient_of_two_sites_counts_alike_at_both_and_sites_keep_their_sizes() -> None:
    draws = Draws({"A": ["p", "q", "x", "y"], "B": ["p", "q", "z", "w", "v"]}, resamples=500)
    scores = np.eye(4)[[0]], np.eye(5)[[0]]
    at_a, at_b = draws.site(scores[0], "A"), draws.site(scores[1], "B")
    assert np.allclose(4 * at_a.draws, 5 * at_b.draws)
    assert np.allclose(draws.site(np.ones((1, 4)), "A").draws, 1.0)
    assert at_a.value == 0.25


def test_a_patient_alone_in_a_group_is_drawn_with_the_nearest_one() -> None:
    draws = Draws({"A": ["p", "x", "y"], "B": ["p"]}, resamples=200)
    assert draws.site(np.array([[1.0, 0.0, 0.0]]), "A").draws.std() > 0


def test_intervals_cover_patients_and_trainings_and_arms_share_their_draws() -> None:
    draws = Draws({"A": [f"p{i}" for i in range(12)]}, resamples=1000)
    scores = np.random.default_rng(0).normal(0.7, 0.1, (3, 12))
    wide = draws.site(scores, "A").estimate()
    shift = (draws.site(scores + 0.01, "A") - draws.site(scores, "A")).estimate()
    assert wide.low is not None
    assert wide.high is not None
    assert wide.high - wide.low > 0.03
    assert shift.low == pytest.approx(0.01)
    assert shift.high == pytest.approx(0.01)
    spread = draws.site(np.repeat([[0.6], [0.7], [0.8]], 12, axis=1), "A").estimate()
    assert spread.low == pytest.approx(0.6)


def test_a_case_without_any_label_does_not_count_and_one_patient_has_no_interval() -> None:
    draws = Draws({"A": ["p", "q", "r"]}, resamples=100)
    assert draws.site(np.array([[0.5, np.nan, 0.7]]), "A").value == pytest.approx(0.6)
    alone = draws.site(np.array([[0.5, np.nan, np.nan]]), "A").estimate()
    assert (alone.value, alone.low) == (0.5, None)
    assert draws.site(np.full((1, 3), np.nan), "A").estimate().value is None
    table = draws.by_patient({"A": np.array([[0.5, np.nan, 0.7]])})
    assert np.isnan(table[0, 1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> StudyFindings:
    study = Study(tmp_path_factory.mktemp("study"))
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_augment", {"A": 0.84, "B": 0.6})
    study.arm("central_polarity", {"A": 0.85, "B": 0.74})
    study.arm("federated_polarity", {"A": 0.85, "B": 0.739})
    study.arm("federated_diffusion", {"A": 0.7, "B": 0.6})
    study.arm("central_diffusion", {"A": 0.85, "B": 0.7})
    study.arm("local_B_none", {"B": 0.8})
    study.arm("central_none_epsilon-8", {"A": 0.8, "B": 0.42})
    return analyse(study.results(), resamples=300)


def test_targets_are_the_sites_without_labels(found: StudyFindings, tmp_path: Path) -> None:
    assert found.targets == ("B",)
    assert target_sites(Study(tmp_path / "all", labelled=()).study) == ("A", "B")
    assert target_sites(Study(tmp_path / "one", labelled=(), held_out=["C"]).study) == ("C",)
    assert target_sites(Study(tmp_path / "two", held_out=["C"]).study) == ("B", "C")


def test_gap_recovered_is_the_gain_over_that_of_own_labels(found: StudyFindings) -> None:
    gap = found.arm("central_polarity").gap
    assert gap is not None
    assert gap.recovered is not None
    assert gap.recovered.value == pytest.approx(0.8, abs=0.02)
    assert gap.gap.value == pytest.approx(0.3, abs=0.01)
    assert found.arm("central_none").gap is None
    assert found.arm("local_B_none").gap is None
    assert list(found.gaps) == ["B"]
    assert found.oracles == {"A": "central_none", "B": "local_B_none"}


def test_worst_site_is_the_lowest_mean(found: StudyFindings) -> None:
    arm = found.arm("central_augment")
    assert arm.worst_site == "B"
    assert arm.worst.value == arm.dice["B"].value
    assert found.arm("local_B_none").worst_site is None


def test_comparisons_are_paired_with_the_control_and_corrected_in_their_family(found: StudyFindings) -> None:
    by_arm = {item.first: item for item in found.against_control}
    assert set(by_arm) == {
        "central_augment", "central_polarity", "federated_polarity", "central_diffusion", "federated_diffusion"
    }  # fmt: skip
    better = by_arm["central_polarity"]
    assert better.verdict == BETTER
    assert better.patients == 12
    assert better.p is not None
    assert better.adjusted == pytest.approx(5 * better.p)
    assert found.private[0].verdict == WORSE
    assert found.private[0].second == "central_none"


def test_federated_is_as_good_only_within_the_margin(found: StudyFindings) -> None:
    close, far = {item.first: item for item in found.federated}, found.federated
    equal = close["federated_polarity"].equivalence
    assert equal is not None
    assert equal.shown
    worse = close["federated_diffusion"].equivalence
    assert worse is not None
    assert not worse.shown
    assert not worse.not_worse
    assert len(far) == 2
    assert len(found.points["federated_polarity"]) == 12


def test_sites_where_the_arm_to_compare_with_failed_are_in_no_equivalence_and_no_price(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=["C"])
    study.arm("central_none", {"A": 0.85, "B": 0.7, "C": 0.05})
    study.arm("federated_none", {"A": 0.85, "B": 0.7, "C": 0.05})
    study.arm("central_polarity", {"A": 0.85, "B": 0.7, "C": 0.7})
    study.arm("federated_polarity", {"A": 0.85, "B": 0.7, "C": 0.05})
    study.arm("central_none_epsilon-8", {"A": 0.8, "B": 0.42, "C": 0.05})
    found = analyse(study.results(), resamples=100)
    assert {item.first: item.sites for item in found.federated} == {
        "federated_none": ("B",),
        "federated_polarity": ("B", "C"),
    }
    assert [item.sites for item in found.private] == [("B",)]
    assert {site for site, _, _ in found.points["federated_none"]} == {"B", "C"}
    assert (found.failed_at("central_none"), found.failed("central_none")) == (("C",), False)


def test_a_harmonizer_is_held_against_plain_nnunet_of_its_mode_at_the_reference(tmp_path: Path) -> None:
    """Federated plain nnU-Net is below central here; the harmonizer changes nothing at A."""
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_polarity", {"A": 0.85, "B": 0.7})
    study.arm("federated_polarity", {"A": 0.75, "B": 0.7})
    alone = analyse(study.results(), resamples=100)
    assert [(item.first, item.second) for item in alone.at_reference] == [
        ("central_polarity", "central_none"),
        ("federated_polarity", "central_none"),
    ]
    assert any("difference to plain nnU-Net, central -0." in item.words for item in alone.controls)
    study.arm("federated_none", {"A": 0.75, "B": 0.5})
    both = analyse(study.results(), resamples=100)
    assert {item.first: item.second for item in both.at_reference}["federated_polarity"] == "federated_none"
    results = {item.words.split(", at the")[0]: item.passed for item in both.controls}
    assert results["polarity, federated"] is True


def test_the_control_without_shift_fails_where_the_reference_changed(found: StudyFindings) -> None:
    results = {item.words.split(",")[0] + item.words.split(",")[1]: item.passed for item in found.controls}
    assert results["polarity central"] is True
    assert results["diffusion federated"] is False


def test_identical_arms_are_neither_better_nor_worse(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_polarity", {"A": 0.85, "B": 0.5}, like="central_none")
    found = analyse(study.results(), resamples=100)
    assert found.against_control[0].verdict == UNCLEAR
    assert found.against_control[0].p == 1.0
    assert found.arm("central_polarity").gap is None


def test_a_travelling_subject_is_the_references_patient(tmp_path: Path) -> None:
    study = Study(tmp_path)
    registry = study.study.registry
    assert registry.patient_of("B_subject001") == "A_subject001"
    assert registry.patient_of("B_case3") == "B_case3"
    study.arm("central_none", {"A": 0.85, "B": 0.5}, travelling=2)
    draws = study_draws(study.results())
    assert set(draws.patients["A"]) & set(draws.patients["B"]) == {"A_subject000", "A_subject001"}


def test_cells_of_other_settings_are_not_compared(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_none_epsilon-8", {"A": 0.8, "B": 0.4})
    for folder in (study.folder / "cells").iterdir():
        arm = Arm("central", "none", epsilon=8.0 if "epsilon" in folder.name else None)
        file = folder / "environment.json"
        content = json.loads(file.read_text()) | {"settings": settings_of(study.study, arm)}
        file.write_text(json.dumps(content))
    assert len(study.results().finished) == 6
    file = study.folder / "study.toml"
    text = file.read_text()
    file.write_text(f"{text}[training]\nnum_processes = 7\n")  # how it is run, not what is trained
    assert len(study.results().finished) == 6
    for more, words in (
        (
            "[training]\ninitial_lr = 0.5\n",
            r"central_none_seed-0 was begun with initial_lr = 0.01, study.toml has 0.5 now",
        ),
        (
            "[privacy]\nclip = 3.0\n",
            r"central_none_epsilon-8_seed-0 was begun with \[privacy\] clip = None, .* 3.0 now",
        ),
    ):
        file.write_text(text + more)
        with pytest.raises(DataError, match=words):
            study.results()
    file.write_text(text.replace('reference = "A"', 'reference = "B"'))
    with pytest.raises(DataError, match=r"begun with reference = A, study.toml has B now"):
        study.results()


def test_two_patients_are_no_gap_however_alike_their_differences(tmp_path: Path) -> None:
    """A percentile interval over two patients lies above 0 in a quarter of all draws of nothing."""
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("local_B_none", {"B": 0.8})
    found = analyse(study.results(), resamples=100)
    (gap,) = found.gap_tests
    assert (gap.sites, gap.verdict, gap.patients) == (("B",), BETTER, 12)
    for file in (study.folder / "cells").glob("*/metrics.json"):
        content = json.loads(file.read_text())
        content["cases"] = {name: case for name, case in content["cases"].items() if name[2:] in ("case0", "case1")}
        file.write_text(json.dumps(content))
    few = analyse(study.results(), resamples=100)
    assert few.gaps["B"].low is not None
    assert few.gaps["B"].low > 0
    assert few.gap_tests[0].verdict == UNCLEAR


def test_a_site_without_test_cases_is_no_target_and_is_named(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=("C",))
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_polarity", {"A": 0.85, "B": 0.7})
    found = analyse(study.results(), resamples=100)
    assert found.targets == ("B",)
    assert found.against_control[0].verdict == BETTER
    assert any("No labelled case to test on at C" in line for line in limits(found))
