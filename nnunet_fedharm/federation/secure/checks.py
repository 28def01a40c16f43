"""What of secure aggregation contradicts other options, or cannot hold: refused before the start, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.planning.facts import SiteFacts
from nnunet_fedharm.privacy.fixed_point import Field, Layout
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES, default_threshold

MODES = ("off", "segmenter", "all")
"""Which rounds the server sees as sums only."""
MEANS = ("fedavg", "fedavgm", "fedadam", "fedyogi")
"""Strategies that need no single updates, only their mean."""
SUMMED = ("curve",)
"""Learned harmonizers of which every site trains every tensor."""


def secures(config: RunOptions, phase: str) -> bool:
    """Whether the updates of a phase go through secure sums."""
    return config.secure_aggregation == "all" or config.secure_aggregation == phase


def check_secure(config: RunOptions) -> None:
    """Check everything about secure aggregation that the configuration alone can tell.

    Raises:
        FederationError: unknown value, too few sites, or an option that needs single updates.
    """
    if config.secure_aggregation not in MODES:
        raise FederationError(f"secure-aggregation is {config.secure_aggregation!r}; choose one of {', '.join(MODES)}.")
    if config.secure_aggregation == "off":
        return
    _check_numbers(config)
    if config.strategy not in MEANS:
        raise FederationError(
            f"The strategy {config.strategy} needs the single updates that secure aggregation hides. Choose one of "
            f"{', '.join(MEANS)}."
        )
    for name, used in (("norm-bound", config.norm_bound > 0), ("fp16", config.fp16)):
        if used:
            raise FederationError(
                f"{name} looks at or shortens single updates, which secure aggregation hides. Leave it out."
            )
    if config.secure_aggregation == "all" and config.harmonizer_rounds and config.harmonizer not in SUMMED:
        raise FederationError(
            f"Of the harmonizer {config.harmonizer!r}, the reference's site trains parts alone: a sum of one site hides nothing. "
            "Use secure-aggregation segmenter; the harmonizer rounds are then as without it."
        )
    if config.secure_aggregation == "segmenter" and not config.segmenter_rounds:
        raise FederationError("secure-aggregation is for the segmenter, and segmenter-rounds is 0.")
    if config.site_names:
        _require(len(config.site_names), "this federation")


def check_colluding(config: RunOptions, *, opens: str) -> None:
    """Refuse more colluding sites than hidden noise can bear: with the threshold's number the server opens everything.

    Args:
        opens: what they would open, for the sentence.

    Raises:
        FederationError: too many.
    """
    threshold = config.secure_threshold or default_threshold(len(config.site_names) or MIN_SITES)
    if config.site_colluding >= threshold:
        raise FederationError(
            f"site-colluding is {config.site_colluding}, but {threshold} sites together with the server open any {opens}. Raise "
            "secure-threshold, or lower site-colluding."
        )


def check_secure_sites(config: RunOptions, facts: Sequence[SiteFacts]) -> None:
    """Check secure aggregation against what the sites have.

    Raises:
        FederationError: too few sites with labels.
    """
    if secures(config, "segmenter") and config.segmenter_rounds:
        _require(sum(fact.n_labelled > 0 for fact in facts), "the segmenter phase (sites with labels)")


def _check_numbers(config: RunOptions) -> None:
    if not config.secure_clip > 0:
        raise FederationError(f"secure-clip must be > 0, got {config.secure_clip}.")
    if not 4 <= config.secure_bytes <= 8:
        raise FederationError(f"secure-bytes must be 4 to 8, got {config.secure_bytes}.")
    if config.secure_threshold < 0:
        raise FederationError(f"secure-threshold must be >= 0, got {config.secure_threshold}.")
    count = len(config.site_names)
    if count and config.secure_threshold and not count < 2 * config.secure_threshold <= 2 * count:
        raise FederationError(
            f"secure-threshold is {config.secure_threshold} of {count} sites; take more than half of them and at most all."
        )
    if config.weighting == "steps":
        most = config.local_epochs * config.iterations_per_epoch
        Layout((Field("tensor", (), config.secure_clip),), max(count, MIN_SITES), most, config.secure_bytes)


def _require(sites: int, where: str) -> None:
    if sites < MIN_SITES:
        raise FederationError(
            f"Secure aggregation needs at least {MIN_SITES} sites, {where} has {sites}: a sum of fewer shows one site's part. "
            "Let more sites take part, or turn secure-aggregation off."
        )
