"""The study as one HTML page: answers and pictures first, numbers below, methods at the end.

`render_study` computes nothing and reads no file. The page needs no network and no script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.differences.summary import describe
from nnunet_fedharm.evaluation.html import Html, block, bullets, figure, figures, folded, key, paragraphs, text
from nnunet_fedharm.evaluation.site_report.parts import distance_matrix, highest_distance
from nnunet_fedharm.evaluation.site_report.tables import scanner_table
from nnunet_fedharm.evaluation.site_report.words import headline
from nnunet_fedharm.evaluation.words import count, day
from nnunet_fedharm.study.findings import FEWEST_SEEDS, StudyFindings
from nnunet_fedharm.study.report import tables
from nnunet_fedharm.study.report.answers import NOT_MEASURED, Answer, answer_all
from nnunet_fedharm.study.report.figures import (
    answer_figure,
    dice_figure,
    epsilon_figure,
    federated_figure,
    gap_figure,
    lesion_figure,
)
from nnunet_fedharm.study.report.markdown import to_html
from nnunet_fedharm.study.report.names import measured_cases, place
from nnunet_fedharm.study.report.pictures import SiteStrip
from nnunet_fedharm.study.report.prices import another_training
from nnunet_fedharm.study.report.style import STUDY_STYLE

SHOWN = 3
"""Sentences under an answer; more are folded."""


@dataclass(frozen=True)
class Extras:
    """What the page shows beside the numbers.

    Attributes:
        sites: site report of the dataset, where there is one.
        strips, strip_notes: pictures, and sentences on those that are missing.
        labels: names for the colour key.
        methods: Markdown. bibtex: entries.
    """

    sites: Findings | None = None
    strips: Sequence[SiteStrip] = ()
    strip_notes: Sequence[str] = ()
    labels: Sequence[str] = ()
    methods: str = ""
    bibtex: str = ""


def render_study(found: StudyFindings, extras: Extras) -> str:
    """The page as text."""
    sections = [
        ("dice", "Dice at each site", dice_figure(found) + _dice_tables(found), _DICE),
        ("gap", "Share of the gap recovered", gap_figure(found) + paragraphs(_gap_words(found)), _GAP),
        ("federated", "Federated against central", federated_figure(found), _federated_lead(found)),
        (
            "privacy",
            _epsilon_title(found),
            epsilon_figure(found),
            f"{_EPSILON} {another_training(found)}",
        ),
        ("pictures", "Before and after", _strips(extras), _PICTURES),
        ("quality", "Harmonization quality", tables.quality_tables(found), _QUALITY),
        ("lesions", "Lesion safety", lesion_figure(found) + tables.lesion_table(found), _LESIONS),
        ("controls", "Controls", tables.control_table(found), _CONTROLS),
        ("sites", "Differences between the sites", _sites(extras.sites), _sites_lead(extras.sites)),
        ("tests", "All comparisons", tables.comparison_tables(found), _TESTS),
        ("cost", "Cost", tables.cost_table(found), f"{_COST} {another_training(found)}"),
    ]
    shown = [item for item in sections if item[2]]
    absent = [title for _, title, content, _ in sections if not content]
    tail = [
        ("methods", "Methods", _methods(extras), ""),
        ("limits", "Limits", with_code(bullets(limits(found, absent))), ""),
    ]
    return Template(_PAGE).substitute(
        style=STUDY_STYLE,
        title=escape(found.name),
        lead=escape(_lead(found)),
        questions="".join(
            _question(item, answer_figure(found, extras.sites, index))
            for index, item in enumerate(answer_all(found, extras.sites))
        ),
        toc="".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _, _ in [*shown, *tail]),
        sections="".join(_section(*item) for item in [*shown, *tail]),
    )


def limits(found: StudyFindings, absent: Sequence[str] = ()) -> list[str]:
    """What the study cannot say."""
    said = []
    few = sorted({arm.seeds for arm in found.arms if arm.seeds < FEWEST_SEEDS})
    if few:
        said.append(
            f"Some arms have fewer than {FEWEST_SEEDS} trainings: what is said of them is exploratory, for one training may "
            "differ "
            "from the next by more than two methods do."
        )
    elif min((arm.seeds for arm in found.arms), default=0) < 10:
        said.append("Few trainings of each arm tell little about their spread, so intervals are somewhat too narrow.")
    small = [site for site, n in found.patients.items() if n < 10]
    if small:
        said.append(f"Fewer than ten test patients at {joined(small)}: differences there can go unnoticed.")
    untested = [site for site in found.sites if found.patients and not found.patients.get(site)]
    if untested:
        said.append(f"No labelled case to test on at {joined(untested)}: nothing here is about segmentation there.")
    control = found.arm(found.control).dice
    empty = [site for site in found.sites if site in control and control[site].value is None]
    if empty:
        said.append(
            f"At {joined(empty)} neither the labels nor the control's predictions show anything in any test case, so it has no "
            "Dice there: nothing here is about segmentation there."
        )
    another = "Tests hold for these trainings and sites; that another hospital's scanner behaves alike is not shown."
    if found.held_out:
        said.append(f"{another} {joined(found.held_out)}, held out of all training, can only be an example.")
    else:
        said.append(f"{another} Rerun the study with `held_out_sites` in study.toml to learn about it.")
    said.append(
        "Dice and distances do not tell whether a lesion was drawn or erased by a harmonizer; see the pictures, and "
        "measure "
                "lesions with `nnunet-fedharm quality` where the dataset has any.")  # fmt: skip
    if found.epsilons:
        said.append(
            "An epsilon bounds what a trained model can reveal about a patient. What left without noise has no epsilon."
        )
    said += found.notes
    if found.missing:
        names = found.missing[:6]
        more = f" and {len(found.missing) - 6} more" if len(found.missing) > 6 else ""
        said.append(f"No result yet: {', '.join(names)}{more}.")
    if absent:
        said.append(f"{NOT_MEASURED[:1].upper()}{NOT_MEASURED[1:]}: {', '.join(title.lower() for title in absent)}.")
    if not found.settings["fixed_beforehand"]:
        said.append("The margin or the least Dice in [report] was changed after the first trainings.")
    said.append(_energy_words(found))
    return said


def _energy_words(found: StudyFindings) -> str:
    counters = list(dict.fromkeys(name for cost in found.costs for name in cost.counters))
    if not counters:
        return "Energy was not measured: no counter (RAPL, NVML) could be read where the trainings ran."
    return (
        f"Energy is what {joined(counters)} counted during training: processors of the whole machine, whatever else ran on "
        "it, and the visible GPUs; memory, disks and cooling are not in it."
    )


def _lead(found: StudyFindings) -> str:
    trainings = sum(arm.seeds for arm in found.arms)
    words = [
        f"{found.dataset}, {found.configuration}",
        f"{count(len(found.sites), 'site')}, {count(found.patients_total, 'test patient')}",
        f"labels of {joined(found.labelled)}" if found.targets != found.sites else "labels of every site",
        *([f"{joined(found.held_out)} held out of all training"] if found.held_out else []),
        f"{count(len(found.arms), 'arm')}, {count(trainings, 'training')}",
        day(found.created),
    ]
    return "; ".join(words) + "."


def _question(item: Answer, picture: Html) -> str:
    css = "question" if item.measured else "question open"
    first, rest = list(item.support[:SHOWN]), list(item.support[SHOWN:])
    more = folded("More", bullets(rest)) if rest else ""
    answer = with_code(f"{paragraphs([item.headline])}{picture}{bullets(first)}{more}")
    return f'<div class="{css}"><h2>{text(item.question)}</h2>{answer}</div>'


def with_code(html: str) -> str:
    """Commands in sentences, which stand between backticks."""
    return re.sub(r"`([^`<>]+)`", r"<code>\1</code>", html)


def _epsilon_title(found: StudyFindings) -> str:
    private = [report for name, report in found.quality.items() if found.arm(name).epsilon is not None]
    radiomics = any((report.get("features") or {}).get("icc") for report in private)
    return f"Dice {'and radiomics ' if radiomics else ''}against epsilon"


def _dice_tables(found: StudyFindings) -> str:
    return folded("The same as a table", tables.dice_table(found)) + folded(
        "95% Hausdorff distance in mm", tables.distance_table(found)
    )


def _gap_words(found: StudyFindings) -> list[str]:
    if not any(arm.gap is not None and arm.gap.recovered is not None for arm in found.arms):
        return []
    return [tables.gap_words(found)]


def _federated_lead(found: StudyFindings) -> str:
    return (
        f"The band is the margin of {found.settings['margin']:g} Dice within which both count as equally good. Mean Dice "
        f"{place(found)}, without sites where the central arm's is below {found.least_dice:g}; below, a mark for each test case, "
        "a mean over trainings, with the line where both are equal."
    )


def _strips(extras: Extras) -> str:
    if not extras.strips:
        return ""
    shown = "".join(
        f'<div class="sitestrip"><h3>{text(strip.site)}<small>{text(strip.dice)}</small></h3><div class="strip">'
        + "".join(_picture(strip.site, caption, address) for caption, address in strip.columns)
        + "</div></div>"
        for strip in extras.strips
    )
    marks = [(f'<i class="label-{index + 1}"></i>', name) for index, name in enumerate(extras.labels)]
    return key(marks) + shown + paragraphs(list(extras.strip_notes))


def _picture(site: str, caption: str, address: str) -> str:
    words = escape(f"{site}, {caption}", quote=True)
    return f'<figure><img src="{escape(address, quote=True)}" alt="{words}"><figcaption>{text(caption)}</figcaption></figure>'


def _sites(sites: Findings | None) -> str:
    if sites is None:
        return ""
    variants = headline(sites)
    names = [card.site for card in sites.sites]
    highest = highest_distance(variants)
    matrices = [
        figure(
            name, distance_matrix(part, names, highest=highest, label=f"Distance between sites, {name}", narrow=True)
        )
        for name, part in variants
    ]
    said = f'<div class="said">{paragraphs(describe(sites))}</div>'
    distances = block("How far apart", figures(matrices), lead=_DISTANCES) if any(matrices) else ""
    return said + distances + block("Scanners", scanner_table(sites))


def _sites_lead(sites: Findings | None) -> str:
    cases = "" if sites is None else measured_cases(sites)
    return f"Measured on {cases}, chosen by name alone." if cases else ""


def _methods(extras: Extras) -> Html:
    references = folded("References, as BibTeX", f"<pre>{escape(extras.bibtex)}</pre>") if extras.bibtex else ""
    return Html(f'<div class="methods">{to_html(extras.methods)}</div>{references}')


def _section(name: str, title: str, content: str, lead: str) -> str:
    words = f"<p>{escape(lead)}</p>" if lead else ""
    return f'<section class="long" id="{name}"><h2>{escape(title)}</h2>{words}{content}</section>'


_DICE = (
    "Mean over test cases and trainings with 95% bootstrap interval over patients and trainings. Each column has its own scale. "
    "Worst site: the lowest of an arm's site means."
)
_GAP = "0 is plain nnU-Net, 1 is a training on the sites' own labels; 95% intervals. Below 0 an arm is worse than the control."
_EPSILON = (
    "Mean over the target sites with 95% intervals, those among them where an arm fails without privacy too; the smaller "
    "epsilon, the more private. Each point is trained anew."
)
_PICTURES = (
    "One test case of each site: the one whose Dice with the control is the median. The slice has most labelled pixels; one "
    "window "
    "for all pictures. What a harmonizer changes beside contrast can be seen here only in one slice."
)
_QUALITY = (
    "Travelling subjects, the same patients at several sites, as scanned and harmonized by the first training of each arm; "
    "all sites "
    "together. nRMSE: 0 is best; SSIM, edges kept and contrast-to-noise over the truth's: 1 is best. CCC and ICC: agreement of "
    "radiomics features, .75 is called good. Site recognised: balanced accuracy of a classifier on features, below it the 95th "
    "percentile with shuffled sites."
)
_LESIONS = (
    "Lesions of travelling subjects that the control finds in their scans and in the harmonized volumes, first training; it was "
    "trained on no harmonized volume. Fewer found, or more false ones, after harmonization is a warning."
)
_CONTROLS = "Checks whose answer is known beforehand; a study whose controls fail says nothing about the questions."
_TESTS = (
    "Paired by patient: Wilcoxon signed-rank, p adjusted by Holm within each table; a verdict also needs an interval that "
    "excludes 0. "
    "Intervals over patients and trainings."
)
_COST = (
    "Means over trainings. Shared before: fingerprint, plans and preprocessing that were made once for several cells, and that a "
    "user of this arm alone waits for too; training has what the cell planned and preprocessed itself. Adaptation: all held-out "
    "sites together. Sites of a federation take turns on this machine, where hospitals work side by side and wait for the "
    "network. A site alone takes the plans of the pooled cases, whose time is not in its own. Not counted: the training of "
    "weights that all arms start from, and what only the study needs, harmonized volumes and their quality. Bytes are those of "
    "weights, energy that of the training alone."
)
_DISTANCES = "Median shift of the features between two sites, in standard deviations over all volumes."

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$title</h1><p class="lead">$lead</p></header>
<div class="questions">$questions</div>
<nav class="toc" aria-label="sections">$toc</nav>
$sections
</main></body></html>
"""
