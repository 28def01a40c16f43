"""The one-run bound against the paper's own numbers, direct calculation, and mechanisms of known epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.one_run import (
    audit_scores,
    count_correct,
    epsilon_lower_bound,
    p_value,
)
from nnunet_fedharm.privacy.gaussian import gaussian_sigma


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_paper_s(canaries: int, guesses: int, correct: int, delta: float, published: float) -> None:
    """Appendix D and section 7 of Steinke, Nasr, Jagielski 2023."""
    assert epsilon_lower_bound(canaries, guesses, correct, delta=delta) == pytest.approx(published, abs=1e-3)


def test_the_p_value_equals_the_theorem_written_out() -> None:
    canaries, guesses, correct, epsilon, delta = 12, 7, 6, 0.8, 1e-3
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))

    def mass(count: int) -> float:
        return math.comb(guesses, count) * chance**count * (1 - chance) ** (guesses - count) if count >= 0 else 0.0

    tail = sum(mass(count) for count in range(correct, guesses + 1))
    slope = max(
        sum(mass(count) for count in range(correct - i, correct)) / i for i in range(1, canaries + 1)
    )  # the theorem runs i to the number of canaries
    assert p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) == pytest.approx(
        tail + 2 * canaries * delta * slope, rel=1e-12
    )


def test_pure_randomized_response_reaches_the_bound_as_often_as_the_theorem_allows() -> None:
    """The mechanism for which the theorem is tight: each bit is told truly with chance e^eps / (1 + e^eps)."""
    generator, epsilon, canaries, runs = np.random.default_rng(1), 1.0, 200, 1000
    correct = generator.binomial(canaries, 1 / (1 + math.exp(-epsilon)), runs)
    wrong = np.mean([p_value(canaries, canaries, int(count), epsilon=epsilon, delta=0) < 0.05 for count in correct])
    assert 0.02 < wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_a_gaussian_mechanism_is_not_refuted_at_its_own_epsilon_and_is_far_below_it(epsilon: float) -> None:
    generator, canaries, delta = np.random.default_rng(2), 1000, 1e-5
    sigma = gaussian_sigma(epsilon, delta, 1.0)
    for _ in range(5):
        included = generator.random(canaries) < 0.5
        found = audit_scores({"value": included + generator.normal(0, sigma, canaries)}, included, delta=delta)
        assert found.epsilon_low <= epsilon
    included = generator.random(canaries) < 0.5
    leaky = audit_scores({"value": included + generator.normal(0, sigma / 10, canaries)}, included, delta=delta)
    assert leaky.epsilon_low > min(epsilon, leaky.most / 2)


def test_more_right_guesses_never_lower_the_bound_and_delta_never_raises_it() -> None:
    bounds = [epsilon_lower_bound(100, 50, correct, delta=1e-5) for correct in range(51)]
    assert bounds == sorted(bounds)
    assert bounds[25] == 0.0
    assert epsilon_lower_bound(100, 50, 48, delta=1e-3) <= epsilon_lower_bound(100, 50, 48, delta=0)


def test_guesses_take_the_highest_for_in_and_the_lowest_for_out() -> None:
    included = np.array([True, False, True, False, True])
    assert count_correct(np.array([5.0, 1.0, 4.0, 2.0, 0.0]), included, 2) == 1
    assert count_correct(np.array([5.0, 1.0, 4.0, 2.0, 0.0]), included, 5) == 4


def test_the_ceiling_is_the_bound_of_perfect_guesses() -> None:
    included = np.arange(200) % 2 == 0
    perfect = audit_scores({"value": included.astype(float)}, included, delta=1e-5)
    assert perfect.epsilon_low == perfect.most > 3
    assert perfect.correct == perfect.guesses == 200


def test_scores_without_information_show_nothing() -> None:
    generator = np.random.default_rng(3)
    bounds = []
    for _ in range(60):
        included = generator.random(100) < 0.5
        bounds.append(audit_scores({"value": generator.normal(size=100)}, included, delta=1e-5).epsilon_low)
    assert np.mean(np.array(bounds) > 0) <= 0.1


@pytest.mark.parametrize(("guesses", "correct"), [(11, 5), (5, 6), (5, -1)])
def test_impossible_counts_are_refused(guesses: int, correct: int) -> None:
    with pytest.raises(PrivacyError, match="cannot be"):
        p_value(10, guesses, correct, epsilon=1.0, delta=0)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(PrivacyError, match="diverged"):
        audit_scores({"value": np.array([1.0, np.nan])}, np.array([True, False]), delta=0)
