"""Differential privacy of whole sites in a run: what contradicts it, the server's noise, and a site's own.

Flower's wrappers add their noise to the mean and take all weights for equal, whatever they are, and pair arrays by position. Here
tensors go by name, and other weights than equal ones are refused where the server or a site adds the noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import SiteUpdate, as_dtype
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.federation.secure.checks import MEANS, SUMMED, check_colluding
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of, statement
from nnunet_fedharm.federation.site_card import OWN_POLICY, own_statement
from nnunet_fedharm.federation.updates import quorum_of
from nnunet_fedharm.planning.section import reads_styles
from nnunet_fedharm.privacy.releases import GAUSSIAN, Release, check_delta
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, LOCAL, MODES, SERVER, SitePrivacy, clipped

OFF = "off"
NOISY_MEAN = "noisy mean"
"""Name of the one reply that the mean of a round is."""
NOT_COVERED = ("facts", "fingerprint summary", "style", "who takes part")
"""What tells about a site beside its updates."""


def site_privacy_of(config: RunOptions, sites: int) -> SitePrivacy | None:
    """The promise of a phase; None without.

    Args:
        sites: of the phase.
    """
    if config.site_dp == OFF:
        return None
    promised = SitePrivacy(
        mode=config.site_dp,
        clip=config.site_clip,
        noise=config.site_noise,
        delta=config.delta,
        rounds=config.harmonizer_rounds + config.segmenter_rounds,
    )
    if config.site_dp != DISTRIBUTED:
        return promised
    least = max(quorum_of(config.quorum, sites), MIN_SITES)
    return replace(promised, least=least, colluding=config.site_colluding)


def privacy_statement(config: RunOptions, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a run promises, each with its unit: to patients (`patient_level`), to sites (`site_level`), and what single sites
    promise their patients by their own policy (`own_policy`).

    Args:
        facts: site -> its facts.
    """
    said: dict[str, Any] = {}
    if config.privacy is not None:
        said["patient_level"] = {
            "unit": "patient",
            "epsilon": config.privacy.epsilon,
            "delta": config.privacy.delta,
            "of": "all noisy releases of this run at each site: fingerprint summary, style, votes, training",
            "not_covered": ["facts"]
            + ["style"] * (config.privacy.style_noise == 0 and reads_styles(config.harmonizer))
            + ["fingerprint summary"] * (config.privacy.fingerprint_noise == 0),
        }
        shared = shared_steps_of(config, facts)
        if shared is not None:
            said["patient_level"] |= statement(shared, sum(fact["n_labelled"] > 0 for fact in facts.values()))
    own = {site: fact["own_privacy"] for site, fact in facts.items() if fact.get("own_privacy")}
    if own:
        said[OWN_POLICY] = own_statement(own)
    phases = {"harmonizer": config.harmonizer_rounds, "segmenter": config.segmenter_rounds}
    for phase in (name for name, rounds in phases.items() if rounds):
        # Of the phase with the fewest sites: the fewer, the larger the noise of the mean.
        sites = sum(phase == "harmonizer" or fact["n_labelled"] > 0 for fact in facts.values())
        promised = site_privacy_of(config, sites)
        if promised is not None:
            said["site_level"] = promised.statement(sites=sites, without_noise=NOT_COVERED)
    return said


def check_site_privacy(config: RunOptions) -> None:
    """Check everything about the privacy of sites that the configuration alone can tell.

    Raises:
        FederationError, PrivacyError: a value out of range, or an option with which the promise would not hold.
    """
    mode = config.site_dp
    if mode == OFF:
        return
    if mode not in MODES:
        raise FederationError(f"site-dp is {mode!r}; choose one of {', '.join((OFF, *MODES))}.")
    if config.strategy not in MEANS:
        raise FederationError(
            f"The strategy {config.strategy} is not made for site-dp, which gives it one noisy mean. Choose one of "
            f"{', '.join(MEANS)}."
        )
    if config.norm_bound:
        raise FederationError(
            "norm-bound sets sites aside by their updates, which no noise of site-dp hides. Leave it out."
        )
    if config.harmonizer_rounds and config.harmonizer not in SUMMED:
        raise FederationError(
            f"Of the harmonizer {config.harmonizer!r}, one site trains parts alone, or votes: site-dp cannot hide it. Use curve, "
            "or a harmonizer without rounds."
        )
    if mode != DISTRIBUTED and config.weighting != "sites":
        raise FederationError(
            f"site-dp {mode} is for equal weights, and weighting is {config.weighting}: a site of more weight would be hidden "
            "less. Use weighting sites."
        )
    _check_sums(config)
    check_delta(config.delta, len(config.site_names), who=f"site-dp {mode}", mend="Give --delta", unit="site")
    site_privacy_of(config, len(config.site_names) or MIN_SITES)


def _check_sums(config: RunOptions) -> None:
    summed = config.secure_aggregation
    if config.site_dp != DISTRIBUTED:
        if summed != OFF:
            raise FederationError(
                f"site-dp {config.site_dp} needs single updates; with secure-aggregation use distributed."
            )
        return
    if summed == OFF or (config.harmonizer_rounds and summed != "all"):
        raise FederationError(
            "site-dp distributed adds shares of noise inside secure sums, and not every round has one. Use "
            "secure-aggregation all."
        )
    check_colluding(config, opens="update")


def updates_only(ownership: Ownership) -> Ownership:
    """The ownership under site-dp: rows of single sites stay as the server has them."""
    return replace(ownership, rows=frozenset(), fixed=ownership.fixed | ownership.rows)


def trained_tensors(ownership: Ownership, former: Weights, among: Iterable[str] | None = None) -> list[str]:
    """Those that noise hides; counters and flags stay as they are.

    Args:
        former: tensors before the round.
        among: names to choose from; None: all of them.
    """
    names = ownership.common(former if among is None else among)
    return [name for name in sorted(names) if former[name].dtype.kind == "f"]


def change_of(received: Mapping[str, Any], trained: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """What a site changed, in double precision."""
    return {name: np.subtract(trained[name], received[name], dtype=np.float64) for name in names}


def protect(
    promised: SitePrivacy | None, former: Weights, ownership: Ownership, updates: Mapping[str, SiteUpdate]
) -> dict[str, SiteUpdate]:
    """The replies of a plain round as the strategy may see them: with the server's noise one noisy mean and no metric.

    Args:
        former: travelling tensors before the round.
        ownership: of the phase, without rows.
        updates: site -> reply.
    """
    if promised is None or promised.mode != SERVER:
        return dict(updates)
    active = sorted(site for site, update in updates.items() if update.n_steps)
    names = trained_tensors(ownership, former)
    total = {name: np.zeros(former[name].shape) for name in names}
    for site in active:
        for name, value in clipped(change_of(former, updates[site].weights, names), promised.clip).items():
            total[name] += value
    noisy = _with_noise(total, promised.noise * promised.clip)
    mean = {name: as_dtype(former[name] + noisy[name] / max(1, len(active)), former[name].dtype) for name in names}
    kept = {name: former[name] for name in ownership.common(former) if name not in mean}
    silent = {site: SiteUpdate({}, 0, 0, {}) for site in active}
    return {NOISY_MEAN: SiteUpdate({**kept, **mean}, 1, 1, {}), **silent}


def with_own_noise(promised: SitePrivacy, received: Weights, trained: Weights, ownership: Ownership) -> Weights:
    """A site's tensors after its own clipping and noise."""
    names = trained_tensors(ownership, received, trained)
    noisy = _with_noise(clipped(change_of(received, trained, names), promised.clip), promised.share)
    hidden = {name: as_dtype(received[name] + noisy[name], trained[name].dtype) for name in names}
    return {**{name: received[name] for name in trained}, **hidden}


def own_release(promised: SitePrivacy, what: str, run_id: str) -> Release:
    """Entry in a site's ledger, whose unit is the patient: one patient may turn an update into any other, 2 S away."""
    note = f"noise of site-dp {promised.mode}, unit site"
    own = promised.share / promised.clip / 2 if promised.mode == DISTRIBUTED else 0.0
    return Release(
        what=what, mechanism=GAUSSIAN, noise_multiplier=promised.noise / 2, run_id=run_id, note=note, noise_alone=own
    )


def adds_own_noise(promised: SitePrivacy | None) -> TypeGuard[SitePrivacy]:
    """Whether a site's reply carries its own noise."""
    return promised is not None and promised.mode == LOCAL


def _with_noise(tensors: Mapping[str, Any], sigma: float) -> dict[str, Any]:
    from nnunet_fedharm.privacy.noise import SecureNoise  # imports torch

    noise = SecureNoise()
    return {name: noise.hide(value, sigma) for name, value in tensors.items()}
