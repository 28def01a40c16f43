"""A finished model at the sites that were held out of its training: adapted as a new hospital does it, without labels.

| kind of the arm | model at a held-out site |
|---|---|
| with a harmonizer, or Nyul's | after `adapt` with the images of `data/adapt/<SITE>`, in the cell's folder `adapted/<SITE>` |
| plain nnU-Net, strong augmentation | as it is: `adapt` has nothing to change there |
| a site's own labels | its own, which `adapt` never sees |
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from nnunet_fedharm.harmonizers.adaptation import FIXED_KINDS
from nnunet_fedharm.sites.files import read_json, write_json
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.matrix import Arm, Cell
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.trained import Trained
from nnunet_fedharm.trainers.adapted_folder import EVIDENCE

ADAPTED, CLOCK_FILE = "adapted", "clock.json"


def adapted_sites(study: StudyFile, arm: Arm) -> tuple[str, ...]:
    """Held-out sites that the arm's model is adapted to."""
    return () if arm.site or arm.harmonizer in FIXED_KINDS else study.held_out_sites


def adapt_to_held_out(data: StudyData, cell: Cell, folder: Path, trained: Trained, *, device: str) -> Trained:
    """The models with the adapted ones in place of those that a new hospital is given; what is adapted already stays.

    Args:
        folder: of the cell.
        trained: as the training left it.

    Raises:
        FedHarmError: a site's images cannot be used, or the disk is full; its sentence.
    """
    from nnunet_fedharm.evaluation.adapt_model import adapt_model

    models = dict(trained.models)
    for site in adapted_sites(data.study, cell.arm):
        target = folder / ADAPTED / site
        if not (target / EVIDENCE).is_file():
            for left in target.parent.glob(f".{site}.*"):  # of a cell that was killed while it wrote
                shutil.rmtree(left)
            began = time.monotonic()
            adapt_model(
                Path(models[site]),
                data.adapt(site),
                target,
                site=site,
                device=device,
                num_processes=data.study.training.num_processes,
                progress=False,
            )
            write_json({**_seconds(folder), site: time.monotonic() - began}, folder / ADAPTED / CLOCK_FILE)
        models[site] = str(target)
    return replace(trained, models=models)


def adapt_seconds(study: StudyFile, arm: Arm, folder: Path) -> float | None:
    """What the adaptations of a cell took, all held-out sites together; None where an earlier release did not write it down."""
    known, sites = _seconds(folder), adapted_sites(study, arm)
    return sum(known[site] for site in sites) if all(site in known for site in sites) else None


def _seconds(folder: Path) -> dict[str, float]:
    file = folder / ADAPTED / CLOCK_FILE
    return read_json(file, what="The clock of the adaptations") if file.is_file() else {}
