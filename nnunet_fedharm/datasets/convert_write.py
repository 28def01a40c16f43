"""Write a converted data set: linked where nothing changes, whole files only, and resumable.

Files appear in the dataset by renaming, so an interruption leaves no half file; `dataset.json` is written last, so nnU-Net
never sees a half dataset. `conversion.json` says what was converted with which options.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from tqdm import tqdm

from nnunet_fedharm import __version__
from nnunet_fedharm.datasets.convert_cases import ENDING, FOLDERS, Conversion, SourceCase
from nnunet_fedharm.datasets.convert_geometry import files_to_mend
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.files import read_json, write_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.sites.split import place

MANIFEST = "conversion.json"
STAGING = ".converting"


@dataclass(frozen=True)
class Written:
    """What was done.

    Attributes:
        folder: the dataset.
        n_new: files written or linked in this run; the others were there.
    """

    folder: Path
    n_new: int


def dataset_folder(output: Path, dataset_id: int, name: str) -> Path:
    """`output` itself where it is called Dataset<ID>_<Name>, else the folder of that name inside it.

    Raises:
        DataError: the ID is not in 1 … 999, or contradicts the folder's.
        SetupError: nnUNet_raw has another dataset of this ID.
    """
    if not 1 <= dataset_id <= 999:
        raise DataError(f"The dataset ID must be 1 to 999, got {dataset_id}.")
    given = re.fullmatch(r"Dataset(\d{3})_(.+)", output.name)
    if given and int(given.group(1)) != dataset_id:
        raise DataError(f"-d {dataset_id} contradicts the folder {output.name}. Give the same ID.")
    folder = output if given else output / f"Dataset{dataset_id:03d}_{name}"
    for other in sorted(folder.parent.glob(f"Dataset{dataset_id:03d}_*")):
        if other.name != folder.name:
            raise SetupError(f"{other} already has the ID {dataset_id}. Choose another ID with -d.")
    return folder


def write_conversion(conversion: Conversion, folder: Path, *, link: bool = True, progress: bool = True) -> Written:
    """Write or continue an nnU-Net raw dataset.

    Args:
        folder: the dataset's folder, as `dataset_folder` gives it.
        link: hard links, else symbolic links, for files that do not change; False copies.
        progress: show a bar.

    Raises:
        DataError: no case, files on different grids, a label value that is not expected.
        SetupError: the folder holds something else, or cannot be written.
    """
    if not conversion.cases:
        raise DataError("No case is left to convert. Check the source folder and what was left out.")
    open_folder(folder, {**conversion.options, "link": link})
    work = [item for case in conversion.cases for item in [(case, _targets(case, folder))]]
    refuse_strangers(folder, (target for _, targets in work for target in targets.values()))
    n_new = 0
    with staged(folder):
        for case, targets in tqdm(work, "cases", disable=not progress):
            n_new += _write_case(case, targets, conversion.remap, folder, link=link)
    owners = {case.case: case.site for case in conversion.cases}
    patients = {case.case: case.patient for case in conversion.cases if case.patient is not None}
    SitesFile(conversion.sites, owners, patients).save(folder / SITES_FILE)
    write_json(_description(conversion), folder / "dataset.json")
    return Written(folder, n_new)


def open_folder(folder: Path, options: Mapping[str, Any]) -> None:
    """Claim a folder for a conversion, or find that it was claimed by the same one.

    Raises:
        SetupError: it holds something else.
    """
    manifest = folder / MANIFEST
    wanted = {"nnunet_fedharm": __version__, "options": dict(options)}
    if manifest.is_file():
        found = read_json(manifest, what="The record of the conversion").get("options")
        if found != wanted["options"]:
            raise SetupError(
                f"{folder} was made with other options ({found}). Remove it, or choose another ID or folder; nothing was changed."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise SetupError(f"{folder} already holds something else. Remove it or choose another ID; nothing was changed.")
    write_json(wanted, manifest)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(exist_ok=True)


def refuse_strangers(folder: Path, expected: Iterable[Path]) -> None:
    """Refuse files of cases that the source no longer has: nnU-Net would train on them.

    Raises:
        DataError: such a file.
    """
    known = set(expected)
    for path in sorted(folder.glob(f"*/*{ENDING}")):
        if path not in known and path.parent.name != STAGING:
            raise DataError(f"{path} is of a case that is not converted any more. Remove the file or the folder.")


@contextlib.contextmanager
def staged(folder: Path) -> Any:
    """The folder in which files are made; gone afterwards, also after an error."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    (folder / STAGING).mkdir(parents=True)
    try:
        yield folder / STAGING
    finally:
        shutil.rmtree(folder / STAGING, ignore_errors=True)


def put(target: Path, make: Callable[[Path], None], folder: Path) -> None:
    """Let `make` write a file in the staging folder, then rename it to `target`.

    Raises:
        SetupError: no space or no permission.
    """
    temporary = folder / STAGING / target.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        make(temporary)
        temporary.replace(target)
    except OSError as error:
        raise SetupError(
            f"Cannot write {target}: {error}. Choose a folder that this user may write, with space."
        ) from error


def is_same_file(source: Path, target: Path, *, written: bool) -> bool:
    """Whether `target` came from this source: the same file on disk, or of the source's time (and size, if copied)."""
    if not target.exists():
        return False
    if not written and target.samefile(source):
        return True
    before, after = source.stat(), target.stat()
    same_size = after.st_size > 0 if written else after.st_size == before.st_size
    return same_size and int(after.st_mtime) == int(before.st_mtime)


def _targets(case: SourceCase, folder: Path) -> dict[Path, Path]:
    images, labels = FOLDERS[case.part]
    targets = {path: folder / images / f"{case.case}_{channel:04d}{ENDING}" for channel, path in enumerate(case.images)}
    if case.label is not None and labels is not None:
        targets[case.label] = folder / labels / f"{case.case}{ENDING}"
    return targets


def _write_case(
    case: SourceCase, targets: dict[Path, Path], remap: dict[int, int] | None, folder: Path, *, link: bool
) -> int:
    """Number of new files."""
    mend = files_to_mend(case)
    n_new = 0
    for source, target in targets.items():
        mapping = remap if source == case.label else None
        written = mapping is not None or source in mend or not source.name.endswith(ENDING)
        if is_same_file(source, target, written=written):
            continue
        if written:
            put(target, lambda path, source=source, mapping=mapping: _rewrite(source, path, case, mapping), folder)  # type: ignore[misc]
        else:
            target.unlink(missing_ok=True)  # a link to the same file would make the renaming a no-op
            put(target, lambda path, source=source: place(source, path, link=link), folder)  # type: ignore[misc]
        n_new += 1
    return n_new


def _rewrite(source: Path, path: Path, case: SourceCase, remap: dict[int, int] | None) -> None:
    """The file with the first channel's geometry and its labels renumbered; it keeps the source's time."""
    image: Any = nibabel.load(source)
    reference: Any = nibabel.load(case.images[0])
    header = image.header.copy()
    if remap is None:
        voxels = np.asanyarray(image.dataobj)
        header.set_data_dtype(voxels.dtype)
    else:
        voxels = remap_labels(np.asanyarray(image.dataobj), remap, where=f"Case {case.case}: {source}")
        header.set_data_dtype(np.uint8)
    made = nibabel.Nifti1Image(voxels, reference.affine, header)
    made.set_qform(reference.affine, code=int(reference.header["qform_code"]) or 1)
    made.set_sform(reference.affine, code=int(reference.header["sform_code"]) or 1)
    nibabel.save(made, path)
    shutil.copystat(source, path)


def remap_labels(label: Any, remap: Mapping[int, int], *, where: str) -> Any:
    """Renumber, as uint8.

    Raises:
        DataError: a value that the map does not know.
    """
    renumbered = np.zeros(label.shape, dtype=np.uint8)
    for value in np.unique(label):
        if float(value) not in remap:
            raise DataError(
                f"{where} holds the label value {float(value):g}; expected are {sorted(remap)}. Mend the file, name the value, "
                "or leave the case out with --exclude."
            )
        renumbered[label == value] = remap[int(value)]
    return renumbered


def _description(conversion: Conversion) -> dict[str, Any]:
    return {
        "channel_names": {str(index): name for index, name in enumerate(conversion.channels)},
        "labels": conversion.labels,
        "numTraining": sum(case.part == "train" for case in conversion.cases),
        "file_ending": ENDING,
        **conversion.facts,
        "converted_by": f"nnunet-fedharm {__version__}",
    }
