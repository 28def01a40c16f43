"""What to score: the labels or regions that a dataset.json states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError

LabelMap = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Targets:
    """Labels and regions to score.

    Attributes:
        regions: name -> label values that make the region up (a plain label has one); the background is left out.
        ignore: value of voxels that nobody annotated, or None.
    """

    regions: dict[str, tuple[int, ...]]
    ignore: int | None = None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> Targets:
        """Read nnU-Net's `labels`: a value per label, or a list of values per region; `ignore` is excluded.

        Raises:
            DataError: there is no label besides the background.
        """
        regions: dict[str, tuple[int, ...]] = {}
        ignore: int | None = None
        for name, value in dict(dataset_json.get("labels", {})).items():
            values = tuple(int(item) for item in (value if isinstance(value, (list, tuple)) else (value,)))
            if name == "ignore":
                ignore = values[0]
            elif values != (0,):
                regions[name] = values
        if not regions:
            raise DataError("The dataset.json names no label besides the background, so there is nothing to evaluate.")
        return cls(regions, ignore)

    def mask(
        self, name: str, segmentation: LabelMap, counted: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Voxels of a label or region, without those that `counted` leaves out."""
        values = self.regions[name]
        found = segmentation == values[0] if len(values) == 1 else np.isin(segmentation, values)
        return np.asarray(found if counted is None else found & counted, dtype=bool)

    def counted(self, reference: LabelMap) -> npt.NDArray[np.bool_] | None:
        """Voxels that count, or None if all do. As in nnU-Net, the reference alone says which do not."""
        return None if self.ignore is None else np.asarray(reference != self.ignore, dtype=bool)
