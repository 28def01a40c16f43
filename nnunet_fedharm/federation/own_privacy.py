"""Differential privacy by a site's own policy: its training is private in a run that asks for none.

The site trains with plans that have a `privacy` part of its own; the plans that it stores, and whose hash it answers with, stay
those of the run. Its noise is made for the whole run, so the options of the first message hold for all of it: what the policy
said is kept in the site's folder of the run, and a policy that says something else later is refused rather than followed. Noise
that was made for another number of steps or another epsilon would promise nothing.

A run that asks for differential privacy itself has noise, clips and shares that all its sites agree on: it is taken part in as it
is where it is at least as strict, else refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from nnunet_fedharm.federation.durable import read_json, write_json
from nnunet_fedharm.federation.messages import Unpacked
from nnunet_fedharm.federation.policy import Policy, refusal
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.planning.section import SECTION, UNIT, read_section, reads_styles
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions

if TYPE_CHECKING:
    from nnunet_fedharm.planning.facts import SiteFacts

OWN_FILE = "own-privacy.json"
"""In the site's folder of a run: what its policy said when the run began."""
RULE = "patients.private_epsilon"


def options_of(policy: Policy) -> PrivacyOptions | None:
    """What the policy switches on; None where it does not."""
    if not policy.private_epsilon:
        return None
    return PrivacyOptions(
        epsilon=policy.private_epsilon,
        delta=policy.delta,
        clip=policy.private_clip,
        patients_per_step=policy.private_patients_per_step,
        patches_per_patient=policy.private_patches_per_patient,
    )


Admit = Callable[[PrivacyOptions | None], None]
"""Raises where a site does not take part under such options."""


def settled(
    site: Site, asked: PrivacyOptions | None, run_id: str, admit: Admit = lambda options: None
) -> PrivacyOptions | None:
    """What this site trains with: what the run asks for, or what the policy switches on where it asks for nothing.

    Args:
        admit: asked about them before the policy's are kept for the run, so that a policy that is refused can be mended.

    Raises:
        FederationError: the run's own privacy is weaker than the policy's, or the policy has changed within the run.
    """
    own = options_of(site.policy)
    if asked is None:
        return own_privacy(site, run_id, admit)
    if own is not None and (asked.epsilon > own.epsilon or asked.delta > own.delta):
        raise refusal(
            site.name,
            RULE,
            f"the run asks for epsilon {asked.epsilon:g} at delta {asked.delta:g}, and its patients give at most epsilon "
            f"{own.epsilon:g} at delta {own.delta:g}; start it with those, or without --epsilon, and it adds its own noise",
        )
    admit(asked)
    return asked


def own_privacy(site: Site, run_id: str, admit: Admit = lambda options: None) -> PrivacyOptions | None:
    """The policy's options in a run that asks for none, kept at the first call of the run.

    Args:
        admit: as of `settled`.

    Raises:
        FederationError: they are others than at the start of the run, or the run began without any.
        CheckpointError: what was kept is damaged.
    """
    now, first = options_of(site.policy), kept_privacy(site, run_id)
    if now == first:
        admit(now)
        return now
    if now is None or first is not None or _began_without(site, run_id):
        before = "off" if first is None else f"epsilon {first.epsilon:g} and options of its own"
        raise refusal(
            site.name,
            RULE,
            f"it was {before} when this run began, and noise is made for a whole run; put it back, or start a new run with "
            "--restart",
        )
    admit(now)
    write_json(site.folder / run_id / OWN_FILE, now.to_dict())
    return now


def kept_privacy(site: Site, run_id: str) -> PrivacyOptions | None:
    """What `own_privacy` kept in a run; None where nothing was.

    Raises:
        CheckpointError: it is damaged.
    """
    path = site.folder / run_id / OWN_FILE
    return PrivacyOptions(**read_json(path)) if path.is_file() else None


def told_facts(site: Site, run_id: str, facts: SiteFacts) -> dict[str, Any]:
    """Facts with what the site's own policy promises its patients in this run, which is public."""
    own = kept_privacy(site, run_id)
    promised = {} if own is None else {"epsilon": own.epsilon, "delta": own.delta}
    return facts.to_dict() | {"own_privacy": promised}


def own_statistics(site: Site, request: Unpacked, run_config: Mapping[str, Any]) -> Unpacked:
    """A request for a fingerprint summary or a style as the site answers it: with its own noise where a run asks for none.

    Args:
        request: with `epsilon` 0 where the run asks for no privacy.
        run_config: says which harmonizer; one that reads no style is told none, which would cost noise for nothing.
    """
    values = request.values
    own = None if values["epsilon"] else own_privacy(site, values["run_id"])
    if own is None:
        return request
    changed = values | {"epsilon": own.epsilon, "delta": own.delta, "noise": own.fingerprint_multiplier}
    if "summed_over" in values:
        changed |= {"summed_over": 0}  # all of the noise is its own: in such a run nobody else adds a share
    if "styled" in values:
        read = reads_styles(str(run_config.get("harmonizer", "")))
        changed |= {"noise": own.style_noise, "styled": values["styled"] and read}
    return Unpacked(changed, request.weights)


def own_plans(site: Site, run_id: str, plans: Mapping[str, Any], configuration: str) -> Mapping[str, Any]:
    """The plans that the site trains with: those of the run, with its own `privacy` part where they have none."""
    planned = plans["configurations"][configuration]
    if read_section(planned, configuration_name=configuration).privacy is not None:
        return plans
    own = own_privacy(site, run_id)
    if own is None:
        return plans
    changed = deepcopy(dict(plans))
    changed["configurations"][configuration][SECTION]["privacy"] = {**own.to_dict(), "unit": UNIT}
    return changed


def _began_without(site: Site, run_id: str) -> bool:
    """Whether anything about patients has left this site in the run without noise."""
    return any(item.unbounded and item.run_id == run_id for item in Ledger(site.folder).releases())
