"""From finished cells to everything that the report says in numbers.

| number | how |
|---|---|
| Dice of an arm at a site | mean over cases and trainings, 95% percentile bootstrap over patients and trainings |
| worst site | smallest site mean, also in each draw |
| gap recovered | sum over sites of (arm - control) / sum over sites of (oracle - control), same draws of patients for all three |
| difference of two arms | mean over patients, see `paired` |

The oracle of a site is plain nnU-Net on the site's own labels; where the gap's interval reaches 0 no share is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.study.cell_files import is_finished
from nnunet_fedharm.study.controls import check_controls
from nnunet_fedharm.study.costs import cost_of
from nnunet_fedharm.study.draws import RESAMPLES, Drawn, Draws, Scores, Vector, combined
from nnunet_fedharm.study.findings import (
    ArmFinding,
    Comparison,
    GapFinding,
    StudyFindings,
    failed_at,
)
from nnunet_fedharm.study.matrix import Arm, cells_of
from nnunet_fedharm.study.paired import Question, compare_family
from nnunet_fedharm.study.quality import quality_notes
from nnunet_fedharm.study.results import DICE, HD95, StudyResults, fixed_beforehand
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import BASELINES, CONTROL

AUGMENT = Arm("central", "augment")


def analyse(results: StudyResults, *, resamples: int = RESAMPLES, seed: int = 0) -> StudyFindings:
    """All numbers of a study.

    Args:
        results: finished cells; arms without one are left out.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    study, margin = results.study, results.study.report.margin
    draws = study_draws(results, resamples=resamples, seed=seed)
    targets = _tested(results, draws, target_sites(study)) or _tested(results, draws, study.sites)
    plain = [arm for arm in results.by_arm if arm.epsilon is None and not arm.site]
    tested = [arm for arm in plain if arm != results.control]
    harmonized = [arm for arm in plain if is_harmonizer(arm)]
    central = [arm for arm in harmonized if arm.mode == "central"]
    arms = [_arm(results, draws, arm, targets) for arm in results.by_arm]
    learned = _learned(arms, targets, study.report.least_dice)
    reference = (study.subject.reference,)
    at_reference = compare_family(
        results,
        draws,
        "harmonizers against plain nnU-Net of their mode at the reference",
        [
            _question(arm, _plain_of_mode(results, arm), reference, _learned(arms, reference, study.report.least_dice))
            for arm in harmonized
        ],
        margin=margin,
    )
    quality = {
        arm.name: found
        for arm, cells in results.by_arm.items()
        if (found := next((cell.quality for cell in cells if cell.quality is not None), None)) is not None
    }
    return StudyFindings(
        name=study.subject.name,
        dataset=study.raw_dataset.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        configuration=study.subject.configuration,
        sites=study.sites,
        labelled=study.labelled_sites,
        reference=study.subject.reference,
        targets=targets,
        held_out=study.held_out_sites,
        patients={site: len(set(names)) for site, names in draws.patients.items()},
        patients_total=len(draws.names),
        control=results.control.name,
        oracles={site: arm.name for site in study.sites if (arm := results.oracle(site)) in results.by_arm},
        arms=arms,
        gaps=_gaps(results, draws),
        gap_tests=_gap_tests(results, draws),
        against_control=compare_family(
            results, draws, "arms against the control", [Question(arm, results.control, targets) for arm in tested]
        ),
        at_each_site=compare_family(
            results,
            draws,
            "arms against the control, site by site",
            [Question(arm, results.control, (site,)) for arm in tested for site in targets],
        ),
        against_augment=compare_family(
            results,
            draws,
            "central harmonizers against strong augmentation",
            [Question(arm, AUGMENT, targets) for arm in central],
        ),
        federated=compare_family(
            results, draws, "federated against central", list(_federated(plain, targets, learned)), margin=margin
        ),
        points={item.first.name: _points(results, item, targets) for item in _federated(plain, targets, learned)},
        private=compare_family(
            results,
            draws,
            "private against the same without privacy",
            list(_private(results, targets, learned)),
            margin=margin,
        ),
        private_at_labels=compare_family(
            results,
            draws,
            "private against the same without privacy, where labels were used",
            [] if set(study.labelled_sites) <= set(targets) else list(_private(results, study.labelled_sites, {})),
        ),
        at_reference=at_reference,
        controls=check_controls(study, at_reference, quality, {arm.name: arm.title for arm in results.by_arm}),
        costs=[cost_of(results, arm) for arm in results.by_arm],
        quality=quality,
        epsilons=study.arms.epsilons,
        modes=study.arms.modes,
        missing=[cell.name for cell in cells_of(study) if not is_finished(study, cell)],
        notes=quality_notes(study),
        settings={
            **asdict(study.report),
            "private_training": study.private_changes,
            "fixed_beforehand": fixed_beforehand(results),
            "resamples": resamples,
            "seed": seed,
            "level": 0.95,
            "seeds": list(study.subject.seeds),
        },
    )


def study_draws(results: StudyResults, *, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
    """Draws of the patients who were tested."""
    study = results.study
    sites = {site: results.cases(site) for site in study.sites}
    patients = {site: [study.registry.patient_of(case) for case in cases] for site, cases in sites.items() if cases}
    return Draws(patients, resamples=resamples, seed=seed)


def target_sites(study: StudyFile) -> tuple[str, ...]:
    """Sites that harmonization is for: those without labels, held-out ones among them; all, where every site has labels."""
    return study.unlabelled_sites or study.sites


def _tested(results: StudyResults, draws: Draws, sites: Sequence[str]) -> tuple[str, ...]:
    """Sites where the control has a Dice: not those without a labelled case, nor where neither label nor prediction shows any."""
    known = {site: results.scores(results.control, site) for site in sites if draws.patients.get(site)}
    return tuple(site for site, scores in known.items() if scores is not None and np.isfinite(scores).any())


def is_harmonizer(arm: Arm) -> bool:
    """Whether a harmonizer is in front, Nyul's among the baselines aside."""
    return arm.harmonizer not in (CONTROL, *BASELINES)


def _arm(results: StudyResults, draws: Draws, arm: Arm, targets: Sequence[str]) -> ArmFinding:
    found = {site: scores for site in results.study.sites if (scores := results.scores(arm, site)) is not None}
    dice = {site: draws.site(scores, site) for site, scores in found.items()}
    distances = {
        site: draws.site(scores, site) for site in found if (scores := results.scores(arm, site, HD95)) is not None
    }
    complete = all(site in dice for site in targets)
    parts = [dice[site] for site in (targets if complete else dice)]
    return ArmFinding(
        arm=arm.name,
        title=arm.title,
        kind=arm.harmonizer,
        mode=arm.mode,
        augmentation=arm.augmentation,
        epsilon=arm.epsilon,
        site=arm.site,
        seeds=len(results.seeds(arm)),
        dice={site: drawn.estimate() for site, drawn in dice.items()},
        hd95_mm={site: drawn.estimate() for site, drawn in distances.items()},
        worst_site=None if arm.site else min(dice, key=lambda site: dice[site].value, default=None),
        worst=_smallest(list(dice.values())).estimate() if dice and not arm.site else Estimate(None),
        target=_mean(parts).estimate() if complete and parts else None,
        gap=_gap(results, draws, arm, targets) if arm != results.control and not arm.site else None,
        seed_means=_seed_means([found[site] for site in (targets if complete else found)]),
    )


def _seed_means(scores: Sequence[Scores]) -> list[float]:
    """Of each training: mean over sites of their means over cases; a site where no case has a score is left out."""
    known = [found for found in scores if np.isfinite(found).any(axis=1).all()]
    return [float(value) for value in np.mean([np.nanmean(found, axis=1) for found in known], axis=0)] if known else []


def _gap(results: StudyResults, draws: Draws, arm: Arm, sites: Sequence[str]) -> GapFinding | None:
    """Of the sites that have an oracle of their own; None if there is none, or the arm was not tested at one."""
    known = [site for site in sites if results.oracle(site) not in (results.control, arm)]
    triples = [_triple(results, draws, arm, site) for site in known]
    complete = [triple for triple in triples if triple is not None]
    if not complete or len(complete) < len(triples):
        return None
    gained = _sum([of_arm - of_control for of_arm, of_control, _ in complete])
    gap = _sum([oracle - of_control for _, of_control, oracle in complete])
    mean_gap = combined(lambda total: total / len(complete), gap).estimate()
    certain = mean_gap.low is not None and mean_gap.low > 0
    share = combined(_ratio, gained, gap).estimate() if certain else None
    return GapFinding(tuple(known), share, mean_gap)


def _triple(results: StudyResults, draws: Draws, arm: Arm, site: str) -> tuple[Drawn, Drawn, Drawn] | None:
    """Arm, control and oracle at a site, with the seeds that all three have."""
    arms = (arm, results.control, results.oracle(site))
    seeds = [seed for seed in results.seeds(arm) if all(seed in results.seeds(other) for other in arms)]
    scores = [results.scores(item, site, DICE, seeds=seeds) for item in arms] if seeds else [None]
    if any(found is None for found in scores):
        return None
    first, second, third = (draws.site(found, site) for found in scores if found is not None)
    return first, second, third


def _gaps(results: StudyResults, draws: Draws) -> dict[str, Estimate]:
    """Site -> oracle - control, where the site has an oracle of its own."""
    gaps = {}
    for site in results.study.sites:
        if results.oracle(site) == results.control:
            continue
        triple = _triple(results, draws, results.control, site)
        if triple is not None:
            gaps[site] = (triple[2] - triple[1]).estimate()
    return gaps


def _gap_tests(results: StudyResults, draws: Draws) -> list[Comparison]:
    """Each site's own labels against the control there."""
    asked = [
        Question(results.oracle(site), results.control, (site,))
        for site in results.study.sites
        if results.oracle(site) != results.control
    ]
    return compare_family(results, draws, "own labels against the control, site by site", asked)


def _learned(arms: Sequence[ArmFinding], targets: tuple[str, ...], least_dice: float) -> Mapping[str, tuple[str, ...]]:
    """Arm -> targets where it segments well enough to be a measure for another arm.

    Where both of two arms failed, their difference is nothing, and would make the others look alike (ICH E10).
    """
    failed = {arm.arm: failed_at(arm, targets, least_dice) for arm in arms}
    return {name: tuple(site for site in targets if site not in sites) for name, sites in failed.items()}


def _question(first: Arm, second: Arm, sites: tuple[str, ...], learned: Mapping[str, tuple[str, ...]]) -> Question:
    """Of two arms where the second one has learned; over all the sites, and no measure, where it has at none."""
    known = learned.get(second.name, ())
    return Question(first, second, known or sites, measure=bool(known))


def _plain_of_mode(results: StudyResults, arm: Arm) -> Arm:
    """Plain nnU-Net trained as the arm was, if they share a seed; else the control."""
    plain = Arm(arm.mode, CONTROL)
    return plain if set(results.seeds(plain)) & set(results.seeds(arm)) else results.control


def _federated(
    arms: Sequence[Arm], sites: tuple[str, ...], learned: Mapping[str, tuple[str, ...]]
) -> Iterator[Question]:
    for arm in arms:
        central = Arm("central", arm.harmonizer, arm.augmentation)
        if arm.mode == "federated" and central in arms:
            yield _question(arm, central, sites, learned)


def _points(results: StudyResults, question: Question, sites: Sequence[str]) -> list[tuple[str, float, float]]:
    """(site, central, federated) of each case."""
    seeds = [seed for seed in results.seeds(question.first) if seed in results.seeds(question.second)]
    found = []
    for site in sites:
        pair = [results.scores(arm, site, seeds=seeds) for arm in (question.second, question.first)]
        if seeds and pair[0] is not None and pair[1] is not None:
            means = [np.mean(scores, axis=0) for scores in pair if scores is not None]
            found += [(site, float(x), float(y)) for x, y in zip(*means, strict=True) if np.isfinite(x + y)]
    return found


def _private(
    results: StudyResults, sites: tuple[str, ...], learned: Mapping[str, tuple[str, ...]]
) -> Iterator[Question]:
    for arm in results.by_arm:
        same = Arm(arm.mode, arm.harmonizer, arm.augmentation)
        if arm.epsilon is not None and same in results.by_arm:
            yield _question(arm, same, sites, learned)


def _sum(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(sum(part.value for part in parts), np.sum([part.draws for part in parts], axis=0))


def _mean(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(_sum(parts).value / len(parts), _sum(parts).draws / len(parts))


def _smallest(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(min(part.value for part in parts), np.min([part.draws for part in parts], axis=0))


def _ratio(gained: Vector, gap: Vector) -> Vector:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(gained / gap)
