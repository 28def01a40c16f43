"""nnU-Net's progress.png in federated rounds: drawing takes a second or more, for which the other sites would wait."""

from __future__ import annotations

import time
from pathlib import Path

from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

EVERY_S = 300.0
"""The picture is at most this old; nnU-Net draws it after every epoch."""


def spare_pictures(trainer: nnUNetTrainerFedHarm) -> None:
    """Draw progress.png only where there is none, where it is old, and after the last epoch."""
    draw, path = trainer.logger.plot_progress_png, Path(trainer.output_folder) / "progress.png"

    def draw_if_due(folder: str) -> None:
        last = trainer.current_epoch + 1 >= trainer.num_epochs
        if last or not path.is_file() or time.time() - path.stat().st_mtime > EVERY_S:
            draw(folder)

    trainer.logger.plot_progress_png = draw_if_due
