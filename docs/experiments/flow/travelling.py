"""Does the diffusion harmonizer bring a site's images closer to the reference's? Measured on travelling subjects.

    python docs/experiments/flow/travelling.py run    --data DATA --results results.json [--arms NAME ...] [--seeds 3]
    python docs/experiments/flow/travelling.py report --results results.json

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`: eight subjects of site A rendered at
the sites B, C and D, so the answer is known voxel by voxel. Those subjects are held out at every site. D is T2-like: its
contrast is inverted. The harmonizer trains on A alone, the reference; B, C and D give their styles (quantiles) and vote on
whether their contrast is A's inverse.
An arm and seed that the results hold is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fedharm.datasets.travelling import TravellingData, load_travelling
from nnunet_fedharm.harmonizers import Harmonizer, build_harmonizer
from nnunet_fedharm.harmonizers.flow import FlowHarmonizer

SITES = ("A", "B", "C", "D")
PATCH = {2: (40, 40), 3: (32, 40, 32)}
BATCH = {2: 16, 3: 2}


@dataclass(frozen=True)
class Arm:
    """One trained harmonizer; the diffusion harmonizer may be measured with several numbers of steps."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dims: int = 3
    steps: tuple[int, ...] = (1,)
    lr: float = 2e-3


INVERTED = {"polarity": False, "inverted_share": 0.35}

ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "nyul": Arm("nyul"),
    "curve": Arm("curve", lr=3e-3),
    "flow": Arm("diffusion", {"n_steps": 4}, steps=(1, 2, 4)),
    "flow, t = 1 only": Arm("diffusion"),
    "flow, no judge": Arm("diffusion", {"polarity": False}),
    "flow, no judge, inverted curves": Arm("diffusion", INVERTED),
    "flow, inverted curves as well": Arm("diffusion", {"inverted_share": 0.2}),
    "flow, no style code": Arm("diffusion", {"style": False}),
    "flow, no gradient loss": Arm("diffusion", {"gradient_weight": 0.0}),
    "flow, 2d": Arm("diffusion", dims=2),
}


def draw(volume: np.ndarray, dims: int, rng: np.random.Generator) -> np.ndarray:
    """A random, randomly mirrored patch, padded with zeros where the volume is smaller."""
    if dims == 2:
        volume = volume[rng.integers(len(volume))]
    patch = np.zeros(PATCH[dims], np.float32)
    pairs = zip(volume.shape, patch.shape, strict=True)
    starts = [int(rng.integers(max(size - want, 0) + 1)) for size, want in pairs]
    cut = volume[tuple(slice(start, start + want) for start, want in zip(starts, patch.shape, strict=True))]
    patch[tuple(slice(size) for size in cut.shape)] = cut
    return np.flip(patch, [axis for axis in range(dims) if rng.random() < 0.5]).copy()


def batch(
    volumes: list[tuple[np.ndarray, int]], dims: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (B, 1, *PATCH) and their sites (B,)."""
    picked = [volumes[i] for i in rng.integers(len(volumes), size=BATCH[dims])]
    patches = torch.from_numpy(np.stack([draw(volume, dims, rng)[None] for volume, _ in picked]))
    return patches, torch.tensor([site for _, site in picked])


def new(arm: Arm, data: TravellingData) -> Harmonizer:
    options = {"num_channels": 1, "spatial_dims": arm.dims, "styles": data.styles, "reference": data.styles[0]}
    return build_harmonizer(arm.kind, arm.options, **options)


def train(arm: Arm, data: TravellingData, seed: int, steps: int) -> Harmonizer:
    """`steps` steps on patches of the sites that the harmonizer trains on."""
    harmonizer = new(arm, data)
    training = harmonizer.make_training(lr=arm.lr, total_epochs=steps)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sites = [site for site in range(len(SITES)) if harmonizer.trains_on(site)]
    volumes = [(volume, site) for site in sites for volume in data.train[SITES[site]]]
    genuine = [(volume, site) for site in harmonizer.reference_sites() for volume in data.train[SITES[site]]]
    for step in range(steps):
        training.set_epoch(step)
        image, origin = batch(volumes, arm.dims, rng)
        references = batch(genuine, arm.dims, rng)[0] if training.uses_references else None
        training.step(image, origin, generator, references)
    return harmonizer


@torch.no_grad()
def measure(harmonizer: Harmonizer, data: TravellingData, dims: int) -> dict[str, dict[str, float]]:
    """Per site, means over the held-out subjects: correlation with the truth, RMSE / std of the truth, change made."""
    harmonizer.eval()
    harmonizer.open_gate()
    result = {}
    for index, site in enumerate(SITES):
        harmonizer.set_source(data.styles[index])
        rows = []
        for image, truth in data.pairs[site]:
            batch = torch.from_numpy(image)
            mapped = harmonizer(batch[:, None] if dims == 2 else batch[None, None]).reshape(image.shape).numpy()
            error = np.sqrt(np.mean((mapped - truth) ** 2)) / truth.std()
            rows.append((np.corrcoef(mapped.ravel(), truth.ravel())[0, 1], error, np.abs(mapped - image).mean()))
        result[site] = dict(zip(("correlation", "nrmse", "change"), np.mean(rows, axis=0).tolist(), strict=True))
    return result


def run(arguments: argparse.Namespace) -> None:
    data = load_travelling(arguments.data, sites=SITES, reference="A")
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for seed in range(arguments.seeds):
        for name in arguments.arms or ARMS:
            arm = ARMS[name]
            learned = arm.kind in ("curve", "diffusion")
            if any(key.startswith(f"{name}#") and key.endswith(f"#{seed}") for key in results) or (
                seed and not learned
            ):
                continue
            start = time.process_time()
            harmonizer = train(arm, data, seed, arguments.steps) if learned else new(arm, data)
            seconds = time.process_time() - start
            for steps in arm.steps:
                if isinstance(harmonizer, FlowHarmonizer):
                    harmonizer.config = replace(harmonizer.config, n_steps=steps)
                found = measure(harmonizer, data, arm.dims)
                results[f"{name}#{steps}#{seed}"] = {"sites": found, "seconds": seconds}
                line = ", ".join(f"{site} {v['correlation']:.3f} {v['nrmse']:.3f}" for site, v in found.items())
                print(f"{name}, {steps} steps, seed {seed} ({seconds:.0f} s): {line}", flush=True)
            arguments.results.write_text(json.dumps(results, indent=1))
            if arguments.weights and learned:
                torch.save(harmonizer.state_dict(), arguments.weights / (re.sub(r"\W+", "_", f"{name} {seed}") + ".pt"))


def report(arguments: argparse.Namespace) -> None:
    results = json.loads(arguments.results.read_text())
    head = [f"{site} {what}" for what in ("corr.", "nRMSE") for site in "BCD"]
    print(f"| harmonizer | steps | seeds | {' | '.join(head)} | A nRMSE | training, CPU s |")
    print("|" + "---|" * (len(head) + 5))
    for name, arm in ARMS.items():
        for steps in arm.steps:
            rows = [value for key, value in results.items() if key.startswith(f"{name}#{steps}#")]
            if not rows:
                continue
            cells = [[r["sites"][site][key] for r in rows] for key in ("correlation", "nrmse") for site in "BCD"]
            cells.append([row["sites"]["A"]["nrmse"] for row in rows])
            text = [f"{np.mean(cell):.3f}" + (f" ± {np.std(cell):.3f}" if len(cell) > 1 else "") for cell in cells]
            seconds = np.mean([row["seconds"] for row in rows])
            print(f"| {name} | {steps} | {len(rows)} | {' | '.join(text)} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    runner.add_argument("--results", type=Path, required=True, help="JSON file that is added to")
    runner.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--steps", type=int, default=600)
    runner.add_argument("--weights", type=Path, help="folder that trained harmonizers are written to")
    runner.set_defaults(act=run)
    reporter = commands.add_parser("report")
    reporter.add_argument("--results", type=Path, required=True)
    reporter.set_defaults(act=report)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.act(arguments)


if __name__ == "__main__":
    main()
