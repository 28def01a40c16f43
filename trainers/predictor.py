"""nnU-Net's predictor that measures where each whole volume comes from before it slides its window.

The stock predictor shows the network patches only: a checkpoint without a stored source then takes, patch by patch, the
nearest style of the bank. Here the source is measured once a volume, with the weights of each fold (their judges of polarity
differ), and the checkpoint's own holds again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.harmonizers import Harmonizer
from nnunet_fedharm.harmonizers.adaptation import FIXED_KINDS, kept_source, volume_source
from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.trainers.harmonized_segmenter import HarmonizedSegmenter
from nnunet_fedharm.trainers.weights import bare_module

STORED: Literal["stored"] = "stored"
VOLUME: Literal["volume"] = "volume"


class FedHarmPredictor(nnUNetPredictor):
    """Stock prediction with a choice of where the style comes from.

    Args:
        style: "volume" (each volume's own), "stored" (the checkpoint's), a site of the bank; None: the stored one if there
            is one, else the volume's.
        options: of `nnUNetPredictor`.
    """

    network: nn.Module

    def __init__(self, *, style: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.style = style
        self._site: int | None = None

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """As the base class; then the style is settled.

        Raises:
            CheckpointError: another trainer's model, another release's weights, or no stored source where one is asked for.
            PlanError: a site that is not in the bank.
        """
        try:
            super().initialize_from_trained_model_folder(model_training_output_dir, use_folds, checkpoint_name)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename} is missing. Give a results folder of a finished training with -m, and its folds with -f."
            ) from error
        except RuntimeError as error:
            raise CheckpointError(
                f"The weights in {model_training_output_dir} do not fit the network that its plans describe: {error}"
            ) from error
        if not isinstance(bare_module(self.network), HarmonizedSegmenter):
            raise CheckpointError(
                f"{model_training_output_dir} was trained by {self.trainer_name}, not by nnunet_fedharm. "
                "Predict with nnUNetv2_predict."
            )
        self._settle_style()

    @property
    def harmonizer(self) -> Harmonizer:
        """The harmonizer inside a compiled network, with the weights of the fold that predicts at the moment."""
        return cast(Harmonizer, bare_module(self.network).harmonizer)

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """As the base class, which calls it once for each fold after loading its weights, under the chosen source."""
        self.network = self.network.to(self.device)
        self.network.eval()
        with self._source(input_image):
            logits: Tensor = super().predict_sliding_window_return_logits(input_image)
        return logits

    def _settle_style(self) -> None:
        section = read_section(self.configuration_manager.configuration)
        sites = list(section.styles)
        known = all(bool(parameters["harmonizer.source_known"]) for parameters in self.list_of_parameters)
        if section.kind in FIXED_KINDS:
            self.style = STORED  # nothing is harmonized, so nothing need be measured
        elif self.style is None:
            self.style = STORED if known else VOLUME
        elif self.style == STORED and not known:
            raise CheckpointError(
                "This model stores no style. Use --style volume, or store a site's with `nnunet-fedharm adapt`."
            )
        elif self.style not in (STORED, VOLUME):
            if self.style not in sites:
                raise PlanError(
                    f"The plans have no style of site {self.style!r}. They have: {', '.join(sites) or 'none'}; "
                    f"or use {VOLUME!r} or {STORED!r}."
                )
            self._site = sites.index(self.style)

    @contextmanager
    def _source(self, volume: Tensor) -> Iterator[None]:
        if self.style == VOLUME:
            with volume_source(self.harmonizer, volume):
                yield
        else:
            with kept_source(self.harmonizer) if self._site is not None else nullcontext():
                if self._site is not None:
                    self.harmonizer.serve(self._site)
                yield
