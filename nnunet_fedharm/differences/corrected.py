"""Held-out ComBat: how far would correcting the features alone go? The reference for what harmonized images have to beat.

Patients of every site are dealt to two halves. Each half is corrected by what was fitted on the other, and judged alone, so
that no patient's own value takes part in the patient's correction: fitted and judged on the same patients, ComBat sets all
means equal by construction and says nothing. Numbers before and after are means over the two halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.combat import fit_combat
from nnunet_fedharm.differences.cross_validation import Codes, priorities, stratified_folds
from nnunet_fedharm.differences.findings import CombatFinding
from nnunet_fedharm.differences.options import SIGNIFICANT, StatisticsOptions
from nnunet_fedharm.differences.panel import Panel, by_patient
from nnunet_fedharm.differences.ranks import median_over, rank_tests
from nnunet_fedharm.differences.site_classifier import FOREST, classify, forest

FEWEST = 6
"""Patients of a site, so that each half has three: two train a classifier while one is predicted."""


def held_out_combat(
    panel: Panel, options: StatisticsOptions, *, purpose: str, tick: Callable[[], object] = lambda: None
) -> CombatFinding:
    """Correction fitted on one half of the patients and judged on the other, both ways.

    Args:
        panel: complete (see `panel.complete`).
        options: seed, trees, permutations of the forest.
        purpose: of the random draws.
        tick: called after each cross-validation of the classifier.
    """
    usable = panel.with_patients(FEWEST)
    left_out = sorted(set(panel.sites) - set(usable.sites))
    if len(usable.sites) < 2:
        return _missing(f"ComBat was not judged: it needs two sites with {FEWEST} patients or more.")
    halves = stratified_folds(usable.codes, usable.groups, priorities(usable.patients, f"{options.seed}/halves"), 2)
    usable = usable.columns(_varies_in_both(usable, halves))
    if len(usable.names) < 2:
        return _missing("ComBat was not judged: fewer than two features vary within sites.")
    corrected = replace(usable, values=cross_fitted(usable, halves))
    shares, effects = zip(*(_rank_summary(each, halves) for each in (usable, corrected)), strict=True)
    classifier = classify(
        forest(corrected.values, trees=options.trees, seed=int(options.generator(purpose, "trees").integers(2**31))),
        corrected,
        method=f"{FOREST}, after held-out ComBat",
        permutations=options.forest_permutations,
        options=replace(options, folds=3),
        purpose=purpose,
        blocks=halves,
        tick=tick,
    )
    note = "Judged on halves of the patients, before and after, so shares are below those of all patients."
    if left_out:
        note += f" Without {', '.join(left_out)} (fewer than {FEWEST} patients)."
    return CombatFinding(classifier, (shares[0], shares[1]), (effects[0], effects[1]), note)


def cross_fitted(panel: Panel, halves: Codes) -> npt.NDArray[np.float64]:
    """(n, F) values of each half, corrected by what was fitted on the other."""
    corrected = panel.values.copy()
    for half in (0, 1):
        fitted = fit_combat(panel.values[halves != half], panel.codes[halves != half])
        corrected[halves == half] = fitted.apply(panel.values[halves == half], panel.codes[halves == half])
    return corrected


def _varies_in_both(panel: Panel, halves: Codes) -> npt.NDArray[np.bool_]:
    """(F,) features that vary within a site in both halves."""
    varies = np.ones(len(panel.names), dtype=bool)
    for half in (0, 1):
        values, codes = panel.values[halves == half], panel.codes[halves == half]
        inside = np.max([np.ptp(values[codes == code], axis=0) for code in np.unique(codes)], axis=0)
        varies &= inside > 1e-9 * np.abs(values).max(0)
    return varies


def _rank_summary(panel: Panel, halves: Codes) -> tuple[float, float]:
    """Share of features with q < .05 and median eta squared, means over the halves."""
    found = []
    for half in (0, 1):
        patients = by_patient(panel.rows(halves == half))
        tests = rank_tests(patients.values, patients.codes, np.zeros((0, len(patients.codes))))
        found.append((float((tests.q < SIGNIFICANT).mean()), float(median_over(tests.effect))))
    share, effect = np.mean(found, axis=0)
    return float(share), float(effect)


def _missing(note: str) -> CombatFinding:
    return CombatFinding(None, (None, None), (None, None), note)
