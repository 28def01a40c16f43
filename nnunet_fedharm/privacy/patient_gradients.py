"""One step of DP-SGD whose unit is the patient: draw patients, clip each one's gradient, add noise to the sum.

    g = (sum over drawn patients p of clip(g_p, C) + N(0, (sigma C)^2 I)) / (q N)

| symbol | here |
|---|---|
| N, q | patients of the site; probability with which each is drawn, independently of the others (Poisson) |
| g_p | gradient of patient p's mean loss over all their patches of this step, over all trained tensors together |
| C, sigma | `clip`, `noise_multiplier` |

A patient's patches go through the network together and the patients one after the other, so a gradient of one backward pass
is one patient's: exact for every layer whose samples do not mix (batch norm mixes them and is refused), memory does not grow
with the number of patients, and neither hooks nor a second copy of the gradients are needed. One joint clip covers all
tensors, harmonizer and segmenter alike, so one Gaussian release is one step.

References:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (clipping, noise, Poisson sampling);
    McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (a person as the unit).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.noise import NoiseSource, hide

Item = TypeVar("Item")


def draw_patients(patients: Sequence[Item], sample_rate: float) -> list[Item]:
    """Each patient with probability `sample_rate`, independently, by the system's secure generator; may be none at all."""
    generator = secrets.SystemRandom()
    return [patient for patient in patients if generator.random() < sample_rate]


class PatientGradients:
    """Collects the clipped gradients of one step's patients and turns them into one noisy gradient.

    Args:
        parameters: everything that is trained; aliases are counted once.
        clip: C, bound on the L2 norm of one patient's gradient.
        noise_multiplier: sigma; 0 only clips and is not private.
        expected_patients: q N.
        noise: secure source of normal numbers.

    Raises:
        PrivacyError: a bound is out of range.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        clip: float,
        noise_multiplier: float,
        expected_patients: float,
        noise: NoiseSource,
    ) -> None:
        for name, value in (("clip", clip), ("patients per step", expected_patients)):
            if not 0 < value < math.inf:
                raise PrivacyError(f"{name} must be a positive number, got {value}.")
        if not 0 <= noise_multiplier < math.inf:
            raise PrivacyError(f"The noise multiplier must not be negative, got {noise_multiplier}.")
        self.parameters = list(dict.fromkeys(parameters))
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self.expected_patients = expected_patients
        self.noise = noise
        self.norms: list[float] = []
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]
        self.start_patient()

    def start_patient(self) -> None:
        """Forget gradients that belong to nobody."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def end_patient(self) -> float:
        """Clip what the backward passes since `start_patient` left in `.grad` and add it to the sum.

        Returns:
            The norm before clipping. A gradient that is not finite counts as zero, so that its contribution stays bounded.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        if math.isfinite(norm):
            scale = min(1.0, self.clip / (norm + 1e-6))
            for total, gradient in zip(self._sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float(), alpha=scale)
        self.norms.append(norm)
        self.start_patient()
        return norm

    def take_sums(self) -> list[Tensor]:
        """The sums of clipped gradients over the clip, without any noise, one a parameter; start over.

        For a mechanism that adds the noise elsewhere (`shared_steps`): these numbers must not leave the site.
        """
        sums = [total.clone() / self.clip for total in self._sums]
        for total in self._sums:
            total.zero_()
        self.norms.clear()
        return sums

    @torch.no_grad()
    def release(self) -> None:
        """Put the noisy mean gradient into `.grad` of every parameter, whether or not anybody was drawn, and start over.

        Every parameter gets noise, also one that no loss reached: whether a loss reached it may depend on the patients.
        """
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            if self.noise_multiplier > 0:
                total.copy_(hide(total, self.noise, self.noise_multiplier * self.clip))
            parameter.grad = (total / self.expected_patients).to(parameter.dtype)
            total.zero_()
        self.norms.clear()


def refuse_mixing_layers(network: nn.Module) -> None:
    """Refuse layers through which one patient's samples change what others contribute.

    Raises:
        PrivacyError: the network has batch norm.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"{name} is {type(module).__name__}, whose running statistics are released without noise. "
                "Plan the network with instance or group norm."
            )
