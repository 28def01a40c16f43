"""What does epsilon cost a hospital without labels? Its style and its vote on polarity are all that it gives.

    python docs/experiments/private-style/unlabelled.py run    --data DATA --work WORK
    python docs/experiments/private-style/unlabelled.py report --work WORK

DATA is `Dataset910_HippocampusSites`, WORK the folder of `benchmarks/learned_harmonizers.py`, whose `polarity` harmonizers and
segmenters (labels at A) are used. B, C and D each give a noisy style (`planning.private_style`) and a noisy mean vote of the
judge, four fifths of the squared budget for the style; the stock predictor then segments their held-out cases. A's images are
taken for public: judge and segmenter are trained on them without noise. Noise is drawn anew for every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from hippocampus_sites import NAME
from learned_training import (
    SITES,
    Bench,
    Harmonizer,
    harmonizer_weights,
    predict_and_score,
    segmenter_weights,
)
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.style import volume_quantiles
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.private_style import private_style
from nnunet_fedharm.planning.style import preprocessed_cases
from nnunet_fedharm.privacy.gaussian import gaussian_sigma
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import make_trainer, write_results_folder
from nnunet_fedharm.trainers.weights import load_weights

EPSILONS = (math.inf, 8.0, 3.0, 1.0, 0.5)
DELTA = 1e-3
"""Below 1 / 32, the number of patients of each site; at 1e-5 the noise of the same epsilon is about half as large again."""
STYLE_SHARE = 0.8
SEEDS = (0, 1, 2)
CONFIGURATION = "3d_fullres"
PATCHES = 4


def images(bench: Bench, site: str) -> list[np.ndarray]:
    """Preprocessed training volumes (C, D, H, W) of a site, one per patient."""
    root = bench.root("A")
    registry = SitesFile.load(root.preprocessed / NAME / SITES_FILE)
    cases = preprocessed_cases(root, NAME, bench.plans("3d"), CONFIGURATION)
    own = [case for case in sorted(cases) if registry.cases[case] == site]
    return [np.asarray(nnUNetDatasetBlosc2(str(cases[case]), [case]).load_case(case)[0][:]) for case in own]


def vote(harmonizer: JudgedHarmonizer, volumes: list[np.ndarray], index: int, patch: tuple[int, ...]) -> np.ndarray:
    """(N, C) mean votes of each patient's patches."""
    generator = np.random.default_rng(0)
    votes = []
    own = harmonizer.bank_quantiles[index : index + 1]
    for volume in volumes:
        cuts = []
        for _ in range(PATCHES):
            starts = [int(generator.integers(max(n - p, 0) + 1)) for n, p in zip(volume.shape[1:], patch, strict=True)]
            window = tuple(slice(s, s + p) for s, p in zip(starts, patch, strict=True))
            cuts.append(torch.from_numpy(volume[(slice(None), *window)].copy()).float()[None])
        with torch.no_grad():
            found = [harmonizer.votes(cut, own) for cut in cuts]
        votes.append(torch.cat(found).mean(dim=0).numpy())
    return np.stack(votes)


def run(bench: Bench, seed: int, epsilon: float, site: str, volumes: list[np.ndarray]) -> dict[str, Any]:
    """One site at one epsilon: Dice of its held-out cases, error of its style, its vote."""
    harmonizer = Harmonizer("polarity", "3d", "central", seed)
    weights = {
        **harmonizer_weights(bench, harmonizer),
        **segmenter_weights(bench, Harmonizer("none", "3d", "", seed), "A"),
    }
    plans, index, patients = bench.plans_for(harmonizer), SITES.index(site), len(volumes)
    measured = [volume_quantiles(volume) for volume in volumes]
    quantiles, offsets = (np.stack([pair[part] for pair in measured]) for part in (0, 1))
    total = 0.0 if math.isinf(epsilon) else gaussian_sigma(epsilon, DELTA)
    style = private_style(quantiles, offsets, noise_multiplier=total / math.sqrt(STYLE_SHARE), noise=SecureNoise())
    with bench.root("A").activate():
        trainer = make_trainer(trainer_name_for("polarity"), plans, CONFIGURATION, "all", bench.description())
        trainer.assemble()
    weights["harmonizer.bank_quantiles"][index] = style.quantiles
    load_weights(trainer.network, weights)
    votes = vote(trainer.harmonizer.eval(), volumes, index, tuple(trainer.configuration_manager.patch_size))
    noise = np.random.default_rng().standard_normal(votes.shape[1]) * total / math.sqrt(1 - STYLE_SHARE)
    mean_vote = np.clip((votes.sum(axis=0) + noise * math.sqrt(votes.shape[1])) / patients, -1, 1)
    weights["harmonizer.bank_polarity"][index] = mean_vote
    weights["harmonizer.bank_gate"][index] = 1
    folder = bench.work / "private-style" / f"{site}_{epsilon:g}_{seed}"
    fold = write_results_folder(
        NnunetRoot(folder), NAME, plans, bench.description(), {}, CONFIGURATION, "all", trainer_name_for("polarity"),
        weights, epoch=15, which=("final",), site=site,
    )  # fmt: skip
    scores, _ = predict_and_score(bench, fold.parent, site, folder / "predictions")
    return {
        "dice": float(np.mean([case["dice"] for case in scores.values()])),
        "style_error": float(np.abs(style.quantiles - quantiles.mean(axis=0)).mean()),
        "vote": mean_vote.tolist(),
        "patients": patients,
    }


def report(results: dict[str, Any]) -> None:
    sites = SITES[1:]
    print(f"| epsilon | {' | '.join(f'Dice at {site}' for site in sites)} | error of the style, sd | votes of D |")
    print("|---|" + "---|" * (len(sites) + 2))
    for epsilon in EPSILONS:
        arms = {site: [results[key] for s in SEEDS if (key := f"{site} {epsilon:g} {s}") in results] for site in sites}
        if not all(arms.values()):
            continue
        cells = []
        for site in sites:
            dice = [arm["dice"] for arm in arms[site]]
            cells.append(f"{np.mean(dice):.3f} ({min(dice):.3f} to {max(dice):.3f})")
        error = np.mean([arm["style_error"] for found in arms.values() for arm in found])
        votes = ", ".join(f"{arm['vote'][0]:+.2f}" for arm in arms["D"])
        name = "no noise" if math.isinf(epsilon) else f"{epsilon:g}"
        print(f"| {name} | {' | '.join(cells)} | {error:.3f} | {votes} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    path = arguments.work / "private-style.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if arguments.action == "report":
        report(results)
        return
    os.environ.update(nnUNet_compile="f", nnUNet_n_proc_DA="0")
    torch.set_num_threads(1)
    bench = Bench(arguments.data, arguments.work.resolve())
    volumes = {site: images(bench, site) for site in SITES[1:]}
    for seed in SEEDS:
        for epsilon in EPSILONS:
            for site in SITES[1:]:
                key = f"{site} {epsilon:g} {seed}"
                if key not in results:
                    results[key] = run(bench, seed, epsilon, site, volumes[site])
                    path.write_text(json.dumps(results, indent=1))
                    print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
