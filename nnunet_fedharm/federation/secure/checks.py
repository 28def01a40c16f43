"""What of secure aggregation contradicts other options, or cannot hold: refused before the start, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.planning.facts import SiteFacts
from nnunet_fedharm.privacy.fixed_point import Field, Layout
from nnunet_fedharm.privacy.secure_aggregation import COLLUDING, MIN_SITES, default_threshold, holders_of, is_safe

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
    """Refuse a threshold with which a server that lies about who answered opens what noise has to hide.

    Args:
        opens: what it would open, for the sentence.

    Raises:
        FederationError: it is too low for the sites that may collude.
    """
    if config.site_names:
        _check_threshold(config, len(config.site_names), "this federation", config.site_colluding, opens)


def check_secure_sites(config: RunOptions, facts: Sequence[SiteFacts]) -> None:
    """Check secure aggregation against what the sites have.

    Raises:
        FederationError: too few sites with labels, or a threshold that is not safe for them.
    """
    if secures(config, "segmenter") and config.segmenter_rounds:
        sites, where = sum(fact.n_labelled > 0 for fact in facts), "the segmenter phase (sites with labels)"
        _require(sites, where)
        _check_threshold(config, sites, where, config.site_colluding)


def _check_numbers(config: RunOptions) -> None:
    if not config.secure_clip > 0:
        raise FederationError(f"secure-clip must be > 0, got {config.secure_clip}.")
    if not 4 <= config.secure_bytes <= 8:
        raise FederationError(f"secure-bytes must be 4 to 8, got {config.secure_bytes}.")
    if config.secure_threshold < 0:
        raise FederationError(f"secure-threshold must be >= 0, got {config.secure_threshold}.")
    count = len(config.site_names)
    if count:
        _check_threshold(config, count, "this federation", COLLUDING)
    if config.weighting == "steps":
        most = config.local_epochs * config.iterations_per_epoch
        Layout((Field("tensor", (), config.secure_clip),), max(count, MIN_SITES), most, config.secure_bytes)


def _require(sites: int, where: str) -> None:
    if sites < MIN_SITES:
        raise FederationError(
            f"Secure aggregation needs at least {MIN_SITES} sites, {where} has {sites}: a sum of fewer shows one site's part. "
            "Let more sites take part, or turn secure-aggregation off."
        )


def _check_threshold(config: RunOptions, sites: int, where: str, colluding: int, opens: str = "update") -> None:
    """Of sums over so many sites; each site holds the same against the terms that it is sent."""
    holders = holders_of(sites)
    least = default_threshold(holders, colluding)
    threshold = config.secure_threshold or least
    if not is_safe(least, holders, colluding):
        raise FederationError(
            f"site-colluding is {colluding}, but {where} has {sites}: the server and so many open any {opens}, whatever "
            "secure-threshold is. Lower site-colluding."
        )
    if not least <= threshold <= holders:
        raise FederationError(
            f"secure-threshold is {threshold}, but {where} has {sites}: take {least} to {holders}, or leave it out. With less, a "
            f"server that tells sites different things about who answered opens any {opens}, if {colluding} of them help it; "
            "more can never answer."
        )
