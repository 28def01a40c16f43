"""What a private step costs: our loop over patients, Opacus' hooks and its ghost clipping, against a step without privacy.

    python benchmarks/private_step.py [--dims 2|3] [--patients 2 4 8] [--repeats 3]

One thread per OMP_NUM_THREADS. A plain nnU-Net (features 8 to 64, deep supervision off so that Opacus can follow) segments random
patches; 2 patches a patient. `plain` is the same patches in nnU-Net's batches of 2 without clipping: what a training without
privacy would pay for them. `norm, heads` is our loop where only normalization and output layers are trained. Opacus clips each
patch (its unit is the sample), which protects a patch and not a patient; it is measured for its time and memory. Memory is the
peak of what the process holds above its start, in MiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients

PATCHES = 2
SHAPE = {2: (40, 32), 3: (32, 40, 32)}


def network(dims: int, *, inplace: bool) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    model = PlainConvUNet(
        1, 4, [8, 16, 32, 64], conv, 3, [1, 2, 2, 2], 2, 3, 2, conv_bias=True, norm_op=norm,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": inplace},
    )  # fmt: skip
    model.decoder.seg_layers[:-1].requires_grad_(
        False
    )  # without deep supervision no loss reaches them; Opacus stops there
    return model


def for_opacus(model: nn.Module) -> nn.Module:
    """The same tensors, each module under one name: Opacus hooks a module once a name, and counts its gradient as often."""
    del model.decoder.encoder
    for module in model.modules():
        if isinstance(module, ConvDropoutNormReLU):
            for name in ("conv", "norm", "nonlin"):
                module._modules.pop(name, None)
    return model


def loss_function() -> nn.Module:
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)


def patches(dims: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 1, *SHAPE[dims], generator=generator)
    return image, torch.randint(0, 3, (count, 1, *SHAPE[dims]), generator=generator).float()


def plain(dims: int, patients: int) -> Callable[[], None]:
    model, loss = network(dims, inplace=True), loss_function()
    image, target = patches(dims, PATCHES * patients)

    def step() -> None:
        for start in range(0, len(image), PATCHES):
            loss(model(image[start : start + PATCHES]), target[start : start + PATCHES]).backward()
        model.zero_grad()

    return step


def norm_and_heads(dims: int, patients: int) -> Callable[[], None]:
    return by_patient(dims, patients, few=True)


def by_patient(dims: int, patients: int, *, few: bool = False) -> Callable[[], None]:
    model, loss = network(dims, inplace=True), loss_function()
    for module in model.modules() if few else ():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            module.requires_grad_(module in list(model.decoder.seg_layers)[-1:])
    image, target = patches(dims, PATCHES * patients)
    noise = SecureNoise()
    gradients = PatientGradients(
        (p for p in model.parameters() if p.requires_grad),
        clip=1,
        noise_multiplier=1,
        expected_patients=patients,
        noise=noise,
    )

    def step() -> None:
        for start in range(0, len(image), PATCHES):
            gradients.start_patient()
            loss(model(image[start : start + PATCHES]), target[start : start + PATCHES]).backward()
            gradients.end_patient()
        gradients.release()

    return step


def hooks(dims: int, patients: int) -> Callable[[], None]:
    model, loss = GradSampleModule(for_opacus(network(dims, inplace=False)), loss_reduction="mean"), loss_function()
    image, target = patches(dims, PATCHES * patients)

    def step() -> None:
        loss(model(image), target).backward()
        found = [parameter.grad_sample for parameter in dict.fromkeys(model.parameters()) if parameter.requires_grad]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)
        for sample in found:
            torch.einsum("n,n...->...", (1 / norms).clamp(max=1), sample)
        model.zero_grad()

    return step


def ghost(dims: int, patients: int) -> Callable[[], None]:
    model = GradSampleModuleFastGradientClipping(
        for_opacus(network(dims, inplace=False)), max_grad_norm=1, use_ghost_clipping=True, loss_reduction="mean"
    )
    loss = loss_function()
    image, target = patches(dims, PATCHES * patients)

    def step() -> None:
        model.enable_hooks()
        per_patch = torch.stack([loss(out[None], truth[None]) for out, truth in zip(model(image), target, strict=True)])
        per_patch.mean().backward(retain_graph=True)
        scale = model.get_clipping_coef()
        model.zero_grad()
        model.disable_hooks()
        (scale.detach() * per_patch).sum().backward()
        model.zero_grad()

    return step


METHODS = {
    "plain": plain,
    "by patient": by_patient,
    "by patient, norm, heads": norm_and_heads,
    "Opacus, hooks": hooks,
    "Opacus, ghost": ghost,
}


def measure(name: str, dims: int, patients: int, repeats: int, queue: multiprocessing.Queue[object]) -> None:
    """In a process of its own, so that its peak of memory is its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        step = METHODS[name](dims, patients)
        step()
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
        queue.put((float(np.median(seconds)), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    except Exception as error:  # noqa: BLE001 - a method that cannot do this network is a result, and is printed
        queue.put(f"{type(error).__name__}: {error}".splitlines()[0][:120])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, default=3, choices=(2, 3))
    parser.add_argument("--patients", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| patients in a step | method | CPU s | over plain | memory, MiB |\n|---|---|---|---|---|")
    for patients in arguments.patients:
        base = float("nan")
        for name in METHODS:
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, arguments.dims, patients, arguments.repeats, queue))
            process.start()
            found = queue.get()
            process.join()
            if isinstance(found, str):
                print(f"| {patients} | {name} | {found} | | |", flush=True)
                continue
            seconds, memory = found
            base = seconds if name == "plain" else base
            print(f"| {patients} | {name} | {seconds:.2f} | {seconds / base:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
