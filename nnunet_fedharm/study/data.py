"""The data of a study: test cases kept apart first, then what each kind of training may see.

data/consortium/sites/<SITE>/…   training cases by site, with the labels that the study uses
data/own/sites/<SITE>/…          the same cases with each site's own labels, for what a site alone reaches
data/pooled/…                    all sites' training cases in one nnU-Net root, planned and preprocessed once
data/test/<SITE>/{images,labels} test cases, travelling subjects among them
data/federated/<SITE>/…          preprocessed cases that federated cells share; see `shared_cases`
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.sites.files import UNLABELLED, read_dataset_json, read_json, write_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.sites.split import SplitOptions, place, split_dataset
from nnunet_fedharm.study.study_file import CONTROL, StudyFile

BASE_PLANS = "nnUNetStudyPlans"
"""Network and preprocessed cases of every central and local cell."""
READY_FILE = "ready.json"
TRAVELLING = ("imagesTravelling", "labelsTravelling")


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
        """Training cases by site, labels where the study uses them."""
        return self.folder / "consortium"

    @property
    def pooled(self) -> NnunetRoot:
        """All training cases in one place."""
        return NnunetRoot(self.folder / "pooled")

    def own(self, site: str) -> NnunetRoot:
        """One site with its own labels."""
        return NnunetRoot(self.folder / "own" / "sites" / site)

    def preprocessed(self, site: str) -> Path:
        """Preprocessed cases of a site that federated cells share."""
        return self.folder / "federated" / site

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
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.folder / READY_FILE
        with file_lock(self.folder / "data.lock"):
            made = _recipe(self.study)
            if done.is_file():
                if read_json(done, what="The record of the study's data") != made:
                    raise DataError(
                        f"The data in {self.folder} were made for other values of dataset, labelled_sites, held_out_fraction or "
                        f"network size. Put them back in study.toml, or start a new study folder."
                    )
                return
            for name in ("consortium", "own", "pooled", "test", "federated"):  # of a preparation that was stopped
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._make()
            write_json(made, done)

    def _make(self) -> None:
        study, raw = self.study, self.study.raw_dataset
        travellers = tuple(_travellers_at_home(raw, study.subject.reference))
        fraction = study.subject.held_out_fraction
        split_dataset(raw, self.folder / "own", SplitOptions(held_out_fraction=fraction, held_out_cases=travellers))
        labelled = SplitOptions(
            held_out_fraction=fraction, held_out_cases=travellers, labelled_sites=study.labelled_sites
        )
        split_dataset(raw, self.consortium, labelled)
        for site in study.sites:
            self._gather_test(site)
        self._pool()
        training = study.training
        options = CentralOptions(
            configurations=(study.subject.configuration,),
            kind=CONTROL,
            schedule=training.schedule(0, harmonizer_epochs=0),
            plan=plan_options(study, BASE_PLANS),
            num_processes=training.num_processes,
        )
        plans = plan_central(self.pooled, self.dataset_name, options)
        for site in study.sites if self._needs_own else ():
            from nnunet_fedharm.planning.preprocess import preprocess_site

            preprocess_site(
                self.own(site),
                self.dataset_name,
                plans,
                study.subject.configuration,
                num_processes=training.num_processes,
            )

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
                place(path, self.test(site) / target / path.name, link=True)

    def _pool(self) -> None:
        target = self.pooled.create().raw / self.dataset_name
        cases: dict[str, str] = {}
        for site in self.study.sites:
            source = self.consortium / "sites" / site / "nnUNet_raw" / self.dataset_name
            for part in ("imagesTr", "labelsTr", UNLABELLED):
                for path in sorted((source / part).glob("*")):
                    place(path, target / part / path.name, link=True)
            cases |= dict(SitesFile.load(source / SITES_FILE).cases)
        description = read_dataset_json(source, site="pooled")
        ending = str(description["file_ending"])
        trained = {path.name[: -len(ending) - 5] for path in _files(target, "imagesTr", UNLABELLED)}
        n_labelled = len(list((target / "labelsTr").glob(f"*{ending}")))
        write_json({**description, "numTraining": n_labelled}, target / "dataset.json")
        registry = self.study.registry
        patients = {case: patient for case, patient in registry.patients.items() if case in trained}
        SitesFile(registry.sites, {case: site for case, site in cases.items() if case in trained}, patients).save(
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


def _travellers_at_home(raw: Path, reference: str) -> Iterator[str]:
    """Cases of the reference site whose subject travelled: they are ground truth and never trained on."""
    subjects = {path.name.split("_", 1)[1].rsplit("_", 1)[0] for path in (raw / TRAVELLING[0]).glob("*_0000.*")}
    for subject in sorted(subjects):
        case = f"{reference}_{subject}"
        if any((raw / "imagesTr").glob(f"{case}_0000.*")):
            yield case


def _recipe(study: StudyFile) -> dict[str, Any]:
    """What the data depend on."""
    training = study.training
    return {
        "dataset": str(study.raw_dataset),
        "labelled_sites": list(study.labelled_sites),
        "held_out_fraction": study.subject.held_out_fraction,
        "configuration": study.subject.configuration,
        "own": study.arms.oracle or "local" in study.arms.modes,
        **{
            name: list(value) if isinstance(value := getattr(training, name), tuple) else value
            for name in ("gpu_memory_gb", "base_features", "max_features", "batch_size", "patch_size")
        },
    }
