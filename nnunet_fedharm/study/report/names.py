"""Names of arms and places as the report's reader knows them."""

from __future__ import annotations

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.study.findings import ArmFinding, Comparison, StudyFindings
from nnunet_fedharm.study.held_out import left_out
from nnunet_fedharm.study.study_tables import CONTROL

_KINDS = {CONTROL: "plain nnU-Net", "augment": "strong augmentation", "nyul": "Nyul's histogram matching"}


def kind_name(kind: str, *, augmentation: bool = True) -> str:
    """A harmonizer or baseline in a sentence."""
    name = _KINDS.get(kind, kind)
    return name if augmentation else f"{name} without augmentation"


def place(found: StudyFindings) -> str:
    """ "at B, C and D (labels withheld)", "at B (labels withheld) and E (new hospital, held out of all training)"."""
    if set(found.targets) == set(found.sites):
        return f"at {joined(found.targets)}"
    used = [site for site in found.targets if site in found.labelled]
    new = [site for site in found.targets if site in found.held_out]
    withheld = [site for site in found.targets if site not in (*used, *new)]
    parts = [joined(used)] if used else []
    parts += [f"{joined(withheld)} (labels withheld)"] if withheld else []
    if new:
        kind = "new hospitals" if len(new) > 1 else "new hospital"
        parts.append(f"{joined(new)} ({kind}, held out of all training)")
    return f"at {joined(parts)}"


def only_at(found: StudyFindings, item: Comparison) -> str:
    """ " at B alone", of arms that were not compared at all target sites because one of them failed at the others."""
    return "" if set(item.sites) == set(found.targets) else f" at {joined(item.sites)} alone"


def measured_cases(sites: Findings) -> str:
    """ "at most 15 cases of each site, one a patient, and as many travelling subjects"; empty where all were measured."""
    most = sites.settings.get("cases_per_site")
    if most is None:
        return ""
    more = ", and as many travelling subjects" if any(card.n_cases > most for card in sites.sites) else ""
    return f"at most {most} cases of each site, one a patient{more}"


def held_out_words(found: StudyFindings) -> list[str]:
    """What held-out sites stand for and what was done there; nothing where there is none."""
    if not found.held_out:
        return []
    how = "harmonizers were adapted there without labels, as `nnunet-fedharm adapt` does it"
    return [f"{left_out(found.held_out)}: {how}; models without a harmonizer were used as they are."]


def group_of(arm: ArmFinding) -> str:
    """Under which heading an arm stands."""
    if arm.site:
        return "the site's own labels"
    if arm.epsilon is not None:
        return "with differential privacy"
    return "federated" if arm.mode == "federated" else "central"


def style_of(arm: ArmFinding) -> str:
    """CSS class: grey for arms without a harmonizer, blue central, orange federated, violet on a site's own labels."""
    if arm.site:
        return "series-4"
    if arm.mode == "federated":
        return "series-3"
    return "series-1" if arm.kind in _KINDS else "series-2"


def row_name(arm: ArmFinding) -> str:
    """An arm in a figure, under the heading of its group."""
    name = kind_name(arm.kind, augmentation=arm.augmentation)
    name = {"plain nnU-Net": "plain nnU-Net (control)" if arm.mode == "central" else "plain nnU-Net"}.get(name, name)
    if arm.epsilon is not None:
        return f"{kind_name(arm.kind)}, {arm.mode}, ε {arm.epsilon:g}"
    return name


def shown_arms(found: StudyFindings) -> list[ArmFinding]:
    """Arms with a row of their own, in groups; trainings on one site's own labels are marks in the others' rows."""
    order = ["central", "federated", "with differential privacy"]
    rows = [arm for arm in found.arms if not arm.site]
    return sorted(rows, key=lambda arm: order.index(group_of(arm)))
