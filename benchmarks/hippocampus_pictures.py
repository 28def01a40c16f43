"""What the curve harmonizer does to travelling subjects, and the segmentations before and after, as one PNG.

    python benchmarks/hippocampus_pictures.py --work WORK -o docs/benchmarks/hippocampus-sites.png

WORK is the folder of `hippocampus_sites.py run`. Rows are sites B, C, D; the subject is the same, seen by site A in the truth.
All grey pictures share one window in standard deviations; the difference is harmonized minus truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk

from nnunet_fedharm.evaluation.harmonize import harmonize_case, load_harmonizer
from nnunet_fedharm.sites.files import CaseFiles

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = ("input", "harmonized", "truth (site A)", "difference", "expert", "none", "curve")
COLOURS = {1: (0.9, 0.6, 0.0, 0.6), 2: (0.0, 0.6, 0.9, 0.6)}


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def z_score(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()


def overlay(labels: np.ndarray) -> np.ndarray:
    picture = np.zeros((*labels.shape, 4))
    for value, colour in COLOURS.items():
        picture[labels == value] = colour
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--subject", default="travelling_003")
    parser.add_argument("--arms", default="federated_labels-A", help="mode and labels of the arms to show")
    arguments = parser.parse_args()
    labels = arguments.arms.split("_")[1]
    figure, axes = plt.subplots(3, len(COLUMNS), figsize=(2 * len(COLUMNS), 6.6), layout="constrained")
    for row, site in zip(axes, "BCD", strict=True):
        test = arguments.work / "test"
        name = f"{arguments.subject}.nii.gz"
        path = test / site / "images" / name.replace(".nii.gz", "_0000.nii.gz")
        (results,) = (arguments.work / labels / "sites" / site / "nnUNet_results").glob("*/*__plans_curve__*")
        harmonized = harmonize_case(load_harmonizer(results), CaseFiles(site, (path,), None))[0]
        raw = read(path).astype(np.float32)
        # The input's own mean and scale for both: the picture shows what the network sees.
        grey = [z_score(raw), (harmonized - raw.mean()) / raw.std(), z_score(read(test / "A" / "images" / path.name))]
        expert = read(test / site / "labels" / name)
        predicted = [
            read(arguments.work / "predictions" / f"{arguments.arms}_{kind}" / site / name)
            for kind in ("none", "curve")
        ]
        cut = int(np.argmax((expert > 0).sum(axis=(1, 2))))
        for axis, image in zip(row[:3], grey, strict=True):
            axis.imshow(image[cut], cmap="gray", vmin=-2, vmax=2)
        row[3].imshow((grey[1] - grey[2])[cut], cmap="RdBu_r", vmin=-2, vmax=2)
        for axis, segmentation in zip(row[4:], [expert, *predicted], strict=True):
            axis.imshow(grey[0][cut], cmap="gray", vmin=-2, vmax=2)
            axis.imshow(overlay(segmentation[cut]))
        row[0].set_ylabel(f"site {site}")
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=90)


if __name__ == "__main__":
    main()
