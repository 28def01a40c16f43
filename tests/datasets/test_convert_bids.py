"""BIDS data sets: subjects, sessions, sidecars, participants and derivatives become cases, sites and labels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.datasets.bids import BidsOptions, dataset_name, find_bids
from nnunet_fedharm.datasets.convert_write import write_conversion
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from tests.datasets.volumes import SHAPE, write_volume

CHANNELS = ("T1w", "FLAIR")
OPTIONS = BidsOptions(channels=CHANNELS, pipeline="manual", site_column="centre")


def write_session(source: Path, case: str, *, labelled: bool = True) -> None:
    folder = Path(*case.split("_")) / "anat"
    for index, suffix in enumerate(CHANNELS):
        write_volume(source / folder / f"{case}_{suffix}.nii.gz", seed=index)
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 1:3, 1:3], label[4, 4, 4] = 5, 9
    if labelled:
        write_volume(source / "derivatives" / "manual" / folder / f"{case}_dseg.nii.gz", label)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "ds"
    for case in ("sub-01_ses-1", "sub-01_ses-2", "sub-02"):
        write_session(root, case)
    write_session(root, "sub-03", labelled=False)
    (root / "participants.tsv").write_text("participant_id\tcentre\nsub-01\tRome\nsub-02\tOslo North\nsub-03\tRome\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "My study 2", "BIDSVersion": "1.10.0"}))
    (root / "T1w.json").write_text(json.dumps({"Manufacturer": "SIEMENS", "MagneticFieldStrength": 3}))
    nearer = root / "sub-02" / "anat" / "sub-02_T1w.json"
    nearer.write_text(json.dumps({"Manufacturer": "GE MEDICAL SYSTEMS", "PulseSequenceType": "SPGR"}))
    (root / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n0\tnothing\n5\tlesion\n9\tcyst\n")
    return root


def test_the_whole_way_from_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    words = ["--channels", *CHANNELS, "--labels", "manual", "--site-column", "centre"]
    assert main(["convert", "bids", str(source), "-o", str(tmp_path / "raw"), "-d", "7", *words]) == 0
    folder = tmp_path / "raw" / "Dataset007_Mystudy2"
    registry = SitesFile.load(folder / "sites.json")
    assert registry.cases == {"sub-01_ses-1": "Rome", "sub-01_ses-2": "Rome", "sub-02": "Oslo-North", "sub-03": "Rome"}
    assert registry.patients == {"sub-01_ses-1": "sub-01", "sub-01_ses-2": "sub-01"}
    assert registry.sites["Oslo-North"] == SiteInfo("GE", 3.0, "T1w, FLAIR SPGR")
    assert registry.sites["Rome"] == SiteInfo("Siemens", 3.0, "T1w, FLAIR")
    assert "Oslo-North" in capsys.readouterr().out
    assert len(list((folder / "imagesUnlabelled").iterdir())) == 2
    check_raw_dataset(folder, site="all")
    verify_dataset_integrity(str(folder), num_processes=1)


def test_labels_are_renumbered_without_gaps_and_named_by_dseg_tsv(source: Path, tmp_path: Path) -> None:
    conversion = find_bids(source, OPTIONS)
    assert conversion.labels == {"background": 0, "lesion": 1, "cyst": 2}
    write_conversion(conversion, tmp_path / "out", progress=False)
    label = np.asanyarray(nibabel.load(tmp_path / "out" / "labelsTr" / "sub-02.nii.gz").dataobj)
    assert np.unique(label).tolist() == [0, 1, 2]


def test_label_names_can_be_given_and_must_be_usable(source: Path) -> None:
    (source / "derivatives" / "manual" / "dseg.tsv").unlink()
    with pytest.raises(DataError, match="--label-names"):
        find_bids(source, OPTIONS)
    base = {"channels": CHANNELS, "pipeline": "manual"}
    assert find_bids(source, BidsOptions(**base, label_names={"a": 1, "b": 2})).remap is None  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not usable"):
        find_bids(source, BidsOptions(**base, label_names={"a": 1, "b": 1}))  # type: ignore[arg-type]


def test_without_labels_everything_is_unlabelled(source: Path, tmp_path: Path) -> None:
    conversion = find_bids(source, BidsOptions(channels=("T1w",), site_column="centre"))
    write_conversion(conversion, tmp_path / "out", progress=False)
    assert len(list((tmp_path / "out" / "imagesUnlabelled").iterdir())) == 4
    assert not list((tmp_path / "out" / "imagesTr").iterdir())
    check_raw_dataset(tmp_path / "out", site="all")


def test_sidecars_name_the_site_by_institution_or_scanner(source: Path) -> None:
    options = BidsOptions(channels=CHANNELS)
    assert {case.case: case.site for case in find_bids(source, options).cases}["sub-02"] == "GE-3T"
    (source / "sub-02" / "sub-02_T1w.json").write_text(json.dumps({"InstitutionName": "St. Mary's"}))
    assert {case.case: case.site for case in find_bids(source, options).cases}["sub-02"] == "St.-Mary-s"


def test_several_files_for_a_channel_need_an_entity(source: Path) -> None:
    anat = source / "sub-02" / "anat"
    (anat / "sub-02_T1w.nii.gz").rename(anat / "sub-02_run-1_T1w.nii.gz")
    write_volume(anat / "sub-02_ce-gad_run-2_T1w.nii.gz")
    with pytest.raises(DataError, match="sub-02: several files for T1w"):
        find_bids(source, OPTIONS)
    found = find_bids(source, BidsOptions(channels=("ce-gad_T1w",), site_column="centre", skip_missing=True))
    assert [case.images[0].name for case in found.cases] == ["sub-02_ce-gad_run-2_T1w.nii.gz"]
    assert len(found.excluded) == 3


def test_several_segmentations_need_an_entity(source: Path) -> None:
    folder = source / "derivatives" / "manual" / "sub-02" / "anat"
    (folder / "sub-02_dseg.nii.gz").rename(folder / "sub-02_desc-a_dseg.nii.gz")
    write_volume(folder / "sub-02_desc-b_dseg.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(DataError, match="--label-entity"):
        find_bids(source, OPTIONS)
    options = BidsOptions(channels=CHANNELS, pipeline="manual", site_column="centre", label_entity="desc-b")
    assert {case.case: case.label for case in find_bids(source, options).cases}["sub-02"] == (
        folder / "sub-02_desc-b_dseg.nii.gz"
    )


def test_uncompressed_images_are_compressed(source: Path, tmp_path: Path) -> None:
    path = source / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine), path.with_suffix(""))
    path.unlink()
    write_conversion(find_bids(source, OPTIONS), tmp_path / "out", progress=False)
    written = nibabel.load(tmp_path / "out" / "imagesTr" / "sub-02_0000.nii.gz")
    assert (np.asanyarray(written.dataobj) == np.asanyarray(nibabel.load(path.with_suffix("")).dataobj)).all()


def test_what_is_missing_is_named(source: Path) -> None:
    with pytest.raises(DataError, match=r"Pipelines in derivatives: manual"):
        find_bids(source, BidsOptions(channels=CHANNELS, pipeline="automatic"))
    with pytest.raises(DataError, match=r"sub-01_ses-1: it has no file .*T2w"):
        find_bids(source, BidsOptions(channels=("T2w",)))
    with pytest.raises(DataError, match=r"column hospital of participants\.tsv"):
        find_bids(source, BidsOptions(channels=CHANNELS, site_column="hospital"))
    (source / "T1w.json").unlink()
    with pytest.raises(DataError, match="its sidecars do not say"):
        find_bids(source, BidsOptions(channels=CHANNELS))
    (source / "participants.tsv").unlink()
    with pytest.raises(DataError, match=r"participants\.tsv is missing"):
        find_bids(source, OPTIONS)
    with pytest.raises(DataError, match="holds no folder sub-"):
        find_bids(source / "derivatives", OPTIONS)
    with pytest.raises(DataError, match="--channels"):
        BidsOptions(channels=())


def test_wrong_words_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-o", str(tmp_path), "-d", "7", "--channels", "T1w"]
    assert main(["convert", "bids", str(source), *words, "--label-names", "tumor"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    assert main(["convert", "bids", str(source / "no"), *words]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_the_dataset_is_called_as_it_describes_itself(source: Path) -> None:
    assert dataset_name(source) == "Mystudy2"
    (source / "dataset_description.json").unlink()
    assert dataset_name(source) == "ds"
