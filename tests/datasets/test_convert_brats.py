"""BraTS 2021 in its published layout becomes an nnU-Net raw dataset with sites."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.datasets.brats import find_brats
from nnunet_fedharm.datasets.convert_write import dataset_folder, write_conversion
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.registry import SitesFile
from tests.datasets.volumes import write_volume

CHALLENGE = "BraTS2021,BraTS2020,Cohort Name (if publicly available),Site No (represents the originating institution)\n"
TCIA = "Data Collection (as on TCIA+additional),Site ID,PatientID on TCIA Radiology Portal,BraTS2021 ID\n"


def write_case(folder: Path, case: str, *, label_values: tuple[int, ...] = (0, 1, 2, 4), labelled: bool = True) -> None:
    for index, channel in enumerate(("t1", "t1ce", "t2", "flair")):
        write_volume(folder / case / f"{case}_{channel}.nii.gz", seed=index)
    label = np.zeros((6, 7, 8), np.uint8)
    label[:2, 0, 0], label[2, :2, 0], label[3, 0, :2] = label_values[1:]
    if labelled:
        write_volume(folder / case / f"{case}_seg.nii.gz", label)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    data = tmp_path / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021"
    for number in (0, 2, 3):
        write_case(data, f"BraTS2021_{number:05d}")
    (tmp_path / "BraTS21-17_Mapping.csv").write_text(
        CHALLENGE + "BraTS2021_00000,,UPENN-GBM,1\nBraTS2021_00002,,UPENN-GBM,1.0\nBraTS2021_00003,,TCGA-GBM,18\n"
    )
    return tmp_path


def convert(source: Path, *words: str) -> int:
    return main(["convert", "brats2021", str(source), "-o", str(source / "nnUNet_raw"), "-d", "137", *words])


def test_the_published_layout_becomes_a_dataset_that_nnunet_and_we_accept(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert convert(source) == 0
    folder = source / "nnUNet_raw" / "Dataset137_BraTS2021"
    registry = SitesFile.load(folder / "sites.json")
    assert registry.cases == {"BraTS2021_00000": "site-01", "BraTS2021_00002": "site-01", "BraTS2021_00003": "site-18"}
    shown = capsys.readouterr().out
    assert "One case only, too few to train at: site-18" in shown
    assert f"nnunet-fedharm sites check -d {folder}" in shown
    check_raw_dataset(folder, site="all")
    verify_dataset_integrity(str(folder), num_processes=1)


def test_labels_are_renumbered_as_nnunet_does_and_images_are_links(source: Path) -> None:
    convert(source)
    folder = source / "nnUNet_raw" / "Dataset137_BraTS2021"
    case = source / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021" / "BraTS2021_00000"
    label = np.asanyarray(nibabel.load(folder / "labelsTr" / "BraTS2021_00000.nii.gz").dataobj)
    before = np.asanyarray(nibabel.load(case / "BraTS2021_00000_seg.nii.gz").dataobj)
    for old, new in {0: 0, 1: 2, 2: 1, 4: 3}.items():
        assert (label[before == old] == new).all()
    assert (folder / "imagesTr" / "BraTS2021_00000_0003.nii.gz").samefile(case / "BraTS2021_00000_flair.nii.gz")
    assert not (folder / ".converting").exists()


def test_regions_are_those_of_nnunet(source: Path) -> None:
    convert(source, "--regions", "--copy", "--site-by", "collection")
    folder = source / "nnUNet_raw" / "Dataset137_BraTS2021"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"]["whole tumor"] == [1, 2, 3]
    assert description["regions_class_order"] == [1, 2, 3]
    assert set(SitesFile.load(folder / "sites.json").sites) == {"UPENN-GBM", "TCGA-GBM"}
    assert (folder / "imagesTr" / "BraTS2021_00000_0000.nii.gz").stat().st_nlink == 1
    check_raw_dataset(folder, site="all")


def test_the_table_of_tcia_is_understood_too(source: Path) -> None:
    table = source / "mapping.csv"
    table.write_text(
        TCIA + "UPENN-GBM,1,a,BraTS2021_00000\nUPENN-GBM,1,b,BraTS2021_00002\nIvyGAP,6,c,BraTS2021_00003\n"
    )
    conversion = find_brats(source, table=table)
    assert [case.site for case in conversion.cases] == ["site-01", "site-01", "site-06"]


def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(source: Path) -> None:
    conversion = find_brats(source)
    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    assert write_conversion(conversion, folder, progress=False).n_new == 15
    label = folder / "labelsTr" / "BraTS2021_00002.nii.gz"
    untouched = (folder / "labelsTr" / "BraTS2021_00000.nii.gz").stat().st_ino
    label.unlink()
    (folder / "dataset.json").unlink()
    assert write_conversion(conversion, folder, progress=False).n_new == 1
    assert write_conversion(conversion, folder, progress=False).n_new == 0
    assert (folder / "labelsTr" / "BraTS2021_00000.nii.gz").stat().st_ino == untouched
    assert (folder / "dataset.json").is_file()


def test_an_interruption_leaves_no_half_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(image: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    monkeypatch.setattr(nibabel, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_conversion(find_brats(source), folder, progress=False)
    monkeypatch.undo()
    assert not list((folder / "labelsTr").iterdir())
    assert not (folder / "dataset.json").exists()
    assert write_conversion(find_brats(source), folder, progress=False).n_new == 11
    check_raw_dataset(folder, site="all")


def test_a_changed_source_is_converted_again(source: Path) -> None:
    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    write_conversion(find_brats(source), folder, progress=False)
    label = next(source.glob("*/BraTS2021_00003/*_seg.nii.gz"))
    write_volume(label, np.full((6, 7, 8), 4, np.uint8))
    os.utime(label, (1, 1))
    assert write_conversion(find_brats(source), folder, progress=False).n_new == 1
    written = nibabel.load(folder / "labelsTr" / "BraTS2021_00003.nii.gz")
    assert (np.asanyarray(written.dataobj) == 3).all()


def test_a_missing_channel_is_named_or_skipped_and_listed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(source.glob("*/BraTS2021_00002/*_t1ce.nii.gz")).unlink()
    assert convert(source) == 2
    assert "BraTS2021_00002: channel t1ce is missing" in capsys.readouterr().err
    assert convert(source, "--skip-missing") == 0
    shown = capsys.readouterr().out
    assert "Left out: 1" in shown
    assert "BraTS2021_00002: channel t1ce is missing" in shown


def test_cases_without_segmentation_can_be_unlabelled(source: Path) -> None:
    next(source.glob("*/BraTS2021_00003/*_seg.nii.gz")).unlink()
    with pytest.raises(DataError, match=r"BraTS2021_00003: the segmentation .* is missing.*--unlabelled"):
        find_brats(source)
    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    write_conversion(find_brats(source, unlabelled=True), folder, progress=False)
    assert len(list((folder / "imagesUnlabelled").iterdir())) == 4
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    check_raw_dataset(folder, site="all")


def test_a_case_that_the_table_does_not_know_is_named(source: Path) -> None:
    (source / "BraTS21-17_Mapping.csv").write_text(CHALLENGE + "BraTS2021_00000,,UPENN-GBM,1\n")
    with pytest.raises(DataError, match=r"BraTS2021_00002: .* does not say which site"):
        find_brats(source)


@pytest.mark.parametrize("text", ["BraTS2021,Site\na,1\n", "BraTS2021\n"])
def test_a_wrong_table_is_refused(source: Path, text: str) -> None:
    (source / "BraTS21-17_Mapping.csv").write_text(text)
    with pytest.raises(DataError, match=r"has no (column|rows)"):
        find_brats(source)


def test_no_table_no_case_and_doubled_cases_are_refused(source: Path, tmp_path: Path) -> None:
    write_case(source / "again", "BraTS2021_00000")
    with pytest.raises(DataError, match="lies in"):
        find_brats(source)
    (source / "BraTS21-17_Mapping.csv").unlink()
    with pytest.raises(DataError, match="has no table"):
        find_brats(next(source.glob("RSNA*")))
    with pytest.raises(DataError, match="holds no folder BraTS2021"):
        find_brats(next(source.glob("RSNA*/BraTS2021_00000")))


def test_an_unexpected_label_value_is_named(source: Path) -> None:
    write_case(next(source.glob("RSNA*")), "BraTS2021_00003", label_values=(0, 1, 2, 3))
    with pytest.raises(DataError, match=r"BraTS2021_00003: .*_seg\.nii\.gz holds the label value 3"):
        write_conversion(find_brats(source), source / "Dataset137_X", progress=False)


def test_another_conversion_or_foreign_files_are_not_overwritten(source: Path) -> None:
    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    write_conversion(find_brats(source), folder, progress=False)
    with pytest.raises(SetupError, match="made with other options"):
        write_conversion(find_brats(source, regions=True), folder, progress=False)
    with pytest.raises(SetupError, match="already has the ID 137"):
        dataset_folder(source / "nnUNet_raw", 137, "Other")
    with pytest.raises(DataError, match="contradicts"):
        dataset_folder(folder, 138, "BraTS2021")
    with pytest.raises(DataError, match="1 to 999"):
        dataset_folder(folder, 0, "BraTS2021")
    (folder / "conversion.json").unlink()
    with pytest.raises(SetupError, match="already holds something else"):
        write_conversion(find_brats(source), folder, progress=False)


def test_cases_can_be_left_out_by_name_but_not_silently_after_they_were_written(source: Path) -> None:
    folder = dataset_folder(source / "nnUNet_raw", 137, "BraTS2021")
    write_conversion(find_brats(source), folder, progress=False)
    with pytest.raises(DataError, match="is of a case that is not converted any more"):
        write_conversion(find_brats(source, exclude=["BraTS2021_00003"]), folder, progress=False)
    with pytest.raises(DataError, match="which is no case of the source"):
        find_brats(source, exclude=["BraTS2021_7"])


def test_excel_without_openpyxl_asks_for_csv(source: Path) -> None:
    pytest.importorskip("pandas")
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        table = source / "BraTS2021_MappingToTCIA.xlsx"
        table.write_bytes(b"not read")
        with pytest.raises(SetupError, match="Save the table as CSV"):
            find_brats(source, table=table)
    else:
        pytest.skip("openpyxl is installed")
