"""The data of a study: test cases kept apart first, then what each kind of training may see.

data/consortium/sites/<SITE>/…   training cases by site, with the labels that the study uses; held-out sites are not in it
data/own/sites/<SITE>/…          all sites' training cases with each site's own labels, for what a site alone reaches
data/pooled/…                    the consortium's cases in one nnU-Net root, planned and preprocessed once
data/adapt/<SITE>/               images of a held-out site that finished models are adapted with: no labels, no test case
data/test/<SITE>/{images,labels} test cases, travelling subjects among them
data/federated/<SITE>/…          preprocessed cases that federated cells share; see `shared_cases`
data/clock.json                  how long that took; see `shared_time`
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.sites.files import (
    UNLABELLED,
    labelled_cases,
    read_dataset_json,
    read_json,
    unlabelled_cases,
    write_json,
)
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.sites.split import SplitOptions, place, split_dataset
from nnunet_fedharm.study.shared_time import write_prepared
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import CONTROL

BASE_PLANS = "nnUNetStudyPlans"
"""Network and preprocessed cases of every central and local cell."""
READY_FILE = "ready.json"
FOLDERS = ("consortium", "own", "pooled", "adapt", "test", "federated")
TRAVELLING = ("imagesTravelling", "labelsTravelling")
ADAPT_VOLUMES = 20
"""Most volumes of a held-out site that a model is adapted with, as a new hospital would gather them."""


@dataclass(frozen=True)
class StudyData:
    """Folders of a study's data."""

    study: StudyFile

    @property
    def folder(self) -> Path:
        return self.study.folder / "data"

    @property
    def dataset_name(self) -> str:
        """Name of the raw dataset's folder."""
        return self.study.raw_dataset.name

    @property
    def consortium(self) -> Path:
        """Training cases by training site, labels where the study uses them."""
        return self.folder / "consortium"

    @property
    def pooled(self) -> NnunetRoot:
        """All training cases of the training sites in one place."""
        return NnunetRoot(self.folder / "pooled")

    def own(self, site: str) -> NnunetRoot:
        """One site with its own labels."""
        return NnunetRoot(self.folder / "own" / "sites" / site)

    def preprocessed(self, site: str) -> Path:
        """Preprocessed cases of a site that federated cells share."""
        return self.folder / "federated" / site

    def adapt(self, site: str) -> Path:
        """Images without labels that a finished model is adapted to a held-out site with."""
        return self.folder / "adapt" / site

    def test(self, site: str) -> Path:
        """Test cases of a site: `images` and `labels`."""
        return self.folder / "test" / site

    @property
    def ready(self) -> bool:
        """Whether `prepare` has made everything."""
        return (self.folder / READY_FILE).is_file()

    def prepare(self) -> None:
        """Make everything that is missing; several processes may ask at once.

        Raises:
            FedHarmError: the dataset cannot be used; its sentence.
        """
        _ = self.study.start  # a wrong path is refused here, before hours of training
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.folder / READY_FILE
        with file_lock(self.folder / "data.lock"):
            made = _recipe(self.study)
            if done.is_file():
                self._refuse_other_values(read_json(done, what="The record of the study's data"), made)
                self._refuse_shared_patients()
                return
            for name in FOLDERS:  # of a preparation that was stopped
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._make()
            write_json(made, done)

    def _refuse_other_values(self, former: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        before = {"held_out_sites": [], "held_out_cases": [], **former}
        if before.get("dataset") == str(self.study.raw_dataset):  # a release that recorded the absolute path
            before["dataset"] = made["dataset"]
        changed = [
            f"{_KEYS.get(name, name)} was {json.dumps(before.get(name))} and is {json.dumps(value)} now"
            for name, value in made.items()
            # Data that hold each site's own labels serve a study that no longer asks for them too.
            if before.get(name) != value and (name != "own" or value)
        ]
        if changed:
            raise DataError(
                f"The data in {self.folder} were made for other values: {'; '.join(changed)}. Put that back in study.toml, or "
                "start a new study folder."
            )

    def _make(self) -> None:
        study, raw = self.study, self.study.raw_dataset
        tested = (*study.subject.held_out_cases, *_travellers_at_home(raw, study.registry))
        fraction = study.subject.held_out_fraction
        own = SplitOptions(held_out_fraction=fraction, held_out_cases=tested, labelled_sites=study.own_sites)
        split_dataset(raw, self.folder / "own", own)
        shared = SplitOptions(
            held_out_fraction=fraction,
            held_out_cases=tested,
            labelled_sites=study.labelled_sites,
            without_sites=study.held_out_sites,
        )
        split_dataset(raw, self.consortium, shared)
        for site in study.sites:
            self._gather_test(site)
        for site in study.held_out_sites:
            self._gather_adapt(site)
        self._pool()
        training = study.training
        options = CentralOptions(
            configurations=(study.subject.configuration,),
            kind=CONTROL,
            schedule=training.schedule(0, harmonizer_epochs=0),
            plan=plan_options(study, BASE_PLANS),
            num_processes=training.num_processes,
        )
        began = time.monotonic()
        plans = plan_central(self.pooled, self.dataset_name, options)
        pooled_s, own_s = time.monotonic() - began, dict[str, float]()
        for site in study.own_sites if self._needs_own else ():
            from nnunet_fedharm.planning.preprocess import preprocess_site

            began = time.monotonic()
            preprocess_site(
                self.own(site),
                self.dataset_name,
                plans,
                study.subject.configuration,
                num_processes=training.num_processes,
            )
            own_s[site] = time.monotonic() - began
        write_prepared(self.folder, pooled_s=pooled_s, own_s=own_s)

    @property
    def _needs_own(self) -> bool:
        return self.study.arms.oracle or "local" in self.study.arms.modes

    def _gather_test(self, site: str) -> None:
        source = self.own(site).raw / self.dataset_name
        for name, target in (("imagesTs", "images"), ("labelsTs", "labels")):
            (self.test(site) / target).mkdir(parents=True, exist_ok=True)
            for path in sorted((source / name).glob("*")):
                place(path, self.test(site) / target / path.name, link=True)
        for name, target in zip(TRAVELLING, ("images", "labels"), strict=True):
            for path in sorted((self.study.raw_dataset / name).glob(f"{site}_*")):
                if self.study.registry.site_of(path.name) == site:  # not of UCSF_3T, where the site is UCSF
                    place(path, self.test(site) / target / path.name, link=True)

    def _gather_adapt(self, site: str) -> None:
        """Evenly spread over the site's training cases by name: the same for every cell, so that arms are compared on them."""
        if not any((self.test(site) / "labels").iterdir()):
            raise DataError(
                f"The held-out site {site} has no case with a label to test on. Add labelled cases, or do not hold it out."
            )
        source = self.own(site).raw / self.dataset_name
        description = read_dataset_json(source, site=site)
        cases = sorted(
            [*labelled_cases(source, description), *unlabelled_cases(source, description)], key=lambda case: case.case
        )
        if not cases:
            raise DataError(
                f"The held-out site {site} has no image beside its test cases to adapt a model with. Add images, or do not hold "
                "it out."
            )
        for index in dict.fromkeys(np.linspace(0, len(cases) - 1, min(len(cases), ADAPT_VOLUMES)).round().astype(int)):
            for path in cases[index].images:
                place(path, self.adapt(site) / path.name, link=True)

    def _trained_cases(self, ending: str) -> set[str]:
        """Cases of central and federated trainings, as they lie in the pooled root."""
        images = _files(self.pooled.raw / self.dataset_name, "imagesTr", UNLABELLED)
        return {path.name[: -len(ending) - 5] for path in images}

    def _refuse_shared_patients(self) -> None:
        """Nobody is tested who was trained on, under another case's name or at another hospital."""
        registry = self.study.registry
        ending = str(read_dataset_json(self.study.raw_dataset, site="study")["file_ending"])
        known = {registry.patient_of(case): case for case in sorted(self._trained_cases(ending))}
        for site in self.study.sites:
            for path in sorted((self.test(site) / "labels").glob(f"*{ending}")):
                patient = registry.patient_of(path.name.removesuffix(ending))
                if patient in known:
                    raise DataError(
                        f"Patient {patient} would be tested at the site {site} and trained on at "
                        f"{registry.site_of(known[patient])} (case {known[patient]}). Start a new study folder: a split of today "
                        "keeps a patient's cases together."
                    )

    def _pool(self) -> None:
        target = self.pooled.create().raw / self.dataset_name
        cases: dict[str, str] = {}
        for site in self.study.training_sites:
            source = self.consortium / "sites" / site / "nnUNet_raw" / self.dataset_name
            for part in ("imagesTr", "labelsTr", UNLABELLED):
                for path in sorted((source / part).glob("*")):
                    place(path, target / part / path.name, link=True)
            cases |= dict(SitesFile.load(source / SITES_FILE).cases)
        description = read_dataset_json(source, site="pooled")
        ending = str(description["file_ending"])
        self._refuse_shared_patients()
        trained = self._trained_cases(ending)
        n_labelled = len(list((target / "labelsTr").glob(f"*{ending}")))
        write_json({**description, "numTraining": n_labelled}, target / "dataset.json")
        registry = self.study.registry
        sites = {site: registry.sites[site] for site in self.study.training_sites}
        patients = {case: patient for case, patient in registry.patients.items() if case in trained}
        SitesFile(sites, {case: site for case, site in cases.items() if case in trained}, patients).save(
            target / SITES_FILE
        )


def plan_options(study: StudyFile, plans_name: str) -> PlanOptions:
    """Size of the network."""
    training = study.training
    return PlanOptions(
        gpu_memory_gb=training.gpu_memory_gb,
        base_features=training.base_features,
        max_features=training.max_features or None,
        batch_size=training.batch_size or None,
        patch_size=training.patch_size or None,
        plans_name=plans_name,
    )


def _files(folder: Path, *parts: str) -> Iterator[Path]:
    for part in parts:
        yield from (folder / part).glob("*")


def _travellers_at_home(raw: Path, registry: SitesFile) -> Iterator[str]:
    """Cases at home of subjects who travelled: they are ground truth and never trained on."""
    names = {path.name.rsplit("_", 1)[0] for path in (raw / TRAVELLING[0]).glob("*_0000.*")}
    patients = {registry.patient_of(name) for name in names if registry.site_of(name) is not None}
    yield from (case for case in sorted(registry.cases) if registry.patient_of(case) in patients)


_KEYS = {"own": '"oracle is on, or local in modes"'}
"""What a key of the record stands for in study.toml, where it has another name there."""


def _recipe(study: StudyFile) -> dict[str, Any]:
    """What the data depend on."""
    training = study.training
    return {
        "dataset": study.subject.dataset,  # as it is written: a relative path stays right where both folders are moved
        "labelled_sites": list(study.labelled_sites),
        "held_out_sites": list(study.held_out_sites),
        "held_out_fraction": study.subject.held_out_fraction,
        "held_out_cases": list(study.subject.held_out_cases),
        "configuration": study.subject.configuration,
        "own": study.arms.oracle or "local" in study.arms.modes,
        **{
            name: list(value) if isinstance(value := getattr(training, name), tuple) else value
            for name in ("gpu_memory_gb", "base_features", "max_features", "batch_size", "patch_size")
        },
    }
