"""Rules for the values that `plan` writes: lengths and sizes for data and device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import AT_REFERENCE, KINDS, LEARNED, build_harmonizer
from nnunet_fedharm.harmonizers.judges import JUDGES
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.planning.cost import Convolution, cost_ratio, harmonizer_convolutions, segmenter_convolutions
from nnunet_fedharm.planning.defaults import (
    CYCLEGAN_SIZES,
    DIFFUSION_SIZES,
    LARGEST_PREDICTION,
    LARGEST_TRAINING,
    MOST_STEPS,
    complete_options,
    complete_schedule,
    suggest_gpu_memory,
    suggest_options,
    suggest_schedule,
)
from nnunet_fedharm.planning.explain import explain, markdown
from nnunet_fedharm.planning.section import FedHarmSection, Schedule, with_section
from nnunet_fedharm.planning.situation import Device, Situation, find_device, situation_of

GPU, CPU = Device("cuda", 24.0, 8), Device("cpu", None, 2)


def planned(patch: tuple[int, ...], features: list[int], batch: int = 2) -> dict[str, Any]:
    """A configuration as nnU-Net's planner writes it."""
    dims, stages = len(patch), len(features)
    return {
        "patch_size": list(patch),
        "batch_size": batch,
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": features,
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * stages,
                "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def style(shift: float, cases: int) -> Style:
    return Style(np.linspace(-2, 2, len(QUANTILE_LEVELS))[None] + shift, np.array([1.0]), cases)


STYLES = {"A": style(0.0, 60), "B": style(0.2, 40), "C": style(-0.6, 20)}
LARGE = planned((40, 56, 40), [32, 64, 128, 256])
SMALL = planned((32, 40, 32), [8, 16, 32, 64])
FLAT = planned((256, 256), [32, 64, 128, 256, 512, 512], batch=12)


def situation(
    kind: str, configuration: dict[str, Any] = LARGE, device: Device = CPU, reference: str = "A"
) -> Situation:
    return situation_of(configuration, kind=kind, reference=reference, styles=STYLES, device=device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_is_linear_unless_asked_otherwise(kind: str) -> None:
    case = situation(kind, SMALL)
    if kind not in AT_REFERENCE:
        assert "judge" not in complete_options(case, {})
        return
    assert complete_options(case, {})["judge"] == "linear"
    assert complete_options(case, {"judge": "network"})["judge"] == "network"
    steps = {judge: complete_schedule(replace(case, judge=judge), {}).harmonizer_epochs for judge in JUDGES}
    assert steps["linear"] < steps["network"] if kind == "polarity" else steps["linear"] == steps["network"]
    private = complete_schedule(replace(case, judge="linear", private=True), {"iterations_per_epoch": 8})
    assert kind != "polarity" or private.harmonizer_epochs == 3, "24 steps: each costs the segmenter privacy"
    build_harmonizer(
        kind, complete_options(case, {}), num_channels=1, spatial_dims=3, styles=list(STYLES.values()),
        reference=STYLES["A"],
    )  # fmt: skip


def test_the_count_of_convolutions_is_the_networks_own() -> None:
    found = segmenter_convolutions(planned((16, 16), [4, 8]), 1, 3)
    # Encoder 2 + 2, transposed 1, decoder 2, head 1.
    assert found == [
        Convolution(1, 4, 9, (16, 16)),
        Convolution(4, 4, 9, (16, 16)),
        Convolution(4, 8, 9, (8, 8)),
        Convolution(8, 8, 9, (8, 8)),
        Convolution(8, 4, 4, (8, 8)),
        Convolution(8, 4, 9, (16, 16)),
        Convolution(4, 4, 9, (16, 16)),
        Convolution(4, 3, 1, (16, 16)),
    ]
    assert {c.size for c in harmonizer_convolutions("cyclegan", {}, channels=2, patch_size=(8, 12))} == {(8, 12)}
    once = harmonizer_convolutions("diffusion", {"width": 4, "depth": 1}, channels=1, patch_size=(8, 8, 8))
    twice = harmonizer_convolutions(
        "diffusion", {"width": 4, "depth": 1, "n_steps": 2}, channels=1, patch_size=(8, 8, 8)
    )
    assert twice == once * 2


@pytest.mark.parametrize(
    ("configuration", "kind", "sizes", "measured"),
    [
        # One CPU thread, prediction of one window (3d) or training-like batches of eight (2d); torch 2.14.
        (SMALL, "diffusion", {"width": 16, "depth": 3}, 1.54),
        (SMALL, "diffusion", {"width": 32, "depth": 3}, 1.80),
        (SMALL, "cyclegan", {"width": 16}, 1.19),
        (SMALL, "cyclegan", {"width": 32}, 1.40),
        (SMALL, "cyclegan", {"width": 8}, 1.10),
        (LARGE, "cyclegan", {"width": 16}, 1.10),
    ],
)
def test_the_count_follows_what_was_measured(
    configuration: dict[str, Any], kind: str, sizes: dict[str, Any], measured: float
) -> None:
    assert situation(kind, configuration).cost(sizes).prediction == pytest.approx(measured, rel=0.25)


def test_a_gate_that_costs_nothing_is_ratio_one() -> None:
    assert cost_ratio([Convolution(1, 1, 1, (4, 4))], [], batch_size=2, cpu=True).prediction == 1


@pytest.mark.parametrize("kind", ["diffusion", "cyclegan"])
@pytest.mark.parametrize("configuration", [LARGE, SMALL, FLAT])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_sizes_keep_to_the_limits_of_cost_or_are_the_cheapest(
    kind: str, configuration: dict[str, Any], device: Device
) -> None:
    case = situation(kind, configuration, device)
    chosen = {name: choice.value for name, choice in suggest_options(case, {}).items()}
    cost = case.cost(chosen)
    fits = cost.prediction <= LARGEST_PREDICTION and cost.training <= LARGEST_TRAINING
    names = ("width", "depth") if kind == "diffusion" else ("width", "dilations")
    for size in DIFFUSION_SIZES if kind == "diffusion" else CYCLEGAN_SIZES:
        other = case.cost(dict(zip(names, size, strict=True)))
        assert fits or other.prediction >= cost.prediction


def test_the_experiments_size_is_kept_where_it_is_cheap_enough() -> None:
    choices = suggest_options(situation("diffusion"), {})
    assert {name: choice.value for name, choice in choices.items()} == {"width": 16, "depth": 3, "judge": "linear"}
    assert "as in the experiments; a training step about 1." in choices["width"].reason


def test_a_given_width_is_kept_and_the_depth_follows_it() -> None:
    choices = suggest_options(situation("diffusion", SMALL), {"width": 8})
    assert set(choices) == {"depth", "judge"}
    assert set(suggest_options(situation("diffusion", SMALL), {"width": 10})) == {"judge"}
    assert suggest_options(situation("curve", SMALL), {}) == {}


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    images=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    batch=st.integers(1, 64),
    iterations=st.integers(1, 250),
    epochs=st.integers(1, 1000),
    device=st.sampled_from([CPU, GPU]),
)
def test_any_data_get_a_valid_schedule_within_bounds(
    kind: str, images: list[int], batch: int, iterations: int, epochs: int, device: Device
) -> None:
    case = Situation(
        kind=kind,
        patch_size=(8, 8),
        batch_size=batch,
        channels=1,
        segmenter=[],
        images={f"S{index}": count for index, count in enumerate(images)},
        reference_sites=("S0",),
        device=device,
    )
    asked = {"iterations_per_epoch": iterations, "segmenter_epochs": epochs}
    schedule = complete_schedule(case, asked)
    assert (schedule.iterations_per_epoch, schedule.segmenter_epochs) == (iterations, epochs)
    steps = schedule.harmonizer_epochs * iterations
    assert (steps > 0) is (kind in LEARNED)
    assert steps <= max(MOST_STEPS[device.kind], 0) + iterations
    assert steps <= epochs * iterations + iterations


def test_the_lengths_are_explained_in_steps_and_patches() -> None:
    short = {"segmenter_epochs": 200}
    diffusion = suggest_schedule(situation("diffusion", device=GPU), short)["harmonizer_epochs"]
    assert diffusion.value == 12  # 60 images of A x 100 patches / batch of 2 / 250 iterations
    assert "100 patches from each of 60 training images of the reference" in diffusion.reason
    cyclegan = suggest_schedule(situation("cyclegan", device=GPU), short)["harmonizer_epochs"]
    assert cyclegan.reason == diffusion.reason  # both learn from the reference's images
    curve = suggest_schedule(situation("curve"), {})["harmonizer_epochs"]
    assert (curve.value, "5000 steps, a 50th of the segmenter's" in curve.reason) == (20, True)
    least = suggest_schedule(situation("curve", FLAT), {"segmenter_epochs": 40})["harmonizer_epochs"]
    assert (least.value, "the least that the experiments call for" in least.reason) == (2, True)
    long = suggest_schedule(situation("cyclegan"), {"segmenter_epochs": 2000})["harmonizer_epochs"]
    assert "the most on a CPU" in long.reason
    assert suggest_schedule(situation("nyul"), {})["harmonizer_epochs"].value == 0


def test_short_trainings_get_less_momentum_and_long_ones_nnunets_own() -> None:
    short = complete_schedule(situation("curve"), {"segmenter_epochs": 16, "iterations_per_epoch": 40})
    assert (short.momentum, short.initial_lr) == (0.9, 0.1)
    assert short.harmonizer_epochs * 40 == 640  # not longer than the segmenter phase
    long = complete_schedule(situation("curve"), {})
    assert (long.momentum, long.initial_lr, long.segmenter_epochs) == (0.99, 0.01, 1000)
    kept = complete_schedule(situation("curve"), {"segmenter_epochs": 16, "iterations_per_epoch": 40, "momentum": 0.95})
    assert kept.initial_lr == 0.01


def test_a_consensus_learns_from_the_site_nearest_to_it() -> None:
    assert situation("diffusion", reference="consensus").reference_sites == ("A",)
    assert situation("diffusion", reference="C").learning_images == 20
    assert situation("curve", reference="C").learning_images == 120


def test_a_small_gpu_is_planned_for_and_a_large_one_gets_nnunets_target() -> None:
    assert suggest_gpu_memory(Device("cuda", 6.0)).value == 4.8
    assert suggest_gpu_memory(GPU).value == suggest_gpu_memory(CPU).value == 8.0


def test_devices_are_found_by_name() -> None:
    assert find_device("cpu").kind == "cpu"
    assert find_device("cpu").cores >= 1
    assert find_device("cuda").kind == "cuda"
    with pytest.raises(PlanError, match="choose auto, cpu or cuda"):
        find_device("tpu")


def test_every_value_is_explained_and_what_was_set_by_hand_is_said_so() -> None:
    case = situation("diffusion", SMALL)
    sizes = {name: choice.value for name, choice in suggest_options(case, {}).items()}
    schedule = replace(complete_schedule(case, {}), harmonizer_lr=0.5)
    section = FedHarmSection(
        kind="diffusion", harmonizer={**sizes, "noise": 0.3}, reference="A", styles=STYLES, schedule=schedule
    )
    plans = with_section({"configurations": {"3d_fullres": SMALL}}, section, ("3d_fullres",))
    rows = {row.name: row for row in explain(plans, CPU)["3d_fullres"]}
    assert {*Schedule.__dataclass_fields__, "width", "depth", "noise", "cost", "patch_size"} <= set(rows)
    assert all(row.meaning and row.reason for row in rows.values())
    assert rows["harmonizer_lr"].reason.startswith("set by hand, or for another device; the rule for this one: 0.001")
    assert rows["noise"].reason == "set by hand"
    assert "by hand" not in "".join(rows[name].reason for name in ("width", "depth", "harmonizer_epochs", "momentum"))
    assert (
        rows["harmonizer_epochs"].meaning
        == "Epochs of the harmonizer phase, which needs no labels; 0 for harmonizers that have nothing to learn."
    )
    page = markdown("P", {"3d_fullres": list(rows.values())}, CPU)
    assert all(line.count("|") == 5 for line in page.splitlines() if line.startswith("| `"))
