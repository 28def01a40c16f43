"""Does the diffusion harmonizer bring a site's images closer to the reference's? Measured on travelling subjects.

    python docs/experiments/flow/travelling.py run    --data DATA --results results.json [--arms NAME ...] [--seeds 0 1 2]
    python docs/experiments/flow/travelling.py report --results results.json

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`: eight subjects of site A rendered at
the sites B, C and D, so the answer is known voxel by voxel. Those subjects are held out at every site. D is T2-like: its
contrast is inverted. The harmonizer trains on A alone, the reference; B, C and D give their styles (quantiles) and vote on
whether their contrast is A's inverse. Settings are chosen on the subjects with the four lowest numbers (half "choice"); what
is reported is measured on the others (half "report").
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
from nnunet_fedharm.harmonizers.polarity import polarity_step

SITES = ("A", "B", "C", "D")
PATCH = {2: (40, 40), 3: (32, 40, 32)}
BATCH = {2: 16, 3: 2}
HALVES = {"choice": slice(0, 4), "report": slice(4, 8)}


@dataclass(frozen=True)
class Arm:
    """One trained harmonizer; the diffusion harmonizer may be measured with several numbers of steps."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dims: int = 3
    steps: tuple[int, ...] = (1,)
    lr: float = 2e-3
    judge_only: bool = False
    """Leave the bridge at zero: an inverted site gets its inverse in the reference's quantiles, the others stay as they are."""

    @property
    def learned(self) -> bool:
        return self.kind in ("curve", "diffusion")


REGRESSION: dict[str, Any] = {"start_share": 1.0}
DDIM: dict[str, Any] = {"process": "ddim", "n_steps": 4}

ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "nyul": Arm("nyul"),
    "curve": Arm("curve", lr=3e-3),
    "inverse alone": Arm("diffusion", judge_only=True),
    "flow": Arm("diffusion", steps=(1, 2, 4)),
    "regression (t = 1 only)": Arm("diffusion", REGRESSION),
    "ddim": Arm("diffusion", DDIM, steps=(1, 2, 4)),
    "ddim, full schedule": Arm("diffusion", DDIM | {"ddim_start": 1.0}, steps=(1, 2, 4)),
    "flow, no style code": Arm("diffusion", {"style": False}),
    "flow, no gradient loss": Arm("diffusion", {"gradient_weight": 0.0}),
    "flow, blocks only": Arm("diffusion", {"block_share": 1.0}),
    "flow, width 12": Arm("diffusion", {"width": 12}),
}
ARMS |= {f"{name}, 2d": replace(arm, dims=2) for name, arm in ARMS.items() if arm.kind == "diffusion"}
"""Name -> arm, those of the diffusion harmonizer in 3d and in 2d."""


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
        if arm.judge_only:
            polarity_step(training, image, origin, generator, references, judge_steps=1)
        else:
            training.step(image, origin, generator, references)
    return harmonizer


@torch.no_grad()
def measure(harmonizer: Harmonizer, data: TravellingData, dims: int) -> dict[str, dict[str, dict[str, float]]]:
    """Half -> site -> means over subjects: correlation with the truth, RMSE / std of the truth, change made.

    Gates are open everywhere, so A shows what its images would suffer, were they not left alone.
    """
    harmonizer.eval()
    harmonizer.open_gate()
    result: dict[str, dict[str, dict[str, float]]] = {half: {} for half in HALVES}
    for index, site in enumerate(SITES):
        harmonizer.serve(index, gate=1.0)
        rows = []
        for image, truth in data.pairs[site]:
            batch = torch.from_numpy(image)
            mapped = harmonizer(batch[:, None] if dims == 2 else batch[None, None]).reshape(image.shape).numpy()
            error = np.sqrt(np.mean((mapped - truth) ** 2)) / truth.std()
            rows.append((np.corrcoef(mapped.ravel(), truth.ravel())[0, 1], error, np.abs(mapped - image).mean()))
        for half, part in HALVES.items():
            means = np.mean(rows[part], axis=0).tolist()
            result[half][site] = dict(zip(("correlation", "nrmse", "change"), means, strict=True))
    return result


def run(arguments: argparse.Namespace) -> None:
    data = load_travelling(arguments.data, sites=SITES, reference="A")
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for seed in arguments.seeds:
        for name in arguments.arms or ARMS:
            arm = ARMS[name]
            if f"{name}#{arm.steps[0]}#{seed}" in results or (seed and not arm.learned):
                continue
            start = time.process_time()
            harmonizer = train(arm, data, seed, arguments.steps) if arm.learned else new(arm, data)
            seconds = time.process_time() - start
            for steps in arm.steps:
                if isinstance(harmonizer, FlowHarmonizer):
                    harmonizer.config = replace(harmonizer.config, n_steps=steps)
                found = measure(harmonizer, data, arm.dims)
                votes = [round(float(vote), 2) for vote in harmonizer.bank_polarity.flatten()]
                results[f"{name}#{steps}#{seed}"] = found | {"seconds": seconds, "votes": votes}
                line = "; ".join(
                    f"{half} " + ", ".join(f"{site} {found[half][site]['nrmse']:.3f}" for site in "BCDA")
                    for half in HALVES
                )
                print(f"{name}, {steps} steps, seed {seed} ({seconds:.0f} s): {line}; votes {votes}", flush=True)
            arguments.results.write_text(json.dumps(results, indent=1))
            if arguments.weights and arm.learned:
                torch.save(harmonizer.state_dict(), arguments.weights / (re.sub(r"\W+", "_", f"{name} {seed}") + ".pt"))


def report(arguments: argparse.Namespace) -> None:
    """Mean over seeds and, where there are several, the lowest and highest."""
    results = json.loads(arguments.results.read_text())
    for half in HALVES:
        print(f"\nHalf: {half}\n")
        print("| harmonizer | steps | seeds | B nRMSE | C nRMSE | D nRMSE | A nRMSE | D corr. | training, CPU s |")
        print("|" + "---|" * 9)
        for name, arm in ARMS.items():
            for steps in arm.steps:
                rows = [value for key, value in results.items() if key.startswith(f"{name}#{steps}#")]
                if not rows:
                    continue
                cells = [[row[half][site]["nrmse"] for row in rows] for site in "BCDA"]
                cells.append([row[half]["D"]["correlation"] for row in rows])
                seconds = np.mean([row["seconds"] for row in rows])
                print(f"| {name} | {steps} | {len(rows)} | {' | '.join(map(spread, cells))} | {seconds:.0f} |")


def spread(values: list[float]) -> str:
    """Mean (lowest to highest), or the value alone where all are equal."""
    mean, low, high = (f"{value:.3f}".replace("0.", ".") for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    runner.add_argument("--results", type=Path, required=True, help="JSON file that is added to")
    runner.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runner.add_argument("--steps", type=int, default=400)
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
