"""A trainer for an audit: real plans, real patches, a ledger and a results folder of its own that are thrown away.

Nothing of an audit enters the site's ledger, because nothing of it leaves the site: what it prints is for the site alone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import PlanError, PrivacyError
from nnunet_fedharm.nnunet_root import NnunetRoot, environment
from nnunet_fedharm.planning.central import EnvironmentRoot
from nnunet_fedharm.planning.section import SECTION, read_section, with_section
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.private_sampling import SEGMENTER
from nnunet_fedharm.trainers.private_training import PrivateTraining
from nnunet_fedharm.trainers.results import make_trainer
from nnunet_fedharm.trainers.seeds import seed_everything

log = logging.getLogger(__name__)

IN_THIS_PROCESS = {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
"""No worker processes and no compilation: an audit takes few steps, and looks into them."""


@dataclass(frozen=True, kw_only=True)
class AuditedSite:
    """Which training is audited.

    Attributes:
        root: where the site's preprocessed data lies.
        dataset_name: `DatasetXXX_Name`.
        plans: with the `fedharm` section.
        configuration, fold, device: of nnU-Net.
        seed: of the network's start.
    """

    root: NnunetRoot
    dataset_name: str
    plans: Mapping[str, Any]
    configuration: str
    fold: int | str
    device: str = "cpu"
    seed: int = 0

    def privacy(self, given: Mapping[str, Any]) -> PrivacyOptions:
        """What the plans ask for, with what is given here instead.

        Raises:
            PrivacyError: neither says which epsilon is claimed.
        """
        section = read_section(self.plans["configurations"][self.configuration], configuration_name=self.configuration)
        if section.privacy is not None:
            return replace(section.privacy, **given)
        if "epsilon" not in given:
            raise PrivacyError(
                "The plans ask for no differential privacy, so there is no claim to audit. Give one with --epsilon and --delta, "
                "or make the plans with `nnunet-fedharm plan --epsilon`."
            )
        return PrivacyOptions(**given)


def find_plans(root: NnunetRoot, dataset_name: str, plans_name: str, configuration: str) -> dict[str, Any]:
    """The site's plans, after a look whether they have this configuration and a `fedharm` section.

    Raises:
        DataError: there are none.
        PlanError: another configuration, or plans of stock nnU-Net.
    """
    plans = read_json(root.preprocessed / dataset_name / f"{plans_name}.json", what="The plans")
    planned = plans.get("configurations", {})
    if SECTION not in planned.get(configuration, {}):
        ours = ", ".join(name for name, content in planned.items() if SECTION in content) or "none"
        raise PlanError(
            f"{plans_name} has no configuration {configuration!r} with a {SECTION!r} section (it has: {ours}). "
            "Give another with -c, or make the plans with `nnunet-fedharm plan`."
        )
    return plans


@contextmanager
def audit_trainer(
    site: AuditedSite, options: PrivacyOptions | None, *, segmenter: bool = True
) -> Iterator[nnUNetTrainerFedHarm]:
    """An initialized trainer at the start of its segmenter phase, ready for `train_step`.

    Args:
        site: where and what.
        options: of differential privacy; None: none, also where the plans ask for it.
        segmenter: off stops at the start of the harmonizer phase, which needs no labels.

    Raises:
        FedHarmError: data or plans cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="fedharm-audit-") as scratch, environment(IN_THIS_PROCESS):
        root = EnvironmentRoot(Path(scratch), site.root.raw, site.root.preprocessed, Path(scratch) / "results")
        description = read_json(site.root.preprocessed / site.dataset_name / "dataset.json", what="The description")
        with root.activate():
            trainer = _quietly_prepared(site, options, description, Path(scratch), segmenter)
            try:
                yield trainer
            finally:
                close = getattr(trainer.dataloader_train, "close", None)  # a patient loader's threads
                close() if close is not None else None


def claim_of(trainer: nnUNetTrainerFedHarm, phase: str = SEGMENTER) -> tuple[float, float]:
    """(noise multiplier, sample rate) that the trainer's accounting of a phase goes by.

    Raises:
        PrivacyError: no differential privacy.
    """
    if trainer.private is None:
        raise PrivacyError("The trainer has no differential privacy.")
    return trainer.private.noise_multiplier, trainer.private.phases[phase].sample_rate


def _quietly_prepared(
    site: AuditedSite,
    options: PrivacyOptions | None,
    description: Mapping[str, Any],
    scratch: Path,
    segmenter: bool,
) -> nnUNetTrainerFedHarm:
    section = read_section(site.plans["configurations"][site.configuration], configuration_name=site.configuration)
    plans = with_section(dict(site.plans), replace(section, privacy=options), (site.configuration,))
    said = StringIO()  # nnU-Net prints pages; they are of no use here
    with redirect_stdout(said):
        seed_everything(site.seed, "audit")
        trainer = make_trainer(
            trainer_name_for(section.kind), plans, site.configuration, site.fold, description, site.device
        )
        trainer.initialize() if segmenter else trainer.assemble()
        trainer.disable_checkpointing = True
        trainer.harmonizer.open_gate()
        if options is not None:
            trainer.private = PrivateTraining(trainer, options, ledger=Ledger(scratch), run_id="audit")
        if segmenter:
            trainer.on_train_start()
            trainer.on_train_epoch_start()
    log.debug("%s", said.getvalue())
    return trainer
