"""What a harmonizer costs in a training step and in prediction, as a ratio to the plain network.

    python benchmarks/harmonizer_cost.py [--patch 40 56 40] [--features 32 64 128 256] [--batch 2] [--device cpu]

Plain and harmonized steps alternate in one process, and ratios are taken pair by pair, so a machine whose speed drifts does
not decide the result. On a CPU process time is counted, on a GPU synchronised wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_fedharm.harmonizers import KINDS, build_harmonizer
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.trainers.harmonized_segmenter import HarmonizedSegmenter


def style(shift: float, channels: int) -> Style:
    quantiles = np.tile(np.linspace(-2, 2, len(QUANTILE_LEVELS)) * (1 + shift), (channels, 1))
    return Style(quantiles, np.full(channels, 2.0), 10)


def segmenter(features: list[int], channels: int, spatial_dims: int) -> nn.Module:
    """nnU-Net's plain network, with halving strides."""
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if spatial_dims == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    stages = len(features)
    return PlainConvUNet(
        channels, stages, features, conv, 3, [1] + [2] * (stages - 1), 2, 3, [2] * (stages - 1), conv_bias=True,
        norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def training_step(network: nn.Module, image: torch.Tensor) -> None:
    network(image).square().mean().backward()
    network.zero_grad(set_to_none=True)


def prediction(network: nn.Module, image: torch.Tensor) -> None:
    with torch.inference_mode():
        network(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=[40, 56, 40])
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, dims = arguments.device, len(arguments.patch)
    plain = segmenter(arguments.features, arguments.channels, dims).to(device)
    image = torch.randn(arguments.batch, arguments.channels, *arguments.patch, device=device)
    styles = [style(shift, arguments.channels) for shift in (0.0, 0.2, -0.2)]
    print(f"patch {arguments.patch}, features {arguments.features}, batch {arguments.batch}, {device}\n")
    print(
        "| harmonizer | training step / plain | prediction, stored style | prediction, style from the patch |\n|---|---|---|---|"
    )
    for kind in KINDS:
        harmonizer = build_harmonizer(
            kind, {}, num_channels=arguments.channels, spatial_dims=dims, styles=styles, reference=styles[0]
        ).to(device)
        harmonizer.requires_grad_(False)
        harmonizer.open_gate()
        network = HarmonizedSegmenter(harmonizer, plain)
        ratios: list[list[float]] = [[], [], []]
        for repeat in range(arguments.repeats + 1):
            for column, (work, source) in enumerate(
                ((training_step, styles[1]), (prediction, styles[1]), (prediction, None))
            ):
                harmonizer.set_source(source)
                both = [seconds(lambda w=work, n=n: w(n, image), device) for n in (network, plain)]
                if repeat:  # the first pair warms up
                    ratios[column].append(both[0] / both[1])
        cells = [f"{np.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
