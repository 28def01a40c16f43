"""What of a segmenter's training outlives a round: optimizer, gradient scaler, nnU-Net's log; and the round's own means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm


def restore_segmenter(trainer: nnUNetTrainerFedHarm, state: Mapping[str, Any] | None, first_epoch: int) -> None:
    if state is not None:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.logger.load_checkpoint(state["logging"])
        trainer._best_ema = state["best_ema"]
        if trainer.grad_scaler is not None and state["grad_scaler"] is not None:
            trainer.grad_scaler.load_state_dict(state["grad_scaler"])
    _pad_log(trainer, first_epoch)


def segmenter_state(trainer: nnUNetTrainerFedHarm) -> dict[str, Any]:
    log = trainer.logger.get_checkpoint()
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "grad_scaler": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        # Plain floats: the file is read back with weights_only=True, which refuses numpy scalars.
        "logging": {key: _plain(values) for key, values in log.items()},
        "best_ema": None if trainer._best_ema is None else float(trainer._best_ema),
    }


def refuse_not_finite(site: str, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
    """Refuse a round whose weights or momentum became NaN or infinity.

    Raises:
        DataError: they did.
    """
    memory = [value for entry in optimizer["state"].values() for value in entry.values() if torch.is_tensor(value)]
    if all(bool(torch.isfinite(tensor).all()) for tensor in (*weights.values(), *memory) if tensor.is_floating_point()):
        return
    raise DataError(
        f"Site {site}: training gave NaN or infinity. Nothing of this round is kept, and the next one starts from the state "
        "before it; where it happens again, look at the cases that came last, or start with a smaller learning rate."
    )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else float(value)


def _pad_log(trainer: nnUNetTrainerFedHarm, first_epoch: int) -> None:
    """Rounds that this site missed leave a gap in its log; nnU-Net's logger insists on one value per epoch."""
    log = trainer.logger.local_logger.my_fantastic_logging
    for key, values in log.items():
        del values[first_epoch:]
        filler: Any = values[-1] if values else ([float("nan")] if key == "dice_per_class_or_region" else 0.0)
        values.extend([filler] * (first_epoch - len(values)))


def epoch_means(trainer: nnUNetTrainerFedHarm, epochs: int) -> dict[str, float]:
    names = {"train_loss": "train_losses", "val_loss": "val_losses", "dice": "mean_fg_dice"}
    return {name: float(np.mean(trainer.logger.get_value(key, step=None)[-epochs:])) for name, key in names.items()}
