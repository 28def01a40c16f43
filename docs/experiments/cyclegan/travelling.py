"""Does CycleGAN bring a site's images closer to the reference's? Centralized and federated, on travelling subjects.

    python docs/experiments/cyclegan/travelling.py run    --data DATA --results results.json [--arms NAME ...] [--seeds 3]
    python docs/experiments/cyclegan/travelling.py report --results results.json

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`: subjects of site A rendered at the
sites B, C and D, so the answer is known voxel by voxel. Those subjects are held out at every site. The federation is
simulated in this process, with the package's own training steps: K = 4 sites, some local steps, equal average of everything
that the package would send. An arm and seed that the results hold is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fedharm.datasets.travelling import TravellingData, load_travelling
from nnunet_fedharm.harmonizers import Harmonizer, build_harmonizer
from nnunet_fedharm.trainers.weights import export_weights, load_weights

SITES = ("A", "B", "C", "D")
REFERENCE = "A"
LR = {"curve": 3e-3, "cyclegan": 2e-3}


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    local_steps: int = 0
    """Steps between two averages; 0 is centralized."""
    dims: int = 2


NO_PSEUDO = {"pseudo_references": False, "pseudo_sources": False}
REFERENCES = {"pseudo_references": True, "pseudo_sources": False}
SOURCES = {"pseudo_references": False, "pseudo_sources": True}
BOTH = {"pseudo_references": True, "pseudo_sources": True}
SPLIT = {**NO_PSEUDO, "share_backward": True, "one_sided": True}
PLAIN = {**NO_PSEUDO, "polarity": False}
PAIRED = {"paired_weight": 10.0}

ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "nyul": Arm("nyul"),
    "curve": Arm("curve"),
    "central, no polarity vote": Arm("cyclegan", PLAIN),
    "central": Arm("cyclegan", NO_PSEUDO),
    "central, pseudo-sources": Arm("cyclegan", SOURCES),
    "central, paired pseudo-sources": Arm("cyclegan", {**SOURCES, **PAIRED}),
    "split, 1 step (FedCycleGAN)": Arm("cyclegan", SPLIT, local_steps=1),
    "split, 20 steps": Arm("cyclegan", SPLIT, local_steps=20),
    "federated, no pseudo": Arm("cyclegan", NO_PSEUDO, local_steps=20),
    "federated, pseudo-references": Arm("cyclegan", REFERENCES, local_steps=20),
    "federated, pseudo-sources": Arm("cyclegan", SOURCES, local_steps=20),
    "federated, both": Arm("cyclegan", BOTH, local_steps=20),
    "federated, both, no polarity vote": Arm("cyclegan", {**BOTH, "polarity": False}, local_steps=20),
    "central, 3D": Arm("cyclegan", NO_PSEUDO, dims=3),
    "federated, both, 3D": Arm("cyclegan", BOTH, local_steps=20, dims=3),
}


class Patches:
    """Random, randomly mirrored patches of the named sites."""

    def __init__(self, data: TravellingData, sites: Sequence[str], arm: Arm, rng: np.random.Generator) -> None:
        self.volumes = [(volume, SITES.index(site)) for site in sites for volume in data.train[site]]
        self.size = (40, 40) if arm.dims == 2 else (24, 24, 24)
        # A site's batch is half of the centralized one, as four sites step at the same time.
        self.batch = (8 if arm.dims == 2 else 2) // (2 if arm.local_steps else 1)
        self.rng = rng

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            picked = [self.volumes[i] for i in self.rng.integers(len(self.volumes), size=self.batch)]
            patches = torch.from_numpy(np.stack([self.patch(volume) for volume, _ in picked]))
            yield patches[:, None], torch.tensor([site for _, site in picked])

    def patch(self, volume: np.ndarray) -> np.ndarray:
        if len(self.size) == 2:
            volume = volume[self.rng.integers(len(volume))]
        patch = np.zeros(self.size, np.float32)
        starts = [
            self.rng.integers(max(size - want, 0) + 1) for size, want in zip(volume.shape, self.size, strict=True)
        ]
        cut = volume[tuple(slice(start, start + want) for start, want in zip(starts, self.size, strict=True))]
        patch[tuple(slice(size) for size in cut.shape)] = cut
        return np.flip(patch, [axis for axis in range(patch.ndim) if self.rng.random() < 0.5]).copy()


def train_central(arm: Arm, data: TravellingData, seed: int, steps: int) -> Harmonizer:
    """`steps` steps on patches of all sites."""
    harmonizer = new(arm, data)
    training = harmonizer.make_training(lr=LR[arm.kind], total_epochs=steps)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batches = iter(Patches(data, SITES, arm, rng))
    references = iter(Patches(data, [REFERENCE], arm, rng))
    for step in range(steps):
        training.set_epoch(step)
        image, sites = next(batches)
        training.step(image, sites, generator, next(references)[0] if training.uses_references else None)
    return harmonizer


def train_federated(arm: Arm, data: TravellingData, seed: int, steps: int) -> Harmonizer:
    """`steps` steps at each site, with an equal average of what the package sends after every `local_steps`."""
    server = new(arm, data)
    weights = export_weights(server)
    sites = []
    for index, site in enumerate(SITES):
        harmonizer = new(arm, data)
        training = harmonizer.make_training(lr=LR[arm.kind], total_epochs=steps)
        rng = np.random.default_rng([seed, index])
        genuine = iter(Patches(data, [site], arm, rng)) if site == REFERENCE else None
        generator = torch.Generator().manual_seed(100 * seed + index)
        sites.append((harmonizer, training, iter(Patches(data, [site], arm, rng)), genuine, generator))
    for first in range(0, steps, arm.local_steps):
        replies = []
        for harmonizer, training, batches, genuine, generator in sites:
            load_weights(harmonizer, weights)
            training.set_epoch(first)
            training.begin_round()
            for _ in range(arm.local_steps):
                training.step(*next(batches), generator, None if genuine is None else next(genuine)[0])
            training.finish_round()
            replies.append(export_weights(harmonizer))
        weights = {name: np.mean([reply[name] for reply in replies], axis=0) for name in weights}
    load_weights(server, weights)
    return server


def new(arm: Arm, data: TravellingData) -> Harmonizer:
    styles = data.styles
    return build_harmonizer(
        arm.kind,
        arm.options,
        num_channels=1,
        spatial_dims=arm.dims,
        styles=styles,
        reference=styles[SITES.index(REFERENCE)],
    )


@torch.no_grad()
def measure(harmonizer: Harmonizer, data: TravellingData, dims: int) -> dict[str, dict[str, float]]:
    """Per site, means over the held-out subjects: correlation with the truth, RMSE / std of the truth, change made."""
    harmonizer.eval()
    harmonizer.open_gate()
    result = {}
    for site in SITES:
        harmonizer.set_source(data.styles[SITES.index(site)])
        rows = []
        for image, truth in data.pairs[site]:
            batch = torch.from_numpy(image)
            batch = batch[:, None] if dims == 2 else batch[None, None]
            mapped = harmonizer(batch).reshape(image.shape).numpy()
            error = np.sqrt(np.mean((mapped - truth) ** 2)) / truth.std()
            correlation = np.corrcoef(mapped.ravel(), truth.ravel())[0, 1]
            rows.append((correlation, error, np.abs(mapped - image).mean()))
        result[site] = dict(zip(("correlation", "nrmse", "change"), np.mean(rows, axis=0).tolist(), strict=True))
    return result


def inverted_sites(harmonizer: Harmonizer) -> list[str]:
    """Sites that the vote found inverted."""
    if not hasattr(harmonizer, "polarity"):
        return []
    found = harmonizer.inverted(harmonizer.bank_quantiles).any(dim=1)
    return [site for site, inverted in zip(SITES, found.tolist(), strict=True) if inverted]


def run(arguments: argparse.Namespace) -> None:
    data = load_travelling(arguments.data, sites=SITES, reference=REFERENCE)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for name in arguments.arms or ARMS:
        arm = ARMS[name]
        for seed in range(arguments.seeds if arm.kind in LR else 1):
            if f"{name}#{seed}" in results:
                continue
            start = time.perf_counter()
            if arm.kind not in LR:
                harmonizer = new(arm, data)
            else:
                train = train_federated if arm.local_steps else train_central
                harmonizer = train(arm, data, seed, arguments.steps)
            seconds = time.perf_counter() - start
            found = measure(harmonizer, data, arm.dims)
            results[f"{name}#{seed}"] = {"sites": found, "seconds": seconds, "inverted": inverted_sites(harmonizer)}
            arguments.results.write_text(json.dumps(results, indent=1))
            line = ", ".join(f"{s} {v['correlation']:.3f} {v['nrmse']:.3f}" for s, v in found.items())
            print(f"{name} seed {seed} ({seconds:.0f} s): {line}, A changed by {found['A']['change']:.3f}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    results = json.loads(arguments.results.read_text())
    print(
        "| arm | seeds | B corr. | C corr. | D corr. | B nRMSE | C nRMSE | D nRMSE | change at A | D found inverted |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in ARMS:
        runs = [value for key, value in results.items() if key.rsplit("#", 1)[0] == name]
        rows = [value["sites"] for value in runs]
        if not rows:
            continue
        cells = [[row[site][key] for row in rows] for key in ("correlation", "nrmse") for site in "BCD"]
        cells.append([row["A"]["change"] for row in rows])
        text = [f"{np.mean(cell):.3f}" + (f" ± {np.std(cell):.3f}" if len(cell) > 1 else "") for cell in cells]
        turned = sum(value["inverted"] == ["D"] for value in runs)
        print(f"| {name} | {len(rows)} | {' | '.join(text)} | {turned} of {len(runs)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    runner.add_argument("--results", type=Path, required=True, help="JSON file that is added to")
    runner.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--steps", type=int, default=600, help="centralized steps, or steps at each site")
    runner.set_defaults(act=run)
    reporter = commands.add_parser("report")
    reporter.add_argument("--results", type=Path, required=True)
    reporter.set_defaults(act=report)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.act(arguments)


if __name__ == "__main__":
    main()
