"""The tables of `study.toml`: what can be said there, what it means, and its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.planning.section import Schedule

MODES = ("central", "federated", "local")
BASELINES = ("no-augmentation", "augment", "nyul")
CONTROL = "none"
"""Kind of the control: plain nnU-Net with its own augmentation."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`[study]`: the data and the question."""

    name: str
    """Short name, for titles."""
    dataset: str
    """Folder of an nnU-Net raw dataset with sites.json; relative to the study's folder or absolute."""
    configuration: str = "3d_fullres"
    """nnU-Net configuration."""
    reference: str
    """Site whose appearance harmonizers map to."""
    labelled_sites: tuple[str, ...] = ()
    """Sites whose labels are used for training; empty: all that are not held out. The others take part with their images."""
    held_out_sites: tuple[str, ...] = ()
    """Sites that take part in no central or federated training, neither with images nor with labels. They stand for new
    hospitals: each finished model is adapted to them without labels and then tested there."""
    held_out_fraction: float = 0.2
    """Share of each site's labelled cases that is kept for testing, chosen before any training."""
    held_out_cases: tuple[str, ...] = ()
    """Labelled cases that are kept for testing whatever is drawn, with all cases of the same patients: an official test set, for
    example. They do not count for held_out_fraction, which may be 0 where every site has some."""
    site_report_cases: int = 15
    """Cases of each site that `study run` measures to tell how different the sites are, one a patient, and as many travelling
    subjects: radiomics and image quality as scanned, with pyradiomics; 0: none. A site report that is there stays."""
    hours: float = 0.0
    """`study run` starts no cell that would end later than so many hours after its start, by the estimate; 0: no limit."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of every arm for each."""
    fold: str = "all"
    """nnU-Net fold that trainings use."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class Arms:
    """`[arms]`: what is compared with the control, which is plain nnU-Net with its own augmentation."""

    harmonizers: tuple[str, ...] = ("polarity", "diffusion")
    """Kinds of harmonizers."""
    modes: tuple[str, ...] = ("central", "federated")
    """Where control and harmonizers are trained: central (all data in one place) or federated. local adds each labelled
    site alone."""
    baselines: tuple[str, ...] = ("no-augmentation", "augment")
    """Central arms without a network in front: no-augmentation (plain nnU-Net without its augmentation), augment (random
    appearances), nyul."""
    oracle: bool = True
    """Train each site on its own labels too, also where the study withholds them: the upper end of the gap."""
    epsilons: tuple[float, ...] = ()
    """Differential privacy by patient: `private_harmonizers` once more at each, in each mode but local."""
    private_harmonizers: tuple[str, ...] = (CONTROL,)
    """Kinds that are trained at each epsilon; none is the control, without a harmonizer."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """`[training]`: size and length, alike for all arms but for `[privacy]`; a federated arm takes as many steps at each site."""

    harmonizer_epochs: int = 40
    """Epochs of the harmonizer phase."""
    segmenter_epochs: int = 200
    """Epochs of the segmenter phase."""
    local_epochs: int = 1
    """Epochs of a site between two averages."""
    iterations_per_epoch: int = 250
    """Optimizer steps of an epoch."""
    start_from: str = ""
    """Results folder or checkpoint, of public or simulated images for example, whose weights every training starts from;
    relative to the study's folder or absolute; empty: random weights."""
    val_iterations_per_epoch: int = 10
    """Validation batches of an epoch."""
    initial_lr: float = 1e-2
    """Learning rate of the segmenter at the start."""
    momentum: float = 0.99
    """Momentum of the segmenter."""
    harmonizer_lr: float = 1e-3
    """Learning rate of the harmonizer."""
    weighting: str = "cases"
    """Weight of a site in the federated mean: steps, cases or sites."""
    gpu_memory_gb: float = 8.0
    """GPU memory that nnU-Net plans for."""
    base_features: int = 32
    """Features of the first stage."""
    max_features: int = 0
    """Most features of a stage; 0: nnU-Net's own."""
    batch_size: int = 0
    """0: nnU-Net's own."""
    patch_size: tuple[int, ...] = ()
    """Upper bound of the patch; empty: nnU-Net's own."""
    mirroring: bool = True
    """nnU-Net's mirroring at prediction, which multiplies its time by four (2d) or eight (3d)."""
    num_processes: int = 2
    """Processes for preprocessing."""

    def schedule(self, seed: int, *, harmonizer_epochs: int, augmentation: bool = True) -> Schedule:
        """Schedule of one training."""
        return Schedule(
            harmonizer_epochs=harmonizer_epochs,
            segmenter_epochs=self.segmenter_epochs,
            iterations_per_epoch=self.iterations_per_epoch,
            val_iterations_per_epoch=self.val_iterations_per_epoch,
            initial_lr=self.initial_lr,
            momentum=self.momentum,
            harmonizer_lr=self.harmonizer_lr,
            augmentation=augmentation,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class PrivateTraining:
    """What private arms do otherwise than `[training]` says.

    Clipped and noisy gradients want another rate and length than others: a comparison at the rate of plain training tells what an
    untuned private training costs.
    """

    harmonizer_epochs: int = 0
    """Epochs of the harmonizer phase in private arms; 0: as in [training]."""
    segmenter_epochs: int = 0
    """Epochs of the segmenter phase in private arms; 0: as in [training]."""
    iterations_per_epoch: int = 0
    """Optimizer steps of an epoch in private arms; 0: as in [training]."""
    initial_lr: float = 0.0
    """Learning rate of the segmenter at the start in private arms; 0: as in [training]."""
    augmentation: bool = True
    """nnU-Net's augmentation in private arms."""

    def of(self, training: Training) -> Training:
        """The training of a private arm.

        Raises:
            DataError: a negative value.
        """
        changed = {
            name: value
            for name in ("harmonizer_epochs", "segmenter_epochs", "iterations_per_epoch", "initial_lr")
            if (value := getattr(self, name))
        }
        for name, value in changed.items():
            if not 0 < value < math.inf:
                raise DataError(
                    f"{name} in [privacy] must be a positive number, or 0 for that of [training], got {value}."
                )
        return replace(training, **changed)


@dataclass(frozen=True, kw_only=True)
class Report:
    """`[report]`: what counts as good, fixed before any result is seen; each cell records it."""

    margin: float = 0.02
    """Difference in mean Dice within which federated counts as good as central. Experts differ by more among themselves in most
    structures and tumours (0.05 to 0.1)."""
    least_dice: float = 0.3
    """Mean Dice at a site below which an arm has not learned to segment there: two that failed alike are not equally good (no
    assay sensitivity, ICH E10)."""
    lesion_labels: tuple[int, ...] = ()
    """Label values that are lesions; with travelling subjects the control then counts them before and after harmonization."""
