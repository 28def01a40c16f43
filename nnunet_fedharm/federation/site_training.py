"""A site's training as a request asks for it: with the plans that the site stored, under its own privacy where it has some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.own_privacy import own_plans
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.stored_plans import stored_plans

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.local_training import LocalTraining


def local_training(
    site: Site, values: dict[str, Any], *, shared_noise: bool = False
) -> tuple[LocalTraining, dict[str, Any]]:
    """This site's LocalTraining and the plans that it stored for the run.

    Args:
        values: of the request; no word of it may switch off what the site's own policy switched on.
        shared_noise: of a step whose noise all sites add together, which is the run's or nobody's.
    """
    from nnunet_fedharm.trainers.local_training import LocalTraining

    federation = stored_plans(site, values["run_id"], values["plans_hash"])
    plans = federation["plans"]
    if not shared_noise:
        plans = own_plans(site, values["run_id"], plans, values["configuration"])
    training = LocalTraining(
        root=site.root,
        dataset_name=values["dataset_name"],
        plans=plans,
        dataset_json=federation["dataset_json"],
        configuration=values["configuration"],
        fold=int(values["fold"]) if values["fold"].isdigit() else values["fold"],
        site=site.name,
        trainer_name=values["trainer_name"],
        state_folder=site.folder / values["run_id"],
        seed=values["seed"],
        device=site.device,
        local_groups=[group for group in values["local_groups"].split(",") if group],
    )
    return training, federation


def whole_weights(received: Weights, federation: dict[str, Any], values: dict[str, Any]) -> Weights:
    """All tensors of the network: what does not travel (a resting segmenter, local groups) begins at the run's seeded start."""
    if values["phase"] == "segmenter" and not values["local_groups"]:
        return received
    from nnunet_fedharm.trainers.results import initial_weights

    start = initial_weights(
        federation["plans"], federation["dataset_json"], values["configuration"], values["trainer_name"], values["seed"]
    )
    return {**start, **received}
