"""Weights as they travel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import CheckpointError, ShapeError
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.trainers.results import initial_weights
from nnunet_fedharm.trainers.weights import bare_module, export_weights, load_weights, unique_tensors
from tests.trainers.conftest import Planned
from tests.trainers.test_trainer import our_trainer


def test_each_tensor_travels_once_and_site_local_ones_never(active: Planned) -> None:
    trainer = our_trainer(active, "curve", "2d")
    trainer.initialize()
    trainer.harmonizer.set_source(Style(np.ones((1, len(QUANTILE_LEVELS))), np.ones(1), 1))
    weights = export_weights(trainer.network)
    sent = sum(value.size for value in weights.values())
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    buffers = sum(b.numel() for name, b in trainer.network.named_buffers() if "source" not in name)
    assert sent == parameters + buffers
    assert len(trainer.network.state_dict()) > len(weights)
    assert not any("source" in name for name in weights)


def test_loading_what_was_exported_restores_every_alias(active: Planned) -> None:
    one, other = our_trainer(active, "curve", "2d"), our_trainer(active, "curve", "2d")
    one.initialize()
    other.initialize()
    load_weights(other.network, export_weights(one.network))
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, other.network.state_dict()[name]), name


def test_a_compiled_network_has_the_same_names() -> None:
    plain = torch.nn.Linear(2, 2)
    compiled = torch.compile(plain)
    assert isinstance(compiled, torch.nn.Module)
    assert list(unique_tensors(compiled)) == list(unique_tensors(plain))
    assert bare_module(compiled) is plain


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["missing", "unknown", "shape", "nan", "inf"]))
def test_unfit_weights_are_refused_and_nothing_is_loaded(fault: str) -> None:
    module = torch.nn.Linear(3, 2)
    before = export_weights(module)
    weights = {name: value + 1 for name, value in before.items()}
    if fault == "missing":
        del weights["bias"]
    elif fault == "unknown":
        weights["extra"] = np.zeros(1, np.float32)
    elif fault == "shape":
        weights["weight"] = np.zeros((3, 2), np.float32)
    else:
        weights["weight"][0, 0] = np.nan if fault == "nan" else np.inf
    with pytest.raises((CheckpointError, ShapeError), match=r"bias|extra|weight"):
        load_weights(module, weights)
    for name, value in export_weights(module).items():
        np.testing.assert_array_equal(value, before[name])


def test_initial_weights_follow_the_seed_and_leave_the_random_state_alone(active: Planned) -> None:
    def draw(seed: int) -> dict[str, np.ndarray]:
        return initial_weights(active.plans["curve"], active.dataset_json, "2d", "nnUNetTrainerFedHarmCurve", seed)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.rand(1), expected)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
