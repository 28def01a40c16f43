"""A model packed, installed by nnU-Net's own installer elsewhere, and predicting the same, and what its card says."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from nnunet_fedharm.cli import main
from nnunet_fedharm.commands.card import write_federated_card
from nnunet_fedharm.errors import CheckpointError, DataError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.study.model_card import CardFacts, CardPrivacy, CardScore, CardSite, card_data, limits, model_card
from nnunet_fedharm.study.model_export import NEEDED, find_folds
from nnunet_fedharm.study.model_facts import read_privacy
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder

NAME, TRAINER = "Dataset001_Blobs", "nnUNetTrainerFedHarmNyul"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Path:
    """Results folder of an untrained 2d model behind Nyul's harmonizer, with site A's style stored."""
    root = NnunetRoot(tmp_path_factory.mktemp("export")).create()
    for site in "AB":
        raw = make_raw_dataset(root.raw, name=NAME, n_labelled=3, site=f"{site}_", seed=ord(site))
    cases = {path.name[:-12]: path.name[0] for path in (raw / "imagesTr").glob("*_0000.nii.gz")}
    SitesFile({"A": SiteInfo("Siemens", 3.0, "T1w"), "B": SiteInfo(simulation={"seed": 1})}, cases).save(
        raw / "sites.json"
    )
    content = json.loads((raw / "dataset.json").read_text()) | {"numTraining": 6}
    (raw / "dataset.json").write_text(json.dumps(content))
    options = CentralOptions(
        configurations=("2d",),
        kind="nyul",
        reference="A",
        schedule=Schedule(segmenter_epochs=1, iterations_per_epoch=1, val_iterations_per_epoch=1),
        plan=PlanOptions(base_features=4, max_features=8, batch_size=2, plans_name="nnUNetFedHarmPlans"),
    )
    plans = plan_central(root, "1", options)
    files = {
        name: json.loads((root.preprocessed / NAME / f"{name}.json").read_text())
        for name in ("dataset", "dataset_fingerprint")
    }
    content |= {"dataset": {"A_case000": {"images": ["secret"], "label": "secret"}}}
    weights = initial_weights(plans, content, "2d", TRAINER, 0)
    folder = write_results_folder(
        root, NAME, plans, content, files["dataset_fingerprint"], "2d", "all", TRAINER, weights, epoch=0, which=("final",),
        site="B",
    )  # fmt: skip
    return folder.parent


def predict(folder: Path, images: Path, output: Path) -> dict[str, np.ndarray]:
    """Probabilities of every case, by nnU-Net's own predictor."""
    torch.set_num_threads(1)
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(folder), ("all",), "checkpoint_final.pth")
    output.mkdir()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=True, overwrite=True)
    return {path.name: np.load(path)["probabilities"] for path in output.glob("*.npz")}


def test_an_installed_zip_predicts_bit_for_bit_what_the_model_predicts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.zip"
    sites = model.parents[2] / "nnUNet_raw" / NAME / "sites.json"
    assert main(["export", "-m", str(model), "-o", str(target), "--sites", str(sites), "--mode", "central"]) == 0
    shown = capsys.readouterr().out
    assert "nnUNetv2_install_pretrained_model_from_zip model.zip" in shown
    assert "--metrics" in shown
    elsewhere = NnunetRoot(tmp_path / "elsewhere").create()
    with elsewhere.activate():
        install_model_from_zip_file(str(target))
    installed = elsewhere.results / NAME / model.name
    images = model.parents[2] / "nnUNet_raw" / NAME / "imagesTr"
    before, after = predict(model, images, tmp_path / "a"), predict(installed, images, tmp_path / "b")
    assert before.keys() == after.keys()
    assert len(before) == 6
    assert all(np.array_equal(before[name], after[name]) for name in before)
    card = (installed / "MODEL_CARD.md").read_text()
    assert "Siemens, 3 T, T1w" in card
    assert "(simulated)" in card
    assert TRAINER in card
    assert json.loads((installed / "model_card.json").read_text())["harmonizer"] == "nyul"


def test_what_a_model_started_from_is_on_its_card_and_where_that_lay_stays_at_home(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "nnUNet_results" / NAME / model.name
    shutil.copytree(model, own)
    start = {"start_from": "/home/somebody/public.pth", "starts": [{"model": "Dataset009_Public/T__P__2d"}]}
    file = own / "fold_all" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    for plans in (content["init_args"]["plans"], json.loads((own / "plans.json").read_text())):
        plans["configurations"]["2d"]["fedharm"] |= start
    torch.save(content, file)
    (own / "plans.json").write_text(json.dumps(plans))
    (file.parent / "privacy.json").write_text(json.dumps({"unit": "patient", "epsilon": 3.0, "delta": 1e-3}))
    assert main(["export", "-m", str(own), "-o", str(tmp_path / "model.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        base = f"{NAME}/{model.name}"
        card = archive.read(f"{base}/MODEL_CARD.md").decode()
        assert "Started from Dataset009_Public/T__P__2d, trained without differential privacy by patient" in card
        assert "not covered: the patients of Dataset009_Public/T__P__2d" in card
        assert all(b"somebody" not in archive.read(name) for name in archive.namelist())


def test_a_card_alone_is_that_of_the_zip_and_a_federation_leaves_one_at_its_server(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "nnUNet_results" / NAME / model.name
    shutil.copytree(model, own)
    words = ["-m", str(own), "--mode", "local", "--license", "CC0"]
    assert main(["card", *words]) == 0
    assert f"Written: {own / 'MODEL_CARD.md'}" in capsys.readouterr().out
    main(["export", *words, "-o", str(tmp_path / "model.zip")])
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        for name in ("MODEL_CARD.md", "model_card.json"):
            assert archive.read(f"{NAME}/{model.name}/{name}").decode() == (own / name).read_text()
    (own / "MODEL_CARD.md").unlink()
    write_federated_card(own / "fold_all")
    assert json.loads((own / "model_card.json").read_text())["mode"] == "federated"
    (own / "fold_all" / "checkpoint_final.pth").unlink()
    (own / "MODEL_CARD.md").unlink()
    write_federated_card(own / "fold_all")
    assert not (own / "MODEL_CARD.md").exists(), "there is no model yet"
    assert main(["card", *words]) == 2


def test_nothing_about_single_cases_and_no_optimizer_is_packed(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.zip"
    main(["export", "-m", str(model), "-o", str(target)])
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    base = f"{NAME}/{model.name}"
    assert sorted(names) == sorted(
        f"{base}/{name}"
        for name in ("MODEL_CARD.md", "model_card.json", "plans.json", "dataset.json", "fold_all/checkpoint_final.pth")
    )
    content = torch.load(tmp_path / base / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert content["optimizer_state"] is None
    assert content["logging"] == {}
    assert set(NEEDED) <= set(content)
    assert "secret" not in (tmp_path / base / "dataset.json").read_text() + str(content["init_args"]["dataset_json"])


def test_the_same_model_gives_the_same_bytes_and_a_former_zip_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.zip", "b.zip"):
        main(["export", "-m", str(model), "-o", str(tmp_path / name)])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    capsys.readouterr()
    assert main(["export", "-m", str(model), "-o", str(tmp_path / "a.zip")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", "-m", str(model), "-o", str(tmp_path / "a.zip"), "--overwrite"]) == 0


def test_a_folder_that_is_no_model_and_a_missing_checkpoint_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "-m", str(tmp_path), "-o", str(tmp_path / "m.zip")]) == 2
    assert "TRAINER__PLANS__CONFIGURATION" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="checkpoint_best"):
        find_folds(model, "checkpoint_best.pth")
    with pytest.raises(CheckpointError, match="fold_3"):
        find_folds(model, "checkpoint_final.pth", ["3"])


FACTS = CardFacts(
    name="demo", dataset=NAME, configuration="2d", trainer="nnUNetTrainerFedHarmCurve", plans="P", folds=("all",),
    checkpoint="checkpoint_final.pth", channels=("T1w",), labels=("tumour",), harmonizer="curve", reference="A",
)  # fmt: skip


def test_a_card_says_what_is_not_known_instead_of_leaving_it_out() -> None:
    card = model_card(FACTS)
    assert "Not measured" in card
    assert "No test scores came with this card" in card
    assert "without differential privacy" in card
    assert "has no bound" in card
    assert "Sites and scanners of the training are not stated" in card
    assert "mode not stated" in card
    assert "pip install ." in card
    assert "nnUNetv2_predict -d Dataset001_Blobs" in card
    assert "pip install" not in model_card(replace(FACTS, trainer="nnUNetTrainer"))


def test_a_card_states_privacy_with_its_unit_and_the_worst_site() -> None:
    facts = replace(
        FACTS,
        sites=(CardSite("A", "GE", True), CardSite("B", "", False, simulated=True)),
        scores=(
            CardScore("A", 10, (0.9, 0.88, 0.92)),
            CardScore("B", 8, (0.7, None, None)),
            CardScore("all", 18, (0.8,) * 3),
        ),
        privacy=(CardPrivacy("patient", 8.0, 1e-5, 7.8, ("facts",)),),
    )
    card = model_card(facts)
    assert "epsilon 8, delta 1e-5; unit: patient; spent 7.80" in card
    assert "not covered, for it left without noise: facts" in card
    assert "Worst site: B, Dice 0.700" in card
    assert "| A | GE | images and labels |" in card
    assert not any("no bound" in line for line in limits(facts))
    assert any("simulated" in line for line in limits(facts))
    assert json.loads(json.dumps(card_data(facts)))["privacy"][0]["unit"] == "patient"


def test_privacy_is_read_as_a_training_or_a_server_wrote_it_and_the_weakest_fold_counts(tmp_path: Path) -> None:
    entry = {"unit": "patient", "epsilon": 3.0, "delta": 1e-5, "without_noise": ["style"]}
    server = {
        "patient_level": {**entry, "epsilon": 8.0, "not_covered": ["facts"]},
        "site_level": {**entry, "unit": "site"},
    }
    for fold, content in (("0", entry), ("1", server)):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / "privacy.json").write_text(json.dumps(content))
    found = {promise.unit: promise for promise in read_privacy(tmp_path, ["0", "1"])}
    assert found["patient"].epsilon == 8.0
    assert found["patient"].without_noise == ("facts",)
    assert found["site"].epsilon == 3.0
    assert read_privacy(tmp_path, ["2"]) == ()
    with pytest.raises(DataError, match=r"fold 2 has no privacy.json .* Export them apart"):
        read_privacy(tmp_path, ["0", "1", "2"])
    (tmp_path / "fold_0" / "privacy.json").write_text("{")
    with pytest.raises(DataError, match="privacy"):
        read_privacy(tmp_path, ["0"])
