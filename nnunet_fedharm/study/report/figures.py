"""Which numbers of a study each figure shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nnunet_fedharm.differences.findings import Estimate, Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.html import Html, figure, figures, key
from nnunet_fedharm.evaluation.site_report.charts import marker_icon
from nnunet_fedharm.evaluation.site_report.parts import distance_matrix, highest_distance
from nnunet_fedharm.evaluation.site_report.words import headline
from nnunet_fedharm.evaluation.words import count, number
from nnunet_fedharm.study.findings import ArmFinding, StudyFindings
from nnunet_fedharm.study.report.charts import band_chart, epsilon_chart, paired_chart
from nnunet_fedharm.study.report.dot_plot import Column, Row, dot_plot, has_value, room_for
from nnunet_fedharm.study.report.names import group_of, kind_name, only_at, row_name, shown_arms, style_of
from nnunet_fedharm.study.study_tables import CONTROL

WORST = " worst"
"""Key of the column for the worst site; no site's name begins with a space."""
COLUMNS = 5
"""Sites beside each other in one figure."""

MODE_KEY = (
    ('<i class="series-1"></i>', "central, no harmonizer"),
    ('<i class="series-2"></i>', "central, harmonized"),
    ('<i class="series-3"></i>', "federated"),
)


def dice_figure(found: StudyFindings) -> Html:
    """Dice of every arm at every site, and at its worst one."""
    rows = [_row(arm) for arm in shown_arms(found)]
    columns = [*(_site_column(found, site) for site in found.sites), Column(WORST, "worst site", "of each arm")]
    columns = [column for column in columns if any(has_value(row, column) for row in rows)]
    charts = [
        dot_plot(rows, columns[first : first + COLUMNS], label="Mean Dice of each arm at each site with 95% intervals")
        for first in range(0, len(columns), COLUMNS)
    ]
    marks = [*MODE_KEY, ('<i class="dash control"></i>', "control")]
    marks += [('<i class="dash"></i>', "training on the site's own labels")] if found.oracles else []
    # On a narrow screen letters keep their size, and the figure is moved sideways.
    wide = "".join(f'<div class="scroll wide">{chart}</div>' for chart in charts)
    return Html(key(marks) + wide) if any(charts) else Html("")


def lesion_figure(found: StudyFindings) -> Html:
    """What harmonization did to the lesions of travelling subjects: recall and false ones, harmonized less as scanned."""
    rows = []
    for name, report in found.quality.items():
        lesions: Mapping[str, Any] = report.get("lesions") or {}
        arm = found.arm(name)
        for site in ["all"] if "all" in lesions else lesions:
            found_here = {key: lesions[site].get(key) for key in ("lesion_recall", "false_lesions")}
            changes = {key: entry["change"] for key, entry in found_here.items() if entry}
            values = {key: Estimate(**change) for key, change in changes.items() if change["value"] is not None}
            where = "" if site == "all" else f", {site}"
            rows.append(Row(group_of(arm), f"{row_name(arm)}{where}", style_of(arm), values))
    if not any(row.values for row in rows):
        return Html("")
    line = (("control", 0.0, "as scanned"),)
    columns = [
        Column("lesion_recall", "lesions found, change of the share", "below 0: lesions are lost", line, (-0.1, 0.1)),
        Column("false_lesions", "false lesions per volume, change", "above 0: lesions are made up", line, (-0.5, 0.5)),
    ]
    return Html(
        f'<div class="scroll wide">{dot_plot(rows, columns, label="Lesions found and made up, harmonized less as scanned")}</div>'
    )


def gap_figure(found: StudyFindings) -> Html:
    """Share of the gap that each arm recovers."""
    rows = [
        Row(group_of(arm), row_name(arm), style_of(arm), {"gap": arm.gap.recovered})
        for arm in shown_arms(found)
        if arm.gap is not None and arm.gap.recovered is not None
    ]
    if not rows:
        return Html("")
    lines = (("control", 0.0, "the control"), ("oracle", 1.0, "a training on the sites' own labels"))
    column = Column("gap", "share of the gap recovered", "0: the control; 1: own labels", lines, (0.0, 1.0))
    return Html(
        dot_plot(
            rows, [column], label="Share of the gap that each arm recovers, 95% intervals", width=760, natural=True
        )
    )


def federated_figure(found: StudyFindings) -> Html:
    """Federated against central: differences with the margin, then a mark per case."""
    if not found.federated:
        return Html("")
    margin = float(found.settings["margin"])
    scatters = [
        figure(
            _name(found.arm(item.first)),
            paired_chart(
                found.points.get(item.first, []),
                found.sites,
                margin=margin,
                label=f"Dice of each case, central and federated, {_name(found.arm(item.first))}",
            ),
        )
        for item in found.federated
    ]
    marks = [(marker_icon(found.sites.index(site)), site) for site in found.targets]
    return Html(f"{_bands(found)}{key(marks)}{figures(scatters)}")


def _bands(found: StudyFindings, width: int = 560) -> Html:
    """Differences between federated and central, and the margin."""
    rows = [
        (
            _name(found.arm(item.first)) + only_at(found, item),
            "series-3",
            replace(item.equivalence.interval, value=item.difference.value),
        )
        for item in found.federated
        if item.equivalence is not None  # else central failed: near to it is no praise
    ]
    return Html(
        band_chart(
            rows,
            margin=float(found.settings["margin"]),
            x_label="federated less central, Dice, 90% interval",
            label="Difference between federated and central training, and the margin of equivalence",
            width=width,
        )
    )


def epsilon_figure(found: StudyFindings) -> Html:
    """Dice, and where it was measured the reproducibility of radiomics, against epsilon."""
    icc = {name: estimate for name, report in found.quality.items() if (estimate := _icc(report)) is not None}
    chart = _epsilon_lines(found)
    radiomics = _epsilon_chart(
        found, icc, "Median ICC of radiomics features against epsilon, 95% intervals", "median ICC"
    )
    if not radiomics:
        return chart
    return figures([figure("mean Dice", chart), figure("median ICC of radiomics features", radiomics)])


def _epsilon_lines(found: StudyFindings, height: int = 290) -> Html:
    targets = {arm.arm: arm.target for arm in found.arms if arm.target is not None}
    words = "Dice over the target sites against epsilon, 95% intervals"
    return _epsilon_chart(found, targets, words, f"mean Dice at {joined(found.targets)}", height=height)


def _epsilon_chart(
    found: StudyFindings, values: Mapping[str, Estimate], label: str, y_label: str, height: int = 290
) -> Html:
    """A line for each kind and mode.

    Args:
        values: arm -> what is drawn; arms without are left out.
    """
    lines: dict[tuple[str, str], dict[float, Estimate]] = {}
    free: dict[tuple[str, str], Estimate] = {}
    for arm in found.arms:
        if arm.arm in values and arm.epsilon is not None:
            lines.setdefault((arm.kind, arm.mode), {})[arm.epsilon] = values[arm.arm]
        elif arm.arm in values and arm.augmentation and not arm.site:
            free[arm.kind, arm.mode] = values[arm.arm]
    if not lines:
        return Html("")
    drawn, marks = [], []
    harmonizers = list(dict.fromkeys(kind for kind, _ in lines if kind != CONTROL))
    for kind, mode in lines:
        plain, harmonized = ("series-1", "series-2") if mode == "central" else ("series-4", "series-3")
        # The colour says the mode, the dashes which of several harmonizers.
        style = plain if kind == CONTROL else f"{harmonized} dashes-{harmonizers.index(kind)}"
        drawn.append((f"{kind_name(kind)}, {mode}", style, lines[kind, mode], free.get((kind, mode))))
        marks.append((f'<i class="{style}"></i>', f"{kind_name(kind)}, {mode}"))
    return Html(key(marks) + epsilon_chart(drawn, label=label, y_label=y_label, height=height))


def _icc(report: Mapping[str, Any]) -> Estimate | None:
    """Median over features of harmonized volumes, all sites together."""
    icc = (report.get("features") or {}).get("icc")
    if not icc:
        return None
    after = icc["median"]["after"]
    return Estimate(after["value"], after.get("low"), after.get("high"))


def answer_figure(found: StudyFindings, sites: Findings | None, question: int) -> Html:
    """The small figure beside the answer to a question of `answers.QUESTIONS`; nothing where there is none."""
    return (_apart(sites), _central(found), _bands(found, width=500), _epsilon_lines(found, height=210))[question]


def _apart(sites: Findings | None) -> Html:
    """Distances between the sites as scanned."""
    variants = headline(sites)[:1] if sites is not None else []
    if sites is None or not variants:
        return Html("")
    names = [card.site for card in sites.sites]
    highest = highest_distance(variants)
    label = "Distance between sites as scanned, in standard deviations"
    return Html(distance_matrix(variants[0][1], names, highest=highest, label=label, narrow=True))


def _central(found: StudyFindings) -> Html:
    """Mean Dice over the target sites of central arms."""
    rows = [
        Row("", row_name(arm), style_of(arm), {"": arm.target})
        for arm in shown_arms(found)
        if arm.mode == "central" and arm.epsilon is None and arm.target is not None
    ]
    if len(rows) < 2:
        return Html("")
    reached = [found.arm(found.oracles[site]).dice.get(site) for site in found.targets if site in found.oracles]
    means = [estimate.value for estimate in reached if estimate is not None and estimate.value is not None]
    lines: list[tuple[str, float, str]] = []
    if len(means) == len(found.targets):
        lines.append(("oracle", sum(means) / len(means), "trainings on the sites' own labels"))
    note = "dashed: own labels" if lines else ""
    column = Column("", f"mean Dice at {joined(found.targets)}", note, lines)
    return Html(
        dot_plot(
            rows,
            [column],
            label="Mean Dice over the target sites, 95% intervals",
            width=500,
            left=room_for([row.name for row in rows]),
            natural=True,
        )
    )


def _row(arm: ArmFinding) -> Row:
    values = dict(arm.dice)
    if arm.worst.value is not None:
        values[WORST] = arm.worst
    return Row(group_of(arm), row_name(arm), style_of(arm), values)


def _site_column(found: StudyFindings, site: str) -> Column:
    lines: list[tuple[str, float, str]] = []
    control = found.arm(found.control).dice.get(site)
    if control is not None and control.value is not None:
        lines.append(("control", control.value, f"control: {number(control.value, 3)}"))
    oracle = found.oracles.get(site)
    if oracle is not None and oracle != found.control:
        reached = found.arm(oracle).dice.get(site)
        if reached is not None and reached.value is not None:
            lines.append(("oracle", reached.value, f"own labels: {number(reached.value, 3)}"))
    withheld = "held out" if site in found.held_out else "labels withheld"
    labels = "labels used" if site in found.labelled else withheld
    return Column(site, site, f"{count(found.patients.get(site, 0), 'patient')}; {labels}", lines)


def _name(arm: ArmFinding) -> str:
    return kind_name(arm.kind, augmentation=arm.augmentation)
