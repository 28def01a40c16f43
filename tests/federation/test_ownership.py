"""Whose word counts for a tensor: against numpy in float64, as properties, and as read off the plans of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import ShapeError
from nnunet_fedharm.federation.aggregation import SiteUpdate, aggregate, shares
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.ownership import Ownership, ownership_of
from nnunet_fedharm.harmonizers import KINDS
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.planning.section import FedHarmSection, Schedule, with_section

BANK = ("A", "B", "C", "D")
OWNERSHIP = Ownership(
    BANK,
    rows=frozenset({"rows", "gates"}),
    fixed=frozenset({"bank"}),
    reference_only=frozenset({"judge", "judge.count"}),
    reference_sites=frozenset({"B", "D"}),
)


def tensors(seed: int) -> Weights:
    generator = np.random.default_rng(seed)
    return {
        "rows": generator.normal(size=(4, 2)).astype(np.float32),
        "gates": generator.normal(size=4).astype(np.float32),
        "bank": generator.normal(size=(4, 3)).astype(np.float32),
        "judge": generator.normal(size=(3, 2)).astype(np.float32),
        "judge.count": np.array(generator.integers(0, 100)),
        "w": generator.normal(size=(5,)).astype(np.float32),
        "count": np.array(generator.integers(0, 100)),
    }


@dataclass
class Round:
    """What came back, and the whole networks that it was cut from."""

    former: Weights
    whole: dict[str, Weights]
    updates: dict[str, SiteUpdate]
    share: dict[str, float]

    def result(self) -> Weights:
        return aggregate(self.former, self.updates, self.share, OWNERSHIP)


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    """Any non-empty set of sites, some of which took no step."""
    steps = draw(
        st.dictionaries(st.sampled_from(BANK), st.integers(0, 50), min_size=1).filter(lambda s: any(s.values()))
    )
    seed = draw(st.integers(0, 99))
    whole = {site: tensors(1000 * seed + ord(site)) for site in steps}
    updates = {site: SiteUpdate(OWNERSHIP.contribution(site, whole[site]), steps[site], 3, {}) for site in steps}
    weighting = draw(st.sampled_from(["steps", "cases", "sites"]))
    return Round(tensors(seed), whole, updates, shares(updates, weighting, batch_size=2))


@settings(max_examples=60, deadline=None)
@given(played=rounds())
def test_every_tensor_is_what_numpy_makes_of_its_owners(played: Round) -> None:
    found = played.result()
    for name, former in played.former.items():
        assert found[name].dtype == former.dtype
        if name in OWNERSHIP.fixed:
            expected = former
        elif name in OWNERSHIP.rows:
            expected = np.stack(
                [
                    played.whole[site][name][row] if site in played.whole else former[row]
                    for row, site in enumerate(BANK)
                ]
            )
        else:
            owners = OWNERSHIP.reference_sites if name in OWNERSHIP.reference_only else BANK
            there = [site for site in owners if played.share.get(site, 0) > 0]
            if there:
                stacked = np.stack([played.whole[site][name].astype(np.float64) for site in there])
                mean = np.average(stacked, axis=0, weights=[played.share[site] for site in there])
                expected = mean
            else:
                expected = former
        # Counts are rounded; a half may go either way.
        tolerance = 0.5 + 1e-9 if former.dtype.kind == "i" else 1e-6
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=tolerance, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(played=rounds(), order=st.permutations(BANK))
def test_the_order_of_the_sites_does_not_matter_bit_for_bit(played: Round, order: list[str]) -> None:
    updates = {site: played.updates[site] for site in order if site in played.updates}
    again = aggregate(played.former, updates, played.share, OWNERSHIP)
    for name, value in played.result().items():
        np.testing.assert_array_equal(again[name], value)


@settings(max_examples=40, deadline=None)
@given(played=rounds())
def test_what_no_owner_sent_stays_bit_for_bit(played: Round) -> None:
    found = played.result()
    for row, site in enumerate(BANK):
        if site not in played.updates:
            for name in OWNERSHIP.rows:
                np.testing.assert_array_equal(found[name][row], played.former[name][row])
    if not any(played.share.get(site, 0) > 0 for site in OWNERSHIP.reference_sites):
        for name in OWNERSHIP.reference_only:
            np.testing.assert_array_equal(found[name], played.former[name])


@settings(max_examples=40, deadline=None)
@given(played=rounds())
def test_replies_that_change_nothing_change_nothing(played: Round) -> None:
    still = {
        site: SiteUpdate(OWNERSHIP.contribution(site, played.former), update.n_steps, 3, {})
        for site, update in played.updates.items()
    }
    found = aggregate(played.former, still, played.share, OWNERSHIP)
    for name, value in played.former.items():
        np.testing.assert_array_equal(found[name], value)


def test_without_exceptions_it_is_the_weighted_mean() -> None:
    updates = {
        site: SiteUpdate({"w": np.full(2, value, np.float32)}, steps, 1, {})
        for site, value, steps in (("A", 1, 3), ("B", 5, 1))
    }
    found = aggregate({"w": np.zeros(2, np.float32)}, updates, shares(updates, "steps"), Ownership())
    np.testing.assert_allclose(found["w"], 2.0)


def test_a_reply_without_its_part_names_the_site() -> None:
    former = tensors(0)
    sent = {site: OWNERSHIP.contribution(site, former) for site in "AB"}
    for name, words in (("w", "B sent no w"), ("judge", "B sent no judge"), ("rows", "B sent no rows")):
        broken = {**sent, "B": {key: value for key, value in sent["B"].items() if key != name}}
        updates = {site: SiteUpdate(weights, 1, 1, {}) for site, weights in broken.items()}
        with pytest.raises(ShapeError, match=words):
            aggregate(former, updates, shares(updates, "steps"), OWNERSHIP)
    updates = {"A": SiteUpdate({**sent["A"], "rows": former["rows"]}, 1, 1, {})}
    with pytest.raises(ShapeError, match=r"rows: A sent \(4, 2\), its row is \(1, 2\)"):
        aggregate(former, updates, {"A": 1.0}, OWNERSHIP)


def style(scale: float) -> Style:
    levels = scale * np.linspace(-2, 2, len(QUANTILE_LEVELS))
    return Style(quantiles=levels[None], offset=np.ones(1), n_cases=3)


def plans(kind: str, *, reference: str = "B", finetune: bool = False, **options: Any) -> dict[str, Any]:
    section = FedHarmSection(
        kind=kind,
        harmonizer=options,
        reference=reference,
        styles={site: style(1 + 0.1 * index) for index, site in enumerate("ABC")},
        schedule=Schedule(phases="finetune" if finetune else "frozen"),
    )
    return with_section({"configurations": {"2d": {"patch_size": [16, 16]}}}, section, ("2d",))


def own(kind: str, phase: str = "harmonizer", **details: Any) -> Ownership:
    return ownership_of(plans(kind, **details), "2d", phase)


def beginnings(names: frozenset[str]) -> set[str]:
    return {name.split(".")[1] for name in names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["harmonizer", "segmenter"])
def test_polarity_and_gate_are_rows_whatever_the_kind(kind: str, phase: str) -> None:
    found = own(kind, phase)
    assert found.bank == ("A", "B", "C")
    assert found.rows == {"harmonizer.bank_polarity", "harmonizer.bank_gate"}
    assert not found.rows & found.fixed


def test_the_diffusion_harmonizer_is_trained_at_the_reference_alone() -> None:
    found = own("diffusion")
    assert beginnings(found.reference_only) == {"network", "style_code", "polarity_judge"}
    assert found.reference_sites == {"B"}
    assert found.idle == frozenset(), "the others vote"
    assert own("diffusion", polarity=False).idle == {"A", "C"}


def test_the_cyclegan_is_trained_at_the_reference_alone_unless_everywhere() -> None:
    networks = {"generator", "reference_discriminator"}
    assert beginnings(own("cyclegan").reference_only) == {"polarity_judge", *networks}
    assert own("cyclegan", polarity=False).idle == {"A", "C"}
    assert beginnings(own("cyclegan", train_everywhere=True).reference_only) == {"polarity_judge"}
    alone = own("cyclegan", train_everywhere=True, pseudo_references=False)
    assert beginnings(alone.reference_only) == {"polarity_judge", "reference_discriminator"}
    assert own("cyclegan", train_everywhere=True, polarity=False).reference_only == frozenset()
    assert own("curve").reference_only == frozenset()


def test_the_nearest_site_stands_for_a_consensus() -> None:
    assert own("diffusion", reference="consensus").reference_sites == {"B"}


def test_the_segmenter_phase_leaves_the_harmonizer_alone_unless_it_is_finetuned() -> None:
    frozen = own("cyclegan", "segmenter")
    assert {"generator", "reference_discriminator", "trained_epochs", "bank_quantiles"} <= beginnings(frozen.fixed)
    assert frozen.reference_only == frozenset()
    tuned = own("cyclegan", "segmenter", finetune=True)
    assert beginnings(frozen.fixed) - beginnings(tuned.fixed) == {"generator"}
