"""Membership attacks: on a model that has memorized, on one that has not, and on sets that differ by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_fedharm import cli
from nnunet_fedharm.errors import CheckpointError, DataError
from nnunet_fedharm.evaluation.audit import words
from nnunet_fedharm.evaluation.audit.membership import (
    MembershipOptions,
    _against_references,
    _judge,
    _residual,
    attack_membership,
)
from nnunet_fedharm.evaluation.audit.model import labelled_cases, load_model, members_by_split, patches_of
from nnunet_fedharm.evaluation.audit.site import AuditedSite
from nnunet_fedharm.sites.files import labelled_cases as training_cases
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder
from tests.evaluation.audit.conftest import NAME

OPTIONS = MembershipOptions(patches=1)


@pytest.fixture(scope="module")
def model(site: AuditedSite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, so that nobody is a member."""
    from nnunet_fedharm.nnunet_root import NnunetRoot

    root = NnunetRoot(tmp_path_factory.mktemp("model"))
    description = read_json(site.root.preprocessed / NAME / "dataset.json", what="description")
    trainer = "nnUNetTrainerFedHarmNone"
    weights = initial_weights(site.plans, description, "2d", trainer, 0)
    return write_results_folder(
        root, NAME, site.plans, description, {}, "2d", "all", trainer, weights, epoch=1, which=("final",)
    ).parent


def judged(members: np.ndarray, others: np.ndarray, features: np.ndarray | None = None) -> str:
    """The reading of losses alone."""
    losses = np.concatenate([members, others])
    if features is None:
        features = np.random.default_rng(0).normal(size=(len(losses), 3))
    audit = _judge("model", {"loss": -losses}, losses, features, len(members), 0, (1.0, 1e-5), MembershipOptions())
    return words.membership_sentence(audit)


def test_lower_losses_of_members_are_found_and_contradict_a_small_epsilon() -> None:
    generator = np.random.default_rng(1)
    said = judged(generator.normal(0, 1, 80), generator.normal(4, 1, 80))
    assert "gives away who was in its training" in said
    assert "claimed epsilon 1 is contradicted" in said


def test_equal_losses_are_called_no_evidence_and_no_proof() -> None:
    generator = np.random.default_rng(1)
    said = judged(generator.normal(0, 1, 30), generator.normal(0, 1, 30))
    assert said.startswith(
        "None of 1 attacks tells 30 members and 30 non-members apart beyond chance; a stronger attack"
    )


def test_sets_that_differ_without_the_model_are_no_evidence_of_a_leak() -> None:
    generator = np.random.default_rng(1)
    size = np.concatenate([generator.normal(0, 1, 40), generator.normal(4, 1, 40)])
    said = judged(size[:40], size[40:], size[:, None])
    assert "so do features without any model" in said


def test_few_cases_are_said_to_be_too_few_for_the_claim() -> None:
    generator = np.random.default_rng(1)
    said = judged(generator.normal(0, 1, 6), generator.normal(0, 1, 6))
    assert "could not contradict the claimed epsilon 1: a perfect attack would show" in said


def test_what_features_explain_is_taken_out_of_the_loss() -> None:
    generator = np.random.default_rng(2)
    features = generator.normal(size=(200, 2))
    rest = generator.normal(size=200) * 0.1
    assert np.corrcoef(_residual(3 * features[:, 0] - features[:, 1] + rest, features), rest)[0, 1] > 0.9


@pytest.mark.parametrize("models", [1, 2, 4])
def test_reference_models_take_out_how_hard_a_case_is(models: int) -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 5, 100)
    member = np.arange(100) < 50
    references = hard[:, None] + generator.normal(0, 0.5, (100, models))
    scores = _against_references(hard - 2.0 * member + generator.normal(0, 0.5, 100), references)
    assert scores[member].mean() > scores[~member].mean() + 0.3
    assert np.mean(scores[member][:, None] > scores[~member]) > 0.9


def test_patches_are_the_same_for_every_model_and_show_the_label(site: AuditedSite, model: Path) -> None:
    loaded = load_model(model, fold="all", checkpoint="checkpoint_final.pth", device="cpu")
    case = training_cases(site.root.raw / NAME, loaded.dataset_json)[0]
    first, second = (patches_of(loaded, case, count=3, seed=4) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert tuple(first.images.shape) == (3, 1, *loaded.patch_size)
    assert (first.labels == 1).flatten(1).any(dim=1).all()


def test_an_untrained_model_gives_nobody_away(site: AuditedSite, model: Path) -> None:
    loaded = load_model(model, fold="all", checkpoint="checkpoint_final.pth", device="cpu")
    cases = training_cases(site.root.raw / NAME, loaded.dataset_json)
    audit = attack_membership(loaded, cases[:3], cases[3:], references=[loaded], claimed=(8.0, 1e-5), options=OPTIONS)
    assert [attack.name for attack in audit.attacks][-1] == "reference models"
    assert not audit.refuted
    assert audit.epsilon_low == 0
    with pytest.raises(DataError, match="as a member and as a non-member"):
        attack_membership(loaded, cases, cases[:2], options=OPTIONS)


def test_the_command_writes_a_page_without_scripts_and_numbers_without_names(
    site: AuditedSite,
    model: Path,
    tmp_path: Path,
    make_raw_dataset: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = make_raw_dataset(tmp_path / "raw", name=NAME, n_labelled=4, site="held", seed=9)
    mine = site.root.raw / NAME
    arguments = ["audit", "membership", "-m", model, "--patches", 1, "-o", tmp_path / "audit"]
    arguments += ["--members", mine / "imagesTr", mine / "labelsTr", "--reference-models", model]
    arguments += ["--non-members", others / "imagesTr", others / "labelsTr"]
    assert cli.main([str(word) for word in arguments]) == 0
    shown = capsys.readouterr().out
    assert "control: features alone" in shown
    page, content = (tmp_path / "audit/report.html").read_text(), (tmp_path / "audit/report.json").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "case00" not in page + content
    assert json.loads(content)["members"] == 6
    assert json.loads(content)["non_members"] == 4


def test_a_fold_s_split_names_members_and_others(site: AuditedSite, tmp_path: Path) -> None:
    description = {"file_ending": ".nii.gz", "channel_names": {"0": "MR"}}
    folder = site.root.raw / NAME
    cases = labelled_cases([folder / "imagesTr", folder / "labelsTr"], description, what="members")
    names = [case.case for case in cases]
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    train, val = members_by_split(cases, path, 0)
    assert [len(train), len(val)] == [4, 2]
    with pytest.raises(DataError, match="no fold 3"):
        members_by_split(cases, path, 3)
    path.write_text(json.dumps([{"train": ["somebody"], "val": []}]))
    with pytest.raises(DataError, match="somebody"):
        members_by_split(cases, path, 0)


def test_missing_things_are_named(site: AuditedSite, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_model(model, fold="3", checkpoint="checkpoint_final.pth", device="cpu")
    with pytest.raises(DataError, match="No members"):
        labelled_cases([tmp_path, tmp_path], {"file_ending": ".nii.gz", "channel_names": {"0": "MR"}}, what="members")
