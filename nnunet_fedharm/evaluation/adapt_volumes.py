"""A new site's volumes: found, checked, preprocessed as nnU-Net's prediction does, and harmonized whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.volumes import read_images
from nnunet_fedharm.harmonizers.style import volume_quantiles
from nnunet_fedharm.sites.checks import check_case, expected_labels
from nnunet_fedharm.sites.files import CaseFiles, cases_in


@dataclass(frozen=True)
class Preprocessing:
    """How volumes are read and preprocessed: nnU-Net's PlansManager and ConfigurationManager, dataset.json, the site's name."""

    plans: Any
    configuration: Any
    dataset_json: dict[str, Any]
    site: str


@dataclass(frozen=True)
class Prepared:
    """A preprocessed volume on disk, so that twenty large ones need not fit into memory.

    Attributes:
        case: the files it comes from.
        path: z-scored (C, D, H, W), float32.
        properties: what nnU-Net needs to go back to the input's grid.
    """

    case: CaseFiles
    path: Path
    properties: dict[str, Any]

    def load(self) -> Tensor:
        return torch.from_numpy(np.load(self.path))


def find_cases(images: Path, dataset_json: Mapping[str, Any], *, labels: Path | None = None) -> list[CaseFiles]:
    """The cases of a folder, after a check that their channels are the model's.

    Args:
        images: folder of CASE_0000.nii.gz, ...
        dataset_json: the model's.
        labels: folder of labels CASE.nii.gz of some of the cases; the others get None.

    Raises:
        DataError: no folder, no case, a channel too few or too many, or not one label; the message names the file.
    """
    ending = str(dataset_json["file_ending"])
    cases = cases_in(images, dataset_json, labels=labels)
    if not cases:
        raise DataError(f"{images} holds no image named CASE_0000{ending}, as the model's dataset.json wants it.")
    channels = dict(dataset_json["channel_names"])
    wanted = ", ".join(f"_{int(index):04d} ({name})" for index, name in channels.items())
    for case in cases:
        for path in case.images:
            if not path.is_file():
                raise DataError(f"The channel {path} is missing. The model wants of each case: {wanted}.")
        extra = images / f"{case.case}_{len(channels):04d}{ending}"
        if extra.exists():
            raise DataError(f"The model does not know the channel {extra}. It wants of each case: {wanted}.")
    found = [case if case.label is None or case.label.is_file() else replace(case, label=None) for case in cases]
    if labels is not None and not any(case.label for case in found):
        raise DataError(f"{labels} holds no label of the images, such as {cases[0].case}{ending}.")
    return found


def prepare_all(
    recipe: Preprocessing, cases: Sequence[CaseFiles], folder: Path, *, num_processes: int
) -> Iterator[Prepared]:
    """`prepare` of every case, in order; in this process if one is enough."""
    work = partial(prepare, recipe, folder)
    if num_processes <= 1 or len(cases) == 1:
        yield from map(work, cases)
        return
    # spawn, as nnU-Net: forking a process that has started torch's threads can hang.
    with ProcessPoolExecutor(min(num_processes, len(cases)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, cases)


def prepare(recipe: Preprocessing, folder: Path, case: CaseFiles) -> Prepared:
    """Read, check and preprocess one case into a file of the folder.

    Raises:
        DataError: unreadable, NaN or infinite voxels, a constant image, or a label that does not fit; names the file.
    """
    reader = recipe.plans.image_reader_writer_class
    expected = expected_labels(recipe.dataset_json, where="The model's dataset.json")
    check_case(case, reader=reader, expected=expected, site=recipe.site)
    raw, properties = read_images(case.images, reader())
    for path, channel in zip(case.images, raw, strict=True):
        inside = channel[channel != 0]
        if inside.min() == inside.max():
            raise DataError(
                f"Site {recipe.site}: {path} is {inside[0]:g} wherever it is not zero, so it has no style. Leave this case out."
            )
    preprocessor = recipe.configuration.preprocessor_class(verbose=False)
    z, _, properties = preprocessor.run_case_npy(
        raw, None, properties, recipe.plans, recipe.configuration, recipe.dataset_json
    )
    target = folder / f"{case.case}.npy"
    np.save(target, np.ascontiguousarray(z, dtype=np.float32))
    return Prepared(case, target, properties)


def quantiles_of(volume: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(C, Q) of a volume (C, D, H, W)."""
    return volume_quantiles(volume.numpy())[0]
