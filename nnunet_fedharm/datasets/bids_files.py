"""Finding files of a BIDS data set: subjects, sessions, images, sidecars, participants, label names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fedharm.datasets.convert_cases import ENDING
from nnunet_fedharm.datasets.convert_tables import Row, by_key, find_column, read_table
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import read_json


def sessions(source: Path) -> dict[str, Path]:
    """Case (`sub-01` or `sub-01_ses-1`) -> its folder, sorted.

    Raises:
        DataError: no subject.
    """
    found: dict[str, Path] = {}
    for subject in sorted(path for path in source.glob("sub-*") if path.is_dir()):
        visits = sorted(path for path in subject.glob("ses-*") if path.is_dir())
        found.update({f"{subject.name}_{visit.name}": visit for visit in visits} or {subject.name: subject})
    if not found:
        raise DataError(f"{source} holds no folder sub-<label>. Give the root of a BIDS data set.")
    return found


def find_file(folder: Path, case: str, suffix: str, *, hint: str) -> Path | None:
    """The one NIfTI file of a case with this suffix (and entities), in any datatype folder; None without one.

    Args:
        suffix: `T1w`, or with entities that the file must have, `ce-gad_T1w`.
        hint: the option that chooses between several.

    Raises:
        DataError: several, none of which is exactly `<case>_<suffix>`.
    """
    *entities, last = suffix.split("_")
    pattern = (f"*/{case}_*{last}.nii", f"*/{case}_*{last}{ENDING}")
    found = [path for name in pattern for path in sorted(folder.glob(name)) if set(entities) <= _entities(path)]
    found = [path for path in found if _stem(path).rsplit("_", 1)[-1] == last]
    exact = [path for path in found if _stem(path) == f"{case}_{suffix}"]
    chosen = exact or found
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen)
        raise DataError(f"Case {case}: several files for {suffix} in {folder}: {names}. Name an entity with {hint}.")
    return chosen[0] if chosen else None


def sidecar(image: Path, source: Path) -> dict[str, Any]:
    """Metadata of an image by the inheritance principle.

    Raises:
        DataError: a sidecar is no JSON object.
    """
    stem, facts = _stem(image), {}
    folders = [folder for folder in (image.parent, *image.parents) if folder == source or source in folder.parents]
    for folder in sorted(set(folders), key=lambda path: len(path.parts)):
        fitting = [
            path
            for path in folder.glob(f"*{stem.rsplit('_', 1)[-1]}.json")
            if set(path.stem.split("_")) <= set(stem.split("_"))
        ]
        for path in sorted(fitting, key=lambda path: len(path.stem.split("_"))):
            facts.update(read_json(path, what="The sidecar"))
    return facts


def participants(source: Path) -> dict[str, Row]:
    """Rows of participants.tsv by subject.

    Raises:
        DataError: no such table.
    """
    path = source / "participants.tsv"
    rows = read_table(path)
    return by_key(rows, find_column(rows, ["participant_id"], table=path, what="subject"), table=path)


def label_names(labels_root: Path) -> dict[str, int]:
    """Name -> value, from the first `*dseg.tsv` of a pipeline (its root, or `derivatives`).

    Raises:
        DataError: there is none, or its values are no whole numbers.
    """
    for folder in (labels_root, labels_root.parent):
        for path in sorted(folder.glob("*dseg.tsv")):
            rows = read_table(path)
            index = find_column(rows, ["index"], table=path, what="label value")
            name = find_column(rows, ["name"], table=path, what="label name")
            try:
                return {row[name]: int(row[index]) for row in rows}
            except ValueError as error:
                raise DataError(f"{path} has an index that is no whole number ({error}). Correct it.") from error
    raise DataError(
        f"{labels_root} has no dseg.tsv that names the labels. Name them: --label-names tumor=1 oedema=2 (name=value)."
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _entities(path: Path) -> set[str]:
    return set(_stem(path).split("_")[:-1])
