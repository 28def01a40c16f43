"""A hospital that nobody knew in training: `nnunet-fedharm adapt` at D with a model of A, B and C."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import numpy as np
from hippocampus_sites import NAME
from learned_training import (
    HARMONIZER_EPOCHS,
    SIZES,
    Bench,
    Harmonizer,
    model_folder,
    predict_and_score,
    segmenter_weights,
)

from nnunet_fedharm.evaluation.adapt_model import adapt_model
from nnunet_fedharm.planning.section import read_section, with_section

NEW = "D"
VOLUMES = 8
"""Unlabelled training images of the new site that it is measured from."""


class WithoutNewSite(Bench):
    """Plans whose style bank does not hold the new site."""

    def plans_for(self, harmonizer: Harmonizer) -> dict[str, object]:
        plans, name = super().plans_for(harmonizer), SIZES[harmonizer.dims].configuration
        section = read_section(plans["configurations"][name])
        known = {site: style for site, style in section.styles.items() if site != NEW}
        return with_section(plans, replace(section, styles=known), (name,))


def measure_new_site(bench: Bench, kind: str) -> None:
    """Train a harmonizer from A's images and the styles of A, B and C, adapt it to D, and score D's test images."""
    path = bench.work / "new-site" / f"{kind}.json"
    if path.exists():
        return
    known = WithoutNewSite(bench.data, bench.work, bench.options)
    harmonizer = Harmonizer(kind, "3d", "central", 0)
    training = known.training(harmonizer, bench.own_root("A"), bench.work / "states" / f"new-site_{kind}")
    epochs = HARMONIZER_EPOCHS[kind]
    weights = training.run(
        phase="harmonizer", round_index=0, first_epoch=0, epochs=epochs, weights=known.start(harmonizer)
    ).weights
    weights["harmonizer.gate"] = np.ones_like(weights["harmonizer.gate"])
    store = bench.work / "new-site" / "harmonizers" / f"{harmonizer.name}.npz"
    store.parent.mkdir(parents=True, exist_ok=True)
    np.savez(store, **{name: value for name, value in weights.items() if name.startswith("harmonizer.")})  # type: ignore[arg-type]
    segmenter = segmenter_weights(bench, harmonizer, "A")
    apart = WithoutNewSite(bench.data, bench.work / "new-site", bench.options)
    apart.plans = bench.plans  # type: ignore[method-assign]
    apart.description = bench.description  # type: ignore[method-assign]
    model = model_folder(apart, harmonizer, {**weights, **segmenter}, bench.work / "new-site" / f"model_{kind}", "")
    images = bench.work / "new-site" / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    source = bench.work / "labels-A" / "sites" / NEW / "nnUNet_raw" / NAME / "imagesUnlabelled"
    for image in sorted(source.glob("*.nii.gz"))[:VOLUMES]:
        shutil.copy(image, images / image.name)
    began = time.monotonic()
    adapted = bench.work / "new-site" / f"adapted_{kind}"
    found = adapt_model(model, images, adapted, site=NEW, overwrite=True, progress=False)
    seconds = time.monotonic() - began
    scores, _ = predict_and_score(bench, adapted, NEW, bench.work / "new-site" / f"predictions_{kind}")
    path.write_text(json.dumps({"seconds": seconds, "cases": scores, **found.evidence()}))
    print(kind, seconds, np.mean([case["dice"] for case in scores.values()]), flush=True)
