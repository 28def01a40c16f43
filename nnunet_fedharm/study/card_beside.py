"""The model card beside a trained model, in its results folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_fedharm.sites.files import write_text
from nnunet_fedharm.study.model_card import CARD, CardFacts, card_files
from nnunet_fedharm.study.model_export import find_folds
from nnunet_fedharm.study.model_facts import name_parts, read_card_facts

FINAL = "checkpoint_final.pth"


def card_facts(model: Path, *, checkpoint: str = FINAL, folds: Sequence[str] | None = None, **known: Any) -> CardFacts:
    """Facts of the folds that have a checkpoint.

    Args:
        model: results folder TRAINER__PLANS__CONFIGURATION.
        folds: their names; None for all that there are.
        known: further arguments of `read_card_facts`.

    Raises:
        CheckpointError: no fold has the checkpoint.
        DataError: a file is missing or damaged.
    """
    name_parts(model)  # a folder that is no model is called that, whatever it lacks
    return read_card_facts(model, folds=find_folds(model, checkpoint, folds), checkpoint=checkpoint, **known)


def write_card(model: Path, facts: CardFacts) -> Path:
    """Write the card as Markdown and JSON; a former one is replaced.

    Returns:
        The Markdown file.

    Raises:
        SetupError: the folder cannot be written.
    """
    for name, text in card_files(facts).items():
        write_text(text, model / name)
    return model / CARD
