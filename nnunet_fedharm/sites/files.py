"""JSON files that are never half written, and the files of each case of an nnU-Net raw dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, SetupError

UNLABELLED = "imagesUnlabelled"
_REQUIRED_KEYS = ("channel_names", "labels", "file_ending")


@dataclass(frozen=True)
class CaseFiles:
    """Where one case lies on disk.

    Attributes:
        case: nnU-Net's case identifier.
        images: one file for each channel, in channel order; a file may be missing on disk.
        label: the segmentation; None for an unlabelled case.
    """

    case: str
    images: tuple[Path, ...]
    label: Path | None


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        DataError: the file is missing, unreadable or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{what} {path} is missing. Create it, or check the path.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{what} {path} cannot be read ({error}). Mend or replace the file.") from error
    if not isinstance(data, dict):
        raise DataError(f"{what} {path} holds a {type(data).__name__}; it has to hold a JSON object.")
    return data


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part.

    Raises:
        SetupError: the folder cannot be written.
    """
    write_text(json.dumps(data, indent=2), path)


def write_text(text: str, path: Path) -> None:
    """As `write_json`.

    Raises:
        SetupError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut may leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        temporary_exists = temporary.parent.is_dir() and temporary.exists()
        if temporary_exists:
            temporary.unlink()
        raise SetupError(
            f"Cannot write {path}: {error.strerror}. Choose a folder that this user may write, with free space."
        ) from error


def read_dataset_json(raw_dataset: Path, *, site: str) -> dict[str, Any]:
    """`dataset.json` of a raw dataset with the keys that nnU-Net needs.

    Raises:
        DataError: no such dataset, unreadable file, missing key.
    """
    if not raw_dataset.is_dir():
        raise DataError(
            f"Site {site} has no dataset: {raw_dataset} does not exist. "
            "Put the nnU-Net raw dataset there, or write it with `nnunet-fedharm sites split`."
        )
    data = read_json(raw_dataset / "dataset.json", what=f"Site {site}: the dataset description")
    if "channel_names" not in data and "modality" in data:
        data["channel_names"] = data["modality"]
    for key in _REQUIRED_KEYS:
        if key not in data:
            raise DataError(
                f"Site {site}: {raw_dataset / 'dataset.json'} has no key {key!r}. Add it as nnU-Net documents."
            )
    return data


def labelled_cases(raw_dataset: Path, dataset_json: Mapping[str, Any]) -> list[CaseFiles]:
    """The training cases as nnU-Net would list them (imagesTr/labelsTr, or the `dataset` key), sorted by identifier."""
    if "dataset" in dataset_json:
        return [
            CaseFiles(
                case,
                tuple(_resolve(raw_dataset, image) for image in files["images"]),
                _resolve(raw_dataset, files["label"]),
            )
            for case, files in sorted(dataset_json["dataset"].items())
        ]
    return cases_in(raw_dataset / "imagesTr", dataset_json, labels=raw_dataset / "labelsTr")


def unlabelled_cases(raw_dataset: Path, dataset_json: Mapping[str, Any]) -> list[CaseFiles]:
    """The cases of `imagesUnlabelled/`, which only the harmonizer phase reads; empty when the folder is missing."""
    return cases_in(raw_dataset / UNLABELLED, dataset_json, labels=None)


def cases_in(images: Path, dataset_json: Mapping[str, Any], *, labels: Path | None) -> list[CaseFiles]:
    """Cases found in one folder of images named `<case>_<4 digits><ending>`."""
    if not images.is_dir():
        return []
    ending = str(dataset_json["file_ending"])
    names = sorted(
        {
            path.name[: -len(ending) - 5]
            for path in images.iterdir()
            if path.name.endswith(ending) and not path.name.startswith(".") and len(path.name) > len(ending) + 5
        }
    )
    channels = range(len(dataset_json["channel_names"]))
    return [
        CaseFiles(
            name,
            tuple(images / f"{name}_{channel:04d}{ending}" for channel in channels),
            None if labels is None else labels / f"{name}{ending}",
        )
        for name in names
    ]


def reader_class(dataset_json: Mapping[str, Any], example: Path, *, site: str) -> type[Any]:
    """The reader that nnU-Net chooses for these files.

    Raises:
        DataError: nnU-Net has none.
    """
    # Imported here: nnunetv2 costs seconds, and most uses of this module do not need it.
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    if not example.exists():
        raise DataError(f"Site {site}: the image file {example} is missing. Restore it or remove the case.")
    try:
        with redirect_stdout(StringIO()):
            chosen: type[Any] = determine_reader_writer_from_dataset_json(
                dict(dataset_json), str(example), verbose=False
            )
    except RuntimeError as error:
        raise DataError(
            f"Site {site}: nnU-Net has no reader for {example}. Use a file ending that nnU-Net supports, such as .nii.gz."
        ) from error
    return chosen


def _resolve(raw_dataset: Path, name: str) -> Path:
    path = Path(os.path.expandvars(name))
    return path if path.is_absolute() else (raw_dataset / path).resolve()
