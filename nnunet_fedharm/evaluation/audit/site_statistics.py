"""The statistics that a site tells, audited on its own images: see `noisy_statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nnunet_fedharm.evaluation.audit.noisy_statistics import (
    Mechanism,
    StatisticAudit,
    StatisticOptions,
    audit_statistic,
    fingerprint_mechanism,
    style_mechanism,
    votes_mechanism,
)
from nnunet_fedharm.evaluation.audit.site import AuditedSite, audit_trainer
from nnunet_fedharm.harmonizers.judges import PACE, LinearJudge
from nnunet_fedharm.planning.private_summary import measured_channels
from nnunet_fedharm.planning.section import read_section, reads_styles
from nnunet_fedharm.planning.style import patient_styles, preprocessed_cases
from nnunet_fedharm.planning.summary import read_cases
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.trainers.seeds import derive_seed


@dataclass(frozen=True)
class SiteStatistics:
    """What was found of every statistic.

    Attributes:
        audits: one a release.
        left_out: release -> why it was not audited.
    """

    audits: tuple[StatisticAudit, ...]
    left_out: Mapping[str, str]

    @property
    def refuted(self) -> bool:
        return any(audit.refuted for audit in self.audits)

    def to_dict(self) -> dict[str, Any]:
        return {"statistics": [audit.to_dict() for audit in self.audits], "left_out": dict(self.left_out)}


def audit_statistics(
    site: AuditedSite,
    privacy: PrivacyOptions,
    options: StatisticOptions,
    *,
    num_processes: int = 1,
    progress: bool = False,
) -> SiteStatistics:
    """Audit fingerprint summary, styles and votes, with the noise that a run by these plans would give them.

    The audits share the error of the confidence. Nothing enters the site's ledger: what is drawn stays here.

    Args:
        site: where and what.
        privacy: of the plans.
        num_processes: to read the raw cases with.

    Raises:
        FedHarmError: data or plans cannot be used.
    """
    path = site.root.preprocessed / site.dataset_name / SITES_FILE
    registry = SitesFile.load(path) if path.is_file() else SitesFile()
    mechanisms: list[Mechanism] = []
    left_out: dict[str, str] = {}
    for found, missing in (
        _fingerprint(site, privacy, registry, num_processes), _styles(site, privacy, registry), _votes(site, privacy),
    ):  # fmt: skip
        mechanisms += found
        left_out |= missing
    shared = replace(options, confidence=1 - (1 - options.confidence) / max(1, len(mechanisms)))
    audits = [audit_statistic(one, delta=privacy.delta, options=shared, progress=progress) for one in mechanisms]
    return SiteStatistics(tuple(audits), left_out)


Found = tuple[list[Mechanism], dict[str, str]]


def _fingerprint(site: AuditedSite, privacy: PrivacyOptions, registry: SitesFile, num_processes: int) -> Found:
    what, noise = "fingerprint summary", privacy.fingerprint_multiplier
    raw = site.root.raw / site.dataset_name
    if not noise:
        return [], {what: "it has no noise (fingerprint noise 0), and the ledger names it so"}
    if not raw.is_dir():
        return [], {what: "the raw images are not here"}
    description, cases = read_cases(raw, site=site.root.path.name, num_processes=num_processes)
    measured = measured_channels(description["channel_names"])
    return [fingerprint_mechanism(list(cases), registry.patients, measured, noise_multiplier=noise)], {}


def _styles(site: AuditedSite, privacy: PrivacyOptions, registry: SitesFile) -> Found:
    kind = read_section(site.plans["configurations"][site.configuration]).kind
    if not reads_styles(kind):
        return [], {"style": f"the harmonizer {kind} reads none, so none is measured"}
    if not privacy.style_noise:
        return [], {"style": "it has no noise (style noise 0), and the ledger names it so"}
    folders = preprocessed_cases(site.root, site.dataset_name, site.plans, site.configuration)
    own: dict[str, list[str]] = {}
    for case in folders:
        own.setdefault(registry.cases.get(case, "this site"), []).append(case)
    mechanisms = []
    for name, cases in sorted(own.items()):
        text = f"Measuring the style of {name}"
        rows = patient_styles([(case, folders[case]) for case in cases], registry.patients, description=text)
        mechanisms.append(style_mechanism(*rows, what=f"style of {name}", noise_multiplier=privacy.style_noise))
    return mechanisms, {}


def _votes(site: AuditedSite, privacy: PrivacyOptions) -> Found:
    """Of an untaught judge: which way the patients vote changes nothing of what is audited."""
    with audit_trainer(site, privacy, segmenter=False) as trainer:
        assert trainer.private is not None
        sampler = trainer.all_patches(np.random.default_rng(derive_seed(site.seed, "audit", "votes")))
        judge = getattr(trainer.harmonizer, "polarity_judge", None)
        if isinstance(judge, LinearJudge):  # it starts without an opinion, and votes of zero would tell nothing
            torch.nn.init.normal_(judge.direction, std=1 / PACE)
        votes = trainer.private.votes(sampler)
        noises = {index: trainer.private.vote_noise(len(rows)).noise_multiplier for index, rows in votes.items()}
        names = list(trainer.bank)
    if not votes:
        return [], {"votes on polarity": "nobody here votes in a run by these plans"}
    return [
        votes_mechanism(rows.cpu(), what=f"votes of {names[index]}", noise_multiplier=noises[index])
        for index, rows in votes.items()
    ], {}
