"""One configuration for Flower, the command line and Python; contradictions are refused at once."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import fields, replace
from typing import Any

import pytest

from nnunet_fedharm.commands import federate as command
from nnunet_fedharm.errors import FederationError, PlanError
from nnunet_fedharm.federation.config import FederateConfig, key_of, warnings_of
from nnunet_fedharm.federation.daemon import app_folder
from nnunet_fedharm.federation.launch import run_arguments, write_run_config
from nnunet_fedharm.federation.report.config import SiteReportConfig, training_keys


def shipped_app() -> dict[str, Any]:
    app: dict[str, Any] = tomllib.loads((app_folder() / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return app


def test_the_shipped_app_has_every_key_with_its_default() -> None:
    shipped = shipped_app()["config"]
    assert shipped == {**SiteReportConfig().to_run_config(), **FederateConfig().to_run_config(), "task": "train"}
    assert FederateConfig.from_run_config(training_keys(shipped)) == FederateConfig()
    assert SiteReportConfig.from_run_config(shipped) == SiteReportConfig()


def test_the_shipped_app_holds_no_code() -> None:
    assert [path.name for path in app_folder().iterdir() if path.name != "__pycache__"] == ["pyproject.toml"]


def test_run_config_round_trips_through_toml(tmp_path: Any) -> None:
    config = FederateConfig(
        root="/data/a b",
        sites="A,B",
        harmonizer="curve",
        harmonizer_options='{"width": 8}',
        harmonizer_rounds=2,
        fp16=True,
        patch_size="32x32",
        deadline_s=12.5,
    )
    write_run_config(config, tmp_path / "run.toml")
    assert FederateConfig.from_run_config(tomllib.loads((tmp_path / "run.toml").read_text())) == config


def test_flower_may_hand_over_an_integer_for_a_float_or_a_dataset_number() -> None:
    config = FederateConfig.from_run_config({"deadline-s": 5, "dataset": 910})
    assert config.deadline_s == 5.0
    assert config.dataset == "910"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"configuration": "3d_lowres"}, "configuration is '3d_lowres'; choose one of 2d, 3d_fullres"),
        ({"configuration": "3d_cascade_fullres"}, "choose one of 2d, 3d_fullres"),
        ({"harmonizer": "magic"}, "choose one of none, augment, nyul, curve"),
        ({"fold": "5"}, "fold is '5'"),
        ({"segmenter_rounds": -1}, "segmenter-rounds must be >= 0, got -1"),
        ({"harmonizer_rounds": -1}, "harmonizer-rounds must be >= 0"),
        ({"segmenter_rounds": 0}, "nothing to train"),
        ({"harmonizer": "nyul", "harmonizer_rounds": 1}, "has nothing to learn"),
        ({"quorum": 3, "sites": "A,B"}, "quorum is 3, but there are only 2 sites"),
        ({"reference": "X", "sites": "A,B"}, "reference site 'X' is not in this federation"),
        ({"sites": "A,A"}, "named twice"),
        ({"sites": "A,../B"}, "not usable"),
        ({"plans_name": "nnUNetPlans"}, "stock nnU-Net's plans are never overwritten"),
        ({"plans_name": "sites"}, "would overwrite sites.json of the preprocessed dataset"),
        ({"plans_name": "../plans"}, "plans name '../plans' is not usable"),
        ({"patch_size": "64"}, "write it as 64x64"),
        ({"patch_size": "64x64", "configuration": "3d_fullres"}, "does not fit the configuration"),
        ({"deadline_s": 0.0}, "deadline-s must be > 0"),
        ({"weighting": "votes"}, "weighting is 'votes'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"harmonizer": "curve", "harmonizer_options": "[1"}, "not a JSON object"),
        (
            {"harmonizer": "cyclegan", "harmonizer_options": '{"train_everywhere": true}', "epsilon": 4.0},
            "train_everywhere does not go with differential privacy",
        ),
        ({"harmonizer": "diffusion", "harmonizer_options": '{"widht": 4}'}, "'diffusion' has no option 'widht'"),
        (
            {"harmonizer": "cyclegan", "harmonizer_options": '{"width": "big"}'},
            "harmonizer.width is 'big'; write a value",
        ),
        ({"harmonizer": "cyclegan", "harmonizer_options": '{"polarity": 1}'}, "write a value like true"),
        ({"harmonizer": "cyclegan", "harmonizer_options": '{"dilations": 2}'}, r"write a value like \[1, 2, 4\]"),
        (
            {"harmonizer": "cyclegan", "harmonizer_options": '{"cycle_weight": -1.0}'},
            "harmonizer.cycle_weight must be >= 0",
        ),
        ({"harmonizer": "none", "harmonizer_options": '{"width": 4}'}, "'none' has no option 'width'"),
        ({"harmonizer": "cyclegan", "phases": "alternate"}, "choose one of frozen, finetune"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(values: dict[str, Any], words: str) -> None:
    with pytest.raises((FederationError, PlanError), match=words):
        FederateConfig(**values)


def test_unknown_keys_and_wrong_types_are_refused() -> None:
    with pytest.raises(FederationError, match="Unknown run config key 'rounds'"):
        FederateConfig.from_run_config({"rounds": 3})
    with pytest.raises(FederationError, match="segmenter-rounds must be int, got '3'"):
        FederateConfig.from_run_config({"segmenter-rounds": "3"})
    with pytest.raises(FederationError, match="fp16 must be bool, got 1"):
        FederateConfig.from_run_config({"fp16": 1})


def test_a_learned_harmonizer_without_rounds_is_a_warning() -> None:
    assert "stays the identity" in warnings_of(FederateConfig(harmonizer="curve"))[0]
    assert warnings_of(FederateConfig(harmonizer="curve", harmonizer_rounds=1)) == []
    assert "maps quantiles, nobody votes" in warnings_of(FederateConfig(harmonizer="polarity"))[0]
    started = FederateConfig(harmonizer="curve", start_from="model")
    assert not [text for text in warnings_of(started) if "identity" in text], "it brings what a harmonizer has learned"


def test_one_sided_discriminators_over_many_steps_are_a_warning() -> None:
    options = '{"train_everywhere": true, "one_sided": true, "pseudo_references": false}'
    config = FederateConfig(harmonizer="cyclegan", harmonizer_options=options, harmonizer_rounds=1)
    assert "a round has 250" in warnings_of(config)[0]
    assert warnings_of(replace(config, iterations_per_epoch=1)) == []


def test_deadlines_and_devices_do_not_make_another_run_but_seeds_do() -> None:
    base = FederateConfig().fingerprint()
    assert FederateConfig(deadline_s=1.0, device="cuda", root="/x").fingerprint() == base
    assert FederateConfig(seed=1).fingerprint() != base


def test_every_field_is_an_option_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(
        ["--root", "/r", "-d", "910", "-c", "3d_fullres", "-f", "0", "--fp16", "--deadline-s", "9", "--device", "cpu"]
    )
    config = FederateConfig(**{item.name: getattr(args, item.name) for item in fields(FederateConfig)})
    wanted = {"dataset": "910", "configuration": "3d_fullres", "fold": "0", "fp16": True, "deadline_s": 9.0}
    assert {name: getattr(config, name) for name in wanted} == wanted
    for item in fields(FederateConfig):
        assert f"--{key_of(item)}" in parser.format_help()


def test_simulation_gets_one_node_per_site(tmp_path: Any) -> None:
    words = run_arguments(FederateConfig(sites="A,B,C", parallel_sites=2), tmp_path / "run.toml")
    assert "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2" in words
