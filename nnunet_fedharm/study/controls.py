"""Checks whose answer is known before the study: what must not change, and what must come back.

| control | must |
|---|---|
| no shift | Dice at the reference site, whose images must not change, is that of plain nnU-Net of the mode within the margin |
| known inverse | volumes of simulated sites come nearer to the same subject at the reference |
| travelling subjects | the same, where the sites are real |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_fedharm.evaluation.words import number
from nnunet_fedharm.study.findings import UNCLEAR, Comparison, ControlFinding
from nnunet_fedharm.study.study_file import StudyFile

NO_SHIFT, KNOWN_INVERSE, TRAVELLING = "no shift", "known inverse", "travelling subjects"
ALL = "all"


def check_controls(
    study: StudyFile,
    at_reference: Sequence[Comparison],
    quality: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
) -> list[ControlFinding]:
    """Every control that the study's data allow.

    Args:
        study: whose sites may be simulated.
        at_reference: harmonizers against plain nnU-Net at the reference site, with equivalence.
        quality: arm -> quality report on travelling subjects.
        titles: arm -> its name for readers.
    """
    simulated = [site for site, info in study.registry.sites.items() if info.simulation is not None]
    name = KNOWN_INVERSE if simulated else TRAVELLING
    found = [_no_shift(item, study.subject.reference, titles) for item in at_reference]
    return found + [item for arm, report in quality.items() for item in _nearer(titles[arm], report, name)]


def _no_shift(item: Comparison, reference: str, titles: Mapping[str, str]) -> ControlFinding:
    change = item.difference
    shown = f"{_signed(change.value)} ({_signed(change.low)} to {_signed(change.high)})"
    equal = item.equivalence
    if equal is None:
        words, passed = "cannot be told, for one of the two did not learn to segment there", None
    elif equal.shown:
        words, passed = f"unchanged within {equal.margin:g} Dice", True
    elif item.verdict != UNCLEAR:
        words, passed = "changed", False
    else:
        words, passed = "not shown to be unchanged", None
    return ControlFinding(
        NO_SHIFT,
        passed,
        f"{titles[item.first]}, at the reference {reference}: {words}; difference to {titles[item.second]} {shown}.",
    )


def _nearer(title: str, report: Mapping[str, Any], name: str) -> list[ControlFinding]:
    """nRMSE to the truth at all sites together, else at the only one."""
    sites = report.get("sites") or {}
    if not sites:
        return []
    site = ALL if ALL in sites else next(iter(sites))
    channel, metrics = next(iter(sites[site].items()))
    if "nrmse" not in metrics:
        return []
    entry = metrics["nrmse"]
    before, after, change = (entry[state] for state in ("before", "after", "change"))
    low, high = change["low"], change["high"]
    passed = None if low is None or high is None else True if high < 0 else False if low > 0 else None
    words = {True: "nearer to the truth", False: "further from the truth", None: "no clear change"}[passed]
    return [
        ControlFinding(
            name,
            passed,
            f"{title}, channel {channel}: {words}; nRMSE {number(before['value'])} as scanned, {number(after['value'])} "
            f"harmonized ({entry['n']} patients).",
        )
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
