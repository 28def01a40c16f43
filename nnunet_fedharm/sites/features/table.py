"""The feature table: a row per case, channel, region and intensity scale; a column per feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import ShapeError

Values = npt.NDArray[np.float64]

SCALES = ("z-score", "raw")
"""Intensity scales: nnU-Net's z-score of the volume, and the values of the file."""
FOREGROUND, IMAGE = "foreground", "image"
"""Regions beside `label NAME`: the union of all labels, and the imaged body (all that is not background air)."""


@dataclass(frozen=True)
class Row:
    """What one row was measured on.

    Attributes:
        case: nnU-Net's case identifier; never leaves a site.
        site, patient: the patient is the case itself unless sites.json says otherwise.
        channel: name of dataset.json.
        region: `label NAME`, FOREGROUND or IMAGE.
        scale: one of SCALES.
        travelling: one of imagesTravelling, the further scans of subjects seen by several sites: kept out of every test
            between sites, compared with the scan at home (same patient, not travelling). Patients whose scans all lie in
            imagesTr stay in the tests, and are grouped by patient.
    """

    case: str
    site: str
    patient: str
    channel: str
    region: str
    scale: str
    travelling: bool = False


@dataclass(frozen=True)
class Failure:
    """A case, or one region of it, that could not be measured.

    Attributes:
        reason: one sentence, which names the region where only a region failed.
    """

    site: str
    case: str
    reason: str


@dataclass(frozen=True)
class FeatureTable:
    """Measured features.

    Attributes:
        rows: (N,) what was measured.
        names: (F,) features, `class_Feature` as pyradiomics names them (`glcm_Contrast`), or `quality_noise`.
        values: (N, F); NaN where a feature does not exist for a row.
    """

    rows: tuple[Row, ...]
    names: tuple[str, ...]
    values: Values

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.names)):
            raise ShapeError(f"{len(self.rows)} rows and {len(self.names)} features, but values {self.values.shape}.")

    def where(self, keep: Callable[[Row], bool]) -> FeatureTable:
        """The rows for which `keep` is true."""
        chosen = [index for index, row in enumerate(self.rows) if keep(row)]
        return FeatureTable(tuple(self.rows[index] for index in chosen), self.names, self.values[chosen])

    def only(self, names: Sequence[str]) -> FeatureTable:
        """These features in this order."""
        position = {name: index for index, name in enumerate(self.names)}
        return FeatureTable(self.rows, tuple(names), self.values[:, [position[name] for name in names]])

    def column(self, name: str) -> Values:
        """(N,) values of one feature."""
        return self.values[:, self.names.index(name)]

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Sites in the order of their first row."""
        return tuple(dict.fromkeys(row.site for row in self.rows))

    @property
    def parts(self) -> tuple[tuple[str, str, str], ...]:
        """(channel, region, scale) that occur, in the order of their first row."""
        return tuple(dict.fromkeys((row.channel, row.region, row.scale) for row in self.rows))

    def part(self, channel: str, region: str, scale: str, **more: Any) -> FeatureTable:
        """One channel, region and scale; further attributes of Row as keywords."""
        wanted = {"channel": channel, "region": region, "scale": scale, **more}
        return self.where(lambda row: all(getattr(row, name) == value for name, value in wanted.items()))


def family_of(name: str) -> str:
    """Family of a feature: intensity, texture, shape (the negative control) or quality."""
    return {"firstorder": "intensity", "shape": "shape", "quality": "quality"}.get(name.split("_", 1)[0], "texture")
