"""Mechanisms that are broken on purpose, for audits to find: of the tests, and of benchmarks/privacy_audit.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_fedharm.evaluation.audit import noisy_statistics
from nnunet_fedharm.planning import private_style, private_summary
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients


def no_noise(gradients: PatientGradients) -> None:
    gradients.noise = lambda shape, device: torch.zeros(shape, device=device)


def no_clipping(gradients: PatientGradients) -> None:
    """Noise for the clip, and gradients of any length."""
    honest = gradients.end_patient

    def end_patient() -> float:
        clip, gradients.clip = gradients.clip, float("inf")
        norm = honest()
        gradients.clip = clip
        return norm

    gradients.end_patient = end_patient  # type: ignore[method-assign]


class _Again:
    """A stream that starts anew.

    Args:
        tensors: of a step.
        by_tensor: starts anew with every tensor of a step, as from a generator that is seeded with the step; else with every
            step, as from one that is seeded in the training loop.
    """

    def __init__(self, tensors: int, *, by_tensor: bool) -> None:
        self.source, self.tensors, self.by_tensor, self.calls = SecureNoise(), tensors, by_tensor, 0

    def __call__(self, shape: torch.Size, device: torch.device) -> Tensor:
        self.source._calls = self.calls // self.tensors if self.by_tensor else self.calls % self.tensors
        self.calls += 1
        return self.source(shape, device)


def noise_repeats(gradients: PatientGradients) -> None:
    """The same noise in every step."""
    gradients.noise = _Again(len(gradients.parameters), by_tensor=False)


def tensors_share_noise(gradients: PatientGradients) -> None:
    """The same noise for every tensor of a step."""
    gradients.noise = _Again(len(gradients.parameters), by_tensor=True)


def noise_of_a_mean(gradients: PatientGradients) -> None:
    """Noise that was calibrated for the sum, divided as if it were for the mean of the patients: once too often."""
    honest = gradients.noise
    gradients.noise = lambda shape, device: honest(shape, device) / gradients.expected_patients


def noise_by_name(gradients: PatientGradients) -> None:
    """Every tensor gets noise once under each of its three names in the state dict, and the names are averaged."""
    honest = gradients.noise
    gradients.noise = lambda shape, device: torch.stack([honest(shape, device) for _ in range(3)]).mean(dim=0)


@contextmanager
def statistics_noise(factor: float) -> Iterator[None]:
    """Statistics with a share of the promised noise; from one key, so that what an audit finds is the same every time."""

    class Scaled(SecureNoise):
        def __init__(self) -> None:
            super().__init__(bytes(32))

        def _normal(self, count: int, device: torch.device) -> Tensor:
            return factor * super()._normal(count, device)

    with patch.object(noisy_statistics, "SecureNoise", Scaled):
        yield


@contextmanager
def statistics_without_bounds() -> Iterator[None]:
    """Statistics with noise for a bounded patient, and patients who may tell anything."""

    class NothingIsCut:
        """numpy, but the shorter of two is always the longer."""

        def __getattr__(self, name: str) -> object:
            return getattr(np, name)

        def minimum(self, first: float, second: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.ones_like(second)

    def told(votes: Tensor, *, noise_multiplier: float, noise: SecureNoise) -> Tensor:
        added = noise(torch.Size([votes.shape[1]]), votes.device) * noise_multiplier * math.sqrt(votes.shape[1])
        return (votes.sum(dim=0) + added) / len(votes)

    with (
        patch.object(private_summary, "_cut", lambda vector: vector),
        patch.object(private_style, "np", NothingIsCut()),
        patch.object(noisy_statistics, "private_votes", told),
    ):
        yield
