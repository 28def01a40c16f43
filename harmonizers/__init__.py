"""Harmonizers: pure torch (and diffusers), no nnU-Net and no Flower in here.

`build_harmonizer` is the only door: kind and sizes come from the plans, so a checkpoint can be rebuilt from its plans alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.augment import AugmentConfig, AugmentHarmonizer
from nnunet_fedharm.harmonizers.base import SITE_LOCAL, SITE_ROWS, Harmonizer, Setting
from nnunet_fedharm.harmonizers.curve import CurveConfig, CurveHarmonizer
from nnunet_fedharm.harmonizers.cyclegan import CycleGANConfig, CycleGANHarmonizer
from nnunet_fedharm.harmonizers.flow import FlowConfig, FlowHarmonizer
from nnunet_fedharm.harmonizers.none import IdentityHarmonizer
from nnunet_fedharm.harmonizers.nyul import NyulHarmonizer
from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.harmonizers.upright import PolarityConfig, PolarityHarmonizer, guessing, undecided

KINDS: tuple[str, ...] = ("none", "augment", "nyul", "curve", "polarity", "cyclegan", "diffusion")
"""Harmonizers of this release, in the order of what they can do."""

LEARNED: frozenset[str] = frozenset({"curve", "polarity", "cyclegan", "diffusion"})
"""Kinds that have a harmonizer phase."""

AT_REFERENCE: frozenset[str] = frozenset({"polarity", "cyclegan", "diffusion"})
"""Kinds that learn from the reference's images; the other sites vote (`cyclegan` unless `train_everywhere`)."""

_CONFIGS: dict[str, type] = {
    "augment": AugmentConfig,
    "curve": CurveConfig,
    "polarity": PolarityConfig,
    "cyclegan": CycleGANConfig,
    "diffusion": FlowConfig,
}
"""Kinds that have options."""

__all__ = [
    "AT_REFERENCE",
    "KINDS",
    "LEARNED",
    "SITE_LOCAL",
    "SITE_ROWS",
    "Harmonizer",
    "build_harmonizer",
    "check_options",
    "doubt",
]


def check_options(kind: str, options: Mapping[str, Any], *, private: bool = False) -> None:
    """Refuse the options that `build_harmonizer` would refuse, without building anything.

    Args:
        private: the training is under differential privacy.

    Raises:
        PlanError: unknown option, a value of another type or out of range, or one that does not go with differential privacy.
    """
    config = _CONFIGS.get(kind)
    known = _known(kind, options, config)
    if config is not None:
        config(**known)
    if private and known.get("train_everywhere"):
        raise PlanError(
            "harmonizer.train_everywhere does not go with differential privacy: the reference's patients alone are drawn, and "
            "the mean with sites that draw nobody would dilute what they teach. Set it to false; the sites then only vote."
        )


def build_harmonizer(
    kind: str,
    options: Mapping[str, Any],
    *,
    num_channels: int,
    spatial_dims: int,
    styles: Sequence[Style],
    reference: Style | None,
) -> Harmonizer:
    """Build a harmonizer without touching the global random state, so that the segmenter's start stays nnU-Net's own.

    Args:
        kind: one of KINDS.
        options: sizes and loss weights of that kind; unknown keys are refused.
        num_channels: MR channels C.
        spatial_dims: 2 or 3.
        styles: style bank.
        reference: style to map to.

    Raises:
        PlanError: unknown kind or option.
    """
    setting = Setting(num_channels=num_channels, spatial_dims=spatial_dims, styles=styles, reference=reference)
    if kind not in KINDS:
        raise PlanError(f"Unknown harmonizer {kind!r}. This release knows {', '.join(KINDS)}.")
    known = _known(kind, options, _CONFIGS.get(kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # all sites start from the same weights; the federation overwrites them anyway
        match kind:
            case "augment":
                return AugmentHarmonizer(setting, AugmentConfig(**known))
            case "curve":
                return CurveHarmonizer(setting, CurveConfig(**known))
            case "polarity":
                return PolarityHarmonizer(setting, PolarityConfig(**known))
            case "cyclegan":
                return CycleGANHarmonizer(setting, CycleGANConfig(**known))
            case "diffusion":
                return FlowHarmonizer(setting, FlowConfig(**known))
            case "nyul":
                return NyulHarmonizer(setting)
            case _:
                return IdentityHarmonizer(setting)


def doubt(kind: str, losses: Mapping[str, float], votes: Mapping[str, float] | None = None) -> str:
    """What the end of a harmonizer phase says against it, in a sentence; empty where there is nothing.

    Args:
        losses: means of the last epoch, as `HarmonizerTraining.step` names them; NaN where a site only votes or they are unknown.
        votes: site -> least polarity over its channels, 1 upright to -1 inverted.
    """
    guesses = guessing(losses) if kind == "polarity" else ""
    return guesses or (undecided(votes or {}) if kind in AT_REFERENCE else "")


def _known(kind: str, options: Mapping[str, Any], config: type | None) -> dict[str, Any]:
    allowed = {item.name: item.default for item in fields(config)} if config is not None else {}
    for key, value in options.items():
        if key not in allowed:
            raise PlanError(
                f"The harmonizer {kind!r} has no option {key!r}. It knows: {', '.join(sorted(allowed)) or 'none'}."
            )
        if not _alike(value, allowed[key]):
            raise PlanError(f"harmonizer.{key} is {value!r}; write a value like {json.dumps(allowed[key])}.")
    return dict(options)


def _alike(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_alike(item, default[0]) for item in value)
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))
