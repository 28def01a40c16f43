"""Harmonized volumes on the input's grid and intensity scale.

The harmonizer works on nnU-Net's preprocessed volume z (cropped, z-scored, resampled). What it changes there, the
residual r = H(z) - z, is carried back:

    y(v) = x(v) + sigma * R^-1[r](v)   inside nnU-Net's nonzero mask,   y(v) = x(v)   outside,

with x the input, sigma the standard deviation that z-scored it (per case and channel) and R^-1 nnU-Net's own
resampling to the input's grid. So the identity harmonizer gives the input back voxel by voxel, no detail is lost to
resampling, and y is in the units of x: mean and standard deviation of the case stay its own, the shape of its
histogram becomes the reference's.

Source style, in this order: the site that is named, the style stored in the checkpoint (a site's own results folder),
the style and polarity of the whole volume (a server's results folder), as `nnunet-fedharm predict` does; a volume that cannot be
told from the reference's then stays as it is. Stock `nnUNetv2_predict` sees patches only and takes the nearest style of the bank
in the last case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import nn

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.evaluation.volumes import read_images
from nnunet_fedharm.harmonizers import Harmonizer
from nnunet_fedharm.harmonizers.adaptation import kept_source, volume_source
from nnunet_fedharm.planning.section import FedHarmSection, read_section
from nnunet_fedharm.sites.files import CaseFiles, read_json

Volume = npt.NDArray[np.float32]
SLICES_AT_ONCE = 32


@dataclass(frozen=True)
class HarmonizerModel:
    """A harmonizer with the plans that its inputs are preprocessed by.

    Attributes:
        harmonizer: in evaluation mode.
        section: the plans' `fedharm` section (style bank, reference).
        plans, configuration: nnU-Net's PlansManager and ConfigurationManager.
        dataset_json: channels, labels, file ending.
    """

    harmonizer: Harmonizer
    section: FedHarmSection
    plans: Any
    configuration: Any
    dataset_json: dict[str, Any]


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """Harmonizer and segmenter of a checkpoint, deep supervision off, on the CPU; further attributes as `HarmonizerModel`."""

    network: nn.Module
    section: FedHarmSection
    plans: Any
    configuration: Any
    dataset_json: dict[str, Any]


def load_harmonizer(
    folder: Path, *, fold: str | None = None, checkpoint: str = "checkpoint_final.pth", device: str = "cpu"
) -> HarmonizerModel:
    """Read the harmonizer of an nnU-Net results folder (TRAINER__PLANS__CONFIGURATION).

    Args:
        folder: holds plans.json, dataset.json and fold_*/; loaded with pickle as nnU-Net does, so only from who you
        trust.
        fold: "0" to "4" or "all"; None takes the first fold that has the checkpoint.
        checkpoint: file name in the fold's folder.
        device: where the harmonizer runs.

    Raises:
        DataError: plans.json or dataset.json is missing.
        CheckpointError: no checkpoint, or one of another trainer.
        PlanError: the plans have no `fedharm` section.
    """
    loaded = load_network(folder, fold=fold, checkpoint=checkpoint)
    # nn.Module attributes are typed Tensor | Module.
    harmonizer: Harmonizer = loaded.network.harmonizer.to(device).eval()  # type: ignore[assignment, union-attr]
    return HarmonizerModel(harmonizer, loaded.section, loaded.plans, loaded.configuration, loaded.dataset_json)


def load_network(folder: Path, *, fold: str | None, checkpoint: str) -> LoadedNetwork:
    """The whole network; arguments and errors as `load_harmonizer`."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_fedharm.trainers.results import trainer_class

    plans = PlansManager(read_json(folder / "plans.json", what="The plans"))
    dataset_json = read_json(folder / "dataset.json", what="The dataset description")
    path = _find_checkpoint(folder, fold, checkpoint)
    state = torch.load(path, map_location="cpu", weights_only=False)
    try:
        trainer = trainer_class(state["trainer_name"])
    except PlanError as error:
        raise CheckpointError(f"{path} was not trained by nnunet_fedharm and has no harmonizer: {error}") from error
    name = state["init_args"]["configuration"]
    configuration = plans.get_configuration(name)
    section = read_section(configuration.configuration, configuration_name=name)
    channels = determine_num_input_channels(plans, configuration, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    network = trainer.build_network_architecture(plans, configuration, channels, heads, enable_deep_supervision=False)
    try:
        network.load_state_dict(state["network_weights"])
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path} do not fit the network that the plans describe: {error}"
        ) from error
    return LoadedNetwork(network, section, plans, configuration, dataset_json)


def harmonize_case(model: HarmonizerModel, case: CaseFiles, *, site: str | None = None) -> Volume:
    """Harmonize one case.

    Args:
        model: from `load_harmonizer`.
        case: one image file per channel.
        site: the bank's style to map from; None: see the module's docstring.

    Returns:
        (C, *grid as nnU-Net's reader orders it), in the units of the input.

    Raises:
        DataError: a file is missing or unreadable.
        PlanError: unknown site, or a channel that is not z-scored.
    """
    raw, properties = read_images(case.images, model.plans.image_reader_writer_class())
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    z, _, properties = preprocessor.run_case_npy(
        raw, None, properties, model.plans, model.configuration, model.dataset_json
    )
    with _source(model, np.asarray(z), site):
        residual = _residual(model.harmonizer, torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32)))
    forward = [0, *(axis + 1 for axis in model.plans.transpose_forward)]
    backward = [0, *(axis + 1 for axis in model.plans.transpose_backward)]
    changed = add_residual(model, raw.transpose(forward), residual, properties)
    return np.ascontiguousarray(changed.transpose(backward))


def add_residual(model: HarmonizerModel, raw: Volume, residual: Volume, properties: dict[str, Any]) -> Volume:
    """x + sigma * R^-1[r] inside the nonzero mask.

    Args:
        model: names the normalisation and the resampling.
        raw: x, (C, *grid), transposed as the plans say.
        residual: r on the preprocessed grid.
        properties: of nnU-Net's preprocessing of this case.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    cropped, outside, box = crop_to_nonzero(raw)
    inside = outside[0] >= 0
    spacing = [properties["spacing"][axis] for axis in model.plans.transpose_forward]
    planned = list(model.configuration.spacing)
    current = planned if len(planned) == len(spacing) else [spacing[0], *planned]
    back = model.configuration.resampling_fn_data(residual, cropped.shape[1:], current, spacing)
    changed = raw.copy()
    window = changed[(slice(None), *(slice(low, high) for low, high in box))]
    for channel, values in enumerate(cropped):
        sigma = _standard_deviation(model, channel, values, inside)
        window[channel][inside] += np.float32(sigma) * np.asarray(back[channel])[inside]
    return changed


def _standard_deviation(model: HarmonizerModel, channel: int, values: Volume, inside: npt.NDArray[np.bool_]) -> float:
    """sigma of nnU-Net's ZScoreNormalization of a channel: over the mask if the plans say so, else over the crop."""
    scheme = model.configuration.normalization_schemes[channel]
    if scheme != "ZScoreNormalization":
        raise PlanError(
            f"Channel {channel} is normalised by {scheme}; harmonized volumes need ZScoreNormalization in the plans."
        )
    masked = values[inside] if model.configuration.use_mask_for_norm[channel] else values
    return max(float(masked.std()), 1e-8)


@contextmanager
def _source(model: HarmonizerModel, z: npt.NDArray[np.floating[Any]], site: str | None) -> Iterator[None]:
    """Set the source of one case; afterwards the checkpoint's own holds again."""
    sites = list(model.section.styles)
    if site is not None and site not in sites:
        raise PlanError(f"The plans have no style of site {site!r}. They have: {', '.join(sites) or 'none'}.")
    if site is None and not bool(model.harmonizer.source_known):
        with volume_source(model.harmonizer, torch.from_numpy(np.ascontiguousarray(z, np.float32))):
            yield
        return
    with kept_source(model.harmonizer):
        if site is not None:
            model.harmonizer.serve(sites.index(site))
        yield


@torch.no_grad()
def _residual(harmonizer: Harmonizer, z: torch.Tensor) -> Volume:
    """H(z) - z of a whole volume (C, *spatial); a 2d harmonizer sees slices along the first axis in batches."""
    device = harmonizer.gate.device
    if harmonizer.spatial_dims == z.ndim - 1:
        return np.asarray((harmonizer(z[None].to(device)).cpu() - z[None])[0].numpy())
    slices = rearrange(z, "c d h w -> d c h w")
    changed = torch.cat([harmonizer(batch.to(device)).cpu() for batch in slices.split(SLICES_AT_ONCE)])
    return np.ascontiguousarray(rearrange(changed - slices, "d c h w -> c d h w").numpy())


def _find_checkpoint(folder: Path, fold: str | None, checkpoint: str) -> Path:
    for candidate in _folds(folder, fold):
        if (candidate / checkpoint).is_file():
            return candidate / checkpoint
    raise CheckpointError(
        f"{folder} has no fold_{fold or '*'}/{checkpoint}. Give a results folder whose training has finished, "
        "or another checkpoint with --checkpoint."
    )


def _folds(folder: Path, fold: str | None) -> Iterator[Path]:
    return iter(sorted(folder.glob("fold_*")) if fold is None else [folder / f"fold_{fold}"])
