"""Travelling subjects: the same subject seen by several sites, the ground truth of harmonization.

A raw dataset keeps them apart from training data: `imagesTravelling/<SITE>_<SUBJECT>_0000.nii.gz` is a subject of the reference
site as another site sees it, `imagesTr/<REFERENCE>_<SUBJECT>_0000.nii.gz` the same subject at home.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.harmonizers.style import Style, average_styles, volume_quantiles

Volume = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TravellingData:
    """Volumes of one channel, z-scored.

    Attributes:
        train: site -> volumes (D, H, W); subjects that travelled are left out at every site.
        pairs: site -> (subject at that site, same subject at the reference); at the reference both are the same.
    """

    train: dict[str, list[Volume]]
    pairs: dict[str, list[tuple[Volume, Volume]]]

    @cached_property
    def styles(self) -> list[Style]:
        """Style of each site, from its training volumes, in the order of `train`."""
        return [
            average_styles([Style(*volume_quantiles(volume[None]), 1) for volume in volumes])
            for volumes in self.train.values()
        ]


def read_z_scored(path: Path) -> Volume:
    """Volume (D, H, W), z-scored as nnU-Net does for MR images without a mask.

    Raises:
        DataError: the file is missing, or its image is constant.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing. Travelling subjects need the same subject in imagesTr of the reference site."
        )
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    if not image.std() > 0:
        raise DataError(f"{path} is constant and cannot be z-scored. Remove this case.")
    return np.asarray((image - image.mean()) / image.std(), dtype=np.float32)


def load_travelling(raw_dataset: Path, *, sites: tuple[str, ...], reference: str) -> TravellingData:
    """Read a dataset with travelling subjects.

    Args:
        raw_dataset: nnU-Net raw dataset with `imagesTravelling`, case names `<SITE>_<SUBJECT>`.
        sites: sites to read, the reference among them.
        reference: the site at whose home the subjects were scanned.

    Raises:
        DataError: no travelling subject, or a file that is missing or unusable.
    """
    pairs: dict[str, list[tuple[Volume, Volume]]] = {site: [] for site in sites}
    travellers: set[str] = set()
    for path in sorted((raw_dataset / "imagesTravelling").glob("*_0000.nii.gz")):
        site, subject, _ = path.name.split("_")
        truth = read_z_scored(raw_dataset / "imagesTr" / f"{reference}_{subject}_0000.nii.gz")
        pairs[site].append((read_z_scored(path), truth))
        if subject not in travellers:
            pairs[reference].append((truth, truth))
        travellers.add(subject)
    if not travellers:
        raise DataError(f"{raw_dataset / 'imagesTravelling'} holds no image. Give a dataset with travelling subjects.")
    train: dict[str, list[Volume]] = {site: [] for site in sites}
    for path in sorted((raw_dataset / "imagesTr").glob("*_0000.nii.gz")):
        site, subject, _ = path.name.split("_")
        if subject not in travellers:
            train[site].append(read_z_scored(path))
    return TravellingData(train, pairs)
