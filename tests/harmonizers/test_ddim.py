"""Conditional DDIM: the schedule, the recursion, and the same promises as the flow's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_fedharm.harmonizers.ddim import TIMESTEPS, DDIMProcess, cosine_betas
from nnunet_fedharm.harmonizers.flow import FlowHarmonizer
from tests.harmonizers.test_flow import flow, seeded
from tests.harmonizers.test_harmonizers import make, padded_noise, style


def ddim(spatial_dims: int = 2, channels: int = 1, **options: object) -> FlowHarmonizer:
    """A DDIM that does something, told a site's style."""
    harmonizer = flow(spatial_dims, channels, process="ddim", **options)
    harmonizer.set_source(style(1.3, 0.8, 0.2, channels=channels))
    return harmonizer


def toward_zero(sample: Tensor, time: float) -> Tensor:
    """A velocity that depends on sample and time."""
    return 0.3 * torch.tanh(sample) + 0.1 * time


def test_the_schedule_is_the_cosine_up_to_its_cut() -> None:
    signal = torch.cumprod(1 - torch.tensor(cosine_betas(0.5), dtype=torch.float64), dim=0)
    middle = torch.cos(torch.tensor((0.5 + 0.008) / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    assert len(signal) == TIMESTEPS
    torch.testing.assert_close(signal[-1], middle / start)
    assert 0 < DDIMProcess(1.0).scheduler.alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("start", [0.25, 1.0])
def test_the_scheduler_walks_the_hand_written_recursion(steps: int, start: float) -> None:
    process, image = DDIMProcess(start), torch.randn(2, 1, 6, 6, generator=seeded())
    signal = torch.cumprod(1 - torch.tensor(cosine_betas(start), dtype=torch.float64), dim=0)
    share = [1.0] + [float(signal[step * TIMESTEPS // steps - 1]) for step in range(1, steps + 1)]
    sample = share[-1] ** 0.5 * image.double()
    for step in range(steps, 0, -1):  # Song et al., eq. 12, with sigma = 0
        guess = image - toward_zero(sample, step / steps)
        noise = (sample - share[step] ** 0.5 * guess) / (1 - share[step]) ** 0.5
        sample = share[step - 1] ** 0.5 * guess + (1 - share[step - 1]) ** 0.5 * noise
    torch.testing.assert_close(process.walk(image, toward_zero, steps), sample.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", range(1, 9))
def test_without_a_velocity_the_image_comes_back_bit_for_bit(steps: int) -> None:
    image = torch.cat([torch.randn(4096, generator=seeded()), torch.tensor([0.0, 1e-30, -3e4, 3e38])])[None, None]
    for start in (0.1, 0.5, 1.0):
        assert torch.equal(DDIMProcess(start).walk(image, lambda sample, _: torch.zeros_like(sample), steps), image)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 4])
def test_before_training_a_harmonizer_is_the_identity_bit_for_bit(spatial_dims: int, channels: int) -> None:
    image = padded_noise(spatial_dims, channels=channels)
    for n_steps in (1, 2, 4):
        harmonizer = make("diffusion", spatial_dims, channels, process="ddim", n_steps=n_steps)
        harmonizer.open_gate()
        harmonizer.set_source(style(1.3, 0.8, 0.2, channels=channels))
        with torch.no_grad():
            assert torch.equal(harmonizer(image), image)


def test_training_samples_are_the_target_under_noise_of_the_drawn_time() -> None:
    process, seen = DDIMProcess(1.0), torch.ones(3, 1, 100, 100)
    seen[:, :, :10] = 0
    target = 2 * seen
    time = torch.tensor([1 / TIMESTEPS, 0.5, 1.0])
    sample = process.sample_at(target, seen, time, seeded())
    assert (sample[:, :, :10] == 0).all()
    inside = sample[:, :, 10:].flatten(1)
    signal = process.scheduler.alphas_cumprod[[0, TIMESTEPS // 2 - 1, TIMESTEPS - 1]]
    torch.testing.assert_close(inside.mean(dim=1), 2 * signal.sqrt(), atol=0.05, rtol=0)
    torch.testing.assert_close(inside.std(dim=1), (1 - signal).sqrt(), atol=0.05, rtol=0)
    assert torch.equal(sample, process.sample_at(target, seen, time, seeded()))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_overlapping_windows_agree_away_from_borders(spatial_dims: int) -> None:
    harmonizer = ddim(spatial_dims, width=4, depth=1, n_steps=2)
    reach, shift = harmonizer.reach, 7
    side = 2 * reach + shift + 8
    image = torch.randn(1, 1, side, *([6] * (spatial_dims - 1)), generator=seeded(5))
    with torch.no_grad():
        left, right = harmonizer(image[:, :, : side - shift]), harmonizer(image[:, :, shift:])
    inner_left, inner_right = left[:, :, shift + reach : side - shift - reach], right[:, :, reach : -reach - shift]
    torch.testing.assert_close(inner_left, inner_right, atol=1e-5, rtol=0)
    assert (inner_left - image[:, :, shift + reach : side - shift - reach]).abs().mean() > 1e-3


@pytest.mark.parametrize(("spatial_dims", "channels"), [(2, 1), (3, 4)])
def test_a_batch_equals_its_elements_and_repeats_bit_for_bit(spatial_dims: int, channels: int) -> None:
    harmonizer, image = ddim(spatial_dims, channels, width=4, n_steps=4), padded_noise(spatial_dims, channels, batch=3)
    with torch.no_grad():
        together = harmonizer(image)
        alone = torch.cat([harmonizer(image[i : i + 1]) for i in range(3)])
        assert torch.equal(together, harmonizer(image))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[image == 0] == 0).all()


def test_mixed_precision_keeps_the_images_dtype_and_its_values() -> None:
    harmonizer, image = ddim(3, width=4, n_steps=2), padded_noise(3)
    with torch.no_grad():
        expected = harmonizer(image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = harmonizer(image)
    assert mixed.dtype == torch.float32
    assert (mixed - expected).abs().mean() < 0.05 * (expected - image).abs().mean()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 4])
def test_it_learns_from_the_reference_alone(spatial_dims: int, channels: int) -> None:
    harmonizer = make("diffusion", spatial_dims, channels, process="ddim", n_steps=2, width=4, depth=1)
    image, sites = padded_noise(spatial_dims, channels=channels), torch.tensor([0, 0])
    optimizer = torch.optim.Adam(harmonizer.mapping_parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = harmonizer.self_paired_loss(image, sites, seeded(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
