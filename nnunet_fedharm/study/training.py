"""One cell's training: by nnU-Net's own training loop, or by a real Flower federation on this machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, FederationError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.launch import federate
from nnunet_fedharm.federation.server_root import LOCAL_GROUPS_FILE, server_folder
from nnunet_fedharm.federation.site import training_environment
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import DEFAULT_PLANS, CentralOptions, plan_central
from nnunet_fedharm.planning.section import CONSENSUS
from nnunet_fedharm.planning.situation import find_device
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.study.data import BASE_PLANS, StudyData, plan_options
from nnunet_fedharm.study.matrix import Cell, augmented, harmonizer_epochs
from nnunet_fedharm.study.shared_cases import keep_cases, take_cases
from nnunet_fedharm.study.shared_time import central_seconds, federated_seconds, seconds_before_rounds
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import CONTROL
from nnunet_fedharm.study.trained import Trained
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.start_weights import with_judge_of

WEEK_S = 7 * 86400.0


def train(data: StudyData, cell: Cell, folder: Path, *, device: str) -> Trained:
    """Train a cell in its folder; one that was stopped goes on from its last checkpoint.

    Raises:
        FedHarmError: a step failed; its sentence.
    """
    return (
        _federated(data, cell, folder, device) if cell.arm.mode == "federated" else _central(data, cell, folder, device)
    )


def _central(data: StudyData, cell: Cell, folder: Path, device: str) -> Trained:
    """All data of a root through nnU-Net's own training loop."""
    study, arm = data.study, cell.arm
    source = data.own(arm.site) if arm.site else data.pooled
    root = linked_root(source, folder, data.dataset_name)
    schedule = study.training_at(arm.epsilon).schedule(
        cell.seed, harmonizer_epochs=harmonizer_epochs(study, arm), augmentation=augmented(study, arm)
    )
    options = CentralOptions(
        configurations=(study.subject.configuration,),
        kind=arm.harmonizer,
        reference=study.subject.reference if arm.harmonizer != CONTROL else CONSENSUS,
        harmonizer=with_judge_of(study.start, arm.harmonizer, {}),
        schedule=asdict(schedule),  # a mapping: the harmonizer's sizes follow the same rules as in a federation
        device=find_device(device),
        plan=plan_options(study, DEFAULT_PLANS),
        base_plans=BASE_PLANS,
        num_processes=study.training.num_processes,
        check=False,
        privacy=None if arm.epsilon is None else study.private(arm.epsilon),
        start_from=study.start,
    )
    plan_central(root, data.dataset_name, options)
    trainer_name = trainer_name_for(arm.harmonizer)
    model = results_folder(root, data, trainer_name)
    with root.activate(), training_environment(device):
        _run_nnunet(data, trainer_name, model, device)
    sites = (arm.site,) if arm.site else study.sites
    spent = _spent([root.path / "fedharm"], cell, study)
    # One model serves all sites: each is predicted with its own style, as at its own results folder. The model has no style of
    # a held-out site.
    known = () if arm.site else study.training_sites
    styles = {site: site if site in known else "stored" for site in sites}
    return Trained(
        dict.fromkeys(sites, str(model)),
        styles,
        epsilon=spent[0],
        without_noise=spent[1],
        shared_s=central_seconds(data.folder, arm.site),
    )


def _run_nnunet(data: StudyData, trainer_name: str, model: Path, device: str) -> None:
    """`nnUNetv2_train`, resumed where it was stopped, without its final prediction of every training case."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from nnunet_fedharm.trainers.phases import HARMONIZER_CHECKPOINT

    subject = data.study.subject
    fold: Any = subject.fold if subject.fold == "all" else int(subject.fold)
    arguments = (data.dataset_name, subject.configuration, fold, trainer_name, DEFAULT_PLANS)
    output = model / f"fold_{fold}"
    if (output / "checkpoint_final.pth").is_file():
        return
    # One that was stopped in its harmonizer phase has no checkpoint of the segmenter yet.
    resumed = any((output / name).is_file() for name in ("checkpoint_latest.pth", HARMONIZER_CHECKPOINT))
    trainer = get_trainer_from_args(*arguments, continue_training=resumed, device=torch.device(device))
    maybe_load_checkpoint(trainer, resumed, validation_only=False)
    trainer.run_training()


def _federated(data: StudyData, cell: Cell, folder: Path, device: str) -> Trained:
    """Every site at home, through Flower."""
    study = data.study
    config = federate_config(data, cell, folder, device=device)
    for site in study.training_sites:
        root = NnunetRoot(folder / "sites" / site).create()
        link(data.consortium / "sites" / site / "nnUNet_raw" / data.dataset_name, root.raw / data.dataset_name)
        take_cases(data.preprocessed(site), root, data.dataset_name)
    federate(config)
    trainer_name = trainer_name_for(cell.arm.harmonizer)
    roots = {site: NnunetRoot(folder / "sites" / site) for site in study.training_sites}
    models = {site: str(results_folder(root, data, trainer_name)) for site, root in roots.items()}
    if study.held_out_sites:
        shared = results_folder(NnunetRoot(server_folder(config)), data, trainer_name)
        check_whole(shared, study.subject.fold)
        models |= dict.fromkeys(study.held_out_sites, str(shared))
    events, _ = read_events(server_folder(config) / "fedharm" / EVENTS_FILE)
    rounds = [event for event in events if event["event"] == "round_end"]
    spent = _spent([root.path / "fedharm" for root in roots.values()], cell, study)
    for site, root in roots.items():
        if cell.arm.epsilon is None:  # a private fingerprint is another one in every run, and so are the plans
            keep_cases(root, data.dataset_name, data.preprocessed(site))
        shutil.rmtree(root.preprocessed)  # or each cell would keep a copy of every case
    return Trained(
        models,
        dict.fromkeys(models, "stored"),
        bytes_up=sum(int(event["bytes_up"]) for event in rounds),
        bytes_down=sum(int(event["bytes_down"]) for event in rounds),
        epsilon=spent[0],
        without_noise=spent[1],
        shared_s=federated_seconds(data.folder, seconds_before_rounds(events)),
    )


def check_whole(model: Path, fold: str) -> None:
    """Refuse a server's results folder that a new hospital could not use.

    Args:
        model: TRAINER__PLANS__CONFIGURATION at the server.
        fold: of the run.

    Raises:
        FederationError: a file of it is missing, or parts of its model are each site's own.
    """
    for name in ("plans.json", "dataset.json", f"fold_{fold}/checkpoint_final.pth"):
        if not (model / name).is_file():
            raise FederationError(
                f"The server left no whole results folder for held-out sites: {model / name} is missing. Run the cell again."
            )
    if (model / f"fold_{fold}" / LOCAL_GROUPS_FILE).is_file():
        raise FederationError(
            f"The server's model {model} is no model for held-out sites: its local groups are each site's own and untrained "
            "there. Train without local groups, or hold no site out."
        )


def federate_config(data: StudyData, cell: Cell, folder: Path, *, device: str) -> FederateConfig:
    """The run of a federated cell.

    Raises:
        DataError: an epoch count that local_epochs does not divide, or a privacy option that a federation does not have.
        FederationError: a value that `federate` refuses.
    """
    study, arm = data.study, cell.arm
    training, subject = study.training_at(arm.epsilon), study.subject
    lengths = {"harmonizer": harmonizer_epochs(study, arm), "segmenter": training.segmenter_epochs}
    for phase, epochs in lengths.items():
        if epochs % training.local_epochs:
            raise DataError(
                f"{phase}_epochs {epochs} in study.toml is no multiple of local_epochs {training.local_epochs}, so federated and "
                "central arms would not take the same steps. Change one of them."
            )
    known = {item.name for item in fields(FederateConfig)}
    private = {} if arm.epsilon is None else {"epsilon": arm.epsilon, **study.privacy}
    for name in private:
        if name not in known:
            raise DataError(
                f"[privacy] {name} in study.toml is for central trainings only. Remove it, or the mode federated."
            )
    return FederateConfig(
        root=str(folder),
        dataset=data.dataset_name,
        configuration=subject.configuration,
        harmonizer=arm.harmonizer,
        reference=subject.reference if arm.harmonizer != CONTROL else CONSENSUS,
        harmonizer_rounds=lengths["harmonizer"] // training.local_epochs,
        segmenter_rounds=lengths["segmenter"] // training.local_epochs,
        local_epochs=training.local_epochs,
        iterations_per_epoch=training.iterations_per_epoch,
        val_iterations=training.val_iterations_per_epoch,
        augmentation=augmented(study, arm),
        initial_lr=training.initial_lr,
        momentum=training.momentum,
        harmonizer_lr=training.harmonizer_lr,
        fold=subject.fold,
        plans_name=DEFAULT_PLANS,
        gpu_memory_gb=training.gpu_memory_gb,
        base_features=training.base_features,
        max_features=training.max_features,
        batch_size=training.batch_size,
        patch_size="x".join(map(str, training.patch_size)),
        weighting=training.weighting,
        seed=cell.seed,
        start_from=study.start,
        device=device,
        num_processes=training.num_processes,
        deadline_s=WEEK_S,  # sites of one machine train one after another, and nobody is late
        **private,
    )


def linked_root(source: NnunetRoot, folder: Path, dataset_name: str) -> NnunetRoot:
    """An nnU-Net root of its own on another one's raw and preprocessed cases; plans, results and ledger are its own."""
    root = NnunetRoot(folder).create()
    link(source.raw / dataset_name, root.raw / dataset_name)
    own = root.preprocessed / dataset_name
    own.mkdir(exist_ok=True)
    for entry in sorted((source.preprocessed / dataset_name).iterdir()):
        link(entry, own / entry.name)
    return root


def link(source: Path, target: Path) -> None:
    """A relative symbolic link, so that a study folder can be moved; what exists stays."""
    if not target.exists() and not target.is_symlink():
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))


def results_folder(root: NnunetRoot, data: StudyData, trainer_name: str) -> Path:
    """TRAINER__PLANS__CONFIGURATION of a root."""
    name = f"{trainer_name}__{DEFAULT_PLANS}__{data.study.subject.configuration}"
    return root.results / data.dataset_name / name


def _spent(folders: list[Path], cell: Cell, study: StudyFile) -> tuple[float | None, tuple[str, ...]]:
    """Largest epsilon of the ledgers, and what left without noise."""
    if cell.arm.epsilon is None:
        return None, ()
    delta = study.private(cell.arm.epsilon).delta
    costs = [Ledger(folder).spent(delta) for folder in folders]
    return max(cost.epsilon for cost in costs), tuple(sorted({name for cost in costs for name in cost.unbounded}))
