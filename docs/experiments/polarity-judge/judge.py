"""How a judge of polarity has to begin, so that it learns from few slices at a time.

    python docs/experiments/polarity-judge/judge.py DATA --dims 2 --batch 4 --steps 400 --seeds 0 1 2 --gain 1 --rate 2e-3

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites`. A judge is trained on patches of site A, the reference, as the
harmonizer phase of `polarity` trains it (`harmonizers/upright.py`): the same network, loss, optimizer and falling learning
rate. Afterwards 64 patches of each other site are let vote; D is the inverted one. One line for each seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
from torch import Tensor

from nnunet_fedharm.harmonizers.judges import GAIN, JUDGES
from nnunet_fedharm.harmonizers.resnet import MirrorConv
from nnunet_fedharm.harmonizers.training import GRADIENT_CLIP
from nnunet_fedharm.trainers.patches import random_patch

PATCH = {2: (56, 40), 3: (32, 40, 32)}
EPOCH = 40
"""Steps at one learning rate."""
LEARNED = 0.5
"""Running loss at which a judge has learned; log 2 = .69 is chance."""

Volume = npt.NDArray[np.float32]


def load(data: Path, site: str) -> list[Volume]:
    """Z-scored volumes of a site."""
    volumes = []
    for path in sorted((data / "imagesTr").glob(f"{site}_*_0000.nii.gz")):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
        volumes.append((image - image.mean()) / max(float(image.std()), 1e-8))
    return volumes


def draw(volumes: Sequence[Volume], dims: int, count: int, rng: np.random.Generator) -> Tensor:
    """(count, 1, *patch)."""
    picked = rng.integers(len(volumes), size=count)
    return torch.from_numpy(np.stack([random_patch(volumes[index][None], PATCH[dims], rng) for index in picked]))


def quantiles(volumes: Sequence[Volume]) -> Tensor:
    """(1, 1, 33) of all voxels of a site."""
    voxels = np.concatenate([volume.ravel()[::7] for volume in volumes])
    return torch.tensor(np.quantile(voxels, np.linspace(0.005, 0.995, 33)), dtype=torch.float32)[None, None]


def train(sites: dict[str, list[Volume]], seed: int, args: argparse.Namespace) -> str:
    """One judge; what came of it."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge = JUDGES[args.judge](channels=1, spatial_dims=args.dims, width=16)
    with torch.no_grad():
        for module in judge.modules():
            if isinstance(module, MirrorConv):
                module.weight.mul_(args.gain / GAIN)
    adam = torch.optim.Adam(judge.taught(), lr=args.rate)
    reference = quantiles(sites["A"])
    wanted = reference.expand(args.batch, -1, -1)
    losses: list[float] = []
    running, learned = float(np.log(2)), None
    for step in range(args.steps):
        for group in adam.param_groups:
            group["lr"] = args.rate * (1 - (step // EPOCH) * EPOCH / args.steps)
        loss = judge.loss(draw(sites["A"], args.dims, args.batch, rng), wanted, generator)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.taught(), GRADIENT_CLIP)
        adam.step()
        losses.append(float(loss.detach()))
        running += 0.05 * (losses[-1] - running)
        if learned is None and running < LEARNED:
            learned = step
    votes = []
    with torch.no_grad():
        for site in "BCD":
            own = quantiles(sites[site]).expand(64, -1, -1)
            score = judge(draw(sites[site], args.dims, 64, rng), own, reference.expand(64, -1, -1))
            right = float((score < 0 if site == "D" else score > 0).float().mean())
            votes.append(f"{float(torch.tanh(score / 2).mean()):+.2f} ({right:.0%} right)")
    return f"seed {seed}: learned at step {learned}, loss {np.mean(losses[-EPOCH:]):.3f}, votes of B, C, D {' '.join(votes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--judge", choices=tuple(JUDGES), default="network")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gain", type=float, default=GAIN, help="of a network")
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    sites = {site: load(args.data, site) for site in "ABCD"}
    for seed in args.seeds:
        print(train(sites, seed, args), flush=True)


if __name__ == "__main__":
    main()
