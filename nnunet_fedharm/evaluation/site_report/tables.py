"""Tables of the site report: pairs of sites, classifiers, agreement, outliers, failures, settings, what left the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_fedharm.differences.findings import AgreementFinding, ClassifierFinding, Findings, PartFinding
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.html import (
    Html,
    block,
    feature_name,
    figure,
    figures,
    paragraphs,
    table,
    text,
)
from nnunet_fedharm.evaluation.site_report.charts import marker_icon, matrix_chart
from nnunet_fedharm.evaluation.site_report.words import classifier_sentence
from nnunet_fedharm.evaluation.words import (
    DASH,
    count,
    interval,
    number,
    percent,
    percent_interval,
    probability,
    significant_digits,
)

MOST_OUTLIERS = 15
SCORED = 3
"""Features named beside an outlier or a pair."""


def scanner_table(findings: Findings) -> Html:
    """Sites and their scanners, from sites.json."""
    rows = [
        (
            Html(f"{marker_icon(index)}{text(card.site)}"),
            card.vendor or "not stated",
            "not stated" if card.field is None else f"{card.field:g}",
            card.sequence or "not stated",
            *((card.n_cases, card.n_patients, card.n_labelled) if card.n_cases else ("not told",) * 3),
        )
        for index, card in enumerate(findings.sites)
    ]
    head = ("site", "vendor", "field (T)", "sequence", "volumes", "patients", "with labels")
    return table(head, rows, css="numbers words")


def feature_table(part: PartFinding, names: Sequence[str]) -> Html:
    """Test, effect and medians of some features."""
    sites = list(part.n)
    by_name = {item.name: item for item in part.features}
    rows = []
    for name in names:
        if name in by_name:
            item = by_name[name]
            medians = [significant_digits(item.medians.get(site)) for site in sites]
            rows.append(
                (
                    feature_name(name),
                    interval(item.effect),
                    probability(item.p),
                    probability(item.q),
                    item.n,
                    *medians,
                )
            )
    head = ("feature", "eta squared (95% interval)", "p", "q", "volumes", *(f"median {site}" for site in sites))
    return table(head, rows)


def pair_table(part: PartFinding) -> Html:
    """Distances of each two sites, the most different first."""
    with_mmd = any(pair.mmd is not None for pair in part.pairs)
    families = list(dict.fromkeys(name for pair in part.pairs for name in pair.by_family))
    rows = []
    for pair in sorted(part.pairs, key=lambda pair: -(pair.wasserstein.value or 0.0)):
        furthest = [f"{name} {number(value)}" for name, value in pair.features[:SCORED]]
        rows.append(
            (
                f"{pair.first} and {pair.second}",
                interval(pair.wasserstein),
                interval(pair.ks),
                *((number(pair.mmd, 3), probability(pair.mmd_p)) if with_mmd else ()),
                *(number(pair.by_family.get(name)) for name in families),
                _lines(furthest),
            )
        )
    head = (
        "sites",
        "Wasserstein",
        "KS",
        *(("MMD²", "p") if with_mmd else ()),
        *families,
        Html('<span class="long">largest Wasserstein distances</span>'),
    )
    return table(head, rows)


def classifier_blocks(variants: Sequence[tuple[str, PartFinding]], sites: Sequence[str]) -> Html:
    """A sentence and a confusion matrix for each classifier, variants side by side."""
    methods = list(dict.fromkeys(item.method for _, part in variants for item in part.classifiers))
    shown = []
    for method in methods:
        for name, part in variants:
            for item in (found for found in part.classifiers if found.method == method):
                title = f"{method}, {name}" if len(variants) > 1 else method
                shown.append(_classifier(title, item, sites))
    return block(
        "Can a computer tell the site?",
        figures(shown),
        lead="Balanced accuracy, cross-validated: no patient is in training and test at once. The null repeats it with "
        "shuffled sites. A blank image fools every classifier: low accuracy alone is no proof of harmonization.",
    )


def _classifier(title: str, item: ClassifierFinding, sites: Sequence[str]) -> Html:
    present = [site for site in sites if site in item.confusion]
    values: dict[tuple[str, str], tuple[float | None, str, str]] = {}
    for true in present:
        total = sum(item.confusion[true].values())
        for predicted in present:
            size = item.confusion[true].get(predicted, 0)
            values[true, predicted] = (
                size / total if total else 0.0,
                str(size),
                f"{true} taken for {predicted}: {size}",
            )
    chart = ""
    if values:
        chart = matrix_chart(
            present,
            present,
            values,
            highest=1.0,
            label=f"Confusion matrix, {title}",
            axes=("true site", "recognised as"),
            cell=(48, 34) if len(present) <= 6 else (38, 28),
        )
    names = ", ".join(name for name, _ in item.features[:SCORED])
    words = [classifier_sentence(item)]
    words += [f"Most important features: {names}."] if names else []
    return Html(f'<div class="classifier">{figure(title, chart)}<div class="said">{paragraphs(words)}</div></div>')


def agreement_table(part: PartFinding) -> Html:
    """CCC and ICC of travelling subjects: a line for each group of sites, a column for each family."""
    families = list(dict.fromkeys(item.family for item in part.agreement))
    found = {(item.sites, item.measure): item for item in part.agreement}
    by_family = {(item.sites, item.measure, item.family): item for item in part.agreement}
    rows = []
    for (sites, measure), any_item in found.items():
        cells = [by_family.get((sites, measure, family)) for family in families]
        rows.append(
            (
                joined(sites),
                measure,
                *(_agreement(item) for item in cells),
                any_item.n_patients,
            )
        )
    head = ("sites", "measure", *(f"{family} features" for family in families), "patients")
    return table(head, rows)


def _agreement(item: AgreementFinding | None) -> Html:
    """Median over features, and below it how many of them agree."""
    if item is None:
        return text(DASH)
    return Html(f"{text(interval(item.median))}<small>{percent(item.share_good)} of {item.n_features} good</small>")


def combat_table(part: PartFinding) -> Html:
    """ComBat on held-out patients."""
    found = part.combat
    if found is None:
        return Html("")
    rows: list[tuple[str, str, str]] = [
        (
            "features that differ (q < .05)",
            percent(found.share_significant[0]),
            percent(found.share_significant[1]),
        ),
        ("median eta squared", number(found.effect[0]), number(found.effect[1])),
    ]
    if found.classifier is not None:
        same = [item for item in part.classifiers if found.classifier.method.startswith(item.method)]
        before = percent_interval(same[0].accuracy) if same else percent(None)
        rows.append(
            (
                "site recognised, " + (same[0].method if same else found.classifier.method),
                before,
                percent_interval(found.classifier.accuracy),
            )
        )
    known = any(value is not None for value in (*found.share_significant, *found.effect)) or found.classifier
    shown = table(("", "features as measured", "after ComBat"), rows) if known else ""
    return Html(shown + (f"<p>{text(found.note)}</p>" if found.note else ""))


def outlier_table(part: PartFinding) -> Html:
    """Cases unlike the others of their site."""
    found = sorted(part.outliers, key=lambda item: -item.score)
    rows = [
        (
            item.case,
            item.site,
            number(item.score, 1),
            _lines([f"{name} {value:+.1f}" for name, value in item.features[:SCORED]]),
        )
        for item in found[:MOST_OUTLIERS]
    ]
    shown = table(("case", "site", "largest robust z", "features"), rows, css="numbers words")
    more = len(found) - MOST_OUTLIERS
    return Html(shown + (f"<p>{count(more, 'more case')} in report.json.</p>" if more > 0 else ""))


def failure_table(findings: Findings) -> Html:
    """Cases that could not be measured; without their names in a federation."""
    if findings.mode == "federated":
        reasons: dict[tuple[str, str], int] = {}
        for item in findings.failures:
            reasons[item.site, item.reason] = reasons.get((item.site, item.reason), 0) + 1
        return table(("site", "cases", "reason"), [(*pair[:1], n, pair[1]) for pair, n in reasons.items()], css="words")
    return table(
        ("case", "site", "reason"),
        [(item.case, item.site, item.reason) for item in findings.failures],
        css="numbers words",
    )


def shared_table(findings: Findings) -> Html:
    """Everything that left a site."""
    rows = [(message, holds, _bytes(size)) for message, holds, size in findings.shared]
    return table(("message", "what it holds", "size"), rows, css="numbers words")


def settings_table(settings: Mapping[str, Any]) -> Html:
    """Settings, nested ones with their path."""
    return table(("setting", "value"), [(name, value) for name, value in _flat(settings)], css="numbers words settings")


def _lines(words: Sequence[str]) -> Html:
    return Html(f'<span class="long">{"<br>".join(feature_name(word) for word in words)}</span>')


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        path = f"{above}{name}".replace("_", " ")
        rows += _flat(value, f"{path}: ") if isinstance(value, Mapping) else [(path, _setting(value))]
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_setting(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "not set" if value is None else str(value)


def _bytes(size: int) -> str:
    return f"{size} bytes" if size < 1000 else f"{size / 1000:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
