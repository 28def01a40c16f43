"""Mechanisms that are broken on purpose, for audits to find."""

from __future__ import annotations

import torch

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
