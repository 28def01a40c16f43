"""Random patches without labels, for the harmonizer phase.

nnU-Net's data loader needs a segmentation for every case; this one reads only images, from the preprocessed folder of the
labelled cases and from the one of the unlabelled cases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor

from nnunet_fedharm.errors import DataError


@dataclass(frozen=True)
class ImageCase:
    """One preprocessed image on disk and the index of its site in the style bank."""

    folder: Path
    name: str
    site: int


def list_cases(
    folders: Sequence[Path], names: Sequence[str] | None, site_of: Mapping[str, str], bank: Sequence[str]
) -> list[ImageCase]:
    """Cases of the harmonizer phase.

    Args:
        folders: preprocessed folders; the first one is restricted to `names` (the training cases of the fold).
        names: case identifiers allowed from the first folder; None allows all.
        site_of: case -> site.
        bank: sites in the style bank's order.

    Raises:
        DataError: no case, or a case whose site has no style.
    """
    cases: list[ImageCase] = []
    for position, folder in enumerate(folders):
        if not folder.is_dir():
            continue
        for name in sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder))):
            if position == 0 and names is not None and name not in names:
                continue
            site = site_of.get(name)
            if site not in bank:
                raise DataError(
                    f"Case {name} belongs to site {site!r}, which has no style in the plans (they have {', '.join(bank)}). "
                    "List the case in sites.json and make the plans again with `nnunet-fedharm plan`."
                )
            cases.append(ImageCase(folder, name, bank.index(site)))
    if not cases:
        raise DataError(
            f"No preprocessed image found in {', '.join(str(f) for f in folders)}. Run `nnunet-fedharm plan` first."
        )
    return cases


class PatchSampler:
    """Draws batches of image patches.

    Args:
        cases: from `list_cases`; a site's chance grows with its number of cases, as nnU-Net draws cases evenly.
        patch_size: (H, W) draws single slices, (D, H, W) draws volumes' patches.
        batch_size: B.
        rng: source of every draw.
    """

    def __init__(
        self, cases: Sequence[ImageCase], patch_size: Sequence[int], batch_size: int, rng: np.random.Generator
    ) -> None:
        self.cases = cases
        self.patch_size = tuple(int(size) for size in patch_size)
        self.batch_size = batch_size
        self.rng = rng

    def only(self, sites: Sequence[int]) -> PatchSampler | None:
        """A sampler of these sites' cases that shares this one's source of draws; None where there is no such case."""
        cases = [case for case in self.cases if case.site in sites]
        return PatchSampler(cases, self.patch_size, self.batch_size, self.rng) if cases else None

    def of(self, names: Collection[str], batch_size: int) -> PatchSampler:
        """A sampler of these cases that shares this one's source of draws."""
        cases = [case for case in self.cases if case.name in names]
        return PatchSampler(cases, self.patch_size, batch_size, self.rng)

    def next(self) -> tuple[Tensor, Tensor]:
        """A batch (B, C, *patch) of float32 and the sites (B,) of its samples."""
        picked = [self.cases[i] for i in self.rng.integers(len(self.cases), size=self.batch_size)]
        patches = np.stack([self._draw(case) for case in picked])
        return torch.from_numpy(patches), torch.tensor([case.site for case in picked])

    def volumes(self, count: int) -> Iterator[Tensor]:
        """Whole volumes (C, D, H, W) of float32, each of another case, drawn at random; all where there are at most `count`."""
        for index in self.rng.permutation(len(self.cases))[:count]:
            case = self.cases[index]
            dataset = infer_dataset_class(str(case.folder))(str(case.folder), [case.name])
            yield torch.from_numpy(np.asarray(dataset.load_case(case.name)[0][:], dtype=np.float32))

    def _draw(self, case: ImageCase) -> npt.NDArray[np.float32]:
        dataset = infer_dataset_class(str(case.folder))(str(case.folder), [case.name])
        data = dataset.load_case(case.name)[0]
        return random_patch(data, self.patch_size, self.rng)


def random_patch(data: Any, patch_size: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A patch (C, *patch) from a random place, mirrored at random; zeros where the volume is smaller.

    Args:
        data: (C, D, H, W); only what is cut is read.
        patch_size: (H, W) for a slice, or (D, H, W).
    """
    wanted = tuple(patch_size) if len(patch_size) == 3 else (1, *patch_size)
    slices, padding = [], []
    for size, want in zip(data.shape[1:], wanted, strict=True):
        start = int(rng.integers(0, max(size - want, 0) + 1))
        slices.append(slice(start, start + min(size, want)))
        short = max(want - size, 0)
        padding.append((short // 2, short - short // 2))
    patch = np.pad(np.asarray(data[(slice(None), *slices)], dtype=np.float32), [(0, 0), *padding])
    axes = tuple(axis + 1 for axis in range(3) if rng.random() < 0.5)
    patch = np.flip(patch, axes) if axes else patch
    return np.ascontiguousarray(patch if len(patch_size) == 3 else patch[:, 0])
