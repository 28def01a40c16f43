"""What an audit found, in one sentence that claims no more than its numbers, and in plain tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunet_fedharm.evaluation.audit.gradient_canaries import GradientAudit
from nnunet_fedharm.evaluation.audit.inversion import InversionAudit
from nnunet_fedharm.evaluation.audit.membership import MembershipAudit
from nnunet_fedharm.evaluation.audit.noisy_statistics import StatisticAudit
from nnunet_fedharm.evaluation.audit.one_run import OneRun
from nnunet_fedharm.evaluation.audit.patient_canaries import PatientAudit
from nnunet_fedharm.evaluation.audit.site_statistics import SiteStatistics

Rows = list[list[str]]


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first one flush left."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


MEMBERSHIP_HEAD = ("attack", "AUC", "95%", "p", "TPR at FPR 1%", "5%", "10%", "epsilon >=")


def membership_rows(audit: MembershipAudit) -> Rows:
    """One row per attack, the control last."""
    rows = []
    for attack in (*audit.attacks, audit.blind):
        control = attack is audit.blind
        rates = ["-" if value is None else f"{value:.2f}" for value in attack.tpr_at.values()]
        name = "control: features alone" if control else attack.name
        bound = "" if control else f"{attack.epsilon_low:.2f}"
        rows.append(
            [
                name,
                f"{attack.auc:.3f}",
                f"{attack.auc_low:.3f} to {attack.auc_high:.3f}",
                f"{attack.p_value:.4f}",
                *rates,
                bound,
            ]
        )
    return rows


def membership_sentence(audit: MembershipAudit) -> str:
    """The reading."""
    best, tests = audit.best, len(audit.attacks)
    sets = f"{audit.members} members and {audit.others} non-members"
    if min(1.0, best.p_value * tests) >= 0.05:
        said = f"None of {tests} attacks tells {sets} apart beyond chance; a stronger attack, or more cases, may."
    elif audit.blind.p_value < 0.05:
        said = (
            f"The {best.name} attack tells {sets} apart (AUC {best.auc:.2f}), but so do features without any model (AUC "
            f"{audit.blind.auc:.2f}): the sets differ in more than membership, so this is no evidence of a leak."
        )
    else:
        said = (
            f"The {best.name} attack tells {sets} apart (AUC {best.auc:.2f}, {best.auc_low:.2f} to {best.auc_high:.2f}), which "
            "features without the model do not: the model gives away who was in its training."
        )
    if audit.claimed is None:
        return said + " It makes no claim of differential privacy."
    claim = f"the claimed epsilon {audit.claimed[0]:.3g}"
    if audit.refuted:
        return f"{said} Epsilon is at least {audit.epsilon_low:.2f} if cases are independent: {claim} is contradicted."
    if audit.most <= audit.claimed[0]:
        return f"{said} So few cases could not contradict {claim}: a perfect attack would show {audit.most:.2f}."
    return f"{said} Nothing contradicts {claim}."


def canary_rows(run: OneRun) -> Rows:
    """One row per score and number of guesses."""
    return [
        [
            str(t["score"]),
            str(t["guesses"]),
            str(t["correct"]),
            f"{t['correct'] / t['guesses']:.3f}",
            f"{t['epsilon_low']:.2f}",
        ]
        for t in run.tried
    ]


CANARY_HEAD = ("score", "guesses", "right", "share", "epsilon >=")


def measured_rows(audit: GradientAudit) -> Rows:
    """What was promised beside what was measured."""
    seen = audit.measured
    rows = [
        ["noise, in clips", f"{audit.noise_multiplier:.3f}", f"{seen.noise:.3f}"],
        [
            "share of one patient, in clips",
            "at most 1",
            f"{seen.contribution:.3f} (error {seen.contribution_error:.3f})",
        ],
        ["share of steps with a patient", f"{audit.sample_rate:.3f}", f"{seen.participation:.3f}"],
        ["noise of steps in a row correlates by", f"below {seen.repeats_limit:.2f}", f"{seen.repeats:.2f}"],
    ]
    if seen.shared is not None and seen.shared_limit is not None:
        rows.append(["noise of two tensors correlates by", f"below {seen.shared_limit:.2f}", f"{seen.shared:.2f}"])
    return rows


MEASURED_HEAD = ("what", "promised", "measured")


def _bound(run: OneRun) -> str:
    return (
        f"epsilon is at least {run.epsilon_low:.2f}" if run.epsilon_low > 0 else "no epsilon above 0 is shown by that"
    )


def canary_sentence(audit: GradientAudit) -> str:
    """The reading."""
    run, claim = (
        audit.found,
        (
            f"epsilon {audit.claimed:.3g} that {audit.steps} steps are said to cost at most (delta {audit.found.delta:.1g})"
        ),
    )
    guessed = f"{run.correct} of {run.guesses} guesses about {run.canaries} canary patients were right"
    if audit.refuted:
        return (
            f"{guessed}: with {run.confidence:.0%} confidence these steps cost at least {run.epsilon_low:.2f}, more than the "
            f"{claim}. The privacy that is claimed is not there."
        )
    if audit.suspicions:
        return (
            f"{guessed}, which does not contradict the {claim}, but the released gradients are not what the mechanism promises: "
            + " ".join(audit.suspicions)
        )
    if run.most <= audit.claimed:
        return (
            f"{guessed}: {_bound(run)}. So few canaries could not contradict the {claim}; all right "
            f"would show {run.most:.2f}. Noise, clipping and draws are as promised."
        )
    return (
        f"{guessed}: {_bound(run)}, which does not contradict the {claim}. Noise, clipping and draws are as promised."
    )


def patient_sentence(audit: PatientAudit) -> str:
    """The reading of the run with real patients."""
    run = audit.found
    guessed = f"{run.correct} of {run.guesses} guesses about {run.canaries} real patients were right"
    if audit.refuted:
        return f"{guessed}: {_bound(run)}, more than the claimed {audit.claimed:.3g}."
    if run.most <= audit.claimed:
        return (
            f"{guessed}: {_bound(run)}. So few patients could show {run.most:.2f} at most, so this "
            f"says nothing against the claimed {audit.claimed:.3g}, nor for it."
        )
    return f"{guessed}: {_bound(run)}, which does not contradict the claimed {audit.claimed:.3g}."


INVERSION_HEAD = ("update", "correlation", "with another patch", "PSNR, dB", "SSIM", "fit", "own patch is nearest")


def inversion_rows(audit: InversionAudit) -> Rows:
    """One row per kind of update: means over the targets."""
    rows = []
    for name, found in audit.by_update().items():
        count = len(found)
        ssims = [r.ssim for r in found if r.ssim is not None]
        rows.append(
            [
                name,
                f"{sum(r.correlation for r in found) / count:.2f}",
                f"{sum(r.nearest_other for r in found) / count:.2f}",
                f"{sum(r.psnr_db for r in found) / count:.1f}",
                f"{sum(ssims) / len(ssims):.2f}" if ssims else "-",
                f"{sum(r.fit for r in found) / count:.3f}",
                f"{sum(r.recognized for r in found)} of {count}",
            ]
        )
    likeness = sum(target.likeness for target in audit.targets) / len(audit.targets)
    return [*rows, ["control: the likest other patch", f"{likeness:.2f}", "", "", "", "", ""]]


def inversion_sentence(audit: InversionAudit) -> str:
    """The reading."""
    said = []
    for name, found in audit.by_update().items():
        known, mean = sum(r.recognized for r in found), sum(r.correlation for r in found) / len(found)
        said.append(f"from {name}, {known} of {len(found)} (correlation {mean:.2f})")
    return (
        f"Reconstructions nearest to their own patch among {audit.patches}: {'; '.join(said)}. By luck it is one in "
        f"{audit.patches}. The attacker knew the labels; that this attack fails on an update does not show that all would."
    )


STATISTICS_HEAD = (
    "release", "patients", "noise", "found at most", "a patient moves", "together", "epsilon >=", "if Gaussian", "claimed <=",
    "verdict",
)  # fmt: skip


def statistics_rows(audits: Sequence[StatisticAudit]) -> Rows:
    """One row per release."""
    return [
        [
            audit.what,
            str(audit.patients),
            f"{audit.noise_multiplier:.2f}",
            f"{audit.noise_most:.2f}" if math.isfinite(audit.noise_most) else "-",
            f"{audit.share:.3f}",
            str(audit.together),
            f"{audit.epsilon_low:.2f}",
            f"{audit.gaussian_low:.2f}",
            f"{audit.claimed:.2f}",
            "refuted" if audit.refuted else "not refuted",
        ]
        for audit in audits
    ]


def statistics_sentence(found: SiteStatistics) -> str:
    """The reading."""
    if not found.audits:
        return "No statistic of this site has noise: there is no claim to audit."
    wrong = [audit for audit in found.audits if audit.refuted]
    draws = found.audits[0].draws
    looked = f"{len(found.audits)} statistics, each drawn for {draws} scores with a canary patient and {draws} without"
    if not wrong:
        return f"{looked}: nothing contradicts the noise that is claimed, and no patient moves more than the bound."
    said = []
    for audit in wrong:
        low = max(audit.epsilon_low, audit.gaussian_low)
        bound = f"epsilon of {audit.together} together is at least {low:.2f}, claimed {audit.claimed:.2f}"
        said.append(" ".join([f"{audit.what}: {bound}.", *audit.suspicions]))
    return f"{looked}: the claim is contradicted. {' '.join(said)}"
