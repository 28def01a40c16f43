"""Studies whose cells were written by hand: metrics and costs, without any training."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.study.results import StudyResults, read_results
from nnunet_fedharm.study.study_file import STUDY_FILE, StudyFile, read_study

CASES = 12
"""Test cases of a site."""


class Study:
    """A study of two sites, A with labels; of a third one, C, where a site is held out.

    Args:
        folder: for everything.
        labelled: sites with labels; none: all.
        seeds: of the study.
        more: lines for [arms].
        simulated: whether B is. held_out: sites.
    """

    def __init__(
        self,
        folder: Path,
        *,
        labelled: Sequence[str] = ("A",),
        seeds: Sequence[int] = (0, 1, 2),
        more: str = 'baselines = ["no-augmentation", "augment"]',
        simulated: bool = False,
        held_out: Sequence[str] = (),
    ) -> None:
        raw = folder / "Dataset001_Blobs"
        raw.mkdir(parents=True)
        sites = "ABC" if held_out else "AB"
        cases = {f"{site}_case{index}": site for site in sites for index in range(CASES)}
        cases |= {f"A_subject{index:03d}": "A" for index in range(2)}
        made = {"seed": 0} if simulated else None
        known = {"A": SiteInfo("GE", 3.0, "T1w"), "B": SiteInfo(simulation=made), "C": SiteInfo()}
        SitesFile({site: known[site] for site in sites}, cases).save(raw / "sites.json")
        description = {"channel_names": {"0": "T1w"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
        (raw / "dataset.json").write_text(json.dumps(description))
        for case in cases:  # what counts labelled cases lists names
            for path in (raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"):
                path.parent.mkdir(exist_ok=True)
                path.touch()
        self.folder = folder / "study"
        self.folder.mkdir()
        (self.folder / STUDY_FILE).write_text(
            f'[study]\nname = "<Blobs>"\ndataset = "../Dataset001_Blobs"\nconfiguration = "2d"\nreference = "A"\n'
            f"labelled_sites = {json.dumps(list(labelled))}\nseeds = {list(seeds)}\n"
            f"held_out_sites = {json.dumps(list(held_out))}\n"
            '[arms]\nharmonizers = ["polarity", "diffusion"]\nepsilons = [8.0]\n'
            f'private_harmonizers = ["none", "polarity"]\n{more}\n'
        )
        self.seeds = list(seeds)

    @property
    def study(self) -> StudyFile:
        """As it is read."""
        return read_study(self.folder)

    def results(self) -> StudyResults:
        """Of all cells so far."""
        return read_results(self.study)

    def arm(
        self,
        name: str,
        dice: Mapping[str, float],
        *,
        seeds: Sequence[int] | None = None,
        like: str = "",
        travelling: int = 0,
        quality: Mapping[str, Any] | None = None,
        noise: float = 0.004,
    ) -> None:
        """Cells of an arm: a case's Dice is the site's, what is special to the case, and a little noise.

        Args:
            name: of the arm's folder.
            dice: site -> mean.
            seeds: with a result; None: the study's.
            like: name whose noise is used.
            travelling: subjects that were seen at all sites.
            quality: of the first seed.
            noise: standard deviation between trainings.
        """
        for seed in self.seeds if seeds is None else seeds:
            generator = np.random.default_rng([seed, zlib.crc32((like or name).encode())])
            folder = self.folder / "cells" / f"{name}_seed-{seed}"
            folder.mkdir(parents=True)
            cases = {}
            for site, mean in dice.items():
                names = [f"{site}_case{index}" for index in range(CASES)]
                names += [f"{site}_subject{index:03d}" for index in range(travelling)]
                for index, case in enumerate(names):
                    value = mean + 0.05 * np.sin(1.7 * index) + generator.normal(0, noise)
                    cases[case] = {"site": site, "labels": {"ball": {"dice": float(value), "hd95_mm": 2.0}}}
            (folder / "metrics.json").write_text(json.dumps({"cases": cases, "sites": {}}))
            cost: dict[str, Any] = {"train_s": 60.0, "predict_s": 0.5, "device": "cpu"}
            if "epsilon" in name:
                cost |= {"epsilon": 7.9, "delta": 1e-5, "without_noise": ["facts"]}
            (folder / "cost.json").write_text(json.dumps(cost))
            versions = {"versions": {"nnunetv2": "2.8.1"}, "git": "abc", "python": "3.12", "machine": "Linux"}
            (folder / "environment.json").write_text(json.dumps(versions))
            if quality is not None and seed == self.seeds[0]:
                (folder / "quality.json").write_text(json.dumps(quality))
