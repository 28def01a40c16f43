"""A raw dataset rendered as several scanners: sites for training, and travelling subjects as ground truth.

    OUT/imagesTr/<SITE>_<CASE>_0000.nii.gz           each case at one site
    OUT/imagesTravelling/<SITE>_<CASE>_0000.nii.gz   K cases of the reference as every other site sees them
    OUT/labelsTravelling, OUT/labelsTr               links: labels never change
    OUT/sites.json, OUT/simulation.json              seed and ranges of each site; parameters drawn for each case

A site without effects is a negative control: its files are the source's. Underscores in case names become dashes, because
travelling subjects are read as <SITE>_<CASE>.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnunet_fedharm.datasets.convert_cases import ENDING
from nnunet_fedharm.datasets.convert_write import is_same_file, open_folder, put, refuse_strangers, staged
from nnunet_fedharm.datasets.simulate_config import Simulation
from nnunet_fedharm.datasets.simulate_render import draw_effects, generator_for, render
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import (
    UNLABELLED,
    CaseFiles,
    labelled_cases,
    read_dataset_json,
    unlabelled_cases,
    write_json,
)
from nnunet_fedharm.sites.parallel import map_cases
from nnunet_fedharm.sites.registry import SITES_FILE, SiteInfo, SitesFile
from nnunet_fedharm.sites.split import place

RECORD = "simulation.json"
TRAVELLING = ("imagesTravelling", "labelsTravelling")


@dataclass(frozen=True)
class Job:
    """One case at one site.

    Attributes:
        source: its files.
        case: its name without underscores.
        images, labels: folders that it goes to; labels may be None.
    """

    source: CaseFiles
    case: str
    site: str
    images: str
    labels: str | None

    @property
    def name(self) -> str:
        return f"{self.site}_{self.case}"


def simulate_sites(
    raw_dataset: Path, output: Path, simulation: Simulation, *, num_processes: int = 1, link: bool = True
) -> list[Job]:
    """Write (or continue) the simulated dataset.

    Args:
        raw_dataset: nnU-Net raw dataset of NIfTI volumes.
        output: folder of the new dataset, such as nnUNet_raw/Dataset911_Simulated.
        link: link files that do not change.

    Returns:
        What was rendered where.

    Raises:
        DataError: too few cases, files that are no volumes, unusable voxels; names site and case.
        SetupError: the output holds something else, or cannot be written.
    """
    dataset_json = read_dataset_json(raw_dataset, site="source")
    if dataset_json["file_ending"] != ENDING:
        raise DataError(
            f"{raw_dataset} holds {dataset_json['file_ending']} files; simulated are {ENDING} volumes only."
        )
    jobs = plan_jobs(
        labelled_cases(raw_dataset, dataset_json), unlabelled_cases(raw_dataset, dataset_json), simulation, raw_dataset
    )
    settings = describe(simulation)
    open_folder(output, {"converter": "simulate-sites", "source": str(raw_dataset.resolve()), **settings, "link": link})
    refuse_strangers(output, (target for job in jobs for target in job_targets(job, output)))
    work = partial(run_job, simulation=simulation, output=output, link=link)
    with staged(output):
        for _ in map_cases(work, jobs, num_processes=num_processes, description="Rendering cases"):
            pass
    _write_records(output, dataset_json, jobs, simulation, raw_dataset.name)
    return jobs


def plan_jobs(
    labelled: list[CaseFiles], unlabelled: list[CaseFiles], simulation: Simulation, raw_dataset: Path
) -> list[Job]:
    """Give each case to one site, in equal shares, and choose the travelling subjects among the reference's.

    Raises:
        DataError: a site would get fewer than two cases to train with, or two cases get the same name.
    """
    sites, seed = list(simulation.sites), simulation.seed
    jobs: list[Job] = []
    for cases, images, labels in ((labelled, "imagesTr", "labelsTr"), (unlabelled, UNLABELLED, None)):
        ordered = sorted(cases, key=lambda case: case.case)
        deal = generator_for(seed, "sites", images).permutation(len(ordered))
        for turn, index in enumerate(deal):
            case = ordered[index]
            jobs.append(Job(case, case.case.replace("_", "-"), sites[turn % len(sites)], images, labels))
    if len({job.case for job in jobs}) != len(jobs):
        raise DataError(f"{raw_dataset} has cases that differ in _ and - only. Rename one of them.")
    at_home = sorted((job for job in jobs if job.site == simulation.reference and job.labels), key=lambda job: job.case)
    fewest = min(sum(job.site == site for job in jobs) for site in sites)
    if fewest < 2 or (simulation.travelling and len(at_home) - simulation.travelling < 2):
        raise DataError(
            f"{raw_dataset} has {len(jobs)} cases for {len(sites)} sites and {simulation.travelling} travelling subjects of "
            f"{simulation.reference}: every site needs two cases that do not travel. Take fewer sites or travellers."
        )
    chosen = generator_for(seed, "travelling").permutation(len(at_home))[: simulation.travelling]
    for index in sorted(chosen):
        home = at_home[index]
        jobs += [Job(home.source, home.case, site, *TRAVELLING) for site in sites if site != simulation.reference]
    return sorted(jobs, key=lambda job: (job.images, job.name))


def job_targets(job: Job, output: Path) -> list[Path]:
    """Files of a job: its channels, then its label if it has one."""
    targets = [output / job.images / f"{job.name}_{channel:04d}{ENDING}" for channel in range(len(job.source.images))]
    return targets if job.labels is None else [*targets, output / job.labels / f"{job.name}{ENDING}"]


def run_job(job: Job, *, simulation: Simulation, output: Path, link: bool) -> None:
    """Render the channels of one case, and link its label. What is complete is left alone."""
    effects = simulation.sites[job.site].effects
    targets = job_targets(job, output)
    for channel, (source, target) in enumerate(zip(job.source.images, targets, strict=False)):
        if is_same_file(source, target, written=not effects.is_control):
            continue
        if effects.is_control:
            _place(source, target, output, link=link)
        else:
            image = _render_file(job, channel, source, simulation)
            put(target, partial(_save, image, source), output)
    label = job.source.label
    if job.labels is not None and label is not None and not is_same_file(label, targets[-1], written=False):
        _place(label, targets[-1], output, link=link)


def describe(simulation: Simulation) -> dict[str, Any]:
    """The simulation as JSON values."""
    return {
        "seed": simulation.seed,
        "reference": simulation.reference,
        "travelling": simulation.travelling,
        "contrast": simulation.contrast,
        "tissues": None
        if simulation.tissues is None
        else {name: list(values) for name, values in simulation.tissues.items()},
        "effects": {name: site.effects.to_dict() for name, site in simulation.sites.items()},
    }


def _place(source: Path, target: Path, output: Path, *, link: bool) -> None:
    if not source.is_file():
        raise DataError(f"{source} is missing. Add the file or remove the case.")
    target.unlink(missing_ok=True)
    put(target, partial(place, source, link=link), output)


def _render_file(job: Job, channel: int, source: Path, simulation: Simulation) -> Any:
    where = f"Site {job.site}, case {job.source.case}: {source}"
    try:
        image: Any = nibabel.load(source)
        volume = np.asanyarray(image.dataobj)
        label = None if job.source.label is None else np.asanyarray(nibabel.load(job.source.label).dataobj)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{where} or its label cannot be read ({error}). Restore the file.") from error
    if volume.ndim != 3 or (label is not None and label.shape != volume.shape):
        raise DataError(f"{where} has the shape {volume.shape}; a volume with a label of its shape is needed.")
    try:
        made = render(
            volume,
            tuple(float(step) for step in image.header.get_zooms()[:3]),
            simulation.sites[job.site].effects,
            seed=simulation.seed,
            site=job.site,
            case=job.case,
            channel=channel,
            label=label,
            tissues=simulation.tissues,
            contrast=simulation.contrast,
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    header = image.header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1.0, 0.0)
    return nibabel.Nifti1Image(made, image.affine, header)


def _save(image: Any, source: Path, path: Path) -> None:
    nibabel.save(image, path)
    shutil.copystat(source, path)  # the source's time marks the file as made from it


def _write_records(
    output: Path, dataset_json: Mapping[str, Any], jobs: list[Job], simulation: Simulation, source_name: str
) -> None:
    settings = describe(simulation)
    shared = {key: settings[key] for key in ("seed", "reference", "tissues", "contrast")}
    sites = {
        name: SiteInfo(
            vendor=site.vendor,
            field=site.field,
            sequence=site.sequence,
            simulation={"source": source_name, **shared, "effects": settings["effects"][name]},
        )
        for name, site in simulation.sites.items()
    }
    home = [job for job in jobs if job.images != TRAVELLING[0]]
    SitesFile(sites, {job.name: job.site for job in home}).save(output / SITES_FILE)
    drawn = {job.name: _drawn(job, simulation) for job in jobs}
    travellers = sorted({job.case for job in jobs if job.images == TRAVELLING[0]})
    write_json({**settings, "source": source_name, "travellers": travellers, "drawn": drawn}, output / RECORD)
    kept = {key: value for key, value in dataset_json.items() if key not in ("dataset", "modality")}
    n_training = sum(job.images == "imagesTr" for job in jobs)
    write_json({**kept, "numTraining": n_training}, output / "dataset.json")


def _drawn(job: Job, simulation: Simulation) -> list[dict[str, float]]:
    effects = simulation.sites[job.site].effects
    return [
        {}
        if effects.is_control
        else draw_effects(effects, seed=simulation.seed, site=job.site, case=job.case, channel=channel)
        for channel in range(len(job.source.images))
    ]
