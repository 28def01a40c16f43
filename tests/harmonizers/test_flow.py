"""The diffusion harmonizer: appearances, networks, bridge."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import build_harmonizer
from nnunet_fedharm.harmonizers.appearance import (
    AppearanceOptions,
    random_appearance,
    random_noise,
    random_rising_curve,
    random_tone,
    spline_displacement,
    standardised,
)
from nnunet_fedharm.harmonizers.flow import FlowConfig, FlowHarmonizer, in_blocks, velocity_loss
from nnunet_fedharm.harmonizers.style import Style, average_styles
from nnunet_fedharm.harmonizers.tone import apply_displacement, knot_positions
from tests.harmonizers.test_harmonizers import make, padded_noise, style

SHARES = ("bank_share", "monotone_share", "inverted_share", "free_share", "gain", "blur", "noise")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_quantiles(count: int = 5) -> Tensor:
    return torch.as_tensor(style(1, 1, 0).quantiles, dtype=torch.float32).expand(count, 1, -1)


def flow(spatial_dims: int = 2, channels: int = 1, **options: object) -> FlowHarmonizer:
    """A flow that does something: the layer that starts at zero is random."""
    harmonizer = make("diffusion", spatial_dims, channels, **options)
    assert isinstance(harmonizer, FlowHarmonizer)
    for name, parameter in harmonizer.named_parameters():
        if "conv_out" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=seeded(2))
    return harmonizer.eval()


def smooth_patches(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Patches with structure, of about unit variance, (batch, 1, size, size)."""
    coarse = torch.randn(batch, 1, size // 4, size // 4, generator=generator)
    return 1.3 * torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


# Appearances


def test_a_spline_through_a_straight_line_is_that_line() -> None:
    low, high = torch.full((1, 1), -2.0), torch.full((1, 1), 2.0)
    controls = torch.linspace(-2, 2, 6).reshape(1, 1, 6)
    torch.testing.assert_close(spline_displacement(controls, low, high), torch.zeros(1, 1, 129), atol=1e-4, rtol=0)


def test_a_falling_curve_keeps_falling_outside_the_styles_range() -> None:
    low, high = torch.full((8, 1), -2.0), torch.full((8, 1), 2.0)
    displacement = spline_displacement(-random_rising_curve(8, 1, seeded()), low, high)
    curve = knot_positions(129, displacement) + displacement
    ends = torch.cat([curve[..., :40].diff(), curve[..., -40:].diff()])
    assert (ends <= 1e-5).all()


def test_the_new_style_is_the_one_that_a_changed_image_has() -> None:
    own = own_quantiles()
    displacement, predicted = random_tone(
        own, own[:1], AppearanceOptions(bank_share=0.0, inverted_share=0.5), seeded(3)
    )
    normal = torch.randn(5, 1, 20000, generator=seeded(1))
    changed = normal + apply_displacement(normal, displacement)
    levels = torch.linspace(0.01, 0.99, 33)
    measured = torch.quantile(changed, levels, dim=-1).movedim(0, -1)
    torch.testing.assert_close(measured[..., 3:-3], predicted[..., 3:-3], atol=0.25, rtol=0)
    assert (changed.mean(dim=-1).abs() < 0.2).all()
    assert ((changed.std(dim=-1) - 1).abs() < 0.3).all()


def test_standardising_the_identity_changes_nothing() -> None:
    own = own_quantiles()
    displacement, quantiles = standardised(torch.zeros(5, 1, 129), own)
    torch.testing.assert_close(displacement, torch.zeros(5, 1, 129), atol=1e-5, rtol=0)
    torch.testing.assert_close(quantiles, own)


def test_appearances_follow_the_generator_and_leave_padding_alone() -> None:
    image = padded_noise(3)
    own = own_quantiles(2)
    arguments = (image, image != 0, own, own[:1], torch.full((1, 1), 2.5), AppearanceOptions())
    first, _ = random_appearance(*arguments, seeded())
    again, _ = random_appearance(*arguments, seeded())
    other, _ = random_appearance(*arguments, seeded(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, :, :4] == 0).all()


def test_inverted_appearances_are_inverted() -> None:
    image = torch.randn(6, 1, 24, 24, generator=seeded())
    own = own_quantiles(6)
    options = AppearanceOptions(**dict.fromkeys(SHARES, 0.0) | {"inverted_share": 1.0})
    changed, _ = random_appearance(image, image != 0, own, own[:1], torch.full((1, 1), 2.5), options, seeded())
    for one, other in zip(image, changed, strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] < -0.7


def test_noise_has_the_drawn_strength() -> None:
    changed = random_noise(torch.zeros(50, 1, 30, 30), AppearanceOptions(noise=0.2), seeded())
    levels = changed.flatten(1).std(dim=1)
    assert levels.max() < 0.21
    assert levels.std() > 0.03


# The bridge


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_overlapping_windows_agree_away_from_borders_whatever_their_offset(spatial_dims: int, n_steps: int) -> None:
    harmonizer = flow(spatial_dims, width=4, depth=1, n_steps=n_steps)
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    reach, shift = harmonizer.reach, 7  # an odd shift: a network with strides would disagree
    side = 2 * reach + shift + 8
    image = torch.randn(1, 1, side, *([6] * (spatial_dims - 1)), generator=seeded(5))
    with torch.no_grad():
        left, right = harmonizer(image[:, :, : side - shift]), harmonizer(image[:, :, shift:])
    inner_left, inner_right = left[:, :, shift + reach : side - shift - reach], right[:, :, reach : -reach - shift]
    assert inner_left.shape[2] >= 8 - shift
    torch.testing.assert_close(inner_left, inner_right, atol=1e-5, rtol=0)
    assert (inner_left - image[:, :, shift + reach : side - shift - reach]).abs().mean() > 1e-3


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("axis", [2, 3])
def test_mirroring_commutes_in_2d_and_3d(spatial_dims: int, axis: int) -> None:
    harmonizer, image = flow(spatial_dims, width=4), padded_noise(spatial_dims)
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    with torch.no_grad():
        torch.testing.assert_close(harmonizer(image.flip(axis)).flip(axis), harmonizer(image), atol=1e-4, rtol=1e-4)


def test_a_batch_equals_its_elements_one_by_one_and_padding_stays_zero() -> None:
    harmonizer, image = flow(channels=2), padded_noise(2, channels=2, batch=3)
    harmonizer.set_source(style(1.3, 0.8, 0.2, channels=2))
    with torch.no_grad():
        together = harmonizer(image)
        alone = torch.cat([harmonizer(image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[:, :, :4] == 0).all()
    assert (together[:, :, 4:] - image[:, :, 4:]).abs().mean() > 0.01


def test_one_step_from_the_image_is_the_image_minus_the_velocity() -> None:
    harmonizer, image = flow(), padded_noise(2)
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    mask, one = image != 0, torch.ones(2)
    with torch.no_grad():
        quantiles = harmonizer.source_of(image, mask).quantiles
        matched = harmonizer._matched(image, mask, quantiles, one)
        velocity = harmonizer.velocity(image, matched, mask, one, harmonizer._code(quantiles, one))
        torch.testing.assert_close(harmonizer(image), image - mask * velocity)


def test_steps_of_a_constant_velocity_add_up_to_it_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    image = padded_noise(2)
    for n_steps in (1, 2, 4):
        harmonizer = flow(n_steps=n_steps)
        times: list[float] = []

        def constant(
            sample: Tensor,
            matched: Tensor,
            mask: Tensor,
            time: Tensor,
            code: Tensor,
            times: list[float] = times,
        ) -> Tensor:
            times.append(float(time[0]))
            return torch.full_like(sample, 0.5)

        monkeypatch.setattr(harmonizer, "velocity", constant)
        harmonizer.set_source(style(1.3, 0.8, 0.2))
        torch.testing.assert_close(harmonizer(image), image - 0.5 * (image != 0))
        assert times == pytest.approx([1 - step / n_steps for step in range(n_steps)])


def test_times_are_drawn_all_over_the_way_however_many_steps_and_at_its_start_alone_on_demand() -> None:
    spread, start = flow(n_steps=1)._draw_times(400, seeded()), flow(start_share=1.0)._draw_times(400, seeded())
    assert (start == 1).all()
    assert 0.4 < (spread == 1).float().mean() < 0.6
    assert 0 < spread.min() < 0.05


def test_two_calls_in_eval_mode_give_the_same_bits() -> None:
    harmonizer, image = flow(n_steps=2), padded_noise(2)
    with torch.no_grad():
        assert torch.equal(harmonizer(image), harmonizer(image))


def test_mixed_precision_keeps_the_images_dtype_and_its_values() -> None:
    harmonizer, image = flow(3, width=4), padded_noise(3)
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    with torch.no_grad():
        expected = harmonizer(image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = harmonizer(image)
    assert mixed.dtype == torch.float32
    assert (mixed - expected).abs().mean() < 0.05 * (expected - image).abs().mean()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_four_channels_are_harmonized_and_learned_together(spatial_dims: int) -> None:
    harmonizer = make("diffusion", spatial_dims, channels=4)
    image = padded_noise(spatial_dims, channels=4)
    loss = harmonizer.self_paired_loss(image, torch.tensor([0, 0]), seeded())
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [name for name, parameter in harmonizer.named_parameters() if parameter.grad is not None]
    assert any("conv_out" in name for name in gradients)


def test_the_reference_site_trains_and_the_others_vote_or_sit_out() -> None:
    assert [make("diffusion").trains_on(site) for site in range(3)] == [True, True, True]
    assert [make("diffusion", polarity=False).trains_on(site) for site in range(3)] == [True, False, False]


def test_with_a_consensus_the_nearest_site_trains() -> None:
    styles = [style(1, 1, 0.4), style(1, 1, 0.1), style(1, 1, -0.6)]
    consensus = average_styles(styles)
    harmonizer = build_harmonizer("diffusion", {}, num_channels=1, spatial_dims=2, styles=styles, reference=consensus)
    assert harmonizer.reference_sites() == [1]


def skewed_patches(batch: int, size: int, seed: int) -> Tensor:
    """Patches with more dark than bright, so that a patch tells whether it is upside down; (batch, 1, size, size)."""
    return torch.exp(smooth_patches(batch, size, seeded(seed))) / 2.16 - 0.76


def test_training_finds_the_inverted_site_and_brings_it_to_the_reference() -> None:
    levels = torch.linspace(0.01, 0.99, 33)
    reference = torch.quantile(skewed_patches(8, 48, 999), levels).numpy().astype(np.float64)[None]
    offset = np.array([2.5])
    # The other site shows the reference upside down, in another tone.
    other = lambda patches: -patches.sign() * patches.abs() ** 0.8  # noqa: E731
    upside_down = torch.quantile(other(skewed_patches(8, 48, 998)), levels).numpy().astype(np.float64)[None]
    styles = [Style(reference, offset, 8), Style(upside_down, offset, 8)]
    harmonizer = build_harmonizer(
        "diffusion", {"width": 8}, num_channels=1, spatial_dims=2, styles=styles, reference=styles[0]
    )
    training = harmonizer.make_training(lr=3e-3, total_epochs=1)
    for step in range(150):
        images = torch.cat([skewed_patches(2, 24, 2 * step), other(skewed_patches(2, 24, 2 * step + 1))])
        parts = training.step(images, torch.tensor([0, 0, 1, 1]), seeded(step), skewed_patches(4, 24, 5000 + step))
    assert np.isfinite(parts["loss"])
    assert harmonizer.bank_polarity.flatten().tolist() == [1.0, pytest.approx(-1, abs=0.75)]
    harmonizer.set_batch_styles(torch.tensor([1, 1]))
    original = skewed_patches(2, 48, 7)
    with torch.no_grad():
        restored = harmonizer(other(original))
    assert np.corrcoef(original.flatten(), restored.flatten())[0, 1] > 0.9


def test_an_unknown_site_gets_the_nearest_style_of_the_polarity_that_the_judge_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harmonizer = make("diffusion")
    patches = torch.randn(2, 1, 64, 64, generator=seeded())  # nearest to style 0
    assert harmonizer.nearest_style(patches, patches != 0).tolist() == [0, 0]  # nothing is inverted yet
    harmonizer.bank_polarity[2] = -1.0
    verdict = torch.tensor([[9.0], [-9.0]])
    monkeypatch.setattr(harmonizer.polarity_judge, "forward", lambda *_: verdict)
    assert harmonizer.nearest_style(patches, patches != 0).tolist() == [0, 2]
    harmonizer.bank_polarity[2] = 1.0  # no inverted site in the bank: the nearest of all
    assert harmonizer.nearest_style(patches, patches != 0).tolist() == [0, 0]


def test_a_site_without_references_changes_nothing_but_its_vote() -> None:
    harmonizer = make("diffusion")
    before = {name: tensor.clone() for name, tensor in harmonizer.state_dict().items()}
    training = harmonizer.make_training(lr=1e-2, total_epochs=1)
    parts = training.step(padded_noise(2), torch.tensor([1, 1]), seeded())
    assert np.isnan(parts["loss"])
    changed = [name for name, tensor in harmonizer.state_dict().items() if not torch.equal(before[name], tensor)]
    assert changed == ["bank_polarity"]
    assert harmonizer.bank_polarity[[0, 2]].flatten().tolist() == [1.0, 1.0]


def test_the_segmentation_loss_reaches_the_bridge_and_not_the_judge() -> None:
    harmonizer = make("diffusion")
    moved = {id(parameter) for parameter in harmonizer.mapping_parameters()}
    left = [name for name, parameter in harmonizer.named_parameters() if id(parameter) not in moved]
    assert left
    assert all(name.startswith("polarity_judge.") for name in left)


def test_the_loss_counts_only_voxels_inside() -> None:
    error, mask = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:] = False
    error[..., 2:] = 100.0
    assert velocity_loss(error, mask, 1.0) == 0
    error[..., :2] = 2.0
    assert velocity_loss(error, mask, 0.0) == 4.0
    assert velocity_loss(error, mask, 1.0) == 4.0  # no differences between neighbours


def test_the_upside_down_guess_undoes_an_inversion() -> None:
    harmonizer = flow(polarity=False)
    normal = torch.randn(1, 1, 64, 64, generator=seeded()).clamp(-2, 2)
    quantiles = -harmonizer.reference_quantiles.flip(-1)[None]
    matched = harmonizer._matched(-normal, normal != 0, quantiles, torch.ones(1))
    torch.testing.assert_close(matched[:, 2:], normal, atol=0.05, rtol=0)
    hidden = harmonizer._matched(-normal, normal != 0, quantiles, torch.zeros(1))
    assert (hidden[:, 1:] == 0).all()


def test_blocks_hold_each_voxel_once_and_keep_their_site() -> None:
    image = torch.arange(2 * 32 * 40.0).reshape(2, 1, 32, 40)
    blocks, sites = in_blocks(image, torch.tensor([5, 6]), 16)
    assert blocks.shape == (8, 1, 16, 20)
    assert sorted(blocks.flatten().tolist()) == image.flatten().tolist()
    assert all((block >= 1280).all() == (site == 6) for block, site in zip(blocks, sites.tolist(), strict=True))
    whole, _ = in_blocks(image, torch.tensor([5, 6]), 64)
    assert torch.equal(whole, image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be 1 to 8, got 0"),
        ({"process": "ddpm"}, "process must be one of flow, ddim, got 'ddpm'"),
        ({"ddim_start": 0.0}, "ddim_start must lie in"),
        ({"block_share": 1.5}, "block_share must lie"),
        ({"width": 3}, "even"),
        ({"inverted_share": 0.9, "free_share": 0.3}, "<= 1"),
        ({"judge_width": 0}, ">= 1"),
        ({"style_dropout": 2.0}, "style_dropout must lie"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FlowConfig(**options)  # type: ignore[arg-type]


def test_other_harmonizers_do_not_pay_for_importing_diffusers() -> None:
    code = (
        "import sys; from nnunet_fedharm.harmonizers import build_harmonizer; "
        "build_harmonizer('none', {}, num_channels=1, spatial_dims=2, styles=[], reference=None); "
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_the_bridges_clip_is_the_one_that_is_used() -> None:
    harmonizer = make("diffusion")
    training = harmonizer.make_training(lr=1e-3, total_epochs=1)
    parameters = [p for group in training.optimizers["bridge"].param_groups for p in group["params"]]
    for clip, expected in ((1.0, 1.0), (None, training.clip)):
        training.descend("bridge", 1e6 * sum((p**2).sum() + p.sum() for p in parameters), clip=clip)
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        assert norm == pytest.approx(expected, rel=1e-3)
