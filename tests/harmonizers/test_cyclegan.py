"""CycleGAN: parts of the loss, balance of the discriminators, what stays at the site, and learning on a toy."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from nnunet_fedharm.errors import FedHarmError, PlanError
from nnunet_fedharm.harmonizers import build_harmonizer
from nnunet_fedharm.harmonizers.cyclegan import CycleGANHarmonizer
from nnunet_fedharm.harmonizers.cyclegan_training import (
    HUBER,
    JUDGE_STEPS,
    PARTS,
    CycleGANTraining,
    distance,
    fake_loss,
    real_loss,
)
from nnunet_fedharm.harmonizers.judges import dress
from nnunet_fedharm.harmonizers.polarity import dressed_references
from nnunet_fedharm.harmonizers.resnet import MirrorConv, PatchDiscriminator, ResidualNetwork
from tests.harmonizers.test_harmonizers import style

CLINIC, REFERENCE = 1, 0
SMALL = {"width": 6, "dilations": [1, 2], "discriminator_width": 4}


def gan(spatial_dims: int = 2, channels: int = 1, **options: Any) -> CycleGANHarmonizer:
    styles = [style(1, 1, 0, channels), style(1.3, 0.8, 0.2, channels), style(0.8, 1.1, -0.3, channels)]
    built = build_harmonizer(
        "cyclegan",
        {**SMALL, **options},
        num_channels=channels,
        spatial_dims=spatial_dims,
        styles=styles,
        reference=styles[REFERENCE],
    )
    assert isinstance(built, CycleGANHarmonizer)
    return built


def everywhere(**options: Any) -> CycleGANHarmonizer:
    """Every site trains, pseudo-sources differ by their tone alone: the parts one by one."""
    paper = {"adversarial_weight": 1.0, "cycle_weight": 10.0, "paired_weight": 0.0}
    return gan(**{"train_everywhere": True, "appearance": False, **paper, **options})


def training(harmonizer: CycleGANHarmonizer, lr: float = 1e-3) -> CycleGANTraining:
    return harmonizer.make_training(lr=lr, total_epochs=10)


def blobs(seed: int, batch: int = 4, spatial_dims: int = 2, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, *([5] * spatial_dims), generator=generator)
    mode = "bicubic" if spatial_dims == 2 else "trilinear"
    image = torch.nn.functional.interpolate(coarse, size=[16] * spatial_dims, mode=mode)
    image[:, :, :2] = 0
    return image


def clinic(batch: int = 4) -> Tensor:
    return torch.full((batch,), CLINIC)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("dilation", [1, 3])
def test_mirroring_commutes_with_the_convolution(spatial_dims: int, dilation: int) -> None:
    convolution = MirrorConv(2, 3, spatial_dims=spatial_dims, dilation=dilation)
    image = blobs(0, 2, spatial_dims, 2)
    with torch.no_grad():
        torch.testing.assert_close(convolution(image.flip(2)).flip(2), convolution(image))


def test_the_residual_starts_at_zero_and_its_gradient_does_not() -> None:
    network = ResidualNetwork(channels=1, spatial_dims=2, style_size=3, width=4, dilations=(1, 2))
    output = network(blobs(0), torch.ones(4, 3))
    assert (output == 0).all()
    zeroed = [name for name, parameter in network.named_parameters() if "weight" in name and not parameter.any()]
    assert zeroed == ["tail.weight"]
    (output - 1).square().sum().backward()
    assert network.tail.weight.grad is not None
    assert network.tail.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_discriminator_judges_even_the_thinnest_patch(spatial_dims: int) -> None:
    judge = PatchDiscriminator(channels=2, spatial_dims=spatial_dims, width=4, style_size=3)
    assert judge(torch.randn(2, 2, 1, *([9] * (spatial_dims - 1))), torch.ones(2, 3)).shape[:3] == (2, 1, 1)


def test_the_losses_have_the_values_of_their_formulas() -> None:
    score = torch.tensor([1.0, 0.0, 0.5])
    assert float(real_loss(score)) == pytest.approx((0 + 1 + 0.25) / 3)
    assert float(fake_loss(score)) == pytest.approx((1 + 0 + 0.25) / 3)
    image, target = torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[3.0, 0.0]]])
    assert float(distance(image, target, target)) == pytest.approx(2.0 - HUBER / 2)  # the zero of `target` is outside
    assert float(distance(image, image + 0.1, image)) == pytest.approx(0.1**2 / (2 * HUBER))
    assert float(distance(image, target, torch.zeros_like(image))) == 0.0


def test_every_part_of_the_loss_is_there_and_zero_weights_turn_it_off() -> None:
    parts = training(everywhere(paired_weight=1.0)).step(blobs(0), clinic(), generator())
    assert set(parts) == set(PARTS)
    assert parts["loss"] == pytest.approx(sum(parts[name] for name in ("adversarial", "cycle", "identity", "paired")))
    assert parts["adversarial"] > 0
    off = training(everywhere(cycle_weight=0.0, identity_weight=0.0))
    for _ in range(3):
        parts = off.step(blobs(0), clinic(), generator())
    assert parts["cycle"] == parts["identity"] == parts["paired"] == 0.0


def test_pseudo_references_carry_the_references_quantiles() -> None:
    dense = torch.randn(1, 1, 128, 128, generator=generator())
    shown = dense.sign() * dense.abs() ** 1.3 * 0.8 + 0.2
    reals = training(everywhere()).reals(shown, torch.tensor([CLINIC]), None)
    assert reals is not None
    assert float((reals - dense).abs().mean()) < 0.05


def test_genuine_references_are_preferred_and_own_patches_of_the_reference_are_genuine() -> None:
    trained = training(everywhere())
    genuine = blobs(9)
    assert trained.reals(blobs(0), clinic(), genuine) is genuine
    own = trained.reals(blobs(0), torch.full((4,), REFERENCE), None)
    assert own is not None
    assert torch.equal(own, blobs(0))


def test_pseudo_sources_show_another_sites_quantiles_and_know_their_answer() -> None:
    trained = training(everywhere())
    image = torch.randn(4, 1, 64, 64, generator=generator())
    sources = trained.sources(image, torch.tensor([REFERENCE, REFERENCE, CLINIC, REFERENCE]), generator(1))
    assert sources is not None
    assert sources.paired.tolist() == [True, True, False, True]
    assert torch.equal(sources.image[2], image[2])
    assert torch.equal(sources.origin, image)
    assert REFERENCE not in sources.sites.tolist()
    for index in (0, 1, 3):
        expected = trained.harmonizer.bank_quantiles[sources.sites[index], 0]
        found = torch.quantile(sources.image[index, 0].flatten(), torch.linspace(0.01, 0.99, 33))
        assert float((found - expected).abs().mean()) < 0.1


@pytest.mark.parametrize(
    ("options", "references", "trained"),
    [
        ({}, False, True),
        ({"pseudo_references": False}, True, True),
        ({"pseudo_references": False}, False, False),
        ({"pseudo_references": False, "one_sided": True}, False, True),
    ],
)
def test_a_discriminator_without_both_sides_is_left_alone_unless_told_otherwise(
    options: dict[str, Any], references: bool, trained: bool
) -> None:
    harmonizer = everywhere(**options)
    before = copy.deepcopy(harmonizer.reference_discriminator.state_dict())
    training(harmonizer).step(blobs(0), clinic(), generator(), blobs(1) if references else None)
    after = harmonizer.reference_discriminator.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before) is trained
    assert harmonizer.generator.tail.weight.abs().sum() > 0  # G learns from the judge in any case


def test_without_pseudo_sources_the_references_own_patches_are_no_sources() -> None:
    trained = training(everywhere(pseudo_sources=False))
    mixed = trained.sources(blobs(0), torch.tensor([REFERENCE, CLINIC, 2, REFERENCE]), generator())
    assert mixed is not None
    assert mixed.sites.tolist() == [CLINIC, 2]
    assert trained.sources(blobs(0), torch.full((4,), REFERENCE), generator()) is None


def test_both_discriminators_see_as_many_reals_as_fakes() -> None:
    trained = training(everywhere())
    seen: list[tuple[str, int]] = []
    for name, judge in (
        ("reference", trained.harmonizer.reference_discriminator),
        ("site", trained.site_discriminator),
    ):
        judge.register_forward_hook(lambda module, inputs, output, name=name: seen.append((name, len(inputs[0]))))
    sources = trained.sources(blobs(0), clinic(), generator())
    reals = trained.reals(blobs(0), clinic(), None)
    trained.discriminator_loss(sources, reals, blobs(2), blobs(3))
    assert sorted(seen) == [("reference", 4), ("reference", 4), ("site", 4), ("site", 4)]


@pytest.mark.parametrize(
    "options", [{}, {"train_everywhere": True}, {"train_everywhere": True, "pseudo_references": False}]
)
def test_only_the_references_site_moves_what_is_declared_as_trained_there(options: dict[str, Any]) -> None:
    at_clinic = training(gan(**options))
    before = copy.deepcopy(at_clinic.harmonizer.state_dict())
    at_clinic.step(blobs(0), clinic(), generator(), None)
    prefixes = at_clinic.harmonizer.trained_at_reference()
    assert "polarity_judge." in prefixes
    for name, tensor in at_clinic.harmonizer.state_dict().items():
        if name.startswith(prefixes):
            assert torch.equal(before[name], tensor), name


def test_a_site_without_the_references_images_votes_and_changes_nothing_else() -> None:
    at_clinic = training(gan())
    before = copy.deepcopy(at_clinic.harmonizer.state_dict())
    parts = at_clinic.step(blobs(0), clinic(), generator(), None)
    assert set(parts) == set(PARTS)
    assert all(math.isnan(value) for value in parts.values()), "a vote has no loss"
    moved = [
        name for name, tensor in at_clinic.harmonizer.state_dict().items() if not torch.equal(before[name], tensor)
    ]
    assert moved == ["bank_polarity"]


def test_by_default_a_centralized_step_is_the_references_step_of_a_federation() -> None:
    alone, pooled = training(gan()), training(gan())
    for seed in range(3):
        alone.step(blobs(seed), torch.full((4,), REFERENCE), generator(seed), blobs(seed + 50))
        pooled.step(blobs(seed), torch.tensor([0, 1, 2, 1]), generator(seed), blobs(seed + 50))
    for name, tensor in alone.harmonizer.state_dict().items():
        assert name == "bank_polarity" or torch.equal(tensor, pooled.harmonizer.state_dict()[name]), name


def test_without_a_judge_only_the_reference_takes_part() -> None:
    assert [gan(polarity=False).trains_on(site) for site in range(3)] == [True, False, False]
    assert all(gan().trains_on(site) for site in range(3))
    assert all(everywhere(polarity=False).trains_on(site) for site in range(3))


def test_pseudo_sources_get_blur_and_noise_inside_the_mask_alone() -> None:
    plain = training(gan(appearance=False)).pseudo_sources(blobs(0), generator())
    made = training(gan()).pseudo_sources(blobs(0), generator())
    assert made.paired.all()
    assert torch.equal(made.origin, blobs(0))
    assert (made.image[:, :, :2] == 0).all()
    change = (made.image - plain.image)[:, :, 2:]
    assert 0.01 < float(change.std()) < 0.5


def test_a_site_moves_its_own_row_of_the_votes_alone() -> None:
    at_clinic = training(everywhere())
    at_clinic.step(blobs(0), clinic(), generator(), None)
    votes = at_clinic.harmonizer.bank_polarity
    assert (votes[[REFERENCE, 2]] == 1.0).all()
    assert (votes[CLINIC] < 1.0).all()


def test_the_references_of_a_consensus_are_dressed_in_its_quantiles() -> None:
    harmonizer = everywhere()
    harmonizer.reference_quantiles.copy_((harmonizer.bank_quantiles[0] + harmonizer.bank_quantiles[1]) / 2)
    trained = training(harmonizer)
    assert len(trained.reference_sites) == 1
    dressed = dressed_references(trained.harmonizer, blobs(1))
    assert not torch.equal(dressed, blobs(1))
    assert torch.equal(dressed_references(everywhere(), blobs(1)), blobs(1))


def test_the_backward_generator_stays_at_the_site_unless_the_plans_share_it() -> None:
    local, shared = everywhere(), everywhere(share_backward=True)
    assert not any("backward" in name for name in local.state_dict())
    assert any(name.startswith("shared_backward.generator") for name in shared.state_dict())
    assert set(training(local).state_dict()["local"]) == {
        name.removeprefix("shared_backward.") for name in shared.state_dict() if name.startswith("shared_backward.")
    }
    assert training(shared).state_dict()["local"] == {}


def test_autocast_changes_the_residual_little_and_keeps_zeros() -> None:
    harmonizer = everywhere().eval()
    torch.nn.init.normal_(harmonizer.generator.tail.weight, std=0.1, generator=generator())
    harmonizer.bank_polarity[CLINIC] = -1.0
    harmonizer.set_batch_styles(clinic())
    with torch.no_grad():
        expected = harmonizer(blobs(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = harmonizer(blobs(0))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert (found[:, :, :2] == 0).all()
    with torch.no_grad():
        assert torch.equal(harmonizer(blobs(0)), expected)


def test_a_segmentation_loss_reaches_the_generator_alone() -> None:
    harmonizer = everywhere(share_backward=True)
    moved = {id(parameter) for parameter in harmonizer.mapping_parameters()}
    assert moved == {id(parameter) for parameter in harmonizer.generator.parameters()}


def test_an_interrupted_training_equals_an_uninterrupted_one() -> None:
    def steps(trained: CycleGANTraining, seeds: range) -> None:
        for seed in seeds:
            trained.set_epoch(seed)
            trained.step(blobs(seed), clinic(), generator(seed), blobs(seed + 50))

    whole = training(everywhere())
    steps(whole, range(4))
    first = training(everywhere())
    steps(first, range(2))
    network, state = copy.deepcopy(first.harmonizer.state_dict()), copy.deepcopy(first.state_dict())
    second = training(everywhere())
    second.harmonizer.load_state_dict(network)
    second.load_state_dict(state)
    steps(second, range(2, 4))
    for module in ("harmonizer", "backward", "site_discriminator"):
        expected = getattr(whole, module).state_dict()
        for name, tensor in getattr(second, module).state_dict().items():
            assert torch.equal(tensor, expected[name]), (module, name)


def test_some_steps_lower_the_cycle_error_of_a_generator_that_does_something() -> None:
    harmonizer = everywhere(adversarial_weight=0.1)
    torch.nn.init.normal_(harmonizer.generator.tail.weight, std=0.3, generator=generator())
    trained = training(harmonizer, lr=5e-3)
    cycles = [trained.step(blobs(seed), clinic(), generator(seed))["cycle"] for seed in range(30)]
    assert sum(cycles[-5:]) < 0.7 * sum(cycles[:5])


def test_paired_pseudo_sources_teach_the_tone_of_the_other_sites() -> None:
    harmonizer = everywhere(paired_weight=10.0, adversarial_weight=0.1, polarity=False)
    trained = training(harmonizer, lr=1e-2)
    for seed in range(60):
        trained.step(blobs(seed), torch.full((4,), REFERENCE), generator(seed), blobs(seed))
    image, upright = blobs(5000), torch.zeros(4, 1, dtype=torch.bool)
    bank = harmonizer.bank_quantiles
    shown = dress(image, bank[REFERENCE].expand(4, -1, -1), bank[clinic()], upright)
    with torch.no_grad():
        after = distance(trained.forth(shown, harmonizer.bank_source(clinic())), image, image)
    assert after < 0.6 * distance(shown, image, image)


def test_a_ddp_process_without_both_sides_still_meets_the_others(tmp_path: Path) -> None:
    trained = training(everywhere(pseudo_sources=False))
    before = copy.deepcopy(trained.harmonizer.reference_discriminator.state_dict())
    met: list[str] = []
    descend = trained.descend
    trained.descend = lambda name, loss: (met.append(name), descend(name, loss))[1]  # type: ignore[method-assign, func-returns-value]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        trained.step(blobs(0), torch.full((4,), REFERENCE), generator(), blobs(1))
        trained.step(blobs(0), clinic(), generator(), blobs(1))
    finally:
        dist.destroy_process_group()
    assert met == [*["polarity"] * JUDGE_STEPS, "generators", "discriminators"] * 2
    alone = training(everywhere(pseudo_sources=False))
    alone.step(blobs(0), torch.full((4,), REFERENCE), generator(), blobs(1))
    after = alone.harmonizer.reference_discriminator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes() -> None:
    trained = training(everywhere())
    with torch.no_grad():
        trained.harmonizer.generator.tail.bias.fill_(float("inf"))
    before = copy.deepcopy(trained.harmonizer.generator.state_dict())
    with pytest.raises(FedHarmError, match=r"loss \(generators\) became (nan|inf)"):
        trained.step(blobs(0), clinic(), generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.harmonizer.generator.state_dict().items())


def test_options_out_of_range_are_refused_with_the_remedy() -> None:
    with pytest.raises(PlanError, match="cycle_weight must be >= 0"):
        gan(cycle_weight=-1.0)
    with pytest.raises(PlanError, match="dilations needs at least one"):
        gan(dilations=[])
    with pytest.raises(PlanError, match="one_sided is the mode without pseudo_references"):
        everywhere(one_sided=True)
    with pytest.raises(PlanError, match="share_backward are for training at every site"):
        gan(share_backward=True)
    with pytest.raises(PlanError, match="without them set train_everywhere"):
        gan(pseudo_sources=False)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_blocks_that_are_computed_again_give_the_same_gradients_for_less_memory(
    spatial_dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = ResidualNetwork(channels=1, spatial_dims=spatial_dims, style_size=3, width=8, dilations=(1, 2, 4))
    torch.nn.init.normal_(network.tail.weight)
    image, style = torch.randn(2, 1, *[20] * spatial_dims), torch.randn(2, 3)

    def gradients() -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(network(image, style), style).square().mean()
            size = sum(kept.values())  # before the backward pass computes anything again
        loss.backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None], size

    whole, size = gradients()
    monkeypatch.setattr("nnunet_fedharm.harmonizers.resnet.AGAIN_ABOVE", 0)
    again, smaller = gradients()
    assert len(again) == len(whole)
    for one, other in zip(again, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert smaller < 0.6 * size
