"""Tables of the report: Dice and distances, comparisons, controls, harmonization quality, lesions, cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.evaluation.html import Html, folded, table, text
from nnunet_fedharm.evaluation.words import DASH, interval, number, percent, probability, scientific
from nnunet_fedharm.study.findings import BETTER, UNCLEAR, WORSE, ArmFinding, Comparison, StudyFindings
from nnunet_fedharm.study.report.names import shown_arms
from nnunet_fedharm.study.report.phrases import signed

QUALITY_METRICS = {
    "nrmse": ("nRMSE", 2),
    "ssim": ("SSIM", 2),
    "edges_kept": ("edges kept", 2),
    "cnr_over_truth": ("CNR / truth", 2),
}


def dice_table(found: StudyFindings) -> Html:
    """Every arm, also those on one site's own labels."""
    return _by_site(found, "dice", 3)


def distance_table(found: StudyFindings) -> Html:
    """The same in 95% Hausdorff distances."""
    return _by_site(found, "hd95_mm", 2)


def _by_site(found: StudyFindings, name: str, digits: int) -> Html:
    with_gap = name == "dice"
    rows = []
    for arm in [*shown_arms(found), *(arm for arm in found.arms if arm.site)]:
        values: dict[str, Estimate] = getattr(arm, name)
        cells: list[object] = [_cell(values.get(site), digits) for site in found.sites]
        if with_gap:
            cells.append(_cell(arm.worst, digits, arm.worst_site or ""))
            cells.append(_gap(arm))
        rows.append((arm.title, arm.seeds, *cells))
    return table(("arm", "trainings", *found.sites, *(("worst site", "gap recovered") if with_gap else ())), rows)


def _cell(estimate: Estimate | None, digits: int, note: str = "") -> Html:
    if estimate is None or estimate.value is None:
        return text(DASH)
    small = "" if estimate.low is None else f"{number(estimate.low, digits)} to {number(estimate.high, digits)}"
    words = f"{note} {small}".strip()
    return Html(f"{number(estimate.value, digits)}<small>{text(words)}</small>")


def _gap(arm: ArmFinding) -> Html:
    if arm.gap is None:
        return text(DASH)
    share = arm.gap.recovered
    if share is None:
        return Html("no gap<small>shown</small>")
    return Html(f"{percent(share.value)}<small>{percent(share.low)} to {percent(share.high)}</small>")


def comparison_tables(found: StudyFindings) -> Html:
    """Every family of tests."""
    families = (
        ("Arms against the control, over the target sites", found.against_control),
        ("Central harmonizers against strong augmentation", found.against_augment),
        ("Federated against central", found.federated),
        ("With differential privacy against without", found.private),
        ("With differential privacy against without, where labels were used", found.private_at_labels),
        ("Arms against the control, site by site", found.at_each_site),
        ("Harmonizers against plain nnU-Net of their mode, at the reference site", found.at_reference),
        ("Own labels against the control, site by site", found.gap_tests),
    )
    return Html("".join(folded(title, _comparisons(found, items)) for title, items in families if items))


def _comparisons(found: StudyFindings, items: list[Comparison]) -> Html:
    with_equal = any(item.equivalence for item in items)
    rows = []
    for item in items:
        equal = item.equivalence
        cells: list[object] = [
            found.arm(item.second).title, ", ".join(item.sites), signed(item.difference),
            probability(item.p), probability(item.adjusted), _verdict(item.verdict),
        ]  # fmt: skip
        if with_equal:
            cells += [probability(equal.p), signed(equal.interval), _equal(item)] if equal else [DASH] * 3
        rows.append((found.arm(item.first).title, *cells, item.patients, item.seeds))
    head = ("arm", "against", "sites", "difference (95% interval)", "p", "p, Holm", "verdict")
    more = ("p, TOST, Holm", "90% interval", "as good") if with_equal else ()
    return table((*head, *more, "patients", "trainings"), rows)


def _verdict(verdict: str) -> Html:
    css = {BETTER: "good", WORSE: "bad", UNCLEAR: ""}[verdict]
    return Html(f'<span class="{css}">{verdict if verdict != UNCLEAR else "not shown"}</span>')


def _equal(item: Comparison) -> Html:
    equal = item.equivalence
    if equal is not None and equal.shown:
        return Html(f'<span class="good">yes, within {equal.margin:g}</span>')
    return text("not worse" if equal is not None and equal.not_worse else "not shown")


def control_table(found: StudyFindings) -> Html:
    """Checks whose answer is known."""
    words = {True: '<span class="good">passed</span>', False: '<span class="bad">failed</span>', None: "not told"}
    return table(
        ("control", "result", "numbers"),
        [(item.name, Html(words[item.passed]), item.words) for item in found.controls],
        css="numbers words",
    )


def quality_tables(found: StudyFindings) -> Html:
    """Travelling subjects: an overview of fidelity, structure, radiomics and site classifier; every site and channel folded."""
    if not found.quality:
        return Html("")
    fidelity, radiomics = [], []
    for name, report in found.quality.items():
        title = found.arm(name).title
        for site, channels in (report.get("sites") or {}).items():
            for channel, metrics in channels.items():
                cells = [_change(metrics.get(metric), digits) for metric, (_, digits) in QUALITY_METRICS.items()]
                fidelity.append((title, site, channel, *cells))
        features = report.get("features") or {}
        groups = [(f"CCC at {site}", entry) for site, entry in (features.get("sites") or {}).items()]
        groups += [("ICC(2,1), all sites", features["icc"])] if features.get("icc") else []
        radiomics += [(title, measure, *_agreement(entry)) for measure, entry in groups]
    metrics_head = ("arm", "site", "channel", *(title for title, _ in QUALITY_METRICS.values()))
    return Html(
        _overview(found)
        + folded("Every site and channel", table(metrics_head, fidelity))
        + folded(
            "Agreement of radiomics features with the same patients at the reference, medians over features",
            table(
                ("arm", "measure", "as scanned", "harmonized", "change (95% interval)"), radiomics, css="numbers words"
            ),
        )
    )


def _overview(found: StudyFindings) -> Html:
    """A row per arm: all sites together, first channel, as scanned and harmonized."""
    rows = []
    for name, report in found.quality.items():
        sites = report.get("sites") or {}
        metrics: Mapping[str, Any] = next(iter(sites.get("all", next(iter(sites.values()), {})).values()), {})
        cells: list[object] = [_change(metrics.get(metric), digits) for metric, (_, digits) in QUALITY_METRICS.items()]
        features = report.get("features") or {}
        agreement = (features.get("sites") or {}).items()
        lines = [f"{text(site)} {_both(entry['median'])}" for site, entry in agreement]
        cells.append(Html("<br>".join(lines)) if lines else DASH)
        cells.append(_both(features["icc"]["median"]) if features.get("icc") else DASH)
        classifier = report.get("site_classifier") or {}
        cells.append(_recognised(classifier) if classifier.get("before") else DASH)
        rows.append((found.arm(name).title, *cells))
    metrics_head = [title for title, _ in QUALITY_METRICS.values()]
    head = ("arm", *metrics_head, "median CCC", "median ICC", "site recognised")
    return table(head, rows)


def _both(entry: Mapping[str, Any]) -> str:
    return f"{number(entry['before']['value'])} → {number(entry['after']['value'])}"


def _change(entry: Mapping[str, Any] | None, digits: int) -> Html:
    if not entry:
        return text(DASH)
    before, after = entry["before"]["value"], entry["after"]["value"]
    return Html(f"{number(before, digits)} → {number(after, digits)}")


def _agreement(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    median = entry["median"]
    change = median["change"]
    return (
        number(median["before"]["value"]),
        number(median["after"]["value"]),
        signed(Estimate(change["value"], change["low"], change["high"])),
    )


def _recognised(classifier: Mapping[str, Any]) -> Html:
    """Balanced accuracy before and after, and below it what shuffled sites reach."""
    shown = []
    for state in ("before", "after"):
        accuracy = classifier[state]["balanced_accuracy"]
        shown.append(percent(accuracy["value"] if isinstance(accuracy, Mapping) else accuracy))
    high = percent(classifier["after"].get("null_high"))
    return Html(f"{' → '.join(shown)}<small>shuffled: {high}</small>")


def lesion_table(found: StudyFindings) -> Html:
    """Lesion-wise recall and false lesions, where a segmenter that saw no harmonized image judged them."""
    rows = []
    for name, report in found.quality.items():
        for site, entry in (report.get("lesions") or {}).items():
            cells = [
                _change(entry.get(metric), 2)
                for metric in ("lesion_recall", "false_lesions", "false_lesions_on_lesion_free")
            ]
            rows.append((found.arm(name).title, site, entry["n_lesions"], *cells))
    head = ("arm", "site", "lesions", "recall", "false lesions per volume", "on lesion-free volumes")
    return table(head, rows)


def cost_table(found: StudyFindings) -> Html:
    """Time, energy, traffic and epsilon of each arm."""
    rows = []
    measured = any(cost.energy_j is not None for cost in found.costs)
    shared = any(cost.shared_s is not None for cost in found.costs)
    adapted = any(cost.adapt_s for cost in found.costs)
    for cost in found.costs:
        arm = found.arm(cost.arm)
        spent = DASH if cost.epsilon is None else f"{cost.epsilon:.2f}"
        delta = DASH if cost.delta is None else scientific(cost.delta)
        rows.append(
            (
                arm.title,
                *([_minutes(cost.shared_s)] if shared else ()),
                _minutes(cost.train_s),
                *([_minutes(cost.adapt_s or None)] if adapted else ()),
                *([DASH if cost.energy_j is None else f"{cost.energy_j / 3600:.1f}"] if measured else ()),
                f"{cost.predict_s:.2f}",
                _bytes(cost.bytes_up),
                _bytes(cost.bytes_down),
                spent,
                delta,
                ", ".join(cost.devices),
            )
        )
    head = (
        "arm",
        *(("shared before, minutes",) if shared else ()),
        "training, minutes",
        *(("adaptation, minutes",) if adapted else ()),
        *(("training, Wh",) if measured else ()),
        "prediction, s per volume",
        "sent by sites",
        "sent to sites",
        "epsilon spent",
        "delta",
        "device",
    )
    return table(head, rows)


def _minutes(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds / 60:.1f}"


def _bytes(size: int) -> str:
    return DASH if not size else f"{size / 1000:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def gap_words(found: StudyFindings) -> str:
    """Gap of each site, in a sentence."""
    shown = [f"{site} {interval(gap, 3)}" for site, gap in found.gaps.items()]
    return f"Gap between control and own labels: {'; '.join(shown)}." if shown else ""
