"""Does the diffusion harmonizer help a segmenter that saw labels of site A only, and more than strong augmentation does?

    python docs/experiments/flow/segmenter.py --data DATA --harmonizer WEIGHTS.pt --results results.json [--seeds 1]

DATA as in travelling.py, WEIGHTS.pt as written there by `--weights`. A U-Net of the benchmark's size (features 8 to 64, patches
32 x 40 x 32, batch 2, SGD 0.1 with momentum 0.9, Dice and cross-entropy) trains on A without the travelling subjects, mirrored.
Arms: `none`; `appearances`, the same network under the harmonizer's own random appearances (half of the samples), which is what
strong augmentation can make of them, and the same with inverted tone curves, since the bridge has a judge for these; `flow`,
harmonizer in front in training and testing; `flow, not at A`, the same with A's own images left alone, as the gates do by
default; `inverse alone`, the judge's inverse at inverted sites, without the bridge. Dice is the mean of both labels on whole
volumes: cases of B, C and D, and A's held-out subjects.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from torch import Tensor, nn
from travelling import ARMS, SITES, new

from nnunet_fedharm.datasets.travelling import load_travelling, read_z_scored
from nnunet_fedharm.harmonizers.appearance import AppearanceOptions, random_appearance
from nnunet_fedharm.harmonizers.flow import FlowConfig, FlowHarmonizer

PATCH, BATCH, LR = (32, 40, 32), 2, 0.1
Case = tuple[np.ndarray, np.ndarray]
Front = Callable[[Tensor, str], Tensor]


def cases_by_site(folder: Path) -> dict[str, list[Case]]:
    """Image and label of every case, with A's travelling subjects under "A held out"."""
    travellers = {path.name.split("_")[1] for path in (folder / "imagesTravelling").glob("*_0000.nii.gz")}
    cases: dict[str, list[Case]] = {site: [] for site in (*SITES, "A held out")}
    for path in sorted((folder / "imagesTr").glob("*_0000.nii.gz")):
        site, number, _ = path.name.split("_")
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{site}_{number}.nii.gz")))
        held = site == "A" and number in travellers
        if site == "A" or number not in travellers:
            cases["A held out" if held else site].append((read_z_scored(path), label.astype(np.int64)))
    return cases


def network() -> nn.Module:
    return PlainConvUNet(
        1, 4, [8, 16, 32, 64], nn.Conv3d, 3, [1, 2, 2, 2], 2, 3, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def draw(case: Case, rng: np.random.Generator) -> Case:
    """A random, mirrored patch of image and label."""
    axes = [axis for axis in range(3) if rng.random() < 0.5]
    starts = [int(rng.integers(max(n - want, 0) + 1)) for n, want in zip(case[0].shape, PATCH, strict=True)]
    patch = []
    for volume in case:
        cut = volume[tuple(slice(start, start + want) for start, want in zip(starts, PATCH, strict=True))]
        padded = np.zeros(PATCH, volume.dtype)
        padded[tuple(slice(size) for size in cut.shape)] = cut
        patch.append(np.flip(padded, axes).copy())
    return patch[0], patch[1]


def train(cases: list[Case], change: Callable[[Tensor, torch.Generator], Tensor], seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    loss_of = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    assert loss_of.dc.apply_nonlin is softmax_helper_dim1
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=3e-5)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps) ** 0.9
        drawn = [draw(cases[i], rng) for i in rng.integers(len(cases), size=BATCH)]
        image = torch.from_numpy(np.stack([image[None] for image, _ in drawn]))
        with torch.no_grad():
            image = change(image, generator)
        loss = loss_of(model(image), torch.from_numpy(np.stack([label[None] for _, label in drawn])))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 12)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def dice(model: nn.Module, front: Front, cases: list[Case], site: str) -> float:
    scores = []
    for image, label in cases:
        batch = front(torch.from_numpy(image)[None, None], site)
        padding = [amount for size in reversed(image.shape) for amount in (0, -size % 8)]
        logits = model(nn.functional.pad(batch, padding))[0]
        found = logits[(slice(None), *(slice(size) for size in image.shape))].argmax(0).numpy()
        for value in (1, 2):
            total = (found == value).sum() + (label == value).sum()
            scores.append(2 * ((found == value) & (label == value)).sum() / total)
    return float(np.mean(scores))


def arms(harmonizer: FlowHarmonizer) -> dict[str, tuple[Callable[..., Tensor], Front]]:
    """Arm -> (change of training images, front-end of testing)."""
    own = harmonizer.bank_quantiles[:1]

    def harmonized(image: Tensor, site: str) -> Tensor:
        harmonizer.serve(SITES.index(site[0]), gate=1.0)
        result: Tensor = harmonizer(image)
        return result

    def inverse(image: Tensor, site: str) -> Tensor:
        harmonizer.serve(SITES.index(site[0]), gate=1.0)
        return harmonizer.upright(image, harmonizer.source_of(image, image != 0))[0]

    def appearances(options: AppearanceOptions, image: Tensor, generator: torch.Generator) -> Tensor:
        changed, _ = random_appearance(
            image, image != 0, own.expand(len(image), -1, -1), harmonizer.bank_quantiles, harmonizer.bank_offset,
            options, generator,
        )  # fmt: skip
        chosen = torch.rand(len(image), generator=generator) < 0.5
        return torch.where(chosen[:, None, None, None, None], changed, image)

    return {
        "none": (lambda image, _: image, lambda image, _: image),
        "appearances": (partial(appearances, harmonizer.config.appearance), lambda image, _: image),
        "appearances, inverted as well": (
            partial(appearances, FlowConfig(inverted_share=0.35).appearance),
            lambda image, _: image,
        ),
        "flow": (lambda image, _: harmonized(image, "A"), harmonized),
        "flow, not at A": (lambda image, _: image, lambda x, site: x if site[0] == "A" else harmonized(x, site)),
        "inverse alone": (lambda image, _: image, inverse),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    parser.add_argument("--harmonizer", type=Path, required=True, help="weights written by travelling.py")
    parser.add_argument("--arm", default="flow", choices=list(ARMS), help="whose weights these are")
    parser.add_argument("--results", type=Path, required=True, help="JSON file that is added to")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--cases", type=int, default=40, help="test cases a site")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, cases = load_travelling(arguments.data, sites=SITES, reference="A"), cases_by_site(arguments.data)
    harmonizer = new(ARMS[arguments.arm], data)
    harmonizer.load_state_dict(torch.load(arguments.harmonizer, weights_only=True))
    assert isinstance(harmonizer.eval(), FlowHarmonizer)
    harmonizer.open_gate()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    models: dict[tuple[int, str], nn.Module] = {}
    for seed in range(arguments.seeds):
        for name, (change, front) in arms(harmonizer).items():
            if f"{name}#{seed}" in results or name not in (arguments.arms or [name]):
                continue
            start = time.process_time()
            plain = (seed, "none")
            share = name in ("flow, not at A", "inverse alone") and plain in models  # its training is that of `none`
            models[seed, name] = models[plain] if share else train(cases["A"], change, seed, arguments.steps)
            seconds = time.process_time() - start
            test = {site: cases[site][: arguments.cases] for site in ("A held out", "B", "C", "D")}
            found = {site: dice(models[seed, name], front, cases, site) for site, cases in test.items()}
            results[f"{name}#{seed}"] = {"dice": found, "seconds": seconds}
            arguments.results.write_text(json.dumps(results, indent=1))
            print(name, seed, {site: round(value, 3) for site, value in found.items()}, f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
