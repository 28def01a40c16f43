"""A step of DP-SGD by patient: clipping, noise and sampling are what the formula says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients, draw_patients, refuse_mixing_layers


def silent(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, device=device)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(inplace=True), nn.Conv2d(4, 1, 1)
    )


def test_mean_of_gradients_that_were_clipped_one_patient_at_a_time(network: nn.Module) -> None:
    patients = [torch.randn(3, 2, 8, 8), 50 * torch.randn(5, 2, 8, 8)]
    collected = PatientGradients(network.parameters(), clip=0.5, noise_multiplier=0, expected_patients=4, noise=silent)
    for patches in patients:
        collected.start_patient()
        network(patches).square().mean().backward()
        collected.end_patient()
    norms = list(collected.norms)
    collected.release()
    found = [parameter.grad.clone() for parameter in network.parameters()]
    expected = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for patches, norm in zip(patients, norms, strict=True):
        gradients = torch.autograd.grad(network(patches).square().mean(), list(network.parameters()))
        assert math.sqrt(sum(float(g.square().sum()) for g in gradients)) == pytest.approx(norm, rel=1e-5)
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1, 0.5 / norm) / 4
    assert max(norms) > 0.5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_no_patient_moves_the_sum_by_more_than_the_bound(network: nn.Module) -> None:
    collected = PatientGradients(network.parameters(), clip=0.1, noise_multiplier=0, expected_patients=1, noise=silent)
    network(1e4 * torch.randn(4, 2, 8, 8)).square().sum().backward()
    collected.end_patient()
    collected.release()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))
    assert norm == pytest.approx(0.1, rel=1e-3)


def test_a_gradient_that_is_not_finite_counts_as_zero(network: nn.Module) -> None:
    collected = PatientGradients(network.parameters(), clip=1, noise_multiplier=0, expected_patients=1, noise=silent)
    (network(torch.randn(1, 2, 8, 8)).sum() * float("nan")).backward()
    assert math.isnan(collected.end_patient())
    collected.release()
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in network.parameters())


def test_noise_has_the_stated_size_for_every_tensor_even_without_any_patient(network: nn.Module) -> None:
    wide = nn.Linear(300, 300)
    collected = PatientGradients(
        [*wide.parameters(), *wide.parameters()], clip=2, noise_multiplier=1.5, expected_patients=3, noise=SecureNoise()
    )
    collected.release()
    assert float(wide.weight.grad.std()) == pytest.approx(1.5 * 2 / 3, rel=0.02)
    assert float(wide.bias.grad.std()) == pytest.approx(1.5 * 2 / 3, rel=0.2)
    before = wide.weight.grad.clone()
    collected.release()
    assert abs(float(torch.corrcoef(torch.stack([before.flatten(), wide.weight.grad.flatten()]))[0, 1])) < 0.02


def test_patients_are_drawn_independently() -> None:
    counts = [len(draw_patients(range(50), 0.2)) for _ in range(2000)]
    assert np.mean(counts) == pytest.approx(10, abs=0.4)
    assert np.var(counts) == pytest.approx(50 * 0.2 * 0.8, rel=0.2)
    assert draw_patients(range(5), 1.0) == [0, 1, 2, 3, 4]


def test_secure_noise_is_normal_and_never_repeats() -> None:
    source = SecureNoise()
    values = source(torch.Size([100_001]), torch.device("cpu")).numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert not np.array_equal(values, source(torch.Size([100_001]), torch.device("cpu")).numpy())
    assert not np.array_equal(values, SecureNoise()(torch.Size([100_001]), torch.device("cpu")).numpy())
    key = bytes(range(32))
    assert torch.equal(
        SecureNoise(key)(torch.Size([3, 7]), torch.device("cpu")),
        SecureNoise(key)(torch.Size([3, 7]), torch.device("cpu")),
    )


def test_batch_norm_and_impossible_bounds_are_refused(network: nn.Module) -> None:
    with pytest.raises(PrivacyError, match=r"1 is BatchNorm3d"):
        refuse_mixing_layers(nn.Sequential(nn.Conv3d(1, 1, 1), nn.BatchNorm3d(1)))
    refuse_mixing_layers(network)
    with pytest.raises(PrivacyError, match="clip must be"):
        PatientGradients(network.parameters(), clip=0, noise_multiplier=1, expected_patients=1, noise=silent)
    with pytest.raises(PrivacyError, match="noise multiplier"):
        PatientGradients(network.parameters(), clip=1, noise_multiplier=-1, expected_patients=1, noise=silent)
