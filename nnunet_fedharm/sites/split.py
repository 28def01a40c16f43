"""One raw dataset of several sites -> one nnU-Net root per site, as a federation finds it.

Each site gets its own cases only: labelled ones in imagesTr/labelsTr, those of sites that take part without labels in
imagesUnlabelled, and a share chosen before any training in imagesTs/labelsTs, which no training reads. That share is of patients:
no scan of a patient who is tested is trained on, at any site. Files are hard links where the file system allows it, so a split of
a large dataset costs no space.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.sites.files import (
    UNLABELLED,
    CaseFiles,
    labelled_cases,
    read_dataset_json,
    unlabelled_cases,
    write_json,
)
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How cases are given to the sites."""

    labelled_sites: tuple[str, ...] | None = None
    """Sites that keep their labels; None: all. The others take part in the harmonizer phase only."""
    held_out_fraction: float = 0.2
    """Share of each site's patients with labels whose cases go to imagesTs/labelsTs."""
    seed: int = 0
    """Seed of the choice; each site draws with its own generator, so adding a site changes no other site's cases, unless they
    have patients in common, who are drawn once for all sites."""
    link: bool = True
    """Hard links (or symbolic links across file systems) instead of copies."""
    without_sites: tuple[str, ...] = ()
    """Sites that get no folder, so that nothing of them takes part; what the others get does not change."""
    held_out_cases: tuple[str, ...] = ()
    """Cases whose patients are held out whatever is drawn, and do not count for the share: subjects that travelled."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction < 1:
            raise DataError(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}.")


@dataclass(frozen=True)
class SiteShare:
    """What one site got.

    Attributes:
        n_labelled, n_unlabelled, n_held_out: cases in imagesTr, imagesUnlabelled and imagesTs.
        n_left_out: cases without a label whose patients are tested with other cases; they are in none of the three.
    """

    site: str
    root: NnunetRoot
    n_labelled: int
    n_unlabelled: int
    n_held_out: int
    n_left_out: int = 0


def split_dataset(raw_dataset: Path, consortium: Path, options: SplitOptions | None = None) -> list[SiteShare]:
    """Write `consortium/sites/<site>/…` for every site of `sites.json` but `without_sites`, and `consortium/server/…`.

    Args:
        raw_dataset: nnU-Net raw dataset with a sites.json.

    Returns:
        One entry per site that got a folder, in the order of sites.json.

    Raises:
        DataError: no dataset, no or wrong sites.json, an unknown site, a site left with too few cases.
        SetupError: a target is not empty or cannot be written.
    """
    options = options or SplitOptions()
    dataset_json = read_dataset_json(raw_dataset, site="all")
    registry = SitesFile.load(raw_dataset / SITES_FILE)
    labelled, unlabelled = labelled_cases(raw_dataset, dataset_json), unlabelled_cases(raw_dataset, dataset_json)
    _check_names(registry, [*labelled, *unlabelled], options)
    sites = [site for site in registry.sites if site not in options.without_sites]
    tested = _tested_patients(registry, labelled, options)
    plans = [_share_out(site, registry, labelled, unlabelled, tested, options) for site in sites]
    roots = [NnunetRoot(consortium / "sites" / site) for site in sites]
    for root in roots:
        _refuse_occupied(root.raw / raw_dataset.name)
    make_consortium_folders(consortium, sites)
    return [
        _write_site(plan, root, raw_dataset.name, dataset_json, registry, link=options.link)
        for plan, root in zip(plans, roots, strict=True)
    ]


def make_consortium_folders(consortium: Path, sites: Collection[str]) -> None:
    """The folders of the server and of every site: an nnU-Net root and `fedharm/` each."""
    for folder in (consortium / "server", *(consortium / "sites" / site for site in sites)):
        root = NnunetRoot(folder).create()
        (root.path / "fedharm").mkdir(exist_ok=True)


@dataclass(frozen=True)
class _Plan:
    site: str
    train: list[CaseFiles]
    unlabelled: list[CaseFiles]
    held_out: list[CaseFiles]
    left_out: int


def _check_names(registry: SitesFile, cases: Sequence[CaseFiles], options: SplitOptions) -> None:
    for case in cases:
        if case.case not in registry.cases:
            raise DataError(
                f"{SITES_FILE} does not say which site case {case.case} comes from. Add the case to `cases`."
            )
        for image in case.images:
            if not image.is_file():
                raise DataError(
                    f"Case {case.case} of site {registry.cases[case.case]}: {image} is missing. Add it or remove the case."
                )
    for site in options.labelled_sites or ():
        if site not in registry.sites:
            raise DataError(f"Unknown site {site} in --labelled-sites. {SITES_FILE} lists {', '.join(registry.sites)}.")


def _tested_patients(registry: SitesFile, labelled: Sequence[CaseFiles], options: SplitOptions) -> set[str]:
    """Patients who are held out: those who must be, a share of those with labels at several sites, and one of each site's own."""
    forced = {registry.patient_of(case) for case in options.held_out_cases}
    places: dict[str, set[str]] = {}
    for case in labelled:
        places.setdefault(registry.patient_of(case.case), set()).add(registry.cases[case.case])
    free = {patient: at for patient, at in places.items() if patient not in forced}
    several = sorted(patient for patient, at in free.items() if len(at) > 1)
    only_shared = {site for at in free.values() for site in at} - {
        site for at in free.values() if len(at) == 1 for site in at
    }
    tested = forced | _drawn(several, "patients of several sites", options, least=1 if only_shared else 0)
    for site in registry.sites:
        own = [patient for patient, at in free.items() if at == {site}]
        has_one = any(site in free[patient] for patient in tested - forced)
        tested |= _drawn(own, site, options, least=0 if has_one else 1)
    return tested


def _drawn(patients: Sequence[str], whose: str, options: SplitOptions, *, least: int = 0) -> set[str]:
    """The share of the patients, at least so many if there are any."""
    order = _generator(options.seed, whose).permutation(len(patients))
    count = round(options.held_out_fraction * len(patients))
    if options.held_out_fraction > 0:
        count = max(count, least)
    return {patients[index] for index in order[:count]}


def _share_out(
    site: str,
    registry: SitesFile,
    labelled: Sequence[CaseFiles],
    unlabelled: Sequence[CaseFiles],
    tested: Collection[str],
    options: SplitOptions,
) -> _Plan:
    own = sorted((case for case in labelled if registry.cases[case.case] == site), key=lambda case: case.case)
    without = [case for case in unlabelled if registry.cases[case.case] == site]
    if not own and not without:
        raise DataError(
            f"Site {site} is empty: no case of the dataset belongs to it. Remove it from {SITES_FILE} or add cases."
        )
    held_out = [case for case in own if registry.patient_of(case.case) in tested]
    train = [case for case in own if registry.patient_of(case.case) not in tested]
    kept = [case for case in without if registry.patient_of(case.case) not in tested]
    left_out = len(without) - len(kept)
    keeps_labels = options.labelled_sites is None or site in options.labelled_sites
    if own and keeps_labels and len(train) < 2:
        raise DataError(
            f"Site {site} has {len(own)} labelled cases, of which {len(train)} would be left to train with "
            f"{len(held_out)} held out; at least 2 are needed. Lower --held-out-fraction or leave the site out of "
            "--labelled-sites."
        )
    if keeps_labels:
        return _Plan(site, train, kept, held_out, left_out)
    return _Plan(site, [], [*kept, *train], held_out, left_out)


def _write_site(
    plan: _Plan,
    root: NnunetRoot,
    dataset_name: str,
    dataset_json: Mapping[str, Any],
    registry: SitesFile,
    *,
    link: bool,
) -> SiteShare:
    target = root.raw / dataset_name
    ending = dataset_json["file_ending"]
    for cases, images, labels in (
        (plan.train, "imagesTr", "labelsTr"),
        (plan.unlabelled, UNLABELLED, None),
        (plan.held_out, "imagesTs", "labelsTs"),
    ):
        for case in cases:
            for channel, image in enumerate(case.images):
                place(image, target / images / f"{case.case}_{channel:04d}{ending}", link=link)
            if labels is not None and case.label is not None:
                place(case.label, target / labels / f"{case.case}{ending}", link=link)
    (target / "imagesTr").mkdir(parents=True, exist_ok=True)
    (target / "labelsTr").mkdir(exist_ok=True)
    description = {key: value for key, value in dataset_json.items() if key not in ("dataset", "modality")}
    write_json({**description, "numTraining": len(plan.train)}, target / "dataset.json")
    registry.only(plan.site).save(target / SITES_FILE)
    counts = len(plan.train), len(plan.unlabelled), len(plan.held_out)
    return SiteShare(plan.site, root, *counts, n_left_out=plan.left_out)


def place(source: Path, target: Path, *, link: bool) -> None:
    """Hard link, else symbolic link (another file system), else copy.

    Raises:
        SetupError: the target cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not link:
            shutil.copy2(source, target)
            return
        try:
            os.link(source.resolve(), target)
        except OSError:
            target.symlink_to(source.resolve())
    except OSError as error:
        raise SetupError(
            f"Cannot write {target}: {error.strerror}. Choose a folder that this user may write, with space."
        ) from error


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SetupError(
            f"{folder} already holds a dataset. Remove it or choose another output folder; nothing was changed."
        )


def _generator(seed: int, site: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{site}/held-out".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
