"""A site's fingerprint summary with noise; `private_merge` makes the fingerprint of all sites out of them.

Every patient tells one vector of bounded length, whatever their images hold; a patient with several cases tells the mean of
theirs. A site sends the sum over its patients plus Gaussian noise.

| part of the vector | bound (L2) | what becomes of it |
|---|---|---|
| log2 of spacing (mm) and of extent (spacing x voxels after cropping, over 128 mm) of three axes, over REACH | 1 | mean extent |
| for each axis, BIN_WEIGHT in one of the announced bins of spacing | BIN_WEIGHT sqrt(3) | median spacing |
| whether cropping leaves 3/4 of the volume, as +-SIZE_WEIGHT | SIZE_WEIGHT | mask for normalization or none |
| for each channel normalized as CT: mean, std, percentiles .5 and 99.5 of foreground over HU_REACH | 1 | their means |

The vector over `sensitivity` is at most 1 long, so noise of standard deviation sigma an entry is the Gaussian mechanism with
noise multiplier sigma. Intensities of other channels are not told at all: nnU-Net does not read them.

| symbol | here |
|---|---|
| sigma | `noise_multiplier` |
| N | `n_patients`, a public number |

References:
    Balle, Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.planning.histogram import INTENSITY, Histogram, percentile
from nnunet_fedharm.planning.summary import CaseSummary, read_cases
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.releases import GAUSSIAN, NONE, Release
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

Vector = npt.NDArray[np.float64]

PRIVATE_VERSION = "private 1"
AXES = 3
BINS_PER_OCTAVE = 8
SPACINGS = 2.0 ** (np.arange(-3 * BINS_PER_OCTAVE, 4 * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)
"""Middles of the bins: 1/8 to 16 mm, 9 % apart; a spacing outside counts as the nearest one."""
USUAL_EXTENT_MM = 128.0
REACH = 4.0
"""Octaves: bound on a patient's six logarithms together; hippocampus crops have 3, cardiac cine MR with 10 mm slices 4."""
BIN_WEIGHT, SIZE_WEIGHT = 0.5, 0.25
CT_VALUES = ("mean", "std", "percentile_00_5", "percentile_99_5")
HU_REACH = np.array([1000.0, 400.0, 1500.0, 2000.0])
"""Of these values, in HU: together they are cut where the squares of their shares add up to more than 1."""
_WHOLE = 0.75
"""Relative size after cropping below which nnU-Net normalizes inside the mask."""


@dataclass(frozen=True)
class PrivateSummary:
    """What a site tells about its cases where no patient may be seen.

    Attributes:
        site: its name.
        n_patients, n_labelled: patients, and those with labels; public numbers.
        n_cases: of all patients; a public number.
        measured: indices of the channels that are normalized as CT.
        noise_multiplier: sigma; 0 leaves the bounds and adds nothing.
        sums: noisy sum of the patients' vectors.
    """

    site: str
    n_patients: int
    n_labelled: int
    n_cases: int
    measured: tuple[int, ...]
    noise_multiplier: float
    sums: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"version": PRIVATE_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrivateSummary:
        """Inverse of `to_dict`.

        Raises:
            PlanError: another version, or a damaged summary.
        """
        if data.get("version") != PRIVATE_VERSION:
            raise PlanError(
                f"A site summary has version {data.get('version')!r}, not {PRIVATE_VERSION!r}. Install the same nnunet_fedharm "
                "at every site."
            )
        try:
            summary = cls(
                site=str(data["site"]),
                n_patients=int(data["n_patients"]),
                n_labelled=int(data["n_labelled"]),
                n_cases=int(data["n_cases"]),
                measured=tuple(int(channel) for channel in data["measured"]),
                noise_multiplier=float(data["noise_multiplier"]),
                sums=tuple(float(value) for value in data["sums"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"A site summary is damaged ({error}). Let the site summarize again.") from error
        whole = len(summary.sums) == length(len(summary.measured)) and all(map(math.isfinite, summary.sums))
        if not whole or not 0 <= summary.n_labelled <= summary.n_patients <= summary.n_cases or not summary.n_patients:
            raise PlanError(f"The summary of site {summary.site} is damaged. Let the site summarize again.")
        return summary


def measured_channels(channel_names: Mapping[str, str]) -> tuple[int, ...]:
    """Indices of the channels whose intensities nnU-Net reads from the fingerprint.

    Args:
        channel_names: of dataset.json.
    """
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    ordered = sorted(channel_names.items(), key=lambda item: int(item[0]))
    return tuple(int(index) for index, name in ordered if issubclass(get_normalization_scheme(name), CTNormalization))


def length(n_measured: int) -> int:
    """Entries of a patient's vector."""
    return 2 * AXES + AXES * len(SPACINGS) + 1 + len(CT_VALUES) * n_measured


def sensitivity(n_measured: int) -> float:
    """Largest length of a patient's vector before it is divided by just this."""
    return math.sqrt(1 + AXES * BIN_WEIGHT**2 + SIZE_WEIGHT**2 + n_measured)


def summarize_private(
    raw_dataset: Path, *, site: str, noise_multiplier: float, num_processes: int = 1
) -> PrivateSummary:
    """Read every case of a site once and tell the noisy sum.

    Raises:
        DataError: no dataset, no case, a file that cannot be read, NaN.
    """
    path = raw_dataset / SITES_FILE
    patients = SitesFile.load(path).patients if path.is_file() else {}
    description, cases = read_cases(raw_dataset, site=site, num_processes=num_processes)
    measured = measured_channels(description["channel_names"])
    return private_summary(
        cases, patients, site=site, measured=measured, noise_multiplier=noise_multiplier, noise=SecureNoise()
    )


def private_summary(
    cases: Iterable[tuple[str, CaseSummary]],
    patients: Mapping[str, str],
    *,
    site: str,
    measured: Sequence[int],
    noise_multiplier: float,
    noise: SecureNoise,
) -> PrivateSummary:
    """A site's noisy summary from its cases.

    Args:
        cases: (identifier, case).
        patients: case -> patient; a case that is not here is its own patient.
        measured: channels of which intensities are told.
        noise_multiplier: sigma; 0 for no noise.
        noise: secure source of normal numbers.

    Raises:
        DataError: no case.
    """
    told = _by_patient(cases, patients)
    if not told:
        raise DataError(f"Site {site} is empty. Add cases or leave the site out.")
    total = private_sum(_vectors(told, measured), noise_multiplier=noise_multiplier, noise=noise)
    return PrivateSummary(
        site=site,
        n_patients=len(told),
        n_labelled=sum(any(case.labelled for case in own) for own in told.values()),
        n_cases=sum(map(len, told.values())),
        measured=tuple(measured),
        noise_multiplier=float(noise_multiplier),
        sums=tuple(float(value) for value in total),
    )


def private_sum(vectors: Vector, *, noise_multiplier: float, noise: SecureNoise) -> Vector:
    """What leaves the site: the sum of its patients' vectors, with noise.

    Args:
        vectors: (N, entries), of `patient_vectors`.
        noise_multiplier: sigma; 0 for no noise.
        noise: secure source of normal numbers.
    """
    total: Vector = vectors.sum(axis=0)
    return noise.hide(total, noise_multiplier)


def patient_vectors(
    cases: Iterable[tuple[str, CaseSummary]], patients: Mapping[str, str], measured: Sequence[int]
) -> Vector:
    """(N, entries), a row a patient; exact, so they stay at this place."""
    return _vectors(_by_patient(cases, patients), measured)


def _by_patient(cases: Iterable[tuple[str, CaseSummary]], patients: Mapping[str, str]) -> dict[str, list[CaseSummary]]:
    told: dict[str, list[CaseSummary]] = {}
    for case, summary in cases:
        told.setdefault(patients.get(case, case), []).append(summary)
    return told


def _vectors(told: Mapping[str, Sequence[CaseSummary]], measured: Sequence[int]) -> Vector:
    return np.stack([patient_vector(own, measured) for own in told.values()])


def patient_vector(cases: Sequence[CaseSummary], measured: Sequence[int]) -> Vector:
    """What one patient tells, at most 1 long (L2): the mean of their cases, intensities of those that have a foreground."""
    parts = [np.mean([_geometry(case) for case in cases], axis=0)]
    marked = [case for case in cases if case.channels]
    for channel in measured:
        values = [_cut(_intensities(case, channel) / HU_REACH) for case in marked]
        parts.append(np.mean(values, axis=0) if values else np.zeros(len(CT_VALUES)))
    vector: Vector = np.concatenate(parts) / sensitivity(len(measured))
    return vector


def fingerprint_release(noise_multiplier: float, *, run_id: str = "") -> Release:
    """Entry in the ledger."""
    return Release(what="fingerprint summary", mechanism=GAUSSIAN, noise_multiplier=noise_multiplier, run_id=run_id)


def exact_release(fingerprint: Mapping[str, Any]) -> Release:
    """Entry for a fingerprint without noise that travels with plans."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return Release(what="fingerprint in the plans", mechanism=NONE, digest=digest)


def _geometry(case: CaseSummary) -> Vector:
    """The first three parts of a case's vector."""
    spacing = np.clip(np.asarray(case.spacing_mm, dtype=np.float64), 2.0**-14, 2.0**14)
    extent = spacing * np.asarray(case.shape)
    bins = np.zeros((AXES, len(SPACINGS)))
    bins[range(AXES), np.abs(np.log2(SPACINGS) - np.log2(spacing)[:, None]).argmin(axis=1)] = BIN_WEIGHT
    logs = np.concatenate([np.log2(spacing), np.log2(extent / USUAL_EXTENT_MM)])
    whole = SIZE_WEIGHT if case.relative_size >= _WHOLE else -SIZE_WEIGHT
    return np.concatenate([_cut(logs / REACH), bins.reshape(-1), [whole]])


def _intensities(case: CaseSummary, channel: int) -> Vector:
    """Mean, std and outer percentiles of a channel's foreground."""
    (mean, variance, minimum, maximum), shares = case.channels[channel]
    histogram = Histogram(0, {(code, 0): share for code, share in shares.items()})
    low, high = (percentile(histogram, INTENSITY, p, minimum=minimum, maximum=maximum) for p in (0.5, 99.5))
    return np.array([mean, math.sqrt(variance), low, high])


def _cut(vector: Vector) -> Vector:
    """At most 1 long."""
    shortened: Vector = vector / max(1.0, float(np.linalg.norm(vector)))
    return shortened
