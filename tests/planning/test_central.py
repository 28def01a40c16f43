"""`nnunet-fedharm plan`: one dataset on the stock nnU-Net paths, ready for nnUNetv2_train."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm import trainers
from nnunet_fedharm.cli import main
from nnunet_fedharm.commands import plan as command
from nnunet_fedharm.commands.options import add_dataclass_options, read_dataclass_options
from nnunet_fedharm.errors import DataError, PlanError, PrivacyError
from nnunet_fedharm.harmonizers import KINDS
from nnunet_fedharm.planning.central import train_commands
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule, read_section
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.trainers.names import trainer_name_for
from tests.sites.raw import write_description, write_multi_site

NAME = "Dataset017_Small"
SMALL = ["--base-features", "4", "--max-features", "8", "--batch-size", "2", "--patch-size", "8", "16", "16"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders that do not lie side by side under nnU-Net's names."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    write_multi_site(tmp_path / "raw" / NAME, {"A": 3, "B": 2})
    return tmp_path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["-d", "17", "-np", "1", *words]))


def plans_file(folders: Path, name: str = "nnUNetFedHarmPlans") -> dict[str, Any]:
    return json.loads((folders / "preprocessed" / NAME / f"{name}.json").read_text())


@pytest.mark.slow
def test_small_plans_of_both_configurations_are_ready_to_train(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-c", "2d", "3d_fullres", *SMALL, "--harmonizer-epochs", "2", "--phases", "finetune") == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_train 017 2d 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans" in printed
    plans = plans_file(folders)
    for name in ("2d", "3d_fullres"):
        section = read_section(plans["configurations"][name])
        assert (section.kind, section.reference, list(section.styles)) == ("polarity", "consensus", ["A", "B"])
        assert (section.schedule.harmonizer_epochs, section.schedule.phases) == (2, "finetune")
        folder = folders / "preprocessed" / NAME / f"nnUNetFedHarmPlans_{name}"
        assert len(list(folder.glob("*.pkl"))) == 5
    assert not (folders / "preprocessed" / NAME / "nnUNetPlans.json").exists()

    page = (folders / "preprocessed" / NAME / "nnUNetFedHarmPlans_explained.md").read_text()
    assert "## 2d" in page
    assert "## 3d_fullres" in page
    assert run("--explain", "--device", "cpu") == 0
    explained = capsys.readouterr().out
    assert all(word in explained for word in ("harmonizer_epochs", "set by hand", "Nesterov momentum", "CPU"))

    # A second run for one configuration keeps the other's section and preprocesses nothing again.
    times = {path: path.stat().st_mtime_ns for path in (folders / "preprocessed").rglob("*.pkl")}
    assert run("-c", "2d", *SMALL, "--harmonizer", "nyul", "--reference", "B") == 0
    again = plans_file(folders)
    assert read_section(again["configurations"]["2d"]).reference == "B"
    assert read_section(again["configurations"]["2d"]).schedule.harmonizer_epochs == 0  # nyul has nothing to learn
    assert again["configurations"]["3d_fullres"] == plans["configurations"]["3d_fullres"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_stock_plans_are_used_and_not_overwritten(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "raw" / NAME / "sites.json").unlink()
    assert run("-c", "2d", "--harmonizer", "none") == 0
    stock = plans_file(folders, "nnUNetPlans")
    (folders / "preprocessed" / NAME / "nnUNetPlans.json").write_text(json.dumps({**stock, "mine": 1}))
    assert run("-c", "2d", "--harmonizer", "none", "-p", "Mine") == 0
    assert plans_file(folders, "nnUNetPlans") == {**stock, "mine": 1}
    configuration = plans_file(folders, "Mine")["configurations"]["2d"]
    assert {key: configuration[key] for key in stock["configurations"]["2d"]} == stock["configurations"]["2d"]
    assert list(read_section(configuration).styles) == ["one_site"]
    with pytest.raises(PlanError, match="never overwritten"):
        run("-p", "nnUNetPlans")
    assert "nnUNetTrainerFedHarmNone" in capsys.readouterr().out


@pytest.mark.benchmark_data
@pytest.mark.slow
def test_benchmark_data_are_planned_small(folders: Path, benchmark_data: Path) -> None:
    """Of each hospital every tenth case: real volumes of different sizes, in a tenth of the time."""
    raw, registry = folders / "raw" / benchmark_data.name, SitesFile.load(benchmark_data / SITES_FILE)
    owned = [[case for case in sorted(registry.cases) if registry.cases[case] == site] for site in registry.sites]
    chosen = {case: registry.cases[case] for cases in owned for case in cases[::10]}
    for case in chosen:
        for name in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            (raw / name).symlink_to(benchmark_data / name)
    SitesFile(registry.sites, chosen).save(raw / SITES_FILE)
    description = json.loads((benchmark_data / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(chosen)}))
    size = ["--base-features", "8", "--max-features", "64", "--batch-size", "4", "--patch-size", "32", "48", "32"]
    assert run("-d", "910", "-c", "3d_fullres", "--skip-check", *size) == 0
    written = folders / "preprocessed" / benchmark_data.name / "nnUNetFedHarmPlans.json"
    configuration = json.loads(written.read_text())["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [32, 48, 32]
    assert {site: style.n_cases for site, style in read_section(configuration).styles.items()} == {
        "A": 6,
        "B": 4,
        "C": 4,
        "D": 4,
    }


@pytest.mark.parametrize("name", ["3d_lowres", "3d_cascade_fullres"])
def test_cascade_stages_are_refused_in_one_sentence(
    folders: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["plan", "-d", "17", "-c", name]) == 2
    printed = capsys.readouterr().err.strip()
    assert "not with 3d_lowres or the cascade" in printed
    assert "\n" not in printed


def test_unknown_dataset_and_reference_are_refused(folders: Path) -> None:
    with pytest.raises(DataError, match=rf"Dataset 18 was not found .*only: {NAME}"):
        run("-d", "18")
    with pytest.raises(PlanError, match=r"'Z' is not in sites.json; choose one of A, B or consensus"):
        run("--reference", "Z")
    with pytest.raises(PlanError, match=r"There are no plans .*nnunet-fedharm plan"):
        run("--explain")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harmonizer-options", "width=4"], r"is not JSON: .*Write it like '{\"width\": 16}'"),
        (["--harmonizer-options", "[4]"], "must be a JSON object"),
        (["--harmonizer-options", '{"depth": 2}'], "'polarity' has no option 'depth'"),
        (
            ["--harmonizer", "cyclegan", "--harmonizer-options", '{"train_everywhere": true}', "--epsilon", "8"],
            "train_everywhere does not go with differential privacy",
        ),
        (["--phases", "both"], "choose one of frozen, alternate, finetune"),
        (["--device", "tpu"], "choose auto, cpu or cuda"),
    ],
)
def test_options_out_of_range_are_refused_before_the_data_are_read(
    folders: Path, words: list[str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        run(*words)
    assert not list((folders / "preprocessed").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_command_names_a_trainer_that_exists(kind: str) -> None:
    plans = {"dataset_name": NAME, "plans_name": "P"}
    (command,) = train_commands(plans, ["2d"], trainer_name_for(kind), n_labelled=3)
    assert command.startswith("nnUNetv2_train 017 2d all -tr ")
    assert hasattr(trainers, command.split()[5])


def test_empty_dataset_is_refused(folders: Path) -> None:
    write_description(folders / "raw" / "Dataset018_Empty")
    with pytest.raises(DataError, match="is empty"):
        run("-d", "18")


def test_every_option_shows_its_help_and_keeps_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_dataclass_options(parser, Schedule)
    add_dataclass_options(parser, PlanOptions, skip={"plans_name"})
    text = " ".join(parser.format_help().split())
    assert "AdamW learning rate of the harmonizer phase. Default: 0.001." in text
    given = parser.parse_args(["--segmenter-epochs", "7", "--patch-size", "4", "5", "6", "--seed", "3"])
    assert read_dataclass_options(given, Schedule) == Schedule(segmenter_epochs=7, seed=3)
    assert read_dataclass_options(given, PlanOptions, plans_name="X") == PlanOptions(
        patch_size=(4, 5, 6), plans_name="X"
    )


@pytest.mark.slow
def test_a_fingerprint_with_noise_is_planned_from_once_and_nnunet_s_own_is_left_alone(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = folders / "preprocessed" / NAME / "dataset_fingerprint.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"of": "stock nnU-Net"}')
    words = ["-c", "2d", *SMALL, "--harmonizer", "none", "--epsilon", "20", "--delta", "0.01", "--style-noise", "0"]
    assert run(*words, "--fingerprint-noise", "4", "--skip-check") == 0
    assert own.read_text() == '{"of": "stock nnU-Net"}', "neither read nor changed"
    kept = json.loads((folders / "preprocessed" / NAME / "private_fingerprint_4.json").read_text())["fingerprint"]
    assert len(kept["spacings"]) == 5
    entries = [entry for entry in Ledger(folders / "fedharm").releases() if entry.what.startswith("fingerprint")]
    assert [(entry.what, entry.noise_multiplier) for entry in entries] == [("fingerprint summary", 4.0)]
    section = read_section(plans_file(folders)["configurations"]["2d"])
    assert section.privacy is not None
    assert section.privacy.fingerprint_multiplier == 4.0, "it counts in the budget of the training"
    assert run(*words, "--fingerprint-noise", "4", "--skip-check", "-p", "Again") == 0
    assert len([e for e in Ledger(folders / "fedharm").releases() if e.what == "fingerprint summary"]) == 1
    first, second = plans_file(folders), plans_file(folders, "Again")
    for key in ("spacing", "patch_size", "batch_size"):
        assert first["configurations"]["2d"][key] == second["configurations"]["2d"][key], "the same bytes cost nothing"
    capsys.readouterr()


def test_noise_of_the_fingerprint_needs_a_budget(folders: Path) -> None:
    with pytest.raises(PlanError, match="--fingerprint-noise belongs to differential privacy"):
        run("--fingerprint-noise", "4")
    with pytest.raises(PrivacyError, match="The budget is epsilon 1 "):
        run("--fingerprint-noise", "0.5", "--epsilon", "1", "--harmonizer", "none")
