"""Radiomics agreement with the reference hospital under the noise that styles and votes of a private run carry.

    python benchmarks/private_features.py --data Dataset910_HippocampusSites --work WORK [--draws 3]

Beside `private_dice.py` and in its WORK. The public start with `polarity` in front; B, C and D give noisy styles and votes, as in
the recipes `public-*`. What the noise is does not depend on epsilon (`--style-noise` and the votes have multipliers of their own;
the training pays for what is left), so this is one column for all epsilons. Concordance (CCC) of radiomics features of eight
travelling subjects with the same subjects at A: median over features, as scanned and harmonized. A line a draw goes to
WORK/features.jsonl; draw 0 has no noise.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_training import SITES
from private_bench import DELTA, REFERENCE_STEPS, Arm, PrivateBench, schedule
from private_dice import private_styles, vote

from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder
from nnunet_fedharm.evaluation.paired_files import find_pairs
from nnunet_fedharm.evaluation.quality import Folders, measure_pairs
from nnunet_fedharm.evaluation.quality_summary import summarize_features
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights

KIND = "polarity"
EPSILON = 8.0


def model_of(own: PrivateBench, draw: int) -> tuple[Any, Any]:
    """Plans and weights after styles and votes; draw 0 without noise on the styles, and with next to none on the votes."""
    places = own.world(f"features-{draw}", {site: own.bench.own_root(site) for site in SITES[1:]})
    privacy = PrivacyOptions(
        epsilon=EPSILON, delta=DELTA, fingerprint_noise=0.0, style_noise=5.0 if draw else 0.0, patients_per_step=4.0
    )
    planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9, harmonizer_epochs=1)
    styles = private_styles(own, places, privacy)
    plans = own.plans(KIND, planned, privacy, styles)
    weights = initial_weights(
        plans, own.bench.description(), "3d_fullres", trainer_name_for(KIND), draw, own.start("public")
    )
    weights = vote(own, plans, Arm("features", "features", EPSILON, draw), places, weights)
    return own.plans(KIND, planned, None, styles), weights


def agreement(own: PrivateBench, plans: Any, weights: Any, site: str) -> Mapping[str, float]:
    """Median CCC over features, as scanned and harmonized."""
    model = own.write_model(NnunetRoot(own.work / "models" / f"features-{site}"), plans, KIND, weights, site)
    images, truths = (own.paired.work / "test" / name / "images" for name in (site, "A"))
    output = own.work / "harmonized" / site
    harmonize_folder(model, images, output, site=site, progress=False)
    labels = own.paired.work / "test" / "A" / "labels"
    pairs = find_pairs(images, truths)
    found = summarize_features(measure_pairs(pairs, Folders(truths, images, output, labels), progress=False), seed=0)
    if found is None:
        raise SystemExit("No features were measured.")
    (rows,) = found["sites"].values()
    return {state: float(rows["median"][state]["value"]) for state in ("before", "after")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    torch.set_num_threads(1)
    own = PrivateBench(arguments.data, arguments.work.resolve())
    own.ready(["public"])
    for draw in range(arguments.draws + 1):
        plans, weights = model_of(own, draw)
        ccc = {site: dict(agreement(own, plans, weights, site)) for site in SITES[1:]}
        polarity = np.asarray(weights["harmonizer.bank_polarity"]).reshape(-1).round(2).tolist()
        with (own.work / "features.jsonl").open("a") as stream:
            stream.write(json.dumps({"draw": draw, "noise": draw > 0, "ccc": ccc, "polarity": polarity}) + "\n")
        print(draw, ccc, polarity, flush=True)


if __name__ == "__main__":
    main()
