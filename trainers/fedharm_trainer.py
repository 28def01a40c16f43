"""nnU-Net trainer with a harmonizer in front: the hooks that differ from the stock trainer, and nothing else.

Every override names the base behaviour it replaces and why. The schedule comes from the plans, so there is no class per
number of epochs, and kind and sizes of the harmonizer too, so `nnUNetv2_predict` can rebuild the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import Harmonizer, build_harmonizer
from nnunet_fedharm.planning.section import CONFIGURATIONS, FedHarmSection, read_section
from nnunet_fedharm.sites.registry import SitesFile
from nnunet_fedharm.trainers.checkpoints import has_checkpoint, refuse_other_training, save_atomically
from nnunet_fedharm.trainers.gates import close_where_dice_falls, close_without_gain
from nnunet_fedharm.trainers.groups import train_only
from nnunet_fedharm.trainers.harmonized_segmenter import HarmonizedSegmenter
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.patches import PatchSampler, list_cases
from nnunet_fedharm.trainers.patient_loader import PatientDraw
from nnunet_fedharm.trainers.phases import GroupedPolyLRScheduler, HarmonizerPhase, give_own_group
from nnunet_fedharm.trainers.private_hooks import PrivateHooks, refuse_processes
from nnunet_fedharm.trainers.seeds import patch_seed, seed_everything
from nnunet_fedharm.trainers.start_weights import refuse_foreign_styles, start_from
from nnunet_fedharm.trainers.weights import bare_module


class nnUNetTrainerFedHarm(PrivateHooks):  # noqa: N801 - nnU-Net finds trainers by this spelling
    """Trains S(H(x)); the kind of H is the plans'. Sub-classes insist on one kind, so that results folders tell them apart.

    Raises:
        PlanError: no `fedharm` section, a cascade or another configuration, or a kind that this class does not train.
        PrivacyError: differential privacy in several processes.
    """

    kind: str | None = None
    my_init_kwargs: dict[str, Any]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        # Checked before the base class creates folders and logs, so that a refused run leaves nothing behind.
        self.section = self._checked_section(plans, configuration)
        refuse_processes(self.section)
        self.continued = bool(plans.get("continue_training", False))
        super().__init__(plans, configuration, fold, dataset_json, device)
        schedule = self.section.schedule
        self.num_epochs = schedule.segmenter_epochs
        self.num_iterations_per_epoch = schedule.iterations_per_epoch
        self.num_val_iterations_per_epoch = schedule.val_iterations_per_epoch
        self.initial_lr = schedule.initial_lr
        self.augmented = schedule.augmentation
        self.site_of_case: dict[str, str] = {}
        self.bank = list(self.section.styles)
        self.harmonizer_phase = HarmonizerPhase(self)

    @classmethod
    def _checked_section(cls, plans: dict[str, Any], configuration: str) -> FedHarmSection:
        if configuration not in CONFIGURATIONS:
            raise PlanError(
                f"{cls.__name__} trains {' and '.join(CONFIGURATIONS)}; {configuration!r} (a cascade or a custom "
                "configuration) is not supported. Use the stock nnU-Net trainer for it."
            )
        resolved = PlansManager(plans).get_configuration(configuration)
        section = read_section(resolved.configuration, configuration_name=configuration)
        if cls.kind is not None and section.kind != cls.kind:
            raise PlanError(
                f"{cls.__name__} trains the harmonizer {cls.kind!r}, but the plans ask for {section.kind!r}. "
                f"Use -tr {trainer_name_for(section.kind)}, or make plans with `nnunet-fedharm plan --harmonizer {cls.kind}`."
            )
        if section.kind != "none" and not section.styles:
            raise PlanError(
                f"The plans hold no style bank, which the harmonizer {section.kind!r} needs. "
                "Make the plans again with `nnunet-fedharm plan`."
            )
        return section

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Stock network first (same random draws as the stock trainer), then the harmonizer in front of it."""
        section = read_section(configuration_manager.configuration)
        segmenter = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        harmonizer = build_harmonizer(
            section.kind,
            section.harmonizer,
            num_channels=num_input_channels,
            spatial_dims=len(configuration_manager.patch_size),
            styles=list(section.styles.values()),
            reference=section.reference_style,
        )
        return HarmonizedSegmenter(harmonizer, segmenter)

    @property
    def harmonizer(self) -> Harmonizer:
        """The harmonizer inside DDP and compile wrappers."""
        return cast(Harmonizer, bare_module(self.network).harmonizer)

    def initialize(self) -> None:
        """As the base class, from seeded weights or those of `start_from`; then the case -> site map of the folder."""
        self._seed("weights")
        super().initialize()
        if self.section.start_from and not (self.continued and has_checkpoint(self.output_folder)):
            start = start_from(self.network, self.section.start_from)
            self.print_to_log_file(f"Started from {self.section.start_from}: {start}.")
        self.site_of_case = self._read_sites()

    def assemble(self) -> None:
        """Network and optimizer without data loaders or preprocessed labels: a server, or a site that has only images.

        The part of the base class's `initialize` that needs no data; the rest of it is not needed to write a checkpoint.
        """
        self._set_batch_size_and_oversample()
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        self.network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets the mirroring axes of inference
        self.site_of_case = self._read_sites()

    def run_epochs(self, first_epoch: int, count: int) -> None:
        """`count` epochs of the base class's `run_training` loop, starting at `first_epoch` of the shared clock."""
        self.current_epoch = first_epoch
        for _ in range(count):
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(steps)
            with torch.no_grad():
                self.on_validation_epoch_start()
                checks = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
                self.on_validation_epoch_end(checks)
            self.on_epoch_end()

    def configure_optimizers(self) -> Any:
        """As the base class, on the segmenter alone unless the plans let the segmentation loss move the harmonizer."""
        schedule = self.section.schedule
        for parameter in self.harmonizer.parameters():
            parameter.requires_grad_(False)
        optimizer, scheduler = super().configure_optimizers()
        for group in optimizer.param_groups:  # the base class has no parameter for it
            group["momentum"] = schedule.momentum
        train_only(self.network, optimizer, schedule.groups)
        mapping = list(self.harmonizer.mapping_parameters())
        if schedule.phases != "finetune" or not mapping:
            return optimizer, scheduler
        for parameter in mapping:
            parameter.requires_grad_(True)
        give_own_group(optimizer, mapping, schedule.finetune_lr_factor)
        return optimizer, GroupedPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def run_training(self) -> None:
        """Harmonizer phase (if any is left to do), then the base class's training."""
        if not self.was_initialized:
            self.initialize()
        refuse_foreign_styles(self.harmonizer, self.section)
        self.start_private()
        if self.private is not None:
            self.private.check_budget(
                harmonizer_epochs=self.section.schedule.harmonizer_epochs - self.harmonizer_phase.trained(),
                segmenter_epochs=self.num_epochs - self.current_epoch,
            )
        self.run_harmonizer_phase()
        self.harmonizer.open_gate()
        super().run_training()

    def run_harmonizer_phase(self) -> None:
        """Train H without labels as far as the next segmenter epoch needs it; resumes from its own checkpoint after `--c`."""
        self.harmonizer_phase.catch_up(self.current_epoch)

    def on_epoch_start(self) -> None:
        """As the base class, after the harmonizer's block where phases alternate."""
        if self.section.schedule.phases == "alternate":
            self.run_harmonizer_phase()
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        """As the base class, which draws on unseeded generators: with a seed an epoch draws the same after `--c` too."""
        if self.private is None:
            self._seed(f"rank_{self.local_rank}", f"epoch_{self.current_epoch}", "segmenter")
        else:
            seed_everything(patch_seed(None, private=True))
        super().on_train_epoch_start()

    def close_gates_without_gain(self, sampler: PatchSampler) -> None:
        """Shut the gates of sites whose patches do not come nearer to the reference; see `trainers.gates`. Not under DP."""
        if self.private is not None:
            return
        gains = close_without_gain(self.harmonizer, sampler, self.device)
        for site, gain in gains.items():
            verdict = "gate open" if gain > 0 else "gate shut: nothing is gained"
            self.print_to_log_file(f"Site {self.bank[site]} comes {gain:+.4f} sd nearer to the reference: {verdict}.")

    def on_train_end(self) -> None:
        """As the base class, after the labelled sites' gates were judged by validation Dice."""
        # A federated site judges its gate once, when it gets the final weights.
        if not self.disable_checkpointing and self.private is None:
            for site, (opened, shut) in close_where_dice_falls(self).items():
                verdict = "gate open" if opened > shut else "gate shut"
                self.print_to_log_file(
                    f"Site {site}: validation Dice {opened:.4f} harmonized, {shut:.4f} as it is: {verdict}."
                )
        super().on_train_end()

    def all_patches(self, rng: np.random.Generator) -> PatchSampler:
        """Patches of the fold's training cases and of all unlabelled cases; validation cases take no part."""
        labelled = Path(self.preprocessed_dataset_folder)
        unlabelled = labelled.with_name(labelled.name + "_unlabelled")
        train_names = list(self.do_split()[0]) if labelled.is_dir() else []  # a site may have no labels at all
        cases = list_cases([labelled, unlabelled], train_names, self.site_of_case, self.bank)
        return PatchSampler(cases, self.configuration_manager.patch_size, self.batch_size, rng)

    def harmonizer_sampler(self, rng: np.random.Generator) -> PatchSampler:
        """`all_patches` of the sites that the harmonizer trains on.

        Raises:
            PlanError: the harmonizer trains on none of the sites that these cases belong to.
        """
        everything = self.all_patches(rng)
        sites = {case.site for case in everything.cases if self.harmonizer.trains_on(case.site)}
        sampler = everything.only(sorted(sites))
        if sampler is None:
            raise PlanError(
                f"The harmonizer {self.section.kind!r} trains on images that look like the reference "
                f"({self.section.reference}), and no training image does. Choose as --reference a site whose images are here."
            )
        return sampler

    def train_step(self, batch: Any) -> dict[str, Any]:
        """Base step, with each sample's site told to the harmonizer."""
        if isinstance(batch, PatientDraw):
            return super().train_step(batch)
        self.tell_sites(batch)
        result: dict[str, Any] = super().train_step(batch)
        self.harmonizer.set_batch_styles(None)
        return result

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Base step, with each sample's site told to the harmonizer."""
        self.tell_sites(batch)
        result: dict[str, Any] = super().validation_step(batch)
        self.harmonizer.set_batch_styles(None)
        return result

    def save_checkpoint(self, filename: str) -> None:
        """Base checkpoint, written beside and moved into place: a full disk leaves the former one whole."""
        if self.local_rank == 0 and not self.disable_checkpointing:
            save_atomically(filename, super().save_checkpoint)
        else:
            super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Base loading, after checking that the checkpoint is this trainer's; further ones hold the plans that it goes on with.

        Raises:
            CheckpointError: another trainer wrote it, or one without the differential privacy that the plans ask for.
        """
        if isinstance(filename_or_checkpoint, str):
            private = self.section.privacy is not None
            refuse_other_training(filename_or_checkpoint, self.__class__.__name__, private=private)
        arguments = self.my_init_kwargs
        super().load_checkpoint(filename_or_checkpoint)
        self.my_init_kwargs = arguments

    def _save_debug_information(self) -> None:
        """As the base class, which writes down every attribute, without the names of cases: nnU-Net's export takes the file."""
        cases, self.site_of_case = self.site_of_case, {}
        try:
            super()._save_debug_information()
        finally:
            self.site_of_case = cases

    def tell_sites(self, batch: dict[str, Any]) -> None:
        """Tell the harmonizer each sample's site.

        Raises:
            PlanError: a case has no site with a style.
        """
        if self.section.kind == "none" or not self.site_of_case:
            return
        names = [str(name) for name in batch["keys"]]
        unknown = [name for name in names if self.site_of_case.get(name) not in self.bank]
        if unknown:
            raise PlanError(
                f"Case {unknown[0]} has no site with a style in the plans. List it in sites.json and run `nnunet-fedharm plan`."
            )
        self.harmonizer.set_batch_styles(torch.tensor([self.bank.index(self.site_of_case[name]) for name in names]))

    def _read_sites(self) -> dict[str, str]:
        if self.preprocessed_dataset_folder_base is None:
            return {}
        path = Path(self.preprocessed_dataset_folder_base) / "sites.json"
        if path.is_file():
            return dict(SitesFile.load(path).cases)
        if len(self.bank) == 1 and self.dataset_class is not None:  # a single-site dataset needs no sites.json
            cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
            return dict.fromkeys(cases, self.bank[0])
        return {}

    def _seed(self, *names: str) -> None:
        if self.section.schedule.seed is not None:
            seed_everything(self.section.schedule.seed, f"fold_{self.fold}", *names)
