"""A patient's gradient of our loop is what Opacus' hooks, its ghost norms and torch.func give for that patient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad

from nnunet_fedharm.privacy.patient_gradients import PatientGradients

PATIENTS, PATCHES, LABELS = 3, 2, 3
NETWORKS = [(kind, dims) for kind in ("plain", "residual") for dims in (2, 3)]


@pytest.fixture(autouse=True)
def opacus_warns() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def network(kind: str, dims: int, *, inplace: bool) -> nn.Module:
    """As nnU-Net builds it, small; the lower output layers, which no loss reaches here, frozen as Opacus needs it."""
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    shared = {
        "input_channels": 1, "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": conv, "kernel_sizes": 3,
        "strides": [1, 2, 2], "num_classes": LABELS, "n_conv_per_stage_decoder": 1, "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"affine": True, "eps": 1e-5}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": inplace},
    }  # fmt: skip
    if kind == "plain":
        model: nn.Module = PlainConvUNet(n_conv_per_stage=1, **shared)
    else:
        model = ResidualEncoderUNet(n_blocks_per_stage=[1, 1, 1], **shared)
    model.decoder.seg_layers[:-1].requires_grad_(False)  # type: ignore[union-attr, index]
    return model.double()


class Addition(nn.Module):
    """A residual block's forward pass without the in-place sum, which Opacus' hooks cannot follow."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, image: Tensor) -> Tensor:
        block = self.block
        result: Tensor = block.nonlin2(block.conv2(block.conv1(image)) + block.skip(image))  # type: ignore[operator]
        return result


def for_opacus(model: nn.Module) -> nn.Module:
    """The same tensors, each module under one name: Opacus hooks a module once a name and counts its gradient as often."""
    del model.decoder.encoder  # type: ignore[union-attr]
    for module in list(model.modules()):
        if isinstance(module, ConvDropoutNormReLU):
            for name in ("conv", "norm", "nonlin"):
                module._modules.pop(name, None)
        if isinstance(module, StackedResidualBlocks):
            module.blocks = nn.Sequential(*map(Addition, module.blocks))
    return model


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    settings = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss: Tensor = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)(output, target)
    return loss


def patches(dims: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (PATIENTS * PATCHES, 1, *(16,) * dims)
    image = torch.randn(shape, generator=generator, dtype=torch.double)
    return image, torch.randint(0, LABELS, shape, generator=generator).double()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_loop(model: nn.Module, image: Tensor, target: Tensor) -> list[dict[str, Tensor]]:
    """What the product collects: patients one after the other, without clipping and noise."""
    parameters = trained(model)
    collected = PatientGradients(
        parameters.values(),
        clip=1e9,
        noise_multiplier=0,
        expected_patients=1,
        noise=lambda shape, device: torch.zeros(shape),
    )
    found = []
    for start in range(0, len(image), PATCHES):
        collected.start_patient()
        loss_of(model(image[start : start + PATCHES]), target[start : start + PATCHES]).backward()
        collected.end_patient()
        collected.release()
        found.append({name: parameter.grad.clone() for name, parameter in parameters.items()})  # type: ignore[union-attr]
    return found


def largest_difference(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> float:
    """Over all patients and tensors; of the largest entry of the tensor's gradient.

    Args:
        expected: name -> (patches, *shape) gradients of single patches.
    """
    worst = 0.0
    for patient, gradients in enumerate(found):
        for name, value in gradients.items():
            own = expected[name][patient * PATCHES : (patient + 1) * PATCHES].mean(dim=0)
            worst = max(worst, float((value - own).abs().max() / own.abs().max().clamp(min=1e-6)))
    return worst


@pytest.mark.parametrize(("kind", "dims"), NETWORKS)
def test_a_patients_gradient_is_the_mean_of_opacus_gradients_of_the_patches(kind: str, dims: int) -> None:
    image, target = patches(dims)
    found = by_loop(for_opacus(network(kind, dims, inplace=True)), image, target)
    hooked = GradSampleModule(for_opacus(network(kind, dims, inplace=False)), loss_reduction="mean")
    loss_of(hooked(image), target).backward()
    expected = {name.removeprefix("_module."): p.grad_sample for name, p in trained(hooked).items()}
    assert largest_difference(found, expected) < 1e-6  # sums are kept in single precision


def test_opacus_counts_a_module_with_several_names_several_times() -> None:
    """Why the networks above had to be changed for it, and why we do not use it for gradients."""
    image, target = patches(2)
    hooked = GradSampleModule(network("plain", 2, inplace=False), loss_reduction="mean")
    loss_of(hooked(image), target).backward()
    first = next(iter(trained(hooked).values()))
    assert first.grad is not None
    times = first.grad_sample.sum(dim=0).norm() / (len(image) * first.grad.norm())  # type: ignore[attr-defined]
    assert float(times) == pytest.approx(4.0)


@pytest.mark.parametrize(("kind", "dims"), NETWORKS)
def test_a_patients_gradient_is_what_torch_func_gives(kind: str, dims: int) -> None:
    image, target = patches(dims)
    found = by_loop(network(kind, dims, inplace=True), image, target)
    model = network(kind, dims, inplace=False)
    parameters = {name: parameter.detach() for name, parameter in trained(model).items()}

    def loss(values: dict[str, Tensor], one: Tensor, truth: Tensor) -> Tensor:
        return loss_of(functional_call(model, values, (one[None],)), truth[None])

    single = [grad(loss)(parameters, image[k], target[k]) for k in range(len(image))]
    expected = {name: torch.stack([one[name] for one in single]) for name in parameters}
    assert largest_difference(found, expected) < 1e-6


@pytest.mark.parametrize(("kind", "dims"), NETWORKS)
def test_norms_before_clipping_are_those_of_ghost_clipping(kind: str, dims: int) -> None:
    image, target = patches(dims)
    model = network(kind, dims, inplace=True)
    collected = PatientGradients(
        trained(model).values(),
        clip=1,
        noise_multiplier=0,
        expected_patients=1,
        noise=lambda shape, device: torch.zeros(shape),
    )
    for k in range(len(image)):
        collected.start_patient()
        loss_of(model(image[k : k + 1]), target[k : k + 1]).backward()
        collected.end_patient()
    ghost = GradSampleModuleFastGradientClipping(
        for_opacus(network(kind, dims, inplace=False)), max_grad_norm=1, use_ghost_clipping=True, loss_reduction="mean"
    )
    loss_of(ghost(image), target).backward()
    torch.testing.assert_close(
        torch.tensor(collected.norms, dtype=torch.double), ghost.get_norm_sample().double(), rtol=1e-4, atol=1e-7
    )
