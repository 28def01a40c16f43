"""A training that starts from a trained model, and one that trains a part of the network."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule, StartModel
from nnunet_fedharm.planning.start import find_checkpoint, models_behind, with_networks_of
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.groups import group_tensors, tensors_of
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.results import initial_weights, make_trainer, trainer_class
from nnunet_fedharm.trainers.start_weights import start_from, with_judge_of
from nnunet_fedharm.trainers.weights import unique_tensors
from tests.trainers.conftest import NAME, Planned
from tests.trainers.test_trainer import TRAINERS

Make = Callable[..., nnUNetTrainerFedHarm]


@pytest.fixture
def make(active: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A new trainer (not continued) by kind, schedule and keys of the section, with an empty ledger."""
    for path in (active.root.path / "fedharm").glob("privacy-ledger*"):
        path.unlink()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))

    def trainer(kind: str, *, schedule: dict[str, Any] | None = None, **keys: Any) -> nnUNetTrainerFedHarm:
        plans = copy.deepcopy(active.plans[kind])
        section = plans["configurations"]["2d"]["fedharm"]
        section["schedule"] |= {"seed": 0, **(schedule or {})}
        section.update(keys)
        plans["continue_training"] = False
        return trainer_class(TRAINERS[kind])(
            plans,
            "2d",
            "all",
            active.dataset_json,
            torch.device("cpu"),  # type: ignore[arg-type]
        )

    yield trainer
    for path in (active.root.path / "fedharm").glob("privacy-ledger*"):
        path.unlink()


@pytest.fixture
def model(make: Make) -> Path:
    """Folder of the fold of a trained polarity model."""
    trainer = make("polarity", schedule={"seed": 7, "segmenter_epochs": 1})
    trainer.run_training()
    return Path(trainer.output_folder)


def segmenter_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in unique_tensors(network).items()
        if name.startswith("segmenter.")
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_start_brings_its_judge_where_none_was_asked_for(make: Make, model: Path) -> None:
    assert with_judge_of(model, "polarity", {}) == {"judge": "network"}
    assert with_judge_of(model, "polarity", {"judge": "linear"}) == {"judge": "linear"}
    assert with_judge_of(model, "curve", {}) == {}
    assert with_judge_of("", "polarity", {"judge_width": 8}) == {"judge_width": 8}
    found = []
    for kind, options in (("polarity", {"judge": "linear"}), ("none", {})):
        trainer = make(kind, schedule={"seed": 7, "segmenter_epochs": 1}, harmonizer=options)
        trainer.run_training()
        found.append(with_judge_of(trainer.output_folder, "polarity", {}))
    assert found == [{"judge": "linear"}, {}]


def test_weights_come_from_the_model_and_styles_from_the_plans(make: Make, model: Path) -> None:
    trained = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)["network_weights"]
    trainer = make("polarity", start_from=str(model.parent))
    trainer.initialize()
    state = trainer.network.state_dict()
    for name, _ in trainer.network.named_parameters():
        assert torch.equal(state[name], trained[name])
    assert int(state["harmonizer.trained_epochs"]) == 0 < int(trained["harmonizer.trained_epochs"])
    other = make("none", start_from=str(model / "checkpoint_final.pth"))
    other.initialize()
    assert same(segmenter_of(other.network), segmenter_of(trainer.network))


def test_a_judge_of_another_kind_is_left_behind(make: Make, model: Path) -> None:
    fresh, started = (
        make("polarity", harmonizer={"judge": "linear"}, **keys) for keys in ({}, {"start_from": str(model)})
    )
    for trainer in (fresh, started):
        trainer.initialize()
    drawn, own = fresh.harmonizer.state_dict(), started.harmonizer.state_dict()
    assert [name for name in own if name.startswith("polarity_judge.network")]
    assert all(torch.equal(own[name], drawn[name]) for name in own), "its features are those that it is whitened for"
    assert not same(segmenter_of(fresh.network), segmenter_of(started.network))


def test_a_start_is_named_with_its_epsilon_and_what_it_started_from_itself(
    active: Planned, model: Path, tmp_path: Path
) -> None:
    own = f"{NAME}/nnUNetTrainerFedHarmPolarity__{active.plans['polarity']['plans_name']}__2d"
    assert models_behind("") == ()
    assert models_behind(model.parent) == (StartModel(own),)
    assert "/" not in str(models_behind(model)[0]).removeprefix(own), "no path of this machine"
    content = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    section = content["init_args"]["plans"]["configurations"]["2d"]["fedharm"]
    section |= {"privacy": {"epsilon": 4.0, "delta": 1e-3, "unit": "patient"}, "starts": [{"model": "public"}]}
    torch.save(content, tmp_path / "private.pth")
    assert models_behind(tmp_path / "private.pth") == (StartModel(own, 4.0, 1e-3), StartModel("public"))
    torch.save({"network_weights": content["network_weights"]}, tmp_path / "bare.pth")
    assert models_behind(tmp_path / "bare.pth") == (StartModel("bare.pth"),)


def test_plans_have_the_network_of_their_start_and_are_ready_to_train(active: Planned, model: Path) -> None:
    sizes = PlanOptions(plans_name="Started", batch_size=3)
    plans = plan_central(
        active.root,
        NAME,
        CentralOptions(
            configurations=("2d",),
            kind="polarity",
            reference="A",
            schedule=Schedule(segmenter_epochs=1),
            plan=sizes,
            start_from=str(model),
        ),
    )
    small, own = active.plans["polarity"]["configurations"]["2d"], plans["configurations"]["2d"]
    for key in ("architecture", "patch_size", "spacing"):
        assert own[key] == small[key]
    assert own["batch_size"] == 3, "asked for"
    trainer = make_trainer(TRAINERS["polarity"], plans, "2d", "all", active.dataset_json)
    trainer.initialize()
    trained = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)["network_weights"]
    assert all(torch.equal(trained[name], value) for name, value in segmenter_of(trainer.network).items())


def test_other_axes_and_spacing_of_a_start_are_taken_with_cases_of_their_own(
    active: Planned, model: Path, tmp_path: Path
) -> None:
    plans, file = active.plans["none"], tmp_path / "start.pth"
    content = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)

    def taken(options: PlanOptions) -> dict[str, Any]:
        torch.save(content, file)
        return with_networks_of(file, plans, ("2d",), options)

    assert taken(PlanOptions()) == plans, "it has the same networks, and brings no section"
    given = content["init_args"]["plans"]
    given["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    other = taken(PlanOptions())
    assert other["configurations"]["2d"]["spacing"] == [2.0, 2.0]
    assert other["configurations"]["2d"]["data_identifier"] == f"{plans['plans_name']}_2d"
    given["transpose_forward"], given["transpose_backward"] = [1, 0, 2], [1, 0, 2]
    turned = taken(PlanOptions())
    assert turned["transpose_forward"] == [1, 0, 2]
    assert list(turned["configurations"]) == ["2d"]
    assert taken(PlanOptions(base_features=4)) == plans, "who sizes the network plans it"
    with pytest.raises(PlanError, match="a model of the configuration 2d, not of 3d_fullres"):
        with_networks_of(file, plans, ("3d_fullres",), PlanOptions())
    given["configurations"]["2d"]["normalization_schemes"] = ["ZScoreNormalization"] * 2
    with pytest.raises(PlanError, match="images with 2 channels, here they have 1"):
        taken(PlanOptions())


@pytest.mark.parametrize("stopped_in_its_harmonizer_phase", [True, False])
def test_a_continued_training_starts_again_only_where_no_checkpoint_is(
    make: Make, model: Path, active: Planned, stopped_in_its_harmonizer_phase: bool
) -> None:
    plans = copy.deepcopy(active.plans["polarity"])
    plans["configurations"]["2d"]["fedharm"]["start_from"] = str(shutil.copytree(model, model.parents[1] / "start"))
    if stopped_in_its_harmonizer_phase:
        for file in model.glob("checkpoint_*.pth"):
            file.unlink()
    continued = make_trainer(TRAINERS["polarity"], plans, "2d", "all", active.dataset_json)
    assert Path(continued.output_folder) == model
    continued.initialize()
    start = model.parents[1] / "start" / "checkpoint_final.pth"
    trained = torch.load(start, map_location="cpu", weights_only=False)["network_weights"]
    same_weights = all(torch.equal(trained[name], value) for name, value in segmenter_of(continued.network).items())
    assert same_weights is stopped_in_its_harmonizer_phase


def test_a_federation_starts_from_it_too(active: Planned, model: Path) -> None:
    arguments = (active.plans["polarity"], active.dataset_json, "2d", TRAINERS["polarity"], 0)
    started, fresh = initial_weights(*arguments, start=str(model)), initial_weights(*arguments)
    trained = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)["network_weights"]
    moved = [name for name in fresh if (started[name] != fresh[name]).any()]
    assert moved
    assert all(name.startswith(("segmenter.", "harmonizer.polarity_judge.")) for name in moved)
    assert all((started[name] == trained[name].numpy()).all() for name in moved)


def test_a_stock_model_can_be_the_start_and_other_labels_get_new_heads(
    make: Make, active: Planned, tmp_path: Path
) -> None:
    plans = copy.deepcopy(active.plans["none"])
    description = active.dataset_json
    description["labels"] = {**description["labels"], "another": len(description["labels"])}
    stock = nnUNetTrainer(plans | {"continue_training": False}, "2d", "all", description, torch.device("cpu"))  # type: ignore[arg-type]
    stock._set_batch_size_and_oversample()
    network = nnUNetTrainer.build_network_architecture(
        stock.plans_manager, stock.configuration_manager, 1, len(description["labels"]), True
    )
    torch.save({"network_weights": network.state_dict(), "logging": {}}, tmp_path / "stock.pth")
    trainer = make("none")
    trainer.initialize()
    before = segmenter_of(trainer.network)
    start = start_from(trainer.network, tmp_path / "stock.pth")
    after = segmenter_of(trainer.network)
    heads = tensors_of(trainer.network, ["heads"])
    assert {name for name in after if torch.equal(after[name], before[name])} >= heads
    assert set(start.fresh) == {name for name, _ in trainer.network.named_parameters() if ".seg_layers." in name}
    assert not torch.equal(after[sorted(set(after) - heads)[1]], before[sorted(set(before) - heads)[1]])


def test_what_cannot_be_a_start_is_refused_with_the_reason(make: Make, model: Path, tmp_path: Path) -> None:
    trainer = make("none")
    trainer.initialize()
    before = segmenter_of(trainer.network)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint_final\.pth"):
        find_checkpoint(tmp_path)
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read as an nnU-Net checkpoint"):
        start_from(trainer.network, tmp_path / "text.pth")
    content = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    weights = content["network_weights"]
    name = next(name for name in weights if name.endswith("encoder.stages.0.0.convs.0.conv.weight"))
    for change, reason in ((weights[name][:1], "Train it with plans"), (weights[name] * float("nan"), "NaN")):
        torch.save({**content, "network_weights": {**weights, name: change}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=reason):
            start_from(trainer.network, tmp_path / "other.pth")
    assert same(before, segmenter_of(trainer.network))


def test_a_checkpoint_runs_no_code(make: Make, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"network_weights": {}, "logging": Evil()}, tmp_path / "evil.pth")
    trainer = make("none")
    trainer.initialize()
    with pytest.raises(CheckpointError, match="cannot be read"):
        start_from(trainer.network, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_pretrained_weights_with_the_styles_of_another_model_are_refused(make: Make, model: Path) -> None:
    file = model / "checkpoint_final.pth"
    content = torch.load(file, map_location="cpu", weights_only=False)
    content["network_weights"]["harmonizer.bank_quantiles"] += 0.5
    torch.save(content, file)
    trainer = make("polarity")
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    with pytest.raises(PlanError, match="--start-from"):
        trainer.run_training()


@pytest.mark.parametrize("privacy", [None, {"epsilon": 50.0, "delta": 1e-2, "patients_per_step": 3.0}])
def test_only_the_chosen_groups_move(make: Make, privacy: dict[str, float] | None) -> None:
    keys = {} if privacy is None else {"privacy": privacy}
    trainer = make("curve", schedule={"trained_groups": "norm, heads", "harmonizer_epochs": 1}, **keys)
    trainer.initialize()
    trainer.run_harmonizer_phase() if privacy is None else None
    before = {name: tensor.detach().clone() for name, tensor in unique_tensors(trainer.network).items()}
    trainer.run_training()
    after = unique_tensors(trainer.network)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    segmenter = {name for name in moved if name.startswith("segmenter.")}
    groups = group_tensors(trainer.network)
    assert segmenter
    assert segmenter <= groups["norm"] | groups["heads"]
    assert segmenter & groups["norm"]
    assert segmenter & groups["heads"]
    if privacy is not None:
        assert trainer._gradients is not None
        assert len(trainer._gradients.parameters) == len(groups["norm"] | groups["heads"])


def test_noise_does_not_move_a_frozen_harmonizer(make: Make) -> None:
    trainer = make("curve", privacy={"epsilon": 1.0, "delta": 1e-2, "patients_per_step": 3.0})
    trainer.initialize()
    trainer.start_private()
    trainer.run_harmonizer_phase()
    before = {name: value.clone() for name, value in trainer.harmonizer.state_dict().items()}
    trainer.run_training()
    after = trainer.harmonizer.state_dict()
    assert [name for name in before if name != "gate" and not torch.equal(before[name], after[name])] == []


def test_a_site_in_a_round_trains_only_the_chosen_groups(active: Planned, tmp_path: Path) -> None:
    plans = copy.deepcopy(active.plans["none"])
    plans["configurations"]["2d"]["fedharm"]["schedule"]["trained_groups"] = "heads"
    weights = initial_weights(plans, active.dataset_json, "2d", TRAINERS["none"], 0)
    training = LocalTraining(
        root=active.root, dataset_name=NAME, plans=plans, dataset_json=active.dataset_json, configuration="2d", fold="all",
        site="A", trainer_name=TRAINERS["none"], state_folder=tmp_path, seed=0, device="cpu",
    )  # fmt: skip
    for round_index in (0, 1):
        sent = weights
        result = training.run(
            phase="segmenter", round_index=round_index, first_epoch=round_index, epochs=1, weights=sent
        )
        weights = result.weights
        moved = {name for name in sent if (sent[name] != weights[name]).any()}
        assert moved
        assert all(".seg_layers." in name for name in moved)


def test_an_unknown_group_is_refused(make: Make) -> None:
    with pytest.raises(PlanError, match=r"trained_groups names 'harmonizer'"):
        make("none", schedule={"trained_groups": "heads,harmonizer"})
