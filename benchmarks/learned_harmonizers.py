"""Learned harmonizers on four hospitals: labels at one site, and one site without labels.

    python benchmarks/learned_harmonizers.py run    --data DATA --work WORK [--groups one-site quality ...]
    python benchmarks/learned_harmonizers.py report --work WORK > docs/benchmarks/learned-harmonizers.md

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its travelling subjects. Several `run` at once share the work:
each arm is done by whoever comes first, and an arm whose metrics exist is not run again. Set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learned_training import (
    SITES,
    Bench,
    Harmonizer,
    claimed,
    model_folder,
    predict_and_score,
    trained_weights,
)

from nnunet_fedharm.harmonizers import AT_REFERENCE
from nnunet_fedharm.harmonizers.judges import JUDGES

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        harmonizer: in front of the segmenter.
        scenario: sites with labels: "A", "not-SITE" or "own-SITE" (the oracle of that site).
        augmentation: nnU-Net's own in the segmenter's training.
    """

    harmonizer: Harmonizer
    scenario: str
    augmentation: bool = True

    @property
    def name(self) -> str:
        return f"{self.scenario}_{self.harmonizer.name}{'' if self.augmentation else '_no-augmentation'}"

    @property
    def tested(self) -> tuple[str, ...]:
        """Sites whose test images are segmented; an oracle is one for its own site only, and upright sites have no inverse."""
        if self.scenario != "A":
            return (self.scenario[-1],)
        return ("A", "D") if self.harmonizer.kind == "inverse" else SITES


def one_site(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Labels at A alone."""
    for seed in seeds:
        yield Arm(Harmonizer("none", dims, "", seed), "A")
        for site in SITES[1:]:
            yield Arm(Harmonizer("none", dims, "", seed), f"own-{site}")
    for seed in seeds:
        yield Arm(Harmonizer("diffusion", dims, "central", seed), "A")
        yield Arm(Harmonizer("inverse", dims, "central", seed), "A")
        yield Arm(Harmonizer("polarity", dims, "central", seed), "A")
        yield Arm(Harmonizer("cyclegan", dims, "central", seed), "A")
        yield Arm(Harmonizer("polarity", dims, "federated", seed), "A")
        yield Arm(Harmonizer("diffusion", dims, "federated", seed), "A")
        yield Arm(Harmonizer("cyclegan", dims, "federated", seed), "A")


def baselines(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """What a harmonizer has to beat."""
    for seed in seeds:
        yield Arm(Harmonizer("augment", dims, "", seed), "A")
        yield Arm(Harmonizer("nyul", dims, "", seed), "A")
        yield Arm(Harmonizer("curve", dims, "central", seed), "A")
        yield Arm(Harmonizer("none", dims, "", seed), "A", augmentation=False)


LEFT_OUT = (("none", ""), ("augment", ""), ("polarity", "central"), ("diffusion", "central"), ("cyclegan", "central"))
"""Kinds and modes of the arms with one site left out; each trains a segmenter of its own, as three sites' labels pass it."""


def one_left_out(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Labels at three sites, images of all four."""
    for seed in seeds:
        for site in reversed(SITES):
            reference = "B" if site == "A" else "A"
            for kind, mode in LEFT_OUT:
                yield Arm(Harmonizer(kind, dims, mode, seed, reference), f"not-{site}")


def one_left_out_federated(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """The same with harmonizer and segmenter federated: as many steps at each site as centralized ones in all."""
    for seed in seeds:
        for kind in ("polarity", "diffusion", "cyclegan"):
            for site in reversed(SITES):
                reference = "B" if site == "A" else "A"
                yield Arm(Harmonizer(kind, dims, "federated", seed, reference), f"not-{site}")


def long(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Segmenters trained five times as long."""
    for seed in seeds:
        for scenario in ("A", *(f"own-{site}" for site in SITES[1:])):
            yield Arm(Harmonizer("none", dims, "", seed), scenario)
        yield Arm(Harmonizer("none", dims, "", seed), "A", augmentation=False)
        for kind, mode in (("polarity", "central"), ("diffusion", "central"), ("cyclegan", "central"), ("augment", "")):
            yield Arm(Harmonizer(kind, dims, mode, seed), "A")


def unaugmented(dims: str, seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Segmenters without nnU-Net's augmentation, which a training as short as this one has not caught up with."""
    for seed in seeds:
        for site in SITES[1:]:
            yield Arm(Harmonizer("none", dims, "", seed), f"own-{site}", augmentation=False)
        for kind, mode in (("none", ""), ("nyul", ""), ("diffusion", "central"), ("cyclegan", "central")):
            yield Arm(Harmonizer(kind, dims, mode, seed), "A", augmentation=False)


def upright_only(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """For DATA that `n4_dataset.py` made, in a WORK of its own: what N4 gives alone and together with `polarity`."""
    for seed in seeds:
        yield Arm(Harmonizer("none", "3d", "", seed), "A")
        yield Arm(Harmonizer("polarity", "3d", "central", seed), "A")


GROUPS = {
    "one-site": lambda: one_site("3d", SEEDS[:1]),
    "one-site-more": lambda: one_site("3d", SEEDS[1:]),
    "unaugmented": lambda: unaugmented("3d", SEEDS[:1]),
    "unaugmented-more": lambda: unaugmented("3d", SEEDS[1:]),
    "baselines": lambda: baselines("3d", SEEDS),
    "one-left-out": lambda: one_left_out("3d", SEEDS[:1]),
    "2d": lambda: one_site("2d", SEEDS[:1]),
    "2d-more": lambda: one_site("2d", SEEDS[1:]),
    "2d-long": lambda: long("2d-long", SEEDS),
    "3d-long": lambda: long("3d-long", SEEDS[:1]),
    "n4": lambda: upright_only(SEEDS),
    "one-left-out-2": lambda: one_left_out("3d", SEEDS[1:2]),
    "one-left-out-3": lambda: one_left_out("3d", SEEDS[2:]),
    "one-left-out-federated": lambda: one_left_out_federated("3d", SEEDS[:1]),
    "one-left-out-2d": lambda: one_left_out("2d", SEEDS[:1]),
    "one-left-out-2d-more": lambda: one_left_out("2d", SEEDS[1:]),
}


def measure(bench: Bench, arm: Arm) -> dict[str, Any]:
    """Scores of an arm at its test sites."""
    weights = trained_weights(bench, arm.harmonizer, arm.scenario, augmentation=arm.augmentation)
    sites: dict[str, Any] = {}
    plain = (
        bench.work
        / "metrics"
        / f"{Arm(Harmonizer('none', arm.harmonizer.dims, '', arm.harmonizer.seed), 'A', arm.augmentation).name}.json"
    )
    for site in arm.tested:
        if site == arm.scenario == arm.harmonizer.reference and arm.harmonizer.kind not in ("none", "augment"):
            # Its gate is shut and its segmenter is plain nnU-Net's: the same predictions.
            sites[site] = json.loads(plain.read_text())["sites"][site]
            continue
        folder = bench.work / "models" / arm.name / site
        model = model_folder(bench, arm.harmonizer, weights, folder, site)
        scores, seconds = predict_and_score(bench, model, site, bench.work / "predictions" / arm.name / site)
        sites[site] = {"cases": scores, "cpu_s_per_volume": seconds, "model": str(model)}
    return {
        "arm": {**vars(arm.harmonizer), "scenario": arm.scenario, "augmentation": arm.augmentation},
        "sites": sites,
        "polarity": weights["harmonizer.bank_polarity"].tolist(),
        "gate": weights["harmonizer.bank_gate"].tolist(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def run(bench: Bench, groups: list[str], kinds: list[str], modes: list[str]) -> None:
    for group in groups:
        for arm in GROUPS[group]():
            if (kinds and arm.harmonizer.kind not in kinds) or (modes and arm.harmonizer.mode not in modes):
                continue
            path = bench.work / "metrics" / f"{arm.name}.json"
            if path.exists() or path.with_name(path.name + ".lock").exists():
                continue
            with claimed(path) as mine:
                if mine:
                    entry = measure(bench, arm)
                    path.with_suffix(".writing").write_text(json.dumps(entry))
                    path.with_suffix(".writing").rename(path)
                    means = {
                        site: round(sum(c["dice"] for c in found["cases"].values()) / len(found["cases"]), 3)
                        for site, found in entry["sites"].items()
                    }
                    print(arm.name, means, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "quality", "new-site", "report"))
    parser.add_argument("--data", type=Path, help="folder of Dataset910_HippocampusSites")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--groups", nargs="*", default=[name for name in GROUPS if name != "n4"], choices=list(GROUPS))
    parser.add_argument(
        "--modes", nargs="*", default=[], choices=("central", "federated"), help="only these; default all"
    )
    parser.add_argument("--kinds", nargs="*", default=[], help="only arms of these harmonizers; default all")
    parser.add_argument(
        "--judge",
        choices=JUDGES,
        default="network",
        help="of contrast; the page's tables have the network's, new plans take linear",
    )
    parser.add_argument("--n4", type=Path, help="report: WORK of the group n4, shown beside")
    arguments = parser.parse_args()
    os.environ.update(nnUNet_compile="f", nnUNet_n_proc_DA="0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    if arguments.action == "report":
        from learned_report import report

        report(work, arguments.n4)
        return
    bench = Bench(arguments.data, work, {kind: {"judge": arguments.judge} for kind in AT_REFERENCE})
    if arguments.action == "quality":
        from learned_quality import measure_quality

        measure_quality(bench)
        return
    if arguments.action == "new-site":
        from learned_new_site import measure_new_site

        for kind in arguments.kinds or ("polarity", "diffusion"):
            measure_new_site(bench, kind)
        return
    run(bench, arguments.groups, arguments.kinds, arguments.modes)


if __name__ == "__main__":
    main()
