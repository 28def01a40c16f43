"""Groups of the network's tensors that a federation shares or leaves to each site: harmonizer, norm, encoder, decoder, heads.

Groups do not overlap: a normalisation layer of the encoder is in `norm` alone, an output layer in `heads` alone. nnU-Net's
decoder holds the encoder, and its blocks hold each layer twice; membership is decided by tensor, not by name.

References:
    Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021 (`norm` local).
    Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (`heads` or `decoder` local).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import FederationError, PlanError
from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.trainers.harmonized_segmenter import HarmonizedSegmenter
from nnunet_fedharm.trainers.weights import Weights, bare_module, export_weights, load_weights, unique_tensors

GROUPS = ("harmonizer", "norm", "encoder", "decoder", "heads")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def group_tensors(network: nn.Module) -> dict[str, frozenset[str]]:
    """group -> canonical names of its tensors, as `export_weights` names them.

    The harmonizer's buffers (styles, polarity, gates) are in no group: they come from the plans, or from one site each.

    Args:
        network: a harmonized segmenter, compiled or not.
    """
    bare = cast(HarmonizedSegmenter, bare_module(network))
    harmonizer, segmenter = bare.harmonizer, bare.segmenter
    norms = _tensors(module for module in segmenter.modules() if isinstance(module, _NORMS))
    heads = _tensors([getattr(getattr(segmenter, "decoder", None), "seg_layers", nn.Identity())])
    encoder = _tensors([getattr(segmenter, "encoder", nn.Identity())])
    found: dict[str, set[str]] = {group: set() for group in GROUPS}
    mapping = {id(parameter) for parameter in harmonizer.parameters()}
    for name, tensor in unique_tensors(network).items():
        key = id(tensor)
        if name.startswith("harmonizer."):
            if key in mapping:
                found["harmonizer"].add(name)
        elif key in norms:
            found["norm"].add(name)
        elif key in heads:
            found["heads"].add(name)
        else:
            found["encoder" if key in encoder else "decoder"].add(name)
    return {group: frozenset(names) for group, names in found.items()}


def tensors_of(network: nn.Module, groups: Iterable[str]) -> frozenset[str]:
    """Names of all tensors of some groups.

    Raises:
        PlanError: the network has no tensor in one of them, or there is no such group.
    """
    found = group_tensors(network)
    chosen: set[str] = set()
    for group in groups:
        if not found.get(group):
            raise PlanError(
                f"The planned network has no tensor in the group {group!r}. Take it out of the groups; this network has "
                f"{', '.join(name for name in GROUPS if found[name])}."
            )
        chosen |= found[group]
    return frozenset(chosen)


def planned_tensors_of(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    trainer_name: str,
    groups: Iterable[str],
) -> frozenset[str]:
    """`tensors_of` of the network that the plans describe; nothing is built where no group is asked for."""
    from nnunet_fedharm.trainers.results import build_network  # makes trainers, which read groups themselves

    wanted = tuple(groups)
    return (
        tensors_of(build_network(plans, dataset_json, configuration, trainer_name), wanted) if wanted else frozenset()
    )


def trained_names(
    plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str, trainer_name: str
) -> frozenset[str]:
    """Names of the segmenter's parameters that a training by these plans moves, where the harmonizer rests."""
    from nnunet_fedharm.trainers.results import build_network

    network = build_network(plans, dataset_json, configuration, trainer_name)
    section = read_section(plans["configurations"][configuration], configuration_name=configuration)
    chosen = tensors_of(network, section.schedule.groups) if section.schedule.groups else None
    return frozenset(
        name
        for name, tensor in unique_tensors(network).items()
        if isinstance(tensor, nn.Parameter) and name.startswith("segmenter.") and (chosen is None or name in chosen)
    )


def train_only(network: nn.Module, optimizer: torch.optim.Optimizer, groups: Sequence[str]) -> None:
    """Freeze all of the segmenter but some groups, and let the optimizer forget what does not train.

    Args:
        network: a harmonized segmenter, compiled or not.
        optimizer: new, with one group of all parameters.
        groups: empty leaves everything as it is.

    Raises:
        PlanError: the network has no tensor in one of them.
    """
    if not groups:
        return
    chosen = tensors_of(network, groups)
    for name, tensor in unique_tensors(network).items():
        if isinstance(tensor, nn.Parameter) and name not in chosen:
            tensor.requires_grad_(False)
    (only,) = optimizer.param_groups
    only["params"] = [parameter for parameter in only["params"] if parameter.requires_grad]


def load_with_own(
    network: nn.Module, received: Weights, groups: Iterable[str], *kept: Mapping[str, Any] | None
) -> frozenset[str]:
    """Load received weights and, over them, the site's own tensors of earlier rounds, later states last.

    Returns:
        Names of the tensors that the site keeps for itself.
    """
    local = tensors_of(network, groups)
    own: Weights = {}
    for state in kept:
        own |= {name: value for name, value in own_tensors(state).items() if name in local}
    load_weights(network, {**received, **own})
    return local


def with_own(
    weights: Weights, names: frozenset[str], kept: Iterable[Mapping[str, Any] | None], *, site: str
) -> Weights:
    """Final weights with the site's own tensors in their places.

    Args:
        weights: the federation's.
        names: tensors that the site keeps for itself.
        kept: its durable states, the latest last.
        site: for messages.

    Raises:
        FederationError: some were never trained here.
    """
    own: Weights = {}
    for state in kept:
        own |= own_tensors(state)
    if names - set(own):
        raise FederationError(
            f"Site {site} never trained {len(names - set(own))} of the {len(names)} tensors that are its own by local-groups, "
            "so it has no model. It gets one when it takes part in a round of the run."
        )
    return {**weights, **{name: own[name] for name in names}}


def own_tensors(state: Mapping[str, Any] | None) -> Weights:
    """What a durable state holds of the site's own tensors."""
    kept: Mapping[str, Tensor] = {} if state is None else state.get("own", {})
    return {name: tensor.cpu().numpy() for name, tensor in kept.items()}


def copies(network: nn.Module, names: frozenset[str]) -> dict[str, Tensor]:
    """The named tensors as they are now, to be kept at the site."""
    return {name: tensor.detach().clone() for name, tensor in unique_tensors(network).items() if name in names}


def shared_weights(network: nn.Module, local: frozenset[str]) -> Weights:
    """What may leave the site: everything but its own tensors."""
    return {name: value for name, value in export_weights(network).items() if name not in local}


def _tensors(modules: Iterable[nn.Module]) -> set[int]:
    """Identities of the parameters and buffers of modules and what they hold."""
    return {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
