"""All statistics of a feature table: one PartFinding per channel, region and intensity scale.

Patients are the units of every test: several volumes of a patient at one site count as their mean, resampling draws patients
within each site, and cross-validation and permutations keep them whole. The same table, options and slices give the same
numbers, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from nnunet_fedharm.differences.corrected import held_out_combat
from nnunet_fedharm.differences.cross_validation import resample_patients
from nnunet_fedharm.differences.distances import pair_findings
from nnunet_fedharm.differences.embedding import axes_of, embedding
from nnunet_fedharm.differences.feature_findings import family_effects, family_shares, feature_findings
from nnunet_fedharm.differences.findings import ClassifierFinding, CombatFinding, PairFinding, PartFinding
from nnunet_fedharm.differences.jobs import Job, Meter, run_jobs
from nnunet_fedharm.differences.kernel import kernel_matrix, kernel_test
from nnunet_fedharm.differences.notes import general_notes, joined, travelling_note
from nnunet_fedharm.differences.options import Progress, StatisticsOptions
from nnunet_fedharm.differences.outliers import outliers
from nnunet_fedharm.differences.panel import Panel, by_patient, case_panel, complete, panel_of
from nnunet_fedharm.differences.ranks import rank_tests
from nnunet_fedharm.differences.site_classifier import (
    DISCRIMINANT,
    FOREST,
    classify,
    discriminant,
    forest,
    forest_importances,
    top_features,
)
from nnunet_fedharm.differences.sketch_classifier import Axes
from nnunet_fedharm.differences.slice_classifier import Slices, SliceSet, slice_finding, slice_set
from nnunet_fedharm.differences.standard import standard_of_values
from nnunet_fedharm.differences.travelling import agreement_findings
from nnunet_fedharm.sites.features.table import FeatureTable

FEWEST = 3
"""Patients of a site that a classifier can learn: two to train on while one is predicted."""
_RANKS, _KERNEL, _DISCRIMINANT, _FOREST, _COMBAT, _SLICES = 3.0, 0.5, 1.0, 12.0, 6.0, 30.0
"""Shares of the progress bar, in seconds of a part of 180 volumes."""


def find_differences(
    table: FeatureTable,
    *,
    options: StatisticsOptions,
    slices: Mapping[tuple[str, str], Slices] | None = None,
    progress: Progress | None = None,
    num_processes: int = 1,
) -> list[PartFinding]:
    """Statistics of every part of a table, in the table's order of parts.

    Args:
        table: features of all sites.
        options: seed and sizes of the resampling.
        slices: (case, channel) -> (s, H, W) or (H, W), of one size per channel; None for no network on slices. What the
            network finds of a channel stands in every part of it.
        progress: told what is being computed and the share that is done.
        num_processes: parts are independent of each other; the numbers do not depend on how many are computed at once.

    Raises:
        ShapeError: slices of different sizes in one channel.
        DataError: a slice holds a value that is not finite.
    """
    one_part = _RANKS + _KERNEL + _DISCRIMINANT + _FOREST + _COMBAT
    channels = list(dict.fromkeys(row.channel for row in table.rows)) if slices else []
    chosen = {channel: slice_set(case_panel(table, channel), slices or {}, channel) for channel in channels}
    jobs = [
        Job(f"network on slices, {channel}", _SLICES, partial(_network, own, channel, options))
        for channel, own in chosen.items()
        if own is not None
    ]
    jobs += [Job("/".join(key), one_part, partial(_part, table.part(*key), key, options)) for key in table.parts]
    found = run_jobs(jobs, num_processes=num_processes, progress=progress)
    parts = found[len(jobs) - len(table.parts) :]
    seen = {finding[0]: finding[1] for finding in found[: len(found) - len(parts)]}
    return [replace(part, classifiers=[*part.classifiers, *seen.get(part.channel, [])]) for part in parts]


def _part(
    part: FeatureTable,
    key: tuple[str, str, str],
    options: StatisticsOptions,
    meter: Meter,
) -> PartFinding:
    purpose, panel = "/".join(key), panel_of(part)
    patients = by_patient(panel)
    tick = meter.step(f"rank tests, {purpose}", _RANKS)
    weights = resample_patients(patients.codes, patients.groups, options.bootstrap, options.generator(purpose, "draws"))
    tests = rank_tests(patients.values, patients.codes, weights)
    usable, notes = complete(panel)
    pairs = list(pair_findings(patients, weights))
    tick()
    pairs = _with_kernel(pairs, by_patient(usable), options, purpose, meter)
    axes = axes_of(usable) if len(usable.cases) > 2 and usable.names else None
    classifiers, combat, more = _classifiers(usable, axes, options, purpose, meter)
    agreement = agreement_findings(part, options, purpose=purpose)
    return PartFinding(
        channel=key[0],
        region=key[1],
        scale=key[2],
        n={site: int((panel.codes == code).sum()) for code, site in enumerate(panel.sites)},
        families=family_effects(patients, tests),
        share_significant=family_shares(patients, tests),
        features=feature_findings(patients, tests, bins=options.bins),
        pairs=pairs,
        classifiers=classifiers,
        embedding=None if axes is None else embedding(usable, axes),
        agreement=agreement,
        combat=combat,
        outliers=outliers(panel, options),
        notes=[*general_notes(panel, tests, options), *notes, *more, *([] if agreement else [travelling_note(part)])],
    )


def _with_kernel(
    pairs: list[PairFinding], patients: Panel, options: StatisticsOptions, purpose: str, meter: Meter
) -> list[PairFinding]:
    """Pairs with the kernel test between them, where both have two patients with complete features."""
    tick = meter.step(f"kernel tests, {purpose}", _KERNEL, max(len(pairs), 1))
    if not patients.names or len(patients.sites) < 2:
        return pairs
    kernel = kernel_matrix(standard_of_values(patients.values).apply(patients.values))
    found = []
    for pair in pairs:
        names = [name for name in (pair.first, pair.second) if name in patients.sites]
        codes = [patients.sites.index(name) for name in names]
        rows = np.flatnonzero(np.isin(patients.codes, codes))
        mmd, p = (None, None)
        if len(names) == 2:
            mmd, p = kernel_test(
                kernel[np.ix_(rows, rows)],
                (patients.codes[rows] == codes[1]).astype(np.intp),
                patients.groups[rows],
                permutations=options.mmd_permutations,
                generator=options.generator(purpose, "kernel", *names),
            )
        found.append(replace(pair, mmd=mmd, mmd_p=p))
        tick()
    return found


def _classifiers(
    panel: Panel, axes: Axes | None, options: StatisticsOptions, purpose: str, meter: Meter
) -> tuple[list[ClassifierFinding], CombatFinding | None, list[str]]:
    """Forest, discriminant and held-out ComBat, and sentences on what they leave out."""
    if axes is None:
        return [], None, ["No classifier of sites: no feature exists and varies for all volumes."]
    usable = panel.with_patients(FEWEST)
    left_out = sorted(set(panel.sites) - set(usable.sites))
    if len(usable.sites) < 2:
        return [], None, [f"No classifier of sites: it needs two sites with {FEWEST} patients or more."]
    standard = standard_of_values(panel.values).apply(usable.values)
    found = [
        _forest(
            usable, options, purpose, meter.step(f"random forest, {purpose}", _FOREST, options.forest_permutations + 1)
        ),
        classify(
            discriminant(axes.project(standard)),
            usable,
            method=DISCRIMINANT,
            permutations=options.permutations,
            options=options,
            purpose=f"{purpose}/discriminant",
            tick=meter.step(f"linear discriminant, {purpose}", _DISCRIMINANT, options.permutations + 1),
        ),
    ]
    tick = meter.step(f"held-out ComBat, {purpose}", _COMBAT, options.forest_permutations + 1)
    combat = held_out_combat(usable, options, purpose=f"{purpose}/combat", tick=tick)
    notes = [f"Classifiers leave out {joined(left_out)}: fewer than {FEWEST} patients."] if left_out else []
    return found, combat, notes


def _forest(panel: Panel, options: StatisticsOptions, purpose: str, tick: Callable[[], object]) -> ClassifierFinding:
    seed = int(options.generator(purpose, "trees").integers(2**31))
    ranking = forest_importances(panel.values, panel.codes, trees=options.trees, seed=seed)
    return classify(
        forest(panel.values, trees=options.trees, seed=seed),
        panel,
        method=FOREST,
        permutations=options.forest_permutations,
        options=options,
        purpose=f"{purpose}/forest",
        features=top_features(panel.names, ranking),
        tick=tick,
    )


def _network(
    chosen: SliceSet, channel: str, options: StatisticsOptions, meter: Meter
) -> tuple[str, list[ClassifierFinding]]:
    """Channel and what the network finds on its slices; nothing with too few patients."""
    tick = meter.step(f"network on slices, {channel}", _SLICES, options.slice_permutations + 1)
    usable = np.isin(chosen.panel.codes, np.flatnonzero(chosen.panel.patients_of_sites() >= FEWEST))
    kept = SliceSet(chosen.panel.rows(usable), chosen.images[usable])
    if len(kept.panel.sites) < 2:
        return channel, []
    return channel, [slice_finding(kept, options, purpose=f"{channel}/slices", tick=tick)]
