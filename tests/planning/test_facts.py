"""Preflight: sites describe themselves, and a site that disagrees is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.errors import DataError, FederationError, PlanError, SiteMismatchError
from nnunet_fedharm.planning.facts import SiteFacts, check_agreement, collect_facts, federation_dataset_json
from tests.sites.raw import ENDING, write_case, write_description

FACTS = SiteFacts(
    site="A",
    dataset_name="Dataset001_Small",
    channels={"0": "T1"},
    labels={"background": 0, "tumour": 1},
    regions_class_order=None,
    file_ending=".nii.gz",
    n_labelled=3,
    n_unlabelled=0,
    versions={"nnunetv2": "2.8.1", "nnunet_fedharm": "0.1.0", "torch": "2.14"},
    reader="SimpleITKIO",
)
OTHERS = [replace(FACTS, site="B", n_labelled=0, n_unlabelled=4), replace(FACTS, site="C")]


def test_facts_count_cases_and_hold_no_case_name(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_Small"
    write_description(folder, channels=("T1", "T2"))
    rng = np.random.default_rng(0)
    for case, labelled in (("patient_x", True), ("patient_y", True), ("patient_z", False)):
        write_case(folder, case, rng, n_channels=2, labelled=labelled)
    facts = collect_facts(folder, site="A")
    assert (facts.n_labelled, facts.n_unlabelled, facts.reader) == (2, 1, "SimpleITKIO")
    assert facts.channels == {"0": "T1", "1": "T2"}
    sent = json.dumps(facts.to_dict())
    assert "patient" not in sent
    assert SiteFacts.from_dict(json.loads(sent)) == facts


def test_empty_site_is_refused(tmp_path: Path) -> None:
    write_description(tmp_path)
    with pytest.raises(DataError, match=r"Site A is empty.*leave the site out"):
        collect_facts(tmp_path, site="A")


def test_missing_first_channel_is_refused(tmp_path: Path) -> None:
    write_description(tmp_path, channels=("T1", "T2"))
    write_case(tmp_path, "a", np.random.default_rng(0), n_channels=2)
    (tmp_path / "imagesTr" / f"a_0000{ENDING}").unlink()
    with pytest.raises(DataError, match=rf"Site A: the image file .*a_0000{ENDING} is missing"):
        collect_facts(tmp_path, site="A")


def test_agreeing_sites_make_one_description_that_counts_labelled_cases() -> None:
    description = federation_dataset_json([FACTS, *OTHERS])
    assert description["numTraining"] == 6
    assert description["channel_names"] == {"0": "T1"}
    assert description["overwrite_image_reader_writer"] == "SimpleITKIO"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": {"0": "T2"}},
            r"Site C disagrees on channels: it has \{'0': 'T2'\}, the others have \{'0': 'T1'\}",
        ),
        ({"labels": {"background": 0, "tumour": 1, "cyst": 2}}, "Site C disagrees on labels: .*cyst.*relabel"),
        ({"file_ending": ".nrrd"}, "Site C disagrees on file_ending: it has '.nrrd', the others have '.nii.gz'"),
        ({"dataset_name": "Dataset002_Other"}, "Site C disagrees on dataset_name"),
        ({"reader": "NibabelIO"}, "Site C disagrees on reader"),
        ({"regions_class_order": [1]}, "Site C disagrees on regions_class_order"),
        ({"versions": {**FACTS.versions, "nnunetv2": "2.5"}}, "Site C disagrees on version of nnunetv2.*same version"),
        ({"versions": {"nnunetv2": "2.8.1", "torch": "2.14"}}, "version of nnunet_fedharm: it has 'not installed'"),
    ],
)
def test_site_that_disagrees_is_named_with_both_values(changes: dict[str, object], message: str) -> None:
    sites = [FACTS, OTHERS[0], replace(OTHERS[1], **changes)]  # type: ignore[arg-type]
    with pytest.raises(SiteMismatchError, match=message):
        check_agreement(sites)


def test_the_majority_decides_who_disagrees() -> None:
    odd = replace(FACTS, file_ending=".mha")
    with pytest.raises(SiteMismatchError, match="Site A disagrees"):
        check_agreement([odd, *OTHERS])


def test_no_labels_anywhere_is_refused() -> None:
    with pytest.raises(SiteMismatchError, match="No site has labels"):
        check_agreement([replace(fact, n_labelled=0) for fact in (FACTS, *OTHERS)])


def test_no_sites_and_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(FederationError, match="No site"):
        check_agreement([])
    with pytest.raises(FederationError, match="Two sites call themselves A"):
        check_agreement([FACTS, FACTS])


def test_facts_of_another_version_are_refused() -> None:
    with pytest.raises(PlanError, match="reader"):
        SiteFacts.from_dict({key: value for key, value in FACTS.to_dict().items() if key != "reader"})
