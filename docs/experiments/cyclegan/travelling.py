"""Does CycleGAN bring a site's images closer to the reference's? Centralized and federated, on travelling subjects.

    python docs/experiments/cyclegan/travelling.py run    --data DATA --results results.json [--arms NAME ...] [--seeds 3]
    python docs/experiments/cyclegan/travelling.py report --results results.json

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`: subjects of site A rendered at the
sites B, C and D, so the answer is known voxel by voxel. Those subjects are held out at every site; settings are chosen on the
four lowest numbers, the other four are for the report. The federation is simulated in this process with the package's own
training steps: K = 4 sites, some local steps, then each tensor from those that the package takes it from. The vote on
polarity is given from the start (`--vote` trains it), so that the arms compare what the generator learns. An arm and seed that
the results hold is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fedharm.datasets.travelling import TravellingData, load_travelling
from nnunet_fedharm.harmonizers import SITE_ROWS, Harmonizer, build_harmonizer, cyclegan_training
from nnunet_fedharm.harmonizers.cyclegan import CycleGANHarmonizer
from nnunet_fedharm.trainers.weights import export_weights, load_weights

SITES = ("A", "B", "C", "D")
REFERENCE = "A"
INVERTED = "D"
LR = {"curve": 3e-3, "cyclegan": 2e-3}
VOTE_IS_TRAINED = False
MEASURES = ("correlation", "nrmse", "change", "structure")
COLUMNS = {
    **{f"{site} {measure}": (site, measure) for measure in ("nrmse", "correlation") for site in "BCD"},
    "change at A": ("A", "change"),
    "C structure": ("C", "structure"),
}


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    local_steps: int = 0
    """Steps between two averages; 0 is centralized."""
    dims: int = 2
    scale: float = 1.0
    """Factor on the number of steps."""


HALVES = {"choice": slice(0, 4), "report": slice(4, 8)}
PAPER = {
    "train_everywhere": True,
    "appearance": False,
    "adversarial_weight": 1.0,
    "cycle_weight": 10.0,
    "paired_weight": 0.0,
}
NO_PSEUDO = {**PAPER, "pseudo_references": False, "pseudo_sources": False}
REFERENCES = {**PAPER, "pseudo_sources": False}
SOURCES = {**PAPER, "pseudo_references": False}
SPLIT = {**NO_PSEUDO, "share_backward": True, "one_sided": True}
PAIRED = {**SOURCES, "paired_weight": 10.0}
PAIRED_BLUR = {**PAIRED, "appearance": True}

ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "nyul": Arm("nyul"),
    "curve": Arm("curve"),
    "pooled": Arm("cyclegan", NO_PSEUDO),
    "pooled, paired": Arm("cyclegan", PAIRED),
    "pooled, paired, blur and noise": Arm("cyclegan", PAIRED_BLUR),
    "mean of sites, both pseudo sides": Arm("cyclegan", PAPER, local_steps=20),
    "mean of sites, pseudo-references": Arm("cyclegan", REFERENCES, local_steps=20),
    "mean of sites, pseudo-sources": Arm("cyclegan", SOURCES, local_steps=20),
    "mean of sites, paired, blur and noise": Arm("cyclegan", PAIRED_BLUR, local_steps=20),
    "the same, adversary .2": Arm("cyclegan", {**PAIRED_BLUR, "adversarial_weight": 0.2}, local_steps=20),
    "the same, 5 local steps": Arm("cyclegan", PAIRED_BLUR, local_steps=5),
    "the same, shared B": Arm("cyclegan", {**PAIRED_BLUR, "share_backward": True}, local_steps=20),
    "split (FedCycleGAN), equal steps": Arm("cyclegan", SPLIT, local_steps=1),
    "split (FedCycleGAN), equal exchanges": Arm("cyclegan", SPLIT, local_steps=1, scale=1 / 20),
    "at the reference, adversary 1, cycle 10": Arm("cyclegan", {"adversarial_weight": 1.0, "cycle_weight": 10.0}),
    "at the reference, adversary .1, cycle 10": Arm("cyclegan", {"cycle_weight": 10.0}, scale=2),
    "at the reference, no adversary, no cycle": Arm(
        "cyclegan", {"adversarial_weight": 0.0, "cycle_weight": 0.0}, scale=2
    ),
    "at the reference, adversary .1, cycle 1 (default)": Arm("cyclegan", scale=2),
    "default, federated": Arm("cyclegan", local_steps=20, scale=2),
    "pooled, 3D": Arm("cyclegan", NO_PSEUDO, dims=3, scale=0.5),
    "default, 3D": Arm("cyclegan", dims=3, scale=0.5),
}


class Patches:
    """Random, randomly mirrored patches of the named sites."""

    def __init__(self, data: TravellingData, sites: Sequence[str], arm: Arm, rng: np.random.Generator) -> None:
        self.volumes = [(volume, SITES.index(site)) for site in sites for volume in data.train[site]]
        self.size = (40, 40) if arm.dims == 2 else (32, 40, 32)
        # A site's batch is half of the pooled one where four sites step at the same time.
        everywhere = arm.local_steps and arm.options.get("train_everywhere", False)
        self.batch = 2 if arm.dims == 3 else 4 if everywhere else 8
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
    """`steps` steps at each site, with an exchange after every `local_steps`."""
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
            for step in range(first, min(first + arm.local_steps, steps)):
                training.set_epoch(step)
                training.step(*next(batches), generator, None if genuine is None else next(genuine)[0])
            replies.append(export_weights(harmonizer))
        weights = combine(replies, server)
    load_weights(server, weights)
    return server


def combine(replies: Sequence[dict[str, np.ndarray]], server: Harmonizer) -> dict[str, np.ndarray]:
    """Row k of a table of rows from site k, what the reference alone trains from its sites, the equal mean of the rest."""
    prefixes, references, combined = server.trained_at_reference(), server.reference_sites(), {}
    for name in replies[0]:
        values = [reply[name] for reply in replies]
        if name in SITE_ROWS:
            combined[name] = np.stack([value[site] for site, value in enumerate(values)])
            continue
        words = [values[site] for site in references] if name.startswith(prefixes) else values
        combined[name] = np.mean(words, axis=0).astype(values[0].dtype)
    return combined


def new(arm: Arm, data: TravellingData) -> Harmonizer:
    styles = data.styles
    shape = {"num_channels": 1, "spatial_dims": arm.dims, "styles": styles, "reference": styles[SITES.index(REFERENCE)]}
    harmonizer = build_harmonizer(arm.kind, arm.options, **shape)
    if arm.kind == "cyclegan" and not VOTE_IS_TRAINED:
        harmonizer.bank_polarity[SITES.index(INVERTED)] = -1.0
    return harmonizer


@torch.no_grad()
def measure(harmonizer: Harmonizer, data: TravellingData, dims: int) -> dict[str, list[list[float]]]:
    """Per site and held-out subject: values of MEASURES, with the gate open, on every second slice in 2D."""
    harmonizer.eval()
    harmonizer.open_gate()
    result = {}
    for index, site in enumerate(SITES):
        harmonizer.serve(index, gate=1.0)
        rows = []
        for image, truth in data.pairs[site]:
            if dims == 2:
                image, truth = image[::2], truth[::2]
            batch = torch.from_numpy(image)
            batch = batch[:, None] if dims == 2 else batch[None, None]
            mapped, base = harmonizer(batch).reshape(image.shape).numpy(), image
            if isinstance(harmonizer, CycleGANHarmonizer):
                base = (
                    harmonizer.upright(batch, harmonizer.source_of(batch, batch != 0))[0].reshape(image.shape).numpy()
                )
            error = np.sqrt(np.mean((mapped - truth) ** 2)) / truth.std()
            correlation = np.corrcoef(mapped.ravel(), truth.ravel())[0, 1]
            rows.append([correlation, error, np.abs(mapped - image).mean(), gradient_correlation(mapped, base)])
        result[site] = np.array(rows, float).tolist()
    return result


def gradient_correlation(image: np.ndarray, base: np.ndarray) -> float:
    """Correlation of all differences between neighbours, inside the mask of the base."""
    inside = base != 0
    own, other = (np.concatenate([part[inside] for part in np.gradient(volume)]) for volume in (image, base))
    return float(np.corrcoef(own, other)[0, 1])


def run(arguments: argparse.Namespace) -> None:
    data = load_travelling(arguments.data, sites=SITES, reference=REFERENCE)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for seed, name in product(range(arguments.seeds), arguments.arms or ARMS):
        arm = ARMS[name]
        if f"{name}#{seed}" in results or (seed and arm.kind not in LR):
            continue
        steps, start = max(1, round(arguments.steps * arm.scale)), time.process_time()
        if arm.kind not in LR:
            harmonizer = new(arm, data)
        else:
            harmonizer = (train_federated if arm.local_steps else train_central)(arm, data, seed, steps)
        seconds = time.process_time() - start
        votes = [round(float(vote), 2) for vote in harmonizer.bank_polarity.flatten()]
        found = {"sites": measure(harmonizer, data, arm.dims), "steps": steps, "seconds": seconds, "votes": votes}
        results[f"{name}#{seed}"] = found
        arguments.results.write_text(json.dumps(results))
        if arguments.weights and arm.kind in LR:
            torch.save(harmonizer.state_dict(), arguments.weights / (re.sub(r"\W+", "_", f"{name} {seed}") + ".pt"))
        print(f"{name}, seed {seed}, {steps} steps, {seconds:.0f} CPU s, votes {votes}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Mean over the half's subjects and the seeds and, where there are several seeds, the lowest and highest."""
    results = json.loads(arguments.results.read_text())
    for half, subjects in HALVES.items():
        print(f"\nHalf: {half}\n\n| arm | seeds | steps | {' | '.join(COLUMNS)} | CPU s per step |")
        print("|" + "---|" * (4 + len(COLUMNS)))
        for name in ARMS:
            runs = [value for key, value in results.items() if key.rsplit("#", 1)[0] == name]
            if not runs:
                continue
            cells = [
                spread([float(np.mean(np.array(r["sites"][site])[subjects, MEASURES.index(measure)])) for r in runs])
                for site, measure in COLUMNS.values()
            ]
            cells.append(spread([r["seconds"] / r["steps"] for r in runs]))
            print(f"| {name} | {len(runs)} | {runs[0]['steps']} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Mean (lowest to highest), or the value alone where all are equal."""
    mean, low, high = (f"{value:.3f}".replace("0.", ".", 1) for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    runner.add_argument("--results", type=Path, required=True, help="JSON file that is added to")
    runner.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--steps", type=int, default=150, help="centralized steps, or steps at each site")
    runner.add_argument("--vote", action="store_true", help="train the judge of polarity too")
    runner.add_argument("--weights", type=Path, help="folder that trained harmonizers are written to")
    runner.set_defaults(act=run)
    reporter = commands.add_parser("report")
    reporter.add_argument("--results", type=Path, required=True)
    reporter.set_defaults(act=report)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if getattr(arguments, "vote", False):
        global VOTE_IS_TRAINED
        VOTE_IS_TRAINED = True
    else:
        cyclegan_training.polarity_step = lambda *_, **__: None
    arguments.act(arguments)


if __name__ == "__main__":
    main()
