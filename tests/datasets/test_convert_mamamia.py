"""MAMA-MIA in its published layout becomes an nnU-Net raw dataset; phases, splits and geometry are respected."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.datasets.convert_write import dataset_folder, write_conversion
from nnunet_fedharm.datasets.mamamia import find_mamamia
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from tests.datasets.volumes import SHAPE, write_volume

HEADER = "patient_id,dataset,fat_suppressed,field_strength,site,manufacturer,scanner_model\n"
PATIENTS = {
    "DUKE_001": ("DUKE", "1", "1.5", "", "SIEMENS", 5),
    "DUKE_002": ("DUKE", "1", "3.0", "", "GE", 4),
    "ISPY2_100899": ("ISPY2", "1", "1.5", "Site AAI", "GE", 6),
    "ISPY2_102011": ("ISPY2", "1", "1.5", "Site AAI", "GE", 3),
    "NACT_01": ("NACT", "1", "1.5", "", "GE", 2),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = []
    for patient, (dataset, fat, field, site, manufacturer, n_phases) in PATIENTS.items():
        rows.append(f"{patient},{dataset},{fat},{field},{site},{manufacturer},model\n")
        for phase in range(n_phases):
            write_volume(tmp_path / "images" / patient / f"{patient}_{phase:04d}.nii.gz", seed=phase)
        tumor = np.zeros(SHAPE, np.uint8)
        tumor[2:4, 2:4, 2:4] = 1
        write_volume(tmp_path / "segmentations" / "expert" / f"{patient}.nii.gz", tumor)
        write_volume(tmp_path / "segmentations" / "automatic" / f"{patient}.nii.gz", np.roll(tumor, 1))
    (tmp_path / "clinical_and_imaging_info.csv").write_text(HEADER + "".join(rows))
    (tmp_path / "train_test_splits.csv").write_text(
        "train_split,test_split\nDUKE_001,DUKE_002\nISPY2_100899,\nISPY2_102011,\nNACT_01,\n"
    )
    return tmp_path


def test_the_published_layout_becomes_a_dataset_with_scanners(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    words = ["-o", str(source / "raw"), "-d", "201", "--phases", "0", "1"]
    assert main(["convert", "mamamia", str(source), *words]) == 0
    folder = source / "raw" / "Dataset201_MAMAMIA"
    registry = SitesFile.load(folder / "sites.json")
    assert registry.cases["ISPY2_102011"] == "ISPY2-AAI"
    assert registry.sites["ISPY2-AAI"] == SiteInfo("GE", 1.5, "T1w DCE fat-suppressed")
    assert registry.sites["DUKE"] == SiteInfo("GE / Siemens", None, "T1w DCE fat-suppressed")
    names = json.loads((folder / "dataset.json").read_text())["channel_names"]
    assert names == {"0": "pre-contrast", "1": "post-contrast 1"}
    assert "too few to train at: NACT" in capsys.readouterr().out
    check_raw_dataset(folder, site="all")
    verify_dataset_integrity(str(folder), num_processes=1)


def test_a_patient_with_fewer_phases_is_named_with_the_phase(source: Path) -> None:
    with pytest.raises(DataError, match=r"Case NACT_01: phase 2 \(post-contrast 2\) is missing.*\(2 phases found\)"):
        find_mamamia(source)
    conversion = find_mamamia(source, skip_missing=True)
    assert len(conversion.cases) == 4
    assert "phase 2" in conversion.excluded["NACT_01"]


def test_phases_are_channels_in_the_order_that_was_asked_for(source: Path) -> None:
    conversion = find_mamamia(source, phases=(1, 0))
    assert [path.name for path in conversion.cases[0].images] == ["DUKE_001_0001.nii.gz", "DUKE_001_0000.nii.gz"]
    for phases in ((), (0, 0), (-1,)):
        with pytest.raises(DataError, match="--phases"):
            find_mamamia(source, phases=phases)


def test_the_official_split_holds_patients_out_of_training(source: Path) -> None:
    folder = dataset_folder(source / "raw", 201, "MAMAMIA")
    conversion = find_mamamia(source, phases=(0,), official_split=True, segmentations="automatic")
    write_conversion(conversion, folder, progress=False)
    assert (folder / "imagesTs" / "DUKE_002_0000.nii.gz").is_file()
    label = folder / "labelsTs" / "DUKE_002.nii.gz"
    assert label.samefile(source / "segmentations" / "automatic" / "DUKE_002.nii.gz")
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 4


def test_sites_can_be_collections_or_manufacturers(source: Path) -> None:
    assert set(find_mamamia(source, phases=(0,), site_by="dataset").sites) == {"DUKE", "ISPY2", "NACT"}
    assert set(find_mamamia(source, phases=(0,), site_by="manufacturer").sites) == {"Siemens", "GE"}


def test_missing_segmentations_rows_cells_and_tables_are_named(source: Path) -> None:
    table = source / "clinical_and_imaging_info.csv"
    text = table.read_text()
    table.write_text(text.replace("NACT_01,NACT", "NACT_01,"))
    with pytest.raises(DataError, match=r"NACT_01: .* leaves dataset empty"):
        find_mamamia(source, phases=(0,))
    table.write_text(text.replace("NACT_01", "NACT_77"))
    with pytest.raises(DataError, match="NACT_01: it has no row"):
        find_mamamia(source, phases=(0,))
    table.write_text(text + "NACT_01,DUKE,1,3,,GE,other\n")
    with pytest.raises(DataError, match="two rows with patient_id NACT_01"):
        find_mamamia(source, phases=(0,))
    table.unlink()
    with pytest.raises(DataError, match=r"clinical_and_imaging_info\.xlsx is missing"):
        find_mamamia(source, phases=(0,))
    with pytest.raises(DataError, match="holds no patient"):
        find_mamamia(source / "images")
    table.write_text(text)
    (source / "segmentations" / "expert" / "DUKE_001.nii.gz").unlink()
    with pytest.raises(DataError, match="DUKE_001: the segmentation"):
        find_mamamia(source, phases=(0,))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("shape", {"shape": (6, 7, 9)}),
        ("spacing", {"spacing": (1.0, 1.0, 1.01)}),
        ("direction", {"spacing": (-1.0, 1.0, 1.0)}),
        ("origin", {"origin": (0.0, 0.0, 0.5)}),
    ],
)
def test_a_phase_or_label_on_another_grid_is_refused_by_name(
    source: Path, what: str, change: dict[str, object]
) -> None:
    write_volume(source / "images" / "DUKE_001" / "DUKE_001_0001.nii.gz", **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"DUKE_001: the channel .*DUKE_001_0001.* has another {what}"):
        write_conversion(find_mamamia(source, phases=(0, 1)), source / "raw", progress=False)
    labels = np.zeros(change.get("shape", SHAPE), np.uint8)
    keywords = {key: value for key, value in change.items() if key != "shape"}
    write_volume(source / "segmentations" / "expert" / "DUKE_001.nii.gz", labels, **keywords)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"DUKE_001: the label .* has another {what}"):
        write_conversion(find_mamamia(source, phases=(0,)), source / "raw2", progress=False)


def test_rounding_in_a_header_is_mended_without_touching_voxels_or_source(source: Path) -> None:
    path = source / "images" / "DUKE_001" / "DUKE_001_0001.nii.gz"
    write_volume(path, seed=1, spacing=(1.0, 1.0, 1.0002))
    before = path.read_bytes()
    folder = dataset_folder(source / "raw", 201, "MAMAMIA")
    conversion = find_mamamia(source, phases=(0, 1))
    write_conversion(conversion, folder, progress=False)
    mended = nibabel.load(folder / "imagesTr" / "DUKE_001_0001.nii.gz")
    assert (np.asanyarray(mended.dataobj) == np.asanyarray(nibabel.load(path).dataobj)).all()
    np.testing.assert_array_equal(mended.affine, np.eye(4))
    assert path.read_bytes() == before
    assert write_conversion(conversion, folder, progress=False).n_new == 0
    check_raw_dataset(folder, site="all")


def test_a_truncated_volume_is_named(source: Path) -> None:
    (source / "images" / "DUKE_002" / "DUKE_002_0000.nii.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"DUKE_002: .*DUKE_002_0000\.nii\.gz cannot be read"):
        write_conversion(find_mamamia(source, phases=(0,)), source / "raw", progress=False)


def test_the_excel_table_is_read_from_its_sheet(source: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["this sheet explains the columns"])
    sheet = book.create_sheet("dataset_info")
    table = source / "clinical_and_imaging_info.csv"
    for index, line in enumerate(table.read_text().splitlines()):
        values = line.split(",")
        sheet.append(
            values if index == 0 else [*values[:2], int(values[2]), float(values[3]), values[4] or None, *values[5:]]
        )
    expected = find_mamamia(source, phases=(0,))
    table.unlink()
    book.save(source / "clinical_and_imaging_info.xlsx")
    assert find_mamamia(source, phases=(0,)) == expected
    (source / "clinical_and_imaging_info.xlsx").write_bytes(b"no workbook")
    with pytest.raises(DataError, match="is no Excel file"):
        find_mamamia(source, phases=(0,))


@pytest.mark.benchmark_data
def test_real_dce_volumes_are_converted_and_pass_every_check(benchmark_data: Path, tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    real = benchmark_data.parent / "breast_dce"
    if not real.is_dir():
        pytest.skip(f"{real} is not here")
    rows = ""
    for number in ("06", "08"):
        patient = f"NACT_{number}"
        folder = tmp_path / "source" / "images" / patient
        labels = tmp_path / "source" / "segmentations" / "expert"
        folder.mkdir(parents=True)
        labels.mkdir(parents=True, exist_ok=True)
        for phase in range(3):
            (folder / f"{patient}_{phase:04d}.nii.gz").symlink_to(real / f"UCSF-BR-{number}_{phase:04d}.nii.gz")
        (labels / f"{patient}.nii.gz").symlink_to(real / f"UCSF-BR-{number}_breast_tissue.nii.gz")
        rows += f"{patient},NACT,1,1.5,,GE,Signa\n"
    (tmp_path / "source" / "clinical_and_imaging_info.csv").write_text(HEADER + rows)
    raw = dataset_folder(tmp_path / "raw", 202, "MAMAMIA")
    conversion = find_mamamia(tmp_path / "source")
    assert write_conversion(conversion, raw, progress=False).n_new == 8
    assert write_conversion(conversion, raw, progress=False).n_new == 0
    check_raw_dataset(raw, site="NACT")
    verify_dataset_integrity(str(raw), num_processes=1)
