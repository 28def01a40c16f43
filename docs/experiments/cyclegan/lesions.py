"""What does a trained harmonizer do to small lesions? Bright and dark blobs, painted into travelling subjects.

    python docs/experiments/cyclegan/lesions.py --data DATA --harmonizer NAME KIND DIMS WEIGHTS OPTIONS [--harmonizer ...]

WEIGHTS is a `state_dict` written by one of the experiments, or a `harmonizers/*.npz` of `benchmarks/learned_harmonizers.py`
(- for a harmonizer without weights), OPTIONS the harmonizer's section of the plans as JSON. No training has seen a blob. Each
volume gets six: radius 1, 2 and 3 voxels, each brighter and darker than its surroundings by STRENGTH standard deviations, on
top of the tissue that is there. Two numbers per blob:

- contrast-to-noise ratio kept: of the output over the input's, with the sign turned at a site that is inverted;
- response: the change of the output that the blob makes inside itself, over STRENGTH, sign turned likewise. A monotone map
  of slope s gives s, so a response without a loss of contrast-to-noise is a change of tone.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch

from nnunet_fedharm.datasets.travelling import TravellingData, load_travelling
from nnunet_fedharm.evaluation.lesions import contrast_to_noise, surroundings
from nnunet_fedharm.harmonizers import Harmonizer, build_harmonizer
from nnunet_fedharm.trainers.weights import load_weights

SITES = ("A", "B", "C", "D")
INVERTED = "D"
RADII = (1, 2, 3)
STRENGTH = 1.5
CHOICE = 4
"""Subjects that settings were chosen on; numbers are of the others."""


def blobs(shape: tuple[int, ...], rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Six masks far enough from each other and from the border for a rim of three voxels each, and their strengths."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    centres: list[np.ndarray] = []
    while len(centres) < 2 * len(RADII):
        centre = np.array([rng.integers(7, size - 7) for size in shape])
        if all(np.linalg.norm(centre - other) > 8 for other in centres):
            centres.append(centre)
    distances = [np.linalg.norm(grid - centre, axis=-1) for centre in centres]
    wanted = product(RADII, (STRENGTH, -STRENGTH))
    return [(distance <= radius, sign) for distance, (radius, sign) in zip(distances, wanted, strict=True)]


@torch.no_grad()
def apply(harmonizer: Harmonizer, image: np.ndarray, dims: int) -> np.ndarray:
    """The volume harmonized, slice by slice in 2D."""
    batch = torch.from_numpy(image)
    mapped: np.ndarray = harmonizer(batch[:, None] if dims == 2 else batch[None, None]).reshape(image.shape).numpy()
    return mapped


def lesions(harmonizer: Harmonizer, data: TravellingData, dims: int) -> dict[str, np.ndarray]:
    """Site -> (blobs, 3): radius, contrast-to-noise ratio kept, response."""
    harmonizer.eval()
    harmonizer.open_gate()
    found = {}
    for site in SITES:
        harmonizer.serve(SITES.index(site), gate=1.0)
        # Turned where this harmonizer turns, not where it should: a blob is kept either way.
        sign = -1.0 if bool((harmonizer.bank_polarity[SITES.index(site)] < -0.25).any()) else 1.0
        rows = []
        for subject, (clean, _) in enumerate(data.pairs[site][CHOICE:]):
            painted = blobs(clean.shape, np.random.default_rng(subject))
            image = (clean + sum(mask * strength for mask, strength in painted)).astype(np.float32)
            before, after = apply(harmonizer, clean, dims), apply(harmonizer, image, dims)
            free = ~np.any([mask for mask, _ in painted], axis=0)
            for mask, strength in painted:
                rim = surroundings(mask, free)
                kept = sign * contrast_to_noise(after, mask, rim) / contrast_to_noise(image, mask, rim)
                radius = next(r for r in RADII if mask.sum() <= 4.6 * r**3 + 4)
                rows.append((radius, kept, sign * (after - before)[mask].mean() / strength))
        found[site] = np.array(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites, raw")
    parser.add_argument(
        "--harmonizer", nargs=5, action="append", required=True, metavar=("NAME", "KIND", "DIMS", "WEIGHTS", "OPTIONS")
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_travelling(arguments.data, sites=SITES, reference="A")
    print("| harmonizer | site | CNR kept, median | 10th percentile | below .8 | response r = 1 | r = 2 | r = 3 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind, dims, weights, options in arguments.harmonizer:
        shape = {"num_channels": 1, "spatial_dims": int(dims), "styles": data.styles, "reference": data.styles[0]}
        harmonizer = build_harmonizer(kind, json.loads(options), **shape)
        if weights.endswith(".npz"):
            stored = np.load(weights)
            load_weights(harmonizer, {key.removeprefix("harmonizer."): stored[key] for key in stored.files})
        elif weights != "-":
            harmonizer.load_state_dict(torch.load(weights, weights_only=True))
        for site, rows in lesions(harmonizer, data, int(dims)).items():
            kept, low, lost = np.median(rows[:, 1]), np.quantile(rows[:, 1], 0.1), np.mean(rows[:, 1] < 0.8)
            responses = [f"{rows[rows[:, 0] == radius, 2].mean():.2f}" for radius in RADII]
            print(f"| {name} | {site} | {kept:.2f} | {low:.2f} | {lost:.0%} | {' | '.join(responses)} |", flush=True)


if __name__ == "__main__":
    main()
