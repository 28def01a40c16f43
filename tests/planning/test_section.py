"""The fedharm section of the plans: what its fields mean together, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.planning.section import PHASES, FedHarmSection, Schedule, private_judge
from nnunet_fedharm.privacy.options import PrivacyOptions


@given(harmonizer=st.integers(1, 60), segmenter=st.integers(1, 60), every=st.integers(1, 70))
def test_alternating_blocks_spend_both_budgets_evenly(harmonizer: int, segmenter: int, every: int) -> None:
    schedule = Schedule(
        phases="alternate", harmonizer_epochs=harmonizer, segmenter_epochs=segmenter, alternate_every=every
    )
    due = [schedule.harmonizer_epochs_before(epoch) for epoch in range(segmenter)]
    assert due[0] >= 1
    assert due[-1] == harmonizer
    assert all(later >= earlier for earlier, later in pairwise(due))
    blocks = sorted(set(range(0, segmenter, every)))
    sizes = [due[start] - (due[start - 1] if start else 0) for start in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert all(due[epoch] == due[epoch - 1] for epoch in range(1, segmenter) if epoch not in blocks)


@pytest.mark.parametrize("phases", ["frozen", "finetune"])
def test_other_phases_need_the_whole_harmonizer_first(phases: str) -> None:
    assert Schedule(phases=phases, harmonizer_epochs=7).harmonizer_epochs_before(0) == 7


def test_the_section_survives_json() -> None:
    section = FedHarmSection(kind="curve", schedule=Schedule(phases="alternate", harmonizer_epochs=3, seed=2))
    assert FedHarmSection.from_dict(json.loads(json.dumps(section.to_dict()))) == section


def test_the_old_key_is_refused_with_what_to_write() -> None:
    data = FedHarmSection(kind="curve").to_dict()
    data["schedule"]["finetune_harmonizer"] = True
    with pytest.raises(PlanError, match=r'\'finetune_harmonizer\'\. Write "phases": "finetune" instead of true'):
        FedHarmSection.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": "together"}, f"choose one of {', '.join(PHASES)}"),
        ({"phases": "alternate"}, "nothing to alternate with"),
        ({"alternate_every": 0}, "alternate_every must be >= 1"),
        ({"finetune_lr_factor": 0.0}, "finetune_lr_factor must be > 0"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Schedule(**changes)


def test_epsilon_and_delta_stand_beside_their_unit() -> None:
    section = FedHarmSection(kind="none", privacy=PrivacyOptions(epsilon=3.0, delta=1e-4))
    written = section.to_dict()
    assert (written["privacy"]["epsilon"], written["privacy"]["delta"], written["privacy"]["unit"]) == (
        3.0,
        1e-4,
        "patient",
    )
    assert FedHarmSection.from_dict(written) == section
    assert written["privacy"]["unit"] == "patient", "reading changes nothing"
    with pytest.raises(PlanError, match="not by patient"):
        FedHarmSection.from_dict({**written, "privacy": {**written["privacy"], "unit": "patch"}})


def test_only_a_private_judge_from_random_weights_is_warned_of() -> None:
    against = private_judge("cyclegan", {}, private=True, start_from="")
    assert "The judge of cyclegan is a network that starts from random weights" in against
    for kind, private, start in (("curve", True, ""), ("cyclegan", False, ""), ("polarity", True, "public")):
        assert private_judge(kind, {}, private=private, start_from=start) == ""
    for options in ({"judge": "linear"}, {"polarity": False}):
        assert private_judge("diffusion", options, private=True, start_from="") == ""
