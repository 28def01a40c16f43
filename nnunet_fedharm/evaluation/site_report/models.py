"""The same volumes harmonized by a trained model, for the site report's before and after; made once and kept.

A results folder whose plans hold the style of every site serves all of them: each volume is mapped from its own site. Where
every site has a results folder of its own, `{site}` in the path stands for the site's name; a site without one (such as the
reference) is served by the style bank of another's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.harmonize import HarmonizerModel, harmonize_case, load_harmonizer
from nnunet_fedharm.evaluation.volumes import write_like
from nnunet_fedharm.sites.features.table import Failure
from nnunet_fedharm.sites.files import CaseFiles, write_text

PLACE = "{site}"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class HarmonizedCases:
    """Volumes of one model.

    Attributes:
        name: "harmonized by curve to A".
        cases: those that could be harmonized, with the scans' labels.
        failures: the others.
        notes: what a reader has to know about the model.
    """

    name: str
    cases: list[CaseFiles]
    failures: list[Failure]
    notes: list[str]


def model_folders(folder: str, sites: Sequence[str]) -> dict[str, Path]:
    """Site -> the results folder that serves it; a site without one of its own is served by the first that there is.

    Args:
        folder: results folder; may hold `{site}`.
        sites: of the dataset.

    Raises:
        DataError: there is no results folder.
    """
    own = {site: Path(folder.replace(PLACE, site)) for site in sites}
    there = [path for path in own.values() if (path / "plans.json").is_file()]
    if not there:
        raise DataError(
            f"The model {folder} has no plans.json. Give a results folder TRAINER__PLANS__CONFIGURATION of our trainers; "
            f"{PLACE} in its path stands for each site's name."
        )
    return {site: path if path in there else there[0] for site, path in own.items()}


def harmonize_cases(
    folder: str, cases: Sequence[CaseFiles], sites: Mapping[str, str], target: Path, *, device: str = "cpu"
) -> HarmonizedCases:
    """Harmonize volumes, or take those that this model has made of the same files before.

    Args:
        folder: results folder; may hold `{site}`.
        cases: volumes as scanned.
        sites: case -> site.
        target: where harmonized volumes are kept, in a folder for each model.
        device: where the harmonizer runs.

    Raises:
        DataError, CheckpointError, PlanError: the model cannot be used.
    """
    folders = model_folders(folder, list(dict.fromkeys(sites[case.case] for case in cases)))
    models: dict[Path, tuple[HarmonizerModel, str]] = {}
    done: list[CaseFiles] = []
    failures: list[Failure] = []
    unknown: set[str] = set()
    for case in tqdm(cases, "harmonize", leave=False):
        site, path = sites[case.case], folders[sites[case.case]]
        if path not in models:
            models[path] = load_harmonizer(path, device=device), _model_key(path)
        model, key = models[path]
        if site not in model.section.styles:
            unknown.add(site)
        try:
            images = _harmonized_files(
                model,
                case,
                site,
                target / key,
                own_folder=path == Path(folder.replace(PLACE, site)) and PLACE in folder,
            )
        except DataError as error:
            failures.append(Failure(site, case.case, f"It could not be harmonized: {error}"))
            continue
        done.append(replace(case, images=images))
    section = next(iter(models.values()))[0].section
    name = f"harmonized by {section.kind}" + (f" to {section.reference}" if section.reference else "")
    notes = [
        f"The model ({name}) was not trained with site {site}: each of its volumes was mapped from its own style."
        for site in sorted(unknown)
    ]
    return HarmonizedCases(name, done, failures, notes)


def _harmonized_files(
    model: HarmonizerModel, case: CaseFiles, site: str, target: Path, *, own_folder: bool
) -> tuple[Path, ...]:
    """Files of one case's channels, written if they are not there for these scans."""
    images = tuple(target / path.name for path in case.images)
    stamp, content = target / f"{case.case}.sha256", _digest(case.images)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == content and all(path.is_file() for path in images):
        return images
    stamp.unlink(missing_ok=True)
    volume = harmonize_case(model, case, site=_source(model, site, own_folder=own_folder))
    for channel, scan, image in zip(volume, case.images, images, strict=True):
        write_like(channel, scan, model.plans.image_reader_writer_class.__name__, image)
    write_text(content, stamp)  # last: a run that was stopped leaves no half case behind
    return images


def _source(model: HarmonizerModel, site: str, *, own_folder: bool) -> str | None:
    """The site to map from: its own folder's stored source, its style in the bank, or (None) the volume's own."""
    stored = bool(model.harmonizer.source_known)
    if own_folder and stored:
        return None
    if site in model.section.styles:
        return site
    if stored:
        model.harmonizer.set_source(None)  # another site's
    return None


def _model_key(folder: Path) -> str:
    files = [folder / "plans.json", *sorted(folder.glob("fold_*/checkpoint_final.pth"))[:1]]
    return _digest(files)[:12]


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    found.update(block)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}. Restore the file.") from error
    return found.hexdigest()
