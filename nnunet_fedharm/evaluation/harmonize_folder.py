"""A folder of volumes through a model's harmonizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.evaluation.harmonize import harmonize_case, load_harmonizer
from nnunet_fedharm.evaluation.volumes import write_like
from nnunet_fedharm.sites.files import cases_in


def harmonize_folder(
    model_folder: Path,
    images: Path,
    output: Path,
    *,
    site: str | None = None,
    fold: str | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Harmonize a folder; one file per channel, named as the input. Returns the number of cases.

    Raises:
        DataError: no case, an unreadable file, or an output folder that is the input folder.
        SetupError: the device does not exist.
    """
    if output.resolve() == images.resolve():
        raise DataError(f"Output and input are both {images}; the originals would be lost. Choose another -o.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError("There is no CUDA device here. Use --device cpu.")
    model = load_harmonizer(model_folder, fold=fold, checkpoint=checkpoint, device=device)
    cases = cases_in(images, model.dataset_json, labels=None)
    if not cases:
        ending = model.dataset_json["file_ending"]
        raise DataError(f"{images} holds no image named CASE_0000{ending}, as the model's dataset.json wants it.")
    reader = model.plans.image_reader_writer_class.__name__
    for case in tqdm(cases, "harmonize", disable=not progress):
        volume = harmonize_case(model, case, site=site)
        for channel, path in zip(volume, case.images, strict=True):
            write_like(channel, path, reader, output / path.name)
    return len(cases)
