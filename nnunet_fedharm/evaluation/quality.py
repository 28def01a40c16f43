"""Harmonization quality of paired volumes: what is measured in each pair.

A pair is one subject at a site, as scanned and harmonized, and the same subject at the reference site (the truth). Every
channel is z-scored over the pair's mask first. The numbers of all pairs are summarized in `quality_summary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.fidelity import foreground_mask, nrmse, psnr, windowed_ssim, zscore_inside
from nnunet_fedharm.evaluation.lesions import LesionCount, contrast_to_noise, count_lesions, surroundings
from nnunet_fedharm.evaluation.paired_files import Pair, Volume, channels_of, read_like, read_volume, segmentation_file
from nnunet_fedharm.evaluation.structure import edge_correlation, gradient_correlation
from nnunet_fedharm.sites.features.radiomics import extract_features, feature_extractor

Image = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
BeforeAfter = tuple[float, float]

METRICS = {
    "ssim": "windowed SSIM to the truth, 1 is best",
    "psnr_db": "PSNR to the truth in dB, higher is better",
    "nrmse": "RMSE to the truth over the truth's standard deviation, 0 is best",
    "gradient_correlation": "gradient correlation to the truth, 1 is best",
    "edges_kept": "correlation of gradient magnitudes with the volume as scanned, 1 keeps every edge",
    "cnr_over_truth": "labelled region's contrast-to-noise ratio over that of the truth, 1 is best",
    "cnr_over_input": "labelled region's contrast-to-noise ratio over that of the volume as scanned, 1 keeps it",
}

FIXED_BY_ZSCORE = ("Mean", "Variance", "RootMeanSquared", "Energy", "TotalEnergy")
"""First-order features that z-scoring over the region itself makes constant; they count only in a labelled region."""


@dataclass(frozen=True)
class Folders:
    """Where the files lie.

    Attributes:
        reference: truths, `CASE_0000.nii.gz`.
        before, after: volumes as scanned and harmonized.
        labels: label maps named as the reference case or as the case; regions of features and lesions.
        masks: foregrounds named so too; without them the voxels where the truth is not zero, holes filled.
        predictions_before, predictions_after: a segmenter's label maps, named as the case.
    """

    reference: Path
    before: Path
    after: Path
    labels: Path | None = None
    masks: Path | None = None
    predictions_before: Path | None = None
    predictions_after: Path | None = None

    def __post_init__(self) -> None:
        predictions = (self.predictions_before, self.predictions_after)
        if any(predictions) and not (all(predictions) and self.labels):
            raise DataError("Lesion-wise recall needs all three: predictions before, predictions after, and labels.")


@dataclass(frozen=True)
class PairQuality:
    """Everything measured in one pair.

    Attributes:
        metrics: channel -> metric -> (before, after).
        features: "truth", "before", "after" -> channel/feature -> value; empty if features were not asked for.
        lesions: counts (before, after), or None without predictions.
    """

    pair: Pair
    metrics: dict[str, dict[str, BeforeAfter]]
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    lesions: tuple[LesionCount, LesionCount] | None = None


def measure_pairs(
    pairs: Sequence[Pair],
    folders: Folders,
    *,
    region_values: Sequence[int] | None = None,
    radiomics: bool = True,
    progress: bool = True,
) -> list[PairQuality]:
    """Measure every pair.

    Args:
        pairs: from `find_pairs`.
        folders: where the files lie; all are looked for before the first is read.
        region_values: label values that make the region of features and lesions up; None takes all but 0.
        radiomics: extract radiomics features.
        progress: show a bar.

    Raises:
        DataError: a missing or unreadable file, or one on another grid than the truth; the message names it.
        SetupError: pyradiomics is asked for and not installed.
    """
    if radiomics:
        feature_extractor()
    for pair in pairs:
        _find_files(pair, folders)
    truths: dict[str, dict[str, float]] = {}
    found = []
    for pair in tqdm(pairs, "measure", disable=not progress):
        found.append(measure_pair(pair, folders, region_values, truths if radiomics else None))
    return found


def measure_pair(
    pair: Pair, folders: Folders, region_values: Sequence[int] | None, truths: dict[str, dict[str, float]] | None
) -> PairQuality:
    """Measure one pair; `truths` keeps the features of each truth, None leaves features out. Errors: `measure_pairs`."""
    channels = channels_of(pair.reference, folders.reference)
    first = read_volume(next(iter(channels.values())))
    region = _region(pair, folders.labels, first, region_values)
    metrics: dict[str, dict[str, BeforeAfter]] = {}
    features: dict[str, dict[str, float]] = {}
    for channel, path in channels.items():
        truth = read_like(path, first)
        mask = _mask(pair, folders.masks, truth)
        images = _read_channel(pair, channel, folders, truth, mask)
        metrics[channel] = channel_metrics(*images, mask, truth.spacing_mm)
        if region is not None:
            metrics[channel].update(contrast_metrics(*images, mask, region))
        if truths is not None and (region is None or region.any()):
            for name, values in _features(pair, channel, images, mask, region, truth, truths).items():
                features.setdefault(name, {}).update(values)
    return PairQuality(pair, metrics, features, _lesions(pair, folders, first, region, region_values))


def channel_metrics(
    truth: Image, before: Image, after: Image, mask: Mask, spacing_mm: Sequence[float]
) -> dict[str, BeforeAfter]:
    """Fidelity and structure of one channel; images z-scored over the mask. Keys: see METRICS."""
    images = (before, after)
    return {
        "ssim": _both(windowed_ssim(truth, image, mask) for image in images),
        "psnr_db": _both(psnr(truth, image, mask) for image in images),
        "nrmse": _both(nrmse(truth, image, mask) for image in images),
        "gradient_correlation": _both(gradient_correlation(truth, image, mask, spacing_mm) for image in images),
        "edges_kept": (1.0, edge_correlation(before, after, mask, spacing_mm)),
    }


def contrast_metrics(truth: Image, before: Image, after: Image, mask: Mask, region: Mask) -> dict[str, BeforeAfter]:
    """Ratios of the region's contrast-to-noise ratio; NaN where the region is empty or has no contrast."""
    around = surroundings(region, mask)
    of_truth, of_before, of_after = (contrast_to_noise(image, region, around) for image in (truth, before, after))
    return {
        "cnr_over_truth": (_ratio(of_before, of_truth), _ratio(of_after, of_truth)),
        "cnr_over_input": (_ratio(of_before, of_before), _ratio(of_after, of_before)),
    }


def _features(
    pair: Pair,
    channel: str,
    images: tuple[Image, Image, Image],
    mask: Mask,
    region: Mask | None,
    grid: Volume,
    truths: dict[str, dict[str, float]],
) -> dict[str, dict[str, float]]:
    """ "truth", "before", "after" -> channel/feature -> value; a truth that several sites share is measured once."""
    fixed = FIXED_BY_ZSCORE if region is None else ()

    def of(image: Image) -> dict[str, float]:
        try:
            values = extract_features(image, mask if region is None else region, grid.spacing_mm)
        except DataError as error:
            raise DataError(f"{pair.case} ({grid.path}): {error}. Leave it out, or use --no-radiomics.") from error
        kept = {name: value for name, value in values.items() if name.removeprefix("firstorder_") not in fixed}
        return {f"{channel}/{name}": value for name, value in kept.items()}

    key = f"{pair.reference}/{channel}"
    if key not in truths:
        truths[key] = of(images[0])
    return {"truth": truths[key], "before": of(images[1]), "after": of(images[2])}


def _find_files(pair: Pair, folders: Folders) -> None:
    """Look for every file of a pair, so that a missing one is told before hours of work."""
    channels = list(channels_of(pair.reference, folders.reference))
    for folder in (folders.before, folders.after):
        channels_of(pair.case, folder, channels)
    for segmentations in (folders.labels, folders.masks):
        if segmentations is not None:
            segmentation_file(segmentations, pair.reference, pair.case)
    for predictions in (folders.predictions_before, folders.predictions_after):
        if predictions is not None:
            segmentation_file(predictions, pair.case)


def _read_channel(pair: Pair, channel: str, folders: Folders, truth: Volume, mask: Mask) -> tuple[Image, Image, Image]:
    """Truth, before, after; z-scored over the mask."""
    others = [
        read_like(channels_of(pair.case, folder, [channel])[channel], truth)
        for folder in (folders.before, folders.after)
    ]
    return (
        zscore_inside(truth.array, mask),
        zscore_inside(others[0].array, mask),
        zscore_inside(others[1].array, mask),
    )


def _mask(pair: Pair, masks: Path | None, truth: Volume) -> Mask:
    if masks is None:
        mask, path = foreground_mask(truth.array), truth.path
    else:
        path = segmentation_file(masks, pair.reference, pair.case)
        mask = np.asarray(read_like(path, truth).array > 0)
    if not mask.any():
        raise DataError(f"{path} is zero everywhere, so {pair.case} has no foreground. Leave the case out.")
    return mask


def _region(pair: Pair, labels: Path | None, grid: Volume, values: Sequence[int] | None) -> Mask | None:
    if labels is None:
        return None
    return _label_mask(segmentation_file(labels, pair.reference, pair.case), grid, values)


def _label_mask(path: Path, grid: Volume, values: Sequence[int] | None) -> Mask:
    found = read_like(path, grid).array
    return np.asarray(found > 0 if values is None else np.isin(found, list(values)), dtype=bool)


def _lesions(
    pair: Pair, folders: Folders, grid: Volume, region: Mask | None, values: Sequence[int] | None
) -> tuple[LesionCount, LesionCount] | None:
    if folders.predictions_before is None or folders.predictions_after is None or region is None:
        return None
    before, after = (
        count_lesions(region, _label_mask(segmentation_file(folder, pair.case), grid, values))
        for folder in (folders.predictions_before, folders.predictions_after)
    )
    return before, after


def _both(values: Iterable[float]) -> BeforeAfter:
    before, after = values
    return before, after


def _ratio(value: float, base: float) -> float:
    return value / base if base and np.isfinite(base) else float("nan")
