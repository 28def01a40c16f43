"""Whose word counts for a tensor: one site's, the reference's sites', everybody's or nobody's; read off the plans.

A mean over all sites is wrong where only some of them learn a tensor: the others send back what they were given, and the mean
undoes part of what was learnt. What a site's word does not count for, it does not send.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.harmonizers import SITE_ROWS, Harmonizer, build_harmonizer
from nnunet_fedharm.planning.section import FedHarmSection, read_section

PREFIX = "harmonizer."
"""Of the harmonizer's tensors in the whole network."""

GATE = PREFIX + "gate"
"""Of the phase, not of a site: shut in kinds that would not be the identity before it."""

FROM_PLANS = ("gate", "reference_quantiles", "reference_offset", "bank_quantiles", "bank_offset")
"""Buffers of the harmonizer that no training changes."""


@dataclass(frozen=True)
class Ownership:
    """Exceptions from the mean over all sites, in one phase.

    Attributes:
        bank: sites in the order of the style bank.
        rows: tensors whose row k belongs to site k of the bank.
        fixed: tensors that no site changes.
        reference_only: tensors that only the reference's sites train.
        reference_sites: their names.
        idle: sites that do not take part in the phase.
        local: tensors of which every site keeps its own (personalisation); they travel in no direction.
    """

    bank: tuple[str, ...] = ()
    rows: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    reference_only: frozenset[str] = frozenset()
    reference_sites: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()

    def common(self, names: Iterable[str]) -> set[str]:
        """Those of the names that every site trains, so that a mean over sites makes sense."""
        return set(names) - self.rows - self.fixed - self.reference_only - self.local

    def shared(self, weights: Weights) -> Weights:
        """What may travel at all: everything but the tensors of which every site keeps its own."""
        return {name: value for name, value in weights.items() if name not in self.local}

    def contribution(self, site: str, weights: Weights) -> Weights:
        """What a site sends back of these tensors: those that it may change, and of a table of rows its own, (1, ...)."""
        chosen: Weights = {}
        for name, value in self.shared(weights).items():
            if name in self.rows:
                if site in self.bank:
                    row = self.bank.index(site)
                    chosen[name] = value[row : row + 1]
            elif name not in self.fixed and (name not in self.reference_only or site in self.reference_sites):
                chosen[name] = value
        return chosen


def ownership_of(plans: Mapping[str, Any], configuration: str, phase: str) -> Ownership:
    """The ownership in a phase ("harmonizer" or "segmenter"), from final plans.

    Raises:
        PlanError: the plans have no fedharm section, or one that no harmonizer can be built from.
    """
    planned = plans["configurations"][configuration]
    section = read_section(planned, configuration_name=configuration)
    if not section.styles:
        return Ownership()
    bank = tuple(section.styles)
    harmonizer = _build(section, len(planned["patch_size"]))
    rows = frozenset(PREFIX + name for name in SITE_ROWS)
    if phase == "segmenter":
        return Ownership(bank, rows, fixed=_at_rest(harmonizer, section.schedule.phases == "finetune") - rows)
    prefixes = tuple(PREFIX + prefix for prefix in harmonizer.trained_at_reference())
    return Ownership(
        bank,
        rows,
        fixed=frozenset(PREFIX + name for name in FROM_PLANS),
        reference_only=frozenset(name for name in _names(harmonizer) if name.startswith(prefixes)),
        reference_sites=frozenset(bank[site] for site in harmonizer.reference_sites()),
        idle=frozenset(name for site, name in enumerate(bank) if not harmonizer.trains_on(site)),
    )


def _build(section: FedHarmSection, spatial_dims: int) -> Harmonizer:
    styles = list(section.styles.values())
    return build_harmonizer(
        section.kind,
        section.harmonizer,
        num_channels=styles[0].quantiles.shape[0],
        spatial_dims=spatial_dims,
        styles=styles,
        reference=section.reference_style,
    )


def _names(harmonizer: Harmonizer) -> frozenset[str]:
    return frozenset(PREFIX + name for name in harmonizer.state_dict())


def _at_rest(harmonizer: Harmonizer, finetuned: bool) -> frozenset[str]:
    """The harmonizer's tensors that the segmenter phase leaves alone."""
    moved = {id(parameter) for parameter in harmonizer.mapping_parameters()} if finetuned else set()
    named = harmonizer.named_parameters(remove_duplicate=False)
    return _names(harmonizer) - {PREFIX + name for name, parameter in named if id(parameter) in moved}
