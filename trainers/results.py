"""The standard nnU-Net results folder, written from averaged weights: what the stock `nnUNetv2_predict` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nnunet_fedharm import trainers
from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.trainers.checkpoints import save_atomically
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.start_weights import start_from
from nnunet_fedharm.trainers.weights import Weights, export_weights, load_weights

Which = Literal["latest", "best", "final"]


def trainer_class(name: str) -> type[nnUNetTrainerFedHarm]:
    """One of our trainers by name.

    Raises:
        PlanError: the name is not one of ours.
    """
    found = getattr(trainers, name, None)
    if not (isinstance(found, type) and issubclass(found, nnUNetTrainerFedHarm)):
        raise PlanError(f"{name!r} is not a trainer of nnunet_fedharm. Use a name such as nnUNetTrainerFedHarmCurve.")
    return found


def make_trainer(
    trainer_name: str,
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    device: str = "cpu",
) -> nnUNetTrainerFedHarm:
    """A trainer from plans in memory; call inside `NnunetRoot.activate()`. It has no network yet."""
    # nnU-Net pops continue_training from the plans it is given; a deep copy keeps the caller's whole.
    own_plans = json.loads(json.dumps(dict(plans)))
    own_plans["continue_training"] = True
    return trainer_class(trainer_name)(
        plans=own_plans,
        configuration=configuration,
        fold=fold,  # type: ignore[arg-type]  # nnU-Net's annotation forgets "all"
        dataset_json=json.loads(json.dumps(dict(dataset_json))),
        device=torch.device(device),
    )


def initial_weights(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    trainer_name: str,
    seed: int,
    start: str = "",
) -> Weights:
    """Weights of round 0: nnU-Net's own initialisation under `seed`, harmonizer at the identity; or those of a trained model.

    Args:
        start: results folder or checkpoint, see `start_weights`; "" for none.

    Raises:
        CheckpointError: it cannot be a start for these plans.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(plans, dataset_json, configuration, trainer_name)
    if start:
        start_from(network, start)
    return export_weights(network)


def build_network(
    plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str, trainer_name: str
) -> nn.Module:
    """The network that the plans describe, untrained, on the CPU."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(dict(plans))
    planned = manager.get_configuration(configuration)
    return trainer_class(trainer_name).build_network_architecture(
        manager,
        planned,
        determine_num_input_channels(manager, planned, dict(dataset_json)),
        manager.get_label_manager(dict(dataset_json)).num_segmentation_heads,
        True,
    )


def write_results_folder(
    root: NnunetRoot,
    dataset_name: str,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    trainer_name: str,
    weights: Weights,
    *,
    epoch: int,
    history: Mapping[str, Sequence[float]] | None = None,
    which: Sequence[Which] = ("latest",),
    site: str | None = None,
    gate: float | None = None,
) -> Path:
    """Write plans, dataset.json, fingerprint, progress.png and checkpoints as the stock trainer would.

    Args:
        root: where `nnUNet_results` lies.
        weights: from `export_weights` or an average of such.
        epoch: last finished epoch of the shared clock.
        history: nnU-Net logger lists (`train_losses`, `val_losses`, `mean_fg_dice`), one value per round.
        which: checkpoints to write. A folder with a final one has no latest one, as with the stock trainer, unless asked for.
        site: the one site this folder serves, by its row of the bank; None (or a site without a style) serves every site.
        gate: that site's gate, if it is not the bank's.

    Returns:
        The fold's folder.

    Raises:
        CheckpointError: the weights do not fit, or the disk is full; former checkpoints are untouched.
    """
    root.create()
    with root.activate():
        trainer = make_trainer(trainer_name, plans, configuration, fold, dataset_json)
        trainer.assemble()
        load_weights(trainer.network, weights)
        if site in trainer.bank:
            trainer.harmonizer.serve(trainer.bank.index(site), gate=gate)
        _fill_log(trainer, history or {})
        trainer.current_epoch = epoch
        base, folder = Path(trainer.output_folder_base), Path(trainer.output_folder)
        for name, content in (("plans", plans), ("dataset", dataset_json), ("dataset_fingerprint", fingerprint)):
            text = json.dumps(content, indent=2)
            save_atomically(str(base / f"{name}.json"), partial(_write_text, text=text))
        first, *others = which
        trainer.save_checkpoint(str(folder / f"checkpoint_{first}.pth"))
        for name in others:
            source_file = str(folder / f"checkpoint_{first}.pth")
            save_atomically(str(folder / f"checkpoint_{name}.pth"), partial(_copy, source_file))
    return folder


def _write_text(path: str, text: str) -> None:
    Path(path).write_text(text)


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)


def _fill_log(trainer: nnUNetTrainerFedHarm, history: Mapping[str, Sequence[float]]) -> None:
    """Give nnU-Net's logger the federation's curves, so that progress.png shows rounds; missing curves stay empty."""
    losses, dice = list(history.get("train_losses", [])), list(history.get("mean_fg_dice", []))
    values = list(history.get("val_losses", []))
    if not (losses and len(losses) == len(dice) == len(values)):
        return
    log = trainer.logger.local_logger.my_fantastic_logging
    smooth: list[float] = []
    for value in dice:  # nnU-Net's exponential moving average, `MetaLogger.log`
        smooth.append(value if not smooth else 0.9 * smooth[-1] + 0.1 * value)
    rounds = range(len(losses))
    log.update(
        train_losses=losses,
        val_losses=values,
        mean_fg_dice=dice,
        ema_fg_dice=smooth,
        dice_per_class_or_region=[[value] for value in dice],
        lrs=list(history.get("lrs", [0.0] * len(losses))),
        epoch_start_timestamps=[float(i) for i in rounds],
        epoch_end_timestamps=[float(i + 1) for i in rounds],
    )
    trainer._best_ema = max(smooth)
    trainer.logger.plot_progress_png(trainer.output_folder)
