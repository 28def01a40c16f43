"""What a federated report says about itself: sites, settings, bounds, what left the sites, what could not be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import SiteCard
from nnunet_fedharm.federation.report.noise import SHARES, sensitivity_of
from nnunet_fedharm.federation.report.parts import PartState
from nnunet_fedharm.federation.report.steps import Steps

Array = npt.NDArray[np.float64]

_HOLDS = {
    "measure": "names of parts and features; numbers of patients, cases, failures; settings",
    "locate": "counts on a public grid of every feature",
    "histograms": "counts of every feature on common edges, in all zooms",
    "moments": "sums and sums of products of standardised features over all patients",
    "folds": "the same on principal axes for each fold",
    "classify": "patients taken for each site",
    "ranks": "shares in the rank test",
    "keep": "that the findings are stored",
}
_OPEN = {"measure": "names of parts and features; settings; no number of patients", "keep": _HOLDS["keep"]}
NOTES = (
    "Patients are the units: several cases of a patient count as one, their mean. Numbers come from histograms and sums; "
    "settings.bounds says how far they can be from those of the pooled features.",
    "Not in a federated report: kernel distance, random forest, network on slices, travelling subjects and ComBat, which need "
    "single cases of several sites in one place; outliers, which each site finds in its own report.",
)


NOTES_OF_SUMS = (
    "Secure sums: the server knows the sum over all sites of every histogram and of the shares in the rank test, and no site's "
    "own. So there are no medians of sites, no distances between two of them, no classifier and no embedding here; each "
    "site finds how far it is from the others in its own against-others.json.",
    "Patients are the units: several cases of a patient count as one, their mean. settings.bounds says how far effects can be "
    "from those of the pooled features.",
)


@dataclass(frozen=True)
class PartBounds:
    """Largest differences from pooled statistics that the exchanged numbers leave possible, over the features of a part."""

    effect: Array
    ks: Array
    wasserstein: Array


def shared_of(steps: Steps) -> list[tuple[str, str, int]]:
    """Message, what it holds, and bytes that the site sent which sent most."""
    found = []
    for what, sizes in steps.sites.sent.items():
        plain = what.removesuffix(", masked")
        if what != plain:
            holds = f"{_HOLDS[plain]}, masked: the server learns the sum over all sites; keys and shares of them"
        elif steps.plan.sums:
            holds = _OPEN.get(plain, "")  # other replies only say that the numbers are ready for a sum
        else:
            holds = _HOLDS.get(plain, plain)
        if holds:
            found.append((what, holds, max(sizes.values())))
    return found


def notes_of(steps: Steps, state: PartState) -> list[str]:
    """Sentences for one part of the page."""
    kind = NOTES_OF_SUMS if steps.plan.sums else NOTES
    return [*_left_out(steps, state), *state.notes, *kind, *_noise_notes(steps)]


def card_of(site: str, steps: Steps) -> SiteCard:
    scanner = steps.sites.descriptions[site].get("scanner", {})
    numbers = steps.numbers.get(site, {})
    # With noise about so many; 0 with secure sums, where nobody but the site knows.
    about = round(max((state.patients.get(site, 0.0) for state in steps.parts), default=0.0))
    vendor, field, sequence = (scanner.get(key) for key in ("vendor", "field", "sequence"))
    return SiteCard(
        site=site,
        vendor=None if vendor is None else str(vendor),
        field=float(field) if isinstance(field, int | float) else None,
        sequence=None if sequence is None else str(sequence),
        n_cases=numbers.get("n_cases", about),
        n_patients=numbers.get("n_patients", about),
        n_labelled=numbers.get("n_labelled", about),
    )


def _left_out(steps: Steps, state: PartState) -> list[str]:
    notes = [f"Left out: {reason.rstrip('.')}." if site in reason else f"Left out: {site}, {reason.rstrip('.')}."
             for site, reason in sorted(steps.sites.left_out.items())]  # fmt: skip
    without = [] if steps.plan.sums else sorted(set(steps.sites.names) - set(state.patients))
    return [*notes, f"Too few patients here at {', '.join(without)}."] if without else notes


def _noise_notes(steps: Steps) -> list[str]:
    if not steps.plan.on:
        return []
    return [
        f"Everything that left a site carries noise: epsilon {steps.plan.epsilon:g} at delta {steps.plan.delta:g} for a patient, "
        "all messages together. p-values compare with sites that are alike under the same noise; numbers of patients are "
        "approximate; distances and medians are blurred by noise that nothing takes out."
    ]


def settings_of(steps: Steps, bounds: list[PartBounds]) -> dict[str, Any]:
    config, plan = steps.config, steps.plan
    features = [len(state.part.names) for state in steps.parts]
    settings: dict[str, Any] = {
        "features": steps.settings,
        "versions": next(iter(steps.sites.descriptions.values()))["versions"],
        "federation": {
            name: getattr(config, name)
            for name in ("seed", "min_patients", "bins", "dimensions", "simulations", "bootstrap", "secure_sums")
        }
        | {"folds": steps.n_folds, "null": "simulated from pooled moments"},
        "left_out": dict(sorted(steps.sites.left_out.items())),
    }
    if plan.on:
        settings["noise"] = {
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "unit": "patient",
            "sigma": {step: plan.sigma(step, sensitivity_of(step, features)) for step in SHARES},
        }
    else:
        settings["bounds"] = {
            name: {"median": _percentile(bounds, name, 50), "largest": _percentile(bounds, name, 100)}
            for name in ("effect", "ks", "wasserstein")
        }
    return settings


def _percentile(bounds: list[PartBounds], name: str, percent: float) -> float | None:
    values = np.concatenate([getattr(own, name) for own in bounds]) if bounds else np.zeros(0)
    values = values[np.isfinite(values)]
    return float(np.percentile(values, percent)) if values.size else None
