"""Files beside the page: all numbers as JSON, tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.sites.files import write_text
from nnunet_fedharm.study.findings import Comparison, StudyFindings
from nnunet_fedharm.study.results import DICE, HD95, StudyResults

Line = Sequence[object]
INTERVAL = ("value", "low", "high")
COSTS = (
    "arm",
    "train_s",
    "predict_s_per_volume",
    "bytes_up",
    "bytes_down",
    "epsilon",
    "delta",
    "without_noise",
    "devices",
    "energy_j",
    "counters",
    "shared_s",
    "adapt_s",
)


def write_tables(results: StudyResults, found: StudyFindings, folder: Path) -> None:
    """arms.csv, comparisons.csv, cases.csv, costs.csv and controls.csv.

    Raises:
        SetupError: the folder cannot be written.
    """
    _write(folder / "arms.csv", ("arm", "trainings", "number", "site", *INTERVAL), _arms(found))
    head = ("family", "first", "second", "sites", "patients", "trainings", "difference", "low", "high", "p", "p_holm", "verdict",
            "margin", "p_tost_holm", "p_not_worse_holm", "low_90", "high_90", "as_good")  # fmt: skip
    _write(folder / "comparisons.csv", head, [_comparison(item) for item in comparisons(found)])
    _write(folder / "cases.csv", ("arm", "seed", "site", "case", "patient", DICE, HD95), _cases(results))
    _write(folder / "costs.csv", COSTS, _costs(found))
    controls = [
        (item.name, {True: "passed", False: "failed", None: ""}[item.passed], item.words) for item in found.controls
    ]
    _write(folder / "controls.csv", ("control", "result", "numbers"), controls)


def comparisons(found: StudyFindings) -> list[Comparison]:
    """Of all families."""
    return [
        *found.against_control, *found.at_each_site, *found.against_augment, *found.federated, *found.private,
        *found.private_at_labels, *found.gap_tests, *found.at_reference,
    ]  # fmt: skip


def _arms(found: StudyFindings) -> Iterator[Line]:
    for arm in found.arms:
        for name in ("dice", "hd95_mm"):
            for site, estimate in getattr(arm, name).items():
                yield (arm.arm, arm.seeds, name, site, *_interval(estimate))
        yield (arm.arm, arm.seeds, "dice, worst site", arm.worst_site or "", *_interval(arm.worst))
        if arm.target is not None:
            yield (arm.arm, arm.seeds, "dice, target sites", " ".join(found.targets), *_interval(arm.target))
        if arm.gap is not None and arm.gap.recovered is not None:
            yield (arm.arm, arm.seeds, "gap recovered", " ".join(arm.gap.sites), *_interval(arm.gap.recovered))


def _comparison(item: Comparison) -> Line:
    equal = item.equivalence
    tested: Line = ("",) * 6
    if equal is not None:
        ends = (equal.interval.low, equal.interval.high)
        tested = (equal.margin, equal.p, equal.p_not_worse, *ends, "yes" if equal.shown else "no")
    return (
        item.family, item.first, item.second, " ".join(item.sites), item.patients, item.seeds, *_interval(item.difference),
        item.p, item.adjusted, item.verdict, *tested,
    )  # fmt: skip


def _cases(results: StudyResults) -> Iterator[Line]:
    for cell in results.finished:
        for site in results.study.sites:
            distances = cell.scores(site, HD95)
            for case, dice in cell.scores(site, DICE).items():
                patient = results.study.registry.patient_of(case)
                yield (cell.cell.arm.name, cell.cell.seed, site, case, patient, _number(dice), _number(distances[case]))


def _costs(found: StudyFindings) -> Iterator[Line]:
    for item in found.costs:
        numbers = (item.train_s, item.predict_s, item.bytes_up, item.bytes_down, item.epsilon, item.delta)
        yield (
            item.arm,
            *numbers,
            " ".join(item.without_noise),
            " ".join(item.devices),
            item.energy_j,
            " ".join(item.counters),
            item.shared_s,
            item.adapt_s,
        )


def _interval(estimate: Estimate) -> Line:
    return (estimate.value, estimate.low, estimate.high)


def _number(value: float) -> object:
    return "" if value != value else value


def _write(path: Path, head: Line, lines: Sequence[Line] | Iterator[Line]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if cell is None else cell for cell in line] for line in lines])
    write_text(text.getvalue(), path)
