"""A copy of a raw dataset whose images are corrected by N4, the bias-field correction that most MRI pipelines begin with.

    python benchmarks/n4_dataset.py SOURCE TARGET [--processes 2]

SOURCE is an nnU-Net raw dataset; labels and descriptions are linked, travelling subjects are corrected too. Volumes that
exist in TARGET are left alone. Crops have no air, so every voxel takes part; intensities are shifted above zero, as N4 needs
logarithms.

Reference: Tustison et al., "N4ITK: Improved N3 Bias Correction", IEEE Transactions on Medical Imaging 2010.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_fedharm.sites.parallel import map_cases

SHRINK = 2
ITERATIONS = (20, 20)


def corrected(image: sitk.Image) -> sitk.Image:
    """The image over its bias field, in its own units; N4's other settings are SimpleITK's defaults."""
    shifted = sitk.Cast(image, sitk.sitkFloat32)
    lowest = float(np.min(sitk.GetArrayViewFromImage(shifted)))
    shifted = shifted - lowest + 1e-3 * float(np.ptp(sitk.GetArrayViewFromImage(shifted)))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    n4.Execute(sitk.Shrink(shifted, [SHRINK] * image.GetDimension()))
    return shifted / sitk.Exp(sitk.Cast(n4.GetLogBiasFieldAsImage(shifted), sitk.sitkFloat32))


def correct_file(path: Path, target: Path) -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    output = target / path.parent.name / path.name
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(corrected(sitk.ReadImage(str(path))), str(output.with_name(f"writing_{path.name}")))
        output.with_name(f"writing_{path.name}").rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    source, target = arguments.source.resolve(), arguments.target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not path.name.startswith("images") and not (target / path.name).exists():
            (target / path.name).symlink_to(path)
    images = sorted(source.glob("images*/*.nii.gz"))
    list(map_cases(partial(correct_file, target=target), images, num_processes=arguments.processes, description="N4"))


if __name__ == "__main__":
    main()
