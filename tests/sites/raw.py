"""Small raw datasets with several sites, channels, spacings and shapes, written as nnU-Net wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

ENDING = ".nii.gz"
LABELS = {"background": 0, "core": 1, "rim": 2}


def write_volume(
    array: np.ndarray, path: Path, *, spacing: Sequence[float] = (1.0, 1.0, 1.0), origin: float = 0.0
) -> None:
    """Array (z, y, x) and its spacing in the same order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(value) for value in spacing[::-1]])
    image.SetOrigin([origin] * 3)
    sitk.WriteImage(image, str(path))


def write_case(
    dataset: Path,
    case: str,
    rng: np.random.Generator,
    *,
    shape: Sequence[int] = (10, 14, 12),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    gain: float = 1.0,
    n_channels: int = 1,
    labelled: bool = True,
) -> None:
    """One case: noise with a rim of zeros (which nnU-Net crops), and a box of labels 1 and 2."""
    images = dataset / ("imagesTr" if labelled else "imagesUnlabelled")
    for channel in range(n_channels):
        volume = np.zeros(shape, dtype=np.float32)
        inside = tuple(slice(1, size - 1) for size in shape)
        volume[inside] = gain * (100 * (channel + 1) + 20 * rng.standard_normal([size - 2 for size in shape]))
        write_volume(volume, images / f"{case}_{channel:04d}{ENDING}", spacing=spacing)
    if labelled:
        label = np.zeros(shape, dtype=np.uint8)
        corner = [int(rng.integers(2, size // 2)) for size in shape]
        label[tuple(slice(start, start + 4) for start in corner)] = 1
        label[tuple(slice(start, start + 2) for start in corner)] = 2
        write_volume(label, dataset / "labelsTr" / f"{case}{ENDING}", spacing=spacing)


def write_description(dataset: Path, *, channels: Sequence[str] = ("MR",), n_training: int = 0) -> None:
    dataset.mkdir(parents=True, exist_ok=True)
    description = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": LABELS,
        "numTraining": n_training,
        "file_ending": ENDING,
    }
    (dataset / "dataset.json").write_text(json.dumps(description))


def write_multi_site(
    dataset: Path, cases: Mapping[str, int], *, channels: Sequence[str] = ("MR",), seed: int = 0
) -> Path:
    """`cases[site]` labelled cases for each site, each site with its own spacing, shapes and intensities, and sites.json."""
    rng = np.random.default_rng(seed)
    owners = {}
    for index, (site, count) in enumerate(cases.items()):
        for number in range(count):
            case = f"{site}_{number:03d}"
            owners[case] = site
            spacing = (3.0 if index % 2 else 2.5, 0.7 + 0.1 * index, 0.7 + 0.1 * index)
            shape = [int(rng.integers(8, 12)), int(rng.integers(30, 42)), int(rng.integers(30, 42))]
            write_case(dataset, case, rng, shape=shape, spacing=spacing, gain=1 + 0.5 * index, n_channels=len(channels))
    write_description(dataset, channels=channels, n_training=sum(cases.values()))
    sites = {site: {"vendor": "Siemens", "field": 1.5} for site in cases}
    (dataset / "sites.json").write_text(json.dumps({"sites": sites, "cases": owners}))
    return dataset
