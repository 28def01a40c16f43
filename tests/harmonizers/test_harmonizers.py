"""What every harmonizer promises, and what each one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_fedharm.errors import PlanError, ShapeError
from nnunet_fedharm.harmonizers import KINDS, Harmonizer, build_harmonizer
from nnunet_fedharm.harmonizers.base import MAX_STYLE_VOXELS, _even_stride
from nnunet_fedharm.harmonizers.resnet import convolved
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style, average_styles, volume_quantiles

SIZES = {2: (24, 20), 3: (12, 14, 10)}


def style(power: float, scale: float, shift: float, channels: int = 1) -> Style:
    """Quantiles of a tone-mapped normal distribution."""
    levels = torch.special.ndtri(torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)).numpy()
    mapped = np.sign(levels) * np.abs(levels) ** power * scale + shift
    return Style(np.tile(mapped, (channels, 1)), np.full(channels, 2.5), 4)


def make(kind: str, spatial_dims: int = 2, channels: int = 1, **options: object) -> Harmonizer:
    styles = [style(1, 1, 0, channels), style(1.3, 0.8, 0.2, channels), style(0.8, 1.1, -0.3, channels)]
    return build_harmonizer(
        kind, options, num_channels=channels, spatial_dims=spatial_dims, styles=styles, reference=styles[0]
    )


def padded_noise(spatial_dims: int, channels: int = 1, batch: int = 2) -> Tensor:
    image = torch.randn(batch, channels, *SIZES[spatial_dims], generator=torch.Generator().manual_seed(1))
    image[:, :, :4] = 0
    return image


def scrambled(kind: str, **options: object) -> Harmonizer:
    """A harmonizer that does something: random weights everywhere, gate open."""
    harmonizer = make(kind, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for parameter in harmonizer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    harmonizer.open_gate()
    return harmonizer.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 4])
def test_before_training_the_output_is_the_input_bit_for_bit(kind: str, spatial_dims: int, channels: int) -> None:
    image, harmonizer = padded_noise(spatial_dims, channels), make(kind, spatial_dims, channels)
    harmonizer.eval().set_batch_styles(torch.tensor([1, 2]))  # the reference's own gate is shut for good
    assert torch.equal(harmonizer(image), image)


@pytest.mark.parametrize("kind", KINDS)
def test_building_a_harmonizer_leaves_the_global_random_state_alone(kind: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make(kind)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", ["nyul", "curve"])
def test_padding_stays_zero_and_the_rest_changes(kind: str) -> None:
    harmonizer, image = scrambled(kind), padded_noise(2)
    harmonizer.set_batch_styles(torch.tensor([1, 2]))
    output = harmonizer(image)
    assert (output[:, :, :4] == 0).all()
    assert (output[:, :, 4:] - image[:, :, 4:]).abs().mean() > 0.01


@pytest.mark.parametrize("kind", ["nyul", "curve"])
def test_a_batch_equals_its_elements_one_by_one(kind: str) -> None:
    harmonizer, image = scrambled(kind, channels=2), padded_noise(2, channels=2, batch=3)
    image = image.sign() * image.abs() ** 1.3 * 0.8 + 0.2 * (image != 0)  # style 1: the reference's gate is shut
    with torch.no_grad():
        together = harmonizer(image)
        alone = torch.cat([harmonizer(image[i : i + 1]) for i in range(3)])
    assert not torch.equal(together, image)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["nyul", "curve"])
def test_mirroring_the_input_mirrors_the_output(kind: str) -> None:
    harmonizer, image = scrambled(kind), padded_noise(2)
    harmonizer.set_batch_styles(torch.tensor([1, 2]))
    with torch.no_grad():
        torch.testing.assert_close(harmonizer(image.flip(3)).flip(3), harmonizer(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nyul", "curve", "cyclegan"])
def test_overlapping_windows_agree_away_from_borders(kind: str) -> None:
    harmonizer = scrambled(kind, **({"gain_sigma": 2.0} if kind == "curve" else {}))
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    image = torch.randn(1, 1, 96, 40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        left, right = harmonizer(image[:, :, :80]), harmonizer(image[:, :, 16:])
    reach = 3 * 6  # 2.5 sigma of the near blur, of the far one (2 sigma), and of the near one again
    overlap_left, overlap_right = left[:, :, 16 + reach : 80 - reach], right[:, :, reach : 64 - reach]
    torch.testing.assert_close(overlap_left, overlap_right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["nyul", "curve"])
def test_the_order_of_intensities_is_kept_where_the_gain_is_off(kind: str) -> None:
    harmonizer = scrambled(kind, **({"gain": False} if kind == "curve" else {}))
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    ramp = torch.linspace(-8, 8, 1000).reshape(1, 1, 1000, 1)
    with torch.no_grad():
        steps = harmonizer(ramp).flatten().diff()
    assert (steps > 0).all()


def test_nyul_carries_a_sites_quantiles_to_the_reference() -> None:
    harmonizer = make("nyul", 3)
    harmonizer.open_gate()
    levels = torch.rand(1, 1, 30, 30, 30, generator=torch.Generator().manual_seed(0))
    normal = torch.special.ndtri(levels.clamp(1e-4, 1 - 1e-4))
    image = normal.sign() * normal.abs() ** 1.3 * 0.8 + 0.2
    harmonizer.set_batch_styles(torch.tensor([1]))
    quantiles, _ = volume_quantiles(harmonizer(image)[0].numpy())
    np.testing.assert_allclose(quantiles, harmonizer.reference_quantiles.numpy(), atol=0.05)


def test_the_nearest_style_is_found_from_the_patch() -> None:
    harmonizer = make("nyul", 2)
    normal = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = torch.cat(
        [normal, normal.sign() * normal.abs() ** 1.3 * 0.8 + 0.2, normal.sign() * normal.abs() ** 0.8 * 1.1 - 0.3]
    )
    assert harmonizer.nearest_style(patches, patches != 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("spatial", [(128, 128, 128), (40, 56, 40), (512, 512), (7, 5)])
def test_style_voxels_come_from_every_row_and_column(spatial: tuple[int, ...]) -> None:
    stride = _even_stride(spatial)
    picked = np.arange(0, np.prod(spatial), stride)
    for axis, positions in enumerate(np.unravel_index(picked, spatial)):
        assert len(np.unique(positions)) == spatial[axis]
    assert len(picked) <= 2 * MAX_STYLE_VOXELS


def test_autocast_leaves_the_curve_in_full_precision() -> None:
    harmonizer, image = scrambled("curve"), padded_noise(2)
    harmonizer.set_source(style(1.3, 0.8, 0.2))
    with torch.no_grad():
        expected = harmonizer(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(harmonizer(image), expected, atol=1e-6, rtol=0)


def test_a_stored_source_survives_the_state_dict() -> None:
    trained, fresh = make("nyul"), make("nyul")
    trained.open_gate()
    trained.set_source(style(0.8, 1.1, -0.3))
    fresh.load_state_dict(trained.state_dict())
    image = padded_noise(2)
    assert torch.equal(trained(image), fresh(image))
    assert not torch.equal(fresh(image), image)


# White noise is fair to point maps only; networks that see surroundings have tests of their own.
@pytest.mark.parametrize("kind", ["curve"])
def test_self_paired_training_brings_a_site_closer_to_the_reference(kind: str) -> None:
    harmonizer = make(kind, 2)
    optimizer = torch.optim.AdamW(harmonizer.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        patch = torch.nn.functional.interpolate(
            torch.randn(4, 1, 8, 8, generator=generator), size=(32, 32), mode="bicubic"
        )
        loss = harmonizer.self_paired_loss(patch * 1.3, torch.zeros(4, dtype=torch.int64), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    normal = torch.randn(2, 1, 64, 64, generator=generator)
    shifted = normal.sign() * normal.abs() ** 1.3 * 0.8 + 0.2
    harmonizer.set_batch_styles(torch.tensor([1, 1]))
    with torch.no_grad():
        before, after = (shifted - normal).abs().mean(), (harmonizer(shifted) - normal).abs().mean()
    assert after < 0.6 * before


def test_harmonizers_without_weights_refuse_a_harmonizer_phase() -> None:
    with pytest.raises(PlanError, match="nothing to learn"):
        make("nyul").self_paired_loss(padded_noise(2), torch.tensor([0, 0]), torch.Generator())


def test_unknown_kinds_and_options_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="Unknown harmonizer 'gan'"):
        make("gan")
    with pytest.raises(PlanError, match="no option 'depth'"):
        make("curve", depth=3)
    with pytest.raises(PlanError, match="odd"):
        make("curve", knots=32)


def test_a_patch_of_the_wrong_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"planned for \(B, 1, 2 spatial axes\), got \(2, 3, 24, 20\)"):
        make("curve")(padded_noise(2, channels=3))


def test_styles_average_to_the_barycentre_whatever_their_order() -> None:
    styles = [style(1, 1, 0), style(1.3, 0.8, 0.2), style(0.8, 1.1, -0.3)]
    forward, backward = average_styles(styles, [1.0, 2.0, 3.0]), average_styles(styles[::-1], [3.0, 2.0, 1.0])
    np.testing.assert_allclose(forward.quantiles, backward.quantiles, atol=1e-12)
    np.testing.assert_allclose(average_styles([styles[1]] * 3).quantiles, styles[1].quantiles, atol=1e-12)


def test_a_style_survives_json() -> None:
    original = style(1.3, 0.8, 0.2, channels=2)
    copy = Style.from_dict(original.to_dict())
    np.testing.assert_array_equal(copy.quantiles, original.quantiles)
    with pytest.raises(PlanError, match="NaN"):
        Style(np.full((1, len(QUANTILE_LEVELS)), np.nan), np.zeros(1), 1)


@pytest.mark.parametrize("kind", ["nyul", "curve", "cyclegan", "diffusion"])
def test_the_reference_keeps_its_images_and_the_others_do_not(kind: str) -> None:
    harmonizer, image = scrambled(kind), padded_noise(2, batch=3)
    reference = harmonizer.reference_sites()[0]
    harmonizer.set_batch_styles(torch.tensor([reference, 1, 2]))
    with torch.no_grad():
        mixed = harmonizer(image)
    assert torch.equal(mixed[0], image[0])
    assert not torch.equal(mixed[1], image[1])
    harmonizer.set_batch_styles(torch.full((3,), reference))
    with torch.no_grad():
        assert harmonizer(image) is image  # nothing is computed where no gate is open


def test_a_site_of_the_bank_is_served_with_its_polarity_and_gate() -> None:
    harmonizer, image = scrambled("diffusion"), padded_noise(2)
    harmonizer.bank_polarity[1] = -1.0
    harmonizer.set_batch_styles(torch.full((2,), 1))
    with torch.no_grad():
        told = harmonizer(image)
        harmonizer.set_batch_styles(None)
        harmonizer.serve(1)
        assert torch.equal(harmonizer(image), told)
        harmonizer.serve(1, gate=0.0)
        assert harmonizer(image) is image
        fresh = scrambled("diffusion")
        fresh.load_state_dict(harmonizer.state_dict())
        assert fresh(image) is image


def test_a_shut_gate_still_computes_what_ddp_waits_for() -> None:
    harmonizer, image = scrambled("curve"), padded_noise(2)
    harmonizer.serve(0)
    loss = harmonizer(image).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in harmonizer.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 12, 14, 10), (1, 16, 40, 40, 8), (2, 3, 12, 14, 10), (1, 3, 24, 20)])
def test_a_sample_on_its_own_is_convolved_like_one_of_many(shape: tuple[int, ...]) -> None:
    seen: list[int] = []
    layer = (torch.nn.Conv3d if len(shape) == 5 else torch.nn.Conv2d)(shape[1], 4, 3, padding=1)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    image = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(convolved(layer, image), layer(image), atol=1e-5, rtol=1e-5)
    small_and_alone = shape[0] == 1 and len(shape) == 5 and np.prod(shape[:4]) <= 20480
    assert seen[0] == (2 if small_and_alone else shape[0])
