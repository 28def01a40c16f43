"""Groups of tensors: every tensor once, by what it is, and the site's own ones stay at the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_fedharm.errors import FederationError, PlanError
from nnunet_fedharm.federation.strategy_checks import LOCAL_GROUPS
from nnunet_fedharm.trainers.groups import GROUPS, group_tensors, planned_tensors_of, tensors_of
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.results import build_network
from tests.trainers.conftest import NAME, Planned
from tests.trainers.test_local_training import start
from tests.trainers.test_trainer import TRAINERS


def site(planned: Planned, folder: Path, *groups: str, name: str = "A") -> LocalTraining:
    return LocalTraining(
        root=planned.root,
        dataset_name=NAME,
        plans=planned.plans["curve"],
        dataset_json=planned.dataset_json,
        configuration="2d",
        fold="all",
        site=name,
        trainer_name=TRAINERS["curve"],
        state_folder=folder,
        seed=11,
        device="cpu",
        local_groups=groups,
    )


def network_of(planned: Planned, kind: str = "curve") -> nn.Module:
    return build_network(planned.plans[kind], planned.dataset_json, "2d", TRAINERS[kind])


def test_every_trained_tensor_is_in_exactly_one_group(active: Planned) -> None:
    network = network_of(active)
    groups = group_tensors(network)
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names))
    assert set(groups) == set(GROUPS) == set(LOCAL_GROUPS)
    trained = {id(parameter) for parameter in network.parameters()}
    found = dict(network.state_dict(keep_vars=True))
    assert {id(found[name]) for name in names} == trained


def test_membership_is_by_tensor_because_the_decoder_holds_the_encoder(active: Planned) -> None:
    network = network_of(active)
    groups = group_tensors(network)
    assert any(name.startswith("segmenter.decoder.encoder.") for name in groups["encoder"])
    assert not any(".encoder." in name for name in groups["decoder"])
    assert all(".seg_layers." in name for name in groups["heads"])
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert all(len(shapes[name]) == 1 for name in groups["norm"])
    norms = [module for module in network.segmenter.modules() if isinstance(module, nn.InstanceNorm2d)]
    tensors = {id(parameter) for module in norms for parameter in module.parameters()}
    assert len(groups["norm"]) == len(tensors)


def test_a_group_that_the_network_has_not_is_refused(active: Planned) -> None:
    with pytest.raises(PlanError, match="no tensor in the group 'harmonizer'"):
        tensors_of(network_of(active, "none"), ["harmonizer"])
    arguments = (active.plans["curve"], active.dataset_json, "2d", TRAINERS["curve"])
    assert planned_tensors_of(*arguments, ()) == frozenset()
    assert planned_tensors_of(*arguments, ("norm", "heads")) == tensors_of(network_of(active), ("heads", "norm"))


def test_the_sites_own_tensors_are_not_sent_and_live_on_between_rounds(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    norm = tensors_of(network_of(active), ["norm"])
    arguments: dict[str, Any] = {"phase": "segmenter", "epochs": 1}
    first = site(active, tmp_path, "norm").run(round_index=0, first_epoch=0, weights=weights, **arguments)
    assert set(first.weights) == set(weights) - norm
    kept = torch.load(tmp_path / "segmenter_round_00000.pt", weights_only=True)["own"]
    assert set(kept) == norm
    assert any(not np.array_equal(kept[name].numpy(), weights[name]) for name in norm), "they were trained"
    # The server sends the start of the run again, and it must not undo what the site has learnt.
    received = {**weights, **first.weights}
    again = site(active, tmp_path, "norm").run(round_index=1, first_epoch=1, weights=received, **arguments)
    whole = site(active, tmp_path / "shared")
    whole.run(round_index=0, first_epoch=0, weights=weights, **arguments)
    sent = {**received, **{name: kept[name].numpy() for name in norm}}
    expected = whole.run(round_index=1, first_epoch=1, weights=sent, **arguments)
    for name, value in again.weights.items():
        np.testing.assert_array_equal(value, expected.weights[name], err_msg=name)


def test_fedprox_does_not_pull_what_a_site_keeps_for_itself(active: Planned, tmp_path: Path) -> None:
    from nnunet_fedharm.trainers.local_objectives import GradientTerms, extended

    network = network_of(active)
    norm = tensors_of(network, ["norm"])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with extended([optimizer], network, norm, proximal_mu=1.0) as terms:
        assert isinstance(terms, GradientTerms)
        assert not norm & set(terms.received)


def test_the_final_model_holds_the_sites_own_tensors_of_both_phases(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    training = site(active, tmp_path, "harmonizer", "heads")
    sent = training.run(phase="harmonizer", round_index=0, first_epoch=0, epochs=1, weights=weights)
    assert not any(name.startswith("harmonizer.tone") for name in sent.weights)
    training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=1, weights=weights)
    folder = training.finish(weights, active.fingerprint, epoch=0)
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    groups = group_tensors(network_of(active))
    own = torch.load(tmp_path / "segmenter_round_00000.pt", weights_only=True)["own"]
    trained = torch.load(tmp_path / "harmonizer_round_00000.pt", weights_only=True)["own"]
    for name in groups["heads"] | groups["harmonizer"]:
        np.testing.assert_array_equal(final[name].numpy(), own[name].numpy(), err_msg=name)
    for name in groups["harmonizer"]:
        np.testing.assert_array_equal(final[name].numpy(), trained[name].numpy(), err_msg=name)
    assert any(not np.array_equal(final[name].numpy(), weights[name]) for name in groups["harmonizer"])
    assert json.loads((folder.parent / "plans.json").read_text())["plans_name"]


def test_a_site_that_never_trained_its_own_tensors_gets_no_model(active: Planned, tmp_path: Path) -> None:
    with pytest.raises(
        FederationError, match=r"Site A never trained \d+ of the \d+ tensors that are its own by local-groups"
    ):
        site(active, tmp_path, "norm").finish(start(active), active.fingerprint, epoch=0)
