"""The model card of a finished cell, beside its model."""

from __future__ import annotations

from pathlib import Path

from nnunet_fedharm.planning.central import DEFAULT_PLANS
from nnunet_fedharm.sites.files import read_dataset_json, read_json
from nnunet_fedharm.study.card_beside import write_card
from nnunet_fedharm.study.cell_files import ENVIRONMENT_FILE
from nnunet_fedharm.study.held_out import ADAPTED_WITH, left_out
from nnunet_fedharm.study.matrix import Arm, augmented, harmonizer_epochs
from nnunet_fedharm.study.model_card import CardFacts, CardPrivacy
from nnunet_fedharm.study.model_facts import read_scores, scanner_sites
from nnunet_fedharm.study.new_site import adapted_sites
from nnunet_fedharm.study.results import CellResult
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.trainers.names import trainer_name_for


def write_cell_card(study: StudyFile, result: CellResult) -> Path:
    """Write the card as Markdown and JSON into the cell's folder.

    Returns:
        The Markdown file.

    Raises:
        DataError: a file of the dataset or of the cell is damaged.
        SetupError: the folder cannot be written.
    """
    return write_card(result.folder, cell_facts(study, result))


def cell_facts(study: StudyFile, result: CellResult) -> CardFacts:
    """What a cell tells about its model."""
    arm = result.cell.arm
    training = study.training_at(arm.epsilon)
    description = read_dataset_json(study.raw_dataset, site="study")
    environment = result.folder / ENVIRONMENT_FILE
    recorded = read_json(environment, what="The environment of a cell") if environment.is_file() else {}
    labelled = (arm.site,) if arm.site else study.labelled_sites
    trained_on = (arm.site,) if arm.site else study.training_sites
    sites = tuple(site for site in scanner_sites(study.registry, labelled) if site.name in trained_on)
    before = harmonizer_epochs(study, arm)
    learned = f" after {before} of the harmonizer" if before else ""
    trained = (
        f"{training.segmenter_epochs} epochs of {training.iterations_per_epoch} steps{learned}, seed {result.cell.seed}"
    )
    return CardFacts(
        name=f"{study.subject.name}, {arm.title}, seed {result.cell.seed}",
        dataset=study.raw_dataset.name,
        configuration=study.subject.configuration,
        trainer=trainer_name_for(arm.harmonizer),
        plans=DEFAULT_PLANS,
        folds=(study.subject.fold,),
        checkpoint="checkpoint_final.pth",
        channels=tuple(str(name) for name in description["channel_names"].values()),
        labels=tuple(name for name in description["labels"] if name not in ("background", "ignore")),
        harmonizer=arm.harmonizer,
        reference=study.subject.reference,
        mode=arm.mode,
        sites=sites,
        scores=read_scores(result.metrics),
        score_source="Test cases held out by the study; intervals by bootstrap over cases.",
        privacy=_privacy(result),
        trained=trained + ("" if augmented(study, arm) else ", without nnU-Net's augmentation"),
        starts=study.starts,
        versions=recorded.get("versions") or {},
        notes=(
            "It was trained for a comparison, at the size and length that the study has for its arm: it may not be the best "
            "model of this data.",
            *_held_out(study, arm),
        ),
        created=str(recorded.get("started", ""))[:10],
    )


def _held_out(study: StudyFile, arm: Arm) -> tuple[str, ...]:
    """How it was tested at sites that it was not trained on."""
    if arm.site or not study.held_out_sites:
        return ()
    how = "this model as it is"
    if adapted_sites(study, arm):
        how = f"this model after `nnunet-fedharm adapt` {ADAPTED_WITH}"
    return (f"{left_out(study.held_out_sites)}; its scores there are those of {how}.",)


def _privacy(result: CellResult) -> tuple[CardPrivacy, ...]:
    asked, cost = result.cell.arm.epsilon, result.cost
    if asked is None or cost.delta is None:
        return ()
    return (CardPrivacy("patient", asked, cost.delta, cost.epsilon, cost.without_noise),)
