"""One self-contained page per audit: the reading, tables and pictures, and what it does not show. No script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

import numpy as np

from nnunet_fedharm.evaluation.audit import words
from nnunet_fedharm.evaluation.audit.gradient_canaries import GradientAudit
from nnunet_fedharm.evaluation.audit.inversion import Image, InversionAudit
from nnunet_fedharm.evaluation.audit.membership import MembershipAudit
from nnunet_fedharm.evaluation.audit.patient_canaries import PatientAudit
from nnunet_fedharm.evaluation.audit.site_statistics import SiteStatistics
from nnunet_fedharm.evaluation.charts import Line, Point, interval_chart, line_chart, scale, svg, ticks
from nnunet_fedharm.evaluation.html import Html, figure, table, text
from nnunet_fedharm.evaluation.page_style import STYLE
from nnunet_fedharm.evaluation.pictures import data_uri, grey_picture

PICTURE_WIDTH = 220
CSS = (
    ".answer{font-size:18px;line-height:1.45;max-width:80ch;margin:6px 0 14px}.dot.series-1,.dot.series-2{fill-opacity:.55}"
    ".pictures{max-width:940px}.numbers td{text-align:right}.numbers th[scope=row]{text-align:left;font-weight:500}"
    ".numbers th[scope=col]{text-align:right}.numbers th[scope=col]:first-child{text-align:left}"
    ".pictures th:first-child{width:auto;text-align:center;padding:2px 6px}"
    ".pair{align-items:start}section ul{margin:0;padding-left:20px;color:var(--muted)}"
    "figcaption small{display:block;font-weight:400}"
)


def membership_page(audit: MembershipAudit) -> str:
    """The page of a membership audit."""
    claim = "none" if audit.claimed is None else f"{audit.claimed[0]:.3g} at delta {audit.claimed[1]:g}"
    cards = [
        (
            f"{audit.best.auc:.2f}",
            f"AUC of the attack that did best, {audit.best.name}; 0.5 is chance, 1 gives everybody away",
        ),
        (f"{audit.epsilon_low:.2f}", f"lower bound on epsilon over all attacks, {audit.confidence:.0%} confidence"),
        (claim, "epsilon that the model's card claims as an upper bound"),
        (f"{audit.most:.2f}", "the bound that a perfect attack on so many cases would show"),
    ]
    groups = [
        (attack.name, [Point(attack.name, "series-2", attack.auc, attack.auc_low, attack.auc_high)])
        for attack in audit.attacks
    ]
    blind = audit.blind
    groups.append(("features alone", [Point("control", "series-1", blind.auc, blind.auc_low, blind.auc_high)]))
    intervals = interval_chart(
        groups, label="AUC of each attack", x_label="AUC, 95% interval over cases", left=130, x_range=(0.3, 1.0)
    )
    curves = [
        Line(audit.best.name, "series-2", audit.best.roc),
        Line("chance", "series-1", [(0.0, 0.0), (1.0, 1.0)]),
    ]
    curve = line_chart(
        curves, x_label="false positive rate", label="Members found over false alarms", y_range=(0.0, 1.0)
    )
    members, others = audit.scores[audit.best.name]
    strip = _strip([("members", "series-2", members), ("non-members", "series-1", others)], label=audit.best.name)
    body = _section("Attacks", table(words.MEMBERSHIP_HEAD, words.membership_rows(audit)), _membership_lead(audit))
    body += _section(
        "Pictures",
        _pair(figure("AUC", intervals), figure(f"Members found over false alarms, {audit.best.name}", curve)),
    )
    body += _section(
        "Scores of the cases", figure("", strip), f"{audit.best.name}: each dot is a case; no names are kept."
    )
    return _page(
        "Membership audit", f"Was this case in the training of {audit.model}?", words.membership_sentence(audit), cards,
        body, _MEMBERSHIP_NOTES,
    )  # fmt: skip


def canary_page(audit: GradientAudit | None, patients: PatientAudit | None, *, dataset: str) -> str:
    """The page of a canary audit."""
    answers, cards, body = [], [], ""
    if audit is not None:
        run = audit.found
        answers.append(words.canary_sentence(audit))
        cards = [
            (
                f"{run.epsilon_low:.2f}",
                f"lower bound on the epsilon of {audit.steps} steps, {run.confidence:.0%} confidence",
            ),
            (f"{audit.claimed:.3g}", f"upper bound by the accountant, delta {run.delta:.1g}"),
            (f"{run.most:.2f}", f"the largest bound that {run.canaries} canaries could have shown"),
            (f"{run.correct} of {run.guesses}", f"right guesses of the best score, {run.score}"),
        ]
        findings = (
            "".join(f"<li>{text(sentence)}</li>" for sentence in audit.suspicions) or "<li>Nothing out of order.</li>"
        )
        body += _section(
            "Promised and measured",
            table(words.MEASURED_HEAD, words.measured_rows(audit)) + f"<ul>{findings}</ul>",
            "One clip is the length to which a patient's gradient is cut. These numbers show causes; the bound is the verdict.",
        )
        strip = _strip(_by_bit(audit.scores), label=run.score)
        body += _section(
            "Canary patients", figure("", strip),
            f"{run.score}: each dot is a canary. Where the two rows lie apart, one sees who was in.",
        )  # fmt: skip
        body += _section("Guesses", table(words.CANARY_HEAD, words.canary_rows(run)), "All rows share the error of 5%.")
    if patients is not None:
        answers.append(words.patient_sentence(patients))
        body += _section(
            "Real patients as canaries",
            table(words.CANARY_HEAD, words.canary_rows(patients.found))
            + figure("", _strip(_by_bit(patients.scores), label=patients.found.score)),
            f"{len(patients.scores)} patients, of whom a coin put {patients.found.included} into the training of "
            f"{patients.steps} steps.",
        )
    return _page("Canary audit", f"The private training of {dataset}", " ".join(answers), cards, body, _CANARY_NOTES)


def inversion_page(audit: InversionAudit, *, dataset: str) -> str:
    """The page of an inversion audit; it shows patches of patients."""
    cards = [
        (
            f"{sum(r.recognized for r in found)} of {len(found)}",
            f"reconstructions from {name} nearest to their own patch",
        )
        for name, found in audit.by_update().items()
    ]
    body = ""
    for number, target in enumerate(audit.targets, start=1):
        pictures = [("the patch", "", target.truth)]
        pictures += [
            (r.update, f"correlation {r.correlation:.2f}, with another patch {r.nearest_other:.2f}", r.image)
            for r in target.reconstructions
        ]
        head = "".join(f"<th>{text(name)}<small>{text(note)}</small></th>" for name, note, _ in pictures)
        cells = "".join(f"<td>{_slice(image, name)}</td>" for name, _, image in pictures)
        body += _section(
            f"Patch {number}",
            f'<div class="scroll"><table class="pictures"><tr>{head}</tr><tr>{cells}</tr></table></div>',
        )
    size = " x ".join(map(str, audit.patch_size))
    private = "" if audit.epsilon is None or audit.noise_multiplier is None else (
        f" The private step has noise of {audit.noise_multiplier:.2f} clips, for a training of epsilon {audit.epsilon:g}."
    )  # fmt: skip
    body = (
        _section(
            "Updates",
            table(words.INVERSION_HEAD, words.inversion_rows(audit)),
            f"Patches of {size} voxels, {audit.options.iterations} iterations, best of {audit.options.restarts} by its "
            f"fit.{private}",
        )
        + body
    )
    return _page(
        "Gradient inversion audit",
        f"Updates of {dataset}",
        words.inversion_sentence(audit),
        cards,
        body,
        _INVERSION_NOTES,
    )


def statistics_page(found: SiteStatistics, *, dataset: str) -> str:
    """The page of an audit of statistics."""
    cards = [
        (
            f"{max(audit.epsilon_low, audit.gaussian_low):.2f} / {audit.claimed:.2f}",
            f"{audit.what}: lower bound on epsilon of {audit.together} releases, and the upper bound that is claimed",
        )
        for audit in found.audits
    ]
    missing = "".join(f"<li>{text(f'{what} was not audited: {why}.')}</li>" for what, why in found.left_out.items())
    body = _section(
        "Promised and found",
        table(words.STATISTICS_HEAD, words.statistics_rows(found.audits)) + (f"<ul>{missing}</ul>" if missing else ""),
        "Noise is a multiplier of what one patient may move; the bounds are of all releases behind one score together. If "
        "Gaussian: the same rates against Gaussian noise, which is the promise, instead of against any mechanism.",
    )
    for audit in found.audits:
        strip = _strip(_by_bit(audit.scores), label="distance from the answer without the canary, in sensitivities")
        note = f"Each dot is the mean of {audit.together} releases. Where the two rows lie apart, one sees who was in."
        body += _section(audit.what, figure("", strip), note)
    return _page(
        "Statistics audit", f"What {dataset} tells about itself", words.statistics_sentence(found), cards, body,
        _STATISTICS_NOTES,
    )  # fmt: skip


def _membership_lead(audit: MembershipAudit) -> str:
    return (
        f"{audit.members} members, {audit.others} non-members, reference models: {audit.references}. Mean loss "
        f"{audit.losses[0]:.3f} of members, {audit.losses[1]:.3f} of non-members. {audit.others} non-members resolve false "
        f"positive rates of {1 / audit.others:.1%} and above; finer ones are left out (-)."
    )


def _by_bit(scores: Sequence[tuple[float, bool]]) -> list[tuple[str, str, list[float]]]:
    inside = [score for score, included in scores if included]
    outside = [score for score, included in scores if not included]
    return [("in", "series-2", inside), ("out", "series-1", outside)]


def _strip(rows: Sequence[tuple[str, str, Sequence[float]]], *, label: str) -> str:
    """Dots of each row along one axis, moved up and down a little so that they do not hide each other."""
    values = [value for _, _, content in rows for value in content]
    width, height, left = 900, 46 * len(rows) + 44, 150.0
    marks = ticks(min(values), max(values), 7)
    x_of = scale(marks[0], marks[-1], left, width - 20.0)
    parts = [
        f'<line x1="{x_of(m):.1f}" x2="{x_of(m):.1f}" y1="8" y2="{height - 34}" class="grid"/>'
        f'<text x="{x_of(m):.1f}" y="{height - 18}" class="tick mid">{m:g}</text>'
        for m in marks
    ]
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 3}" class="tick mid">{text(label)}</text>')
    for index, (name, style, content) in enumerate(rows):
        middle = 30 + 46 * index
        parts.append(f'<text x="{left - 14}" y="{middle + 4}" class="row end">{text(name)} ({len(content)})</text>')
        for number, value in enumerate(content):
            y = middle + 30 * ((number * 0.618034) % 1 - 0.5)
            parts.append(f'<circle cx="{x_of(value):.1f}" cy="{y:.1f}" r="3" class="dot {style}"/>')
    words_ = "; ".join(f"{name}: {min(c):.3g} to {max(c):.3g}" for name, _, c in rows if c)
    return svg(parts, width, height, f"{label} of each", description=words_)


def _slice(image: Image, name: str) -> str:
    """Middle slice of the first channel, its own contrast: a reconstruction has no scale."""
    channel = image[0]
    shown = channel[channel.shape[0] // 2] if channel.ndim == 3 else channel
    low, high = np.percentile(shown, [1, 99])
    picture = grey_picture(shown, np.ones(shown.shape, dtype=bool), (float(low), float(max(high, low + 1e-6))))
    factor = max(1, -(-PICTURE_WIDTH // shown.shape[1]))
    return f'<img src="{data_uri(picture, factor)}" alt="{text(name)}">'


def _section(title: str, content: str, lead: str = "") -> str:
    words_ = f"<p>{text(lead)}</p>" if lead else ""
    return f"<section><h2>{text(title)}</h2>{words_}{content}</section>"


def _pair(*content: str) -> Html:
    return Html(f'<div class="pair">{"".join(content)}</div>')


def _page(title: str, lead: str, answer: str, cards: Sequence[tuple[str, str]], body: str, notes: Sequence[str]) -> str:
    return Template(_PAGE).substitute(
        style=STYLE + CSS,
        title=text(title),
        lead=text(lead),
        answer=text(answer),
        cards="".join(
            f'<div class="card"><b>{text(value)}</b><span>{text(note)}</span></div>' for value, note in cards
        ),
        body=body,
        notes="".join(f"<li>{text(note)}</li>" for note in notes),
    )


_MEMBERSHIP_NOTES = (
    "An attack that fails is no proof of privacy: stronger ones may succeed. One that succeeds is proof of a leak if the sets "
    "differ in membership alone; the control without a model looks for other differences, in five simple features only.",
    "Intervals and the bound on epsilon take cases as independent draws, though they share one model; the canary audit need not.",
    "The attack with the highest AUC was chosen after the fact; the bound on epsilon is corrected for the number of attacks.",
    "This page is about patients of this site: it names none, but its numbers have no noise. Keep it where the images may be.",
)
_CANARY_NOTES = (
    "The bound holds for the mechanism as it ran here: the trainer's own steps, draws, clipping and noise, seen by an adversary "
    "who reads every released gradient and chooses the canaries' gradients. It covers the segmenter's steps, not styles, votes, "
    "fingerprints or the harmonizer's phase.",
    "A lower bound below the claim does not prove the claim; it could not be refuted with so many canaries and steps.",
    "Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023, theorem 5.2.",
)
_STATISTICS_NOTES = (
    "The bounds hold for the mechanisms as they ran here, on this site's own patients, with one patient beside them who is as "
    "wild as a patient can be. What is told without noise is not covered, nor what is done with the answers.",
    "A bound below the claim does not prove the claim; it could not be refuted with so many draws.",
    "Noise that several sites add together in a secure sum is not covered: here each site adds all of it.",
    "This page is about patients of this site, and its numbers have no noise of their own. Keep it where the images may be.",
)
_INVERSION_NOTES = (
    "Strong assumptions in the attacker's favour: labels, weights, optimizer and preprocessing are known, the update is of one "
    "patch without augmentation, and in the private step nobody else was drawn.",
    "An update that this attack cannot invert may be inverted by another. Only noise with a stated epsilon limits all of them.",
    "These are images of patients: keep this page where they may be.",
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<header><h1>$title</h1><p class="lead">$lead</p><p class="answer">$answer</p><div class="cards">$cards</div></header>
$body
<section class="notes"><h2>What this does not show</h2><ul>$notes</ul></section>
</main></body></html>
"""
