"""What the site report says about one channel, region and intensity scale, as scanned and harmonized side by side."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.differences.findings import Estimate, FeatureFinding, PairFinding, PartFinding
from nnunet_fedharm.differences.options import SIGNIFICANT
from nnunet_fedharm.evaluation.charts import Point
from nnunet_fedharm.evaluation.html import Html, block, feature_name, figure, figures, folded, key, text
from nnunet_fedharm.evaluation.site_report.charts import marker_icon, matrix_chart, ridge_chart, scatter_chart, track
from nnunet_fedharm.evaluation.site_report.tables import (
    agreement_table,
    classifier_blocks,
    combat_table,
    feature_table,
    outlier_table,
    pair_table,
)
from nnunet_fedharm.evaluation.site_report.words import FAMILIES, Key, part_name
from nnunet_fedharm.evaluation.words import count, interval, number, percent

RANKED, SHOWN_HISTOGRAMS = 12, 6
"""Features in the ranking, and those of them with histograms; all are in differences.csv."""

Variants = Sequence[tuple[str, PartFinding]]


def part_section(key_: Key, variants: Variants, sites: Sequence[str], *, opened: bool) -> Html:
    """Everything about one part, folded."""
    content = "".join(
        (
            _beside(variants, _planes(variants, sites), _distances(variants, sites)),
            Html("") if opened else family_block(variants),
            _ranking(variants),
            _histograms(variants, sites),
            block(
                "Each two sites",
                *(_of(name, variants, pair_table(part)) for name, part in variants),
                lead="Medians over features with 95% bootstrap intervals by patient. KS: largest difference between the two "
                "sites' distribution functions, 0 to 1. Wasserstein: mean shift of values, in pooled standard deviations. "
                "MMD: squared distance of all features at once, p from permuted sites.",
            ),
            classifier_blocks(variants, sites),
            block(
                "The same patients at several sites",
                *(_of(name, variants, agreement_table(part)) for name, part in variants),
                lead="Agreement of features of travelling subjects: 1 is full agreement, .75 is called good and .9 excellent. "
                "CCC compares two sites, ICC(2,1) all at once.",
            ),
            block(
                "What correcting the features alone could do",
                *(_of(name, variants, combat_table(part)) for name, part in variants),
                lead="ComBat shifts and scales features per site. It was fitted on other patients than it is judged on here. "
                "It corrects tables, not images: a segmenter gains nothing from it.",
            ),
            block(
                "Volumes unlike the others of their own site",
                *(_of(name, variants, outlier_table(part)) for name, part in variants),
                lead="Robust z-score: distance from the site's median in units of 1.4826 times its median absolute deviation. "
                "The page names cases because it stays with who holds the data.",
            ),
            _notes(variants),
        )
    )
    anchor = f'<span id="{anchor_of(key_)}"></span>'
    return folded(
        Html(f"<b>{text(part_name(key_))}</b> {_gist(variants)}"), anchor + content, opened=opened, css="part"
    )


def anchor_of(key_: Key) -> str:
    """Address of a part inside the page: letters and digits only, and different for different parts."""
    words = "-".join(key_)
    return "part-" + "".join(
        letter if letter.isalnum() and letter.isascii() else f"_{ord(letter):x}" for letter in words
    )


def distance_matrix(
    part: PartFinding, sites: Sequence[str], *, highest: float, label: str, narrow: bool = False
) -> str:
    """Wasserstein distances of each two sites."""
    values: dict[tuple[str, str], tuple[float | None, str, str]] = {}
    for pair in part.pairs:
        tip = f"{pair.first} and {pair.second}: {interval(pair.wasserstein)}"
        for both in ((pair.first, pair.second), (pair.second, pair.first)):
            values[both] = (pair.wasserstein.value, number(pair.wasserstein.value), tip)
    if not values:
        return ""
    present = [site for site in sites if any(site in both for both in values)]
    cell = (44, 36) if narrow or len(present) > 5 else (58, 40)
    return matrix_chart(present, present, values, highest=highest, label=label, cell=cell)


def highest_distance(variants: Variants) -> float:
    """Largest distance of all variants, so that colours can be compared."""
    found = [pair.wasserstein.value or 0.0 for _, part in variants for pair in part.pairs]
    return max(found, default=1.0) or 1.0


def largest_pair(part: PartFinding) -> PairFinding | None:
    """The two sites that are furthest apart."""
    known = [pair for pair in part.pairs if pair.wasserstein.value is not None]
    return max(known, key=lambda pair: pair.wasserstein.value or 0.0, default=None)


def variant_key(variants: Variants) -> Html:
    """Colours of the variants; nothing for one alone."""
    if len(variants) < 2:
        return Html("")
    return key([(f'<i class="series-{index + 1}"></i>', name) for index, (name, _) in enumerate(variants)])


def site_key(sites: Sequence[str]) -> Html:
    """Marks of the sites."""
    return key([(marker_icon(index), site) for index, site in enumerate(sites)])


def family_block(variants: Variants) -> Html:
    """How much of the features' variance the site explains, by family."""
    names = [name for name in FAMILIES if any(name in part.families for _, part in variants)]
    if not names:
        return Html("")
    rows = []
    for name in names:
        first, _, note = FAMILIES[name].partition(": ")
        own = [(variant, part) for variant, part in variants if name in part.families]
        estimates = [(variant, part.families[name]) for variant, part in own]
        shares = [f", {percent(part.share_significant.get(name))}" for _, part in own]
        rows.append(_ranked_row(Html(f"<b>{text(first)}</b><small>{text(note)}</small>"), estimates, shares))
    return block(
        "What differs",
        variant_key(variants),
        _ranked(rows),
        lead="Share of a feature's variance (eta squared of ranks, 0 to 1) that the site explains: median over the family's "
        f"features with 95% interval. Behind it the share of features that differ: q (false discovery) below {SIGNIFICANT:g}.",
    )


def _ranking(variants: Variants) -> Html:
    names = _most_different(variants, RANKED)
    found = [(variant, {item.name: item for item in part.features}) for variant, part in variants]
    rows = []
    for name in names:
        items = [(variant, by_name[name]) for variant, by_name in found if name in by_name]
        label = Html(f"{feature_name(name)}<small>{text(items[0][1].family)}</small>")
        rows.append(_ranked_row(label, [(variant, item.effect) for variant, item in items]))
    tables = "".join(_of(name, variants, feature_table(part, names)) for name, part in variants)
    total = count(len({item.name for _, part in variants for item in part.features}), "feature")
    return block(
        "Features that differ most",
        variant_key(variants),
        _ranked(rows),
        folded("The same as a table, with p, q and medians", tables) if rows else "",
        lead=f"Eta squared with 95% bootstrap interval by patient; the {len(rows)} largest of {total}.",
    )


def _ranked(rows: Sequence[str]) -> Html:
    if not rows:
        return Html("")
    head = (
        f'<div class="ranked head"><span></span>{track([], tick_values=(0.0, 0.25, 0.5, 0.75, 1.0))}<span></span></div>'
    )
    return Html(f"{head}{''.join(rows)}")


def _ranked_row(name: Html, estimates: Sequence[tuple[str, Estimate]], more: Sequence[str] = ()) -> Html:
    points = [
        Point(variant, f"series-{index + 1}", estimate.value, estimate.low, estimate.high)
        for index, (variant, estimate) in enumerate(estimates)
        if estimate.value is not None
    ]
    words = zip([interval(estimate) for _, estimate in estimates], more or [""] * len(estimates), strict=True)
    numbers = "".join(f"<span>{text(value)}{text(share)}</span>" for value, share in words)
    return Html(f'<div class="ranked"><span>{name}</span>{track(points)}<span class="values">{numbers}</span></div>')


def _most_different(variants: Variants, most: int) -> list[str]:
    """Names by their largest effect in any variant: what harmonization leaves or brings is not overlooked."""
    largest: dict[str, float] = {}
    for _, part in variants:
        for item in part.features:
            if item.effect.value is not None:
                largest[item.name] = max(largest.get(item.name, item.effect.value), item.effect.value)
    return sorted(largest, key=lambda name: -largest[name])[:most]


def _histograms(variants: Variants, sites: Sequence[str]) -> Html:
    shown = []
    for name in _most_different(variants, SHOWN_HISTOGRAMS):
        items = [(variant, item) for variant, part in variants for item in part.features if item.name == name]
        edges = [edge for _, item in items for edge in item.edges]
        if edges:
            charts = [_histogram(variant, item, sites, variants, (min(edges), max(edges))) for variant, item in items]
            shown.append(f'<div class="set"><h4>{feature_name(name)}</h4>{figures(charts)}</div>')
    return block(
        "Their values at each site",
        Html(f'<div class="sets n{min(len(variants), 3)}">{"".join(shown)}</div>') if shown else "",
        lead="Share of a site's volumes in each bin; the line is the site's median.",
    )


def _histogram(
    variant: str, item: FeatureFinding, sites: Sequence[str], variants: Variants, x_range: tuple[float, float]
) -> Html:
    label = f"Histogram of {item.name} at each site{_in(variant, variants)}"
    chart = ridge_chart(item.edges, item.histogram, sites, label=label, medians=item.medians, x_range=x_range)
    return figure(variant if len(variants) > 1 else "", chart)


def _beside(variants: Variants, *blocks: str) -> Html:
    """Blocks beside each other, where one state alone leaves room for it."""
    return Html(f'<div class="beside">{"".join(blocks)}</div>' if len(variants) == 1 else "".join(blocks))


def _planes(variants: Variants, sites: Sequence[str]) -> Html:
    shown, notes = [], []
    for name, part in variants:
        if part.embedding is None:
            continue
        points = [(site, x, y, f"{site}: {case}" if case else site) for site, x, y, case in part.embedding.points]
        label = f"Volumes in a plane by {part.embedding.method}{_in(name, variants)}"
        chart = scatter_chart(points, part.embedding.ellipses, sites, axes=part.embedding.axes, label=label)
        shown.append(figure(name if len(variants) > 1 else part.embedding.method, chart))
        notes.append(part.embedding.method)
    lead = f"All features at once, by {notes[0]}: near volumes look alike. " if notes else ""
    lead += "Ellipses hold 95% of a normal distribution with the site's mean and covariance."
    return block("Volumes in a plane", site_key(sites), figures(shown), lead=lead) if any(shown) else Html("")


def _distances(variants: Variants, sites: Sequence[str]) -> Html:
    highest = highest_distance(variants)
    shown = [
        figure(
            name if len(variants) > 1 else "Wasserstein distance",
            distance_matrix(part, sites, highest=highest, label=f"Distance between sites{_in(name, variants)}"),
        )
        for name, part in variants
    ]
    return block(
        "Distance between sites",
        figures(shown),
        lead="Median over features of the Wasserstein distance, in pooled standard deviations; 0 is no difference.",
    )


def _notes(variants: Variants) -> Html:
    notes = dict.fromkeys(f"{note}{_in(name, variants)}" for name, part in variants for note in part.notes)
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return block("What could not be computed, or only with care", f"<ul>{items}</ul>" if items else "")


def _gist(variants: Variants) -> Html:
    """Most important numbers of a part, for the line that opens it."""
    words = []
    for name, part in variants:
        pair, best = largest_pair(part), part.classifiers[0] if part.classifiers else None
        gist = [f"{pair.first} to {pair.second} {number(pair.wasserstein.value)}"] if pair else []
        gist += [f"site recognised in {percent(best.accuracy.value)}"] if best else []
        words.append((f"{name}: " if len(variants) > 1 else "") + ", ".join(gist))
    return Html(f"<small>{'<br>'.join(text(line) for line in words if line)}</small>")


def _of(name: str, variants: Variants, content: str) -> Html:
    """Content under its variant's name, where there are several."""
    if not content:
        return Html("")
    return Html((f"<h4>{text(name)}</h4>" if len(variants) > 1 else "") + content)


def _in(name: str, variants: Variants) -> str:
    return f" ({name})" if len(variants) > 1 else ""
