"""The site report as one HTML page: an answer and pictures first, statistics below, settings at the end.

`render_site_report` computes nothing and reads no file. The page needs no network and no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from nnunet_fedharm.differences.findings import Estimate, Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.html import Html, feature_name, figure, figures, paragraphs, table, text
from nnunet_fedharm.evaluation.report_style import REPORT_STYLE
from nnunet_fedharm.evaluation.site_report.charts import marker_icon
from nnunet_fedharm.evaluation.site_report.parts import (
    Variants,
    anchor_of,
    distance_matrix,
    family_block,
    highest_distance,
    largest_pair,
    part_section,
)
from nnunet_fedharm.evaluation.site_report.slices import TypicalSlices
from nnunet_fedharm.evaluation.site_report.tables import failure_table, scanner_table, settings_table, shared_table
from nnunet_fedharm.evaluation.site_report.words import (
    FAMILIES,
    chance_sentence,
    classifier_sentence,
    headline,
    is_chance,
    keys,
    parts_of,
    scanner,
    short_part_name,
)
from nnunet_fedharm.evaluation.words import DASH, count, day, number, percent


def render_site_report(findings: Findings, *, sentences: Sequence[str], slices: Sequence[TypicalSlices] = ()) -> str:
    """The page as text.

    Args:
        findings: everything that was measured and computed.
        sentences: the answer, one to three plain sentences.
        slices: pictures of typical volumes, one set per channel; the first is on the first screen. None in a federation.
    """
    sites = [card.site for card in findings.sites]
    first = keys(findings)[0] if keys(findings) else None
    variants = headline(findings)
    parts = "".join(part_section(key, parts_of(findings, key), sites, opened=key == first) for key in keys(findings))
    return Template(_PAGE).substitute(
        style=REPORT_STYLE,
        title=escape(f"How different are the sites of {findings.dataset}?"),
        heading=Html(f"How different are the sites of {feature_name(findings.dataset)}?"),
        lead=escape(_lead(findings)),
        answer=_answer(sentences),
        first=_first_screen(findings, variants, sites, slices[:1]),
        families=_section_without_title(family_block(variants)) if slices else "",
        scanners=_section("Scanners", scanner_table(findings), _SCANNERS),
        pictures=_typical(slices, sites),
        overview=_overview(findings),
        parts=parts,
        failures=_section("Cases that could not be measured", failure_table(findings)),
        shared=_section("What left the sites", shared_table(findings), _SHARED) if findings.mode == "federated" else "",
        settings=_section("Settings", settings_table(findings.settings), _SETTINGS),
        notes=paragraphs(_notes(findings)),
    )


def _answer(sentences: Sequence[str]) -> Html:
    """The first sentence large, what supports it below."""
    return Html(f'{paragraphs(sentences[:1])}<div class="support">{paragraphs(sentences[1:])}</div>')


def _lead(findings: Findings) -> str:
    cards = findings.sites
    # Under secure sums a site's own number stays at the site; the sum does not.
    total = sum(card.n_cases for card in cards) or max(
        (sum(part.n.values()) for variant in findings.variants for part in variant.parts), default=0
    )
    words = [
        f"{count(total, 'volume')} at {count(len(cards), 'site')}",
        "measured at the sites; no image, no volume's features and no case name left them"
        if findings.mode == "federated"
        else "all data in one place",
    ]
    if len(findings.variants) > 1:
        words.append(joined([variant.name for variant in findings.variants]))
    return "; ".join([*words, day(findings.created)]) + "."


def _first_screen(
    findings: Findings, variants: Variants, sites: Sequence[str], slices: Sequence[TypicalSlices]
) -> Html:
    cards = "".join(_site_card(findings, index, slices) for index in range(len(sites)))
    lead = ""
    if slices:
        low, high = slices[0].window
        lead = (
            f"<p>A typical volume of each site ({escape(slices[0].channel)}): the slice through the middle of its labels, "
            f"black at {low:.1f} and white at {high:.1f} standard deviations everywhere.</p>"
        )
    title = "What each site's scanner shows" if slices else "The sites"
    families = "" if slices else family_block(variants)
    left = f"<section><h2>{title}</h2>{lead}<div class='sitegrid'>{cards}</div>{families}</section>"
    return Html(f'<div class="first">{left}{_distance_card(variants, sites)}</div>')


def _site_card(findings: Findings, index: int, slices: Sequence[TypicalSlices]) -> str:
    card = findings.sites[index]
    pictures = ""
    for found in slices:
        for variant, by_site in found.pictures.items():
            for address in by_site.get(card.site, [])[:1]:
                caption = variant if len(found.pictures) > 1 else ""
                pictures += _picture(address, f"Site {card.site}, typical volume, {variant}", caption)
    size = count(card.n_cases, "volume") if card.n_cases else "number of volumes not told"
    words = f"{escape(scanner(card))}<br>{size}"
    rows = 2 + pictures.count("<figure>")
    return (
        f'<div class="sitecard" style="grid-row:span {rows}"><h3>{marker_icon(index)}{escape(card.site)}</h3>'
        f"<span>{words}</span>{pictures}</div>"
    )


def _picture(address: str, words: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{escape(address, quote=True)}" alt="{escape(words, quote=True)}">{below}</figure>'


def _distance_card(variants: Variants, sites: Sequence[str]) -> str:
    highest = highest_distance(variants)
    matrices = [
        figure(
            name if len(variants) > 1 else "",
            distance_matrix(part, sites, highest=highest, label=f"Distance between sites, {name}", narrow=True),
        )
        for name, part in variants
    ]
    if not any(matrices):
        reason = "There are no two sites to compare."
        if len(sites) > 1 and variants:
            reason = "No distance between two sites is known here; the notes of the measurements below say why."
        return f"<section><h2>How far apart</h2><p>{reason}</p>{_told(variants)}</section>"
    return (
        "<section><h2>How far apart</h2><p>Median shift of the features between two sites, in standard deviations over all "
        "volumes. 0 is no difference; 1 means that a site's values lie a whole standard deviation off.</p>"
        f"{figures(matrices)}{_told(variants)}</section>"
    )


def _told(variants: Variants) -> str:
    """How often the first classifier recognises the site, in one sentence for one state, else as a list of states."""
    found = [(name, part.classifiers[0]) for name, part in variants if part.classifiers]
    if not found:
        return ""
    first = found[0][1]
    if len(variants) == 1:
        words = f"<p>{escape(classifier_sentence(first))}</p>"
    else:
        rows = "".join(
            f"<li><b>{percent(item.accuracy.value)}</b> of the volumes {escape(name)}"
            f"{escape(_between(item.accuracy))}{', no more than by chance' if is_chance(item) else ''}</li>"
            for name, item in found
        )
        words = f"<p>{escape(first.method[:1].upper() + first.method[1:])}: recognises the site of</p><ul>{rows}</ul>"
        words += f"<p>{escape(chance_sentence(first))}</p>"
    return f"<h2 class='next'>Can a computer tell the site?</h2><div class='said'>{words}</div>"


def _between(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({percent(estimate.low)} to {percent(estimate.high)})"


def _typical(slices: Sequence[TypicalSlices], sites: Sequence[str]) -> str:
    shown = ""
    for found in slices:
        cards = ""
        for index, site in enumerate(sites):
            rows = ""
            for variant, by_site in found.pictures.items():
                pictures = "".join(
                    f'<img src="{escape(address, quote=True)}" alt="Site {escape(site, quote=True)}, typical volume {n}, '
                    f'{escape(variant, quote=True)}">'
                    for n, address in enumerate(by_site.get(site, []), start=1)
                )
                caption = f"<figcaption>{escape(variant)}</figcaption>" if len(found.pictures) > 1 else ""
                rows += f'<figure><div class="three-up">{pictures}</div>{caption}</figure>' if pictures else ""
            cards += f"<div class='sitecard'><h3>{marker_icon(index)}{escape(site)}</h3>{rows}</div>"
        title = f"<h3>{escape(found.channel)}</h3>" if len(slices) > 1 else ""
        low, high = found.window
        shown += f"{title}<p>Black is {low:.1f} and white {high:.1f} standard deviations from the volume's mean.</p>"
        shown += f'<div class="slices">{cards}</div>'
    return _section("Three typical volumes of each site", shown, _TYPICAL)


def _overview(findings: Findings) -> str:
    rows: list[tuple[object, ...]] = []
    several = len(findings.variants) > 1
    for key in keys(findings):
        name_of_part: object = Html(f'<a href="#{anchor_of(key)}">{text(short_part_name(key))}</a>')
        for name, part in parts_of(findings, key):
            pair = largest_pair(part)
            best = part.classifiers[0] if part.classifiers else None
            rows.append(
                (
                    name_of_part,
                    *([_keep(name)] if several else []),
                    _keep(f"{pair.first} and {pair.second}: {number(pair.wasserstein.value)}" if pair else DASH),
                    percent(best.accuracy.value) if best else DASH,
                    *(percent(part.share_significant.get(family)) for family in FAMILIES),
                )
            )
            name_of_part = ""
    head = ("channel, region, scale", *(["state"] if several else []), "furthest sites", "site recognised", *FAMILIES)
    return table(head, rows, css="numbers words toc")


def _keep(words: str) -> Html:
    """Not to be broken into lines."""
    return Html(f'<span class="keep">{text(words)}</span>')


def _notes(findings: Findings) -> list[str]:
    notes = [
        "Features differ between sites because scanners differ, or because patients do. Shape is the control for the second; "
        "travelling subjects, where there are any, settle it. A site report cannot separate the two without them.",
        "After z-score, overall brightness and contrast are gone by construction; differences in raw values of MR have no unit "
        "and mean little between vendors.",
        "Intervals are 95% bootstrap intervals by patient. p values are not corrected across parts; q values are, across the "
        "features of their part.",
    ]
    if findings.mode == "federated":
        return [*notes, "There are no pictures, no single volumes and no outliers here: those stay at the sites."]
    return [
        *notes,
        "This page shows slices of patients and names of cases: keep it where the images may be. The federated report holds "
        "neither.",
    ]


def _section(title: str, content: str, lead: str = "") -> str:
    if not content:
        return ""
    words = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{words}{content}</section>"


def _section_without_title(content: str) -> str:
    return f'<section class="bare">{content}</section>' if content else ""


_SCANNERS = "As sites.json states them. A patient seen at several sites counts at each."
_SHARED = "Every message from a site to the server. Nothing else left the sites."
_SETTINGS = "What the numbers depend on, in the spirit of the Image Biomarker Standardisation Initiative (IBSI)."
_TYPICAL = (
    "Chosen by their features, not by hand: the three volumes with the smallest summed distance to all others of their site. "
    "The same slice of the same volumes in every state, in one window."
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$heading</h1><p class="lead">$lead</p><div class="answer">$answer</div></header>
$first
$families
$scanners
$pictures
<section><h2>All measurements</h2><p>Each line is a channel, a region and an intensity scale; the sections below hold
everything about it. Site recognised: balanced accuracy of the first classifier. Intensity to shape: share of the family's
features that differ between sites (q below .05).</p>$overview</section>
$parts
$failures
$shared
$settings
<section class="notes"><h2>How to read this, and what it does not show</h2>$notes</section>
</main></body></html>
"""
