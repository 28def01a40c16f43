"""Harmonization quality of folders whose answer is known: a perfect harmonizer, the identity, a bad one, broken files."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from nnunet_fedharm.commands import quality as command
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.paired_files import Pair, find_pairs, images_in, read_volume
from nnunet_fedharm.evaluation.quality import FIXED_BY_ZSCORE, METRICS, Folders, measure_pairs
from nnunet_fedharm.evaluation.quality_report import quality_report, reference_site
from nnunet_fedharm.evaluation.quality_summary import summarize_lesions, summarize_metrics

SHAPE = (12, 14, 10)
PATIENTS = ("p1", "p2", "p3", "p4")
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if array.dtype == bool else np.float32
    nib.save(nib.Nifti1Image(array.astype(dtype), affine), path)


def subject(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tissue with a bright lesion of the patient's own place, and the lesion's mask."""
    generator = np.random.default_rng(index)
    lesion = np.zeros(SHAPE, bool)
    corner = generator.integers(2, 5, 3)
    lesion[tuple(slice(start, start + 4) for start in corner)] = True
    waves = np.sin(np.indices(SHAPE)[0] * 0.7) * 10 + np.cos(np.indices(SHAPE)[1] * 0.5) * 8
    return 100 + waves + (30 + 5 * index) * lesion + generator.normal(0, 3, SHAPE), lesion


def scanned(truth: np.ndarray, site: str) -> np.ndarray:
    """B compresses the bright end, C inverts the contrast."""
    return 50 * np.log(truth) + 7 if site == "B" else 400 - truth


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Four patients at the reference and at sites B and C; `after` is perfect up to gain and offset."""
    pairs = {}
    for index, patient in enumerate(PATIENTS):
        truth, lesion = subject(index)
        save(tmp_path / "reference" / f"A_{patient}_0000.nii.gz", truth)
        save(tmp_path / "labels" / f"A_{patient}.nii.gz", lesion)
        for site in "BC":
            save(tmp_path / "before" / f"{site}_{patient}_0000.nii.gz", scanned(truth, site))
            save(tmp_path / "after" / f"{site}_{patient}_0000.nii.gz", 3 * truth + 11)
            pairs[f"{site}_{patient}"] = {"reference": f"A_{patient}", "site": site}
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return Folders(tmp_path / "reference", tmp_path / "before", tmp_path / "after", labels=tmp_path / "labels")


def pairs_of(folders: Folders) -> list[Pair]:
    return find_pairs(folders.before, folders.reference, pairs_file=folders.before.parent / "pairs.json")


def report(folders: Folders, **options: Any) -> dict[str, Any]:
    pairs_file = folders.before.parent / "pairs.json"
    settings = {"permutations": 4, "trees": 5, "progress": False, "pairs_file": pairs_file}
    return quality_report(folders, **{**settings, **options})


def test_a_perfect_harmonizer_reaches_the_best_value_of_every_number(folders: Folders) -> None:
    found = report(folders)
    best = {"ssim": 1, "nrmse": 0, "gradient_correlation": 1, "cnr_over_truth": 1}
    for site in ("B", "C", "all"):
        metrics = found["sites"][site]["0000"]
        assert set(metrics) == set(METRICS)
        for name, value in best.items():
            assert metrics[name]["after"]["value"] == pytest.approx(value, abs=1e-5)
            assert metrics[name]["n"] == len(PATIENTS)
        assert metrics["psnr_db"]["after"]["value"] > 80
    assert found["sites"]["C"]["0000"]["cnr_over_input"]["after"]["value"] == pytest.approx(-1, abs=1e-5)
    assert found["sites"]["C"]["0000"]["edges_kept"]["after"]["value"] == pytest.approx(1, abs=1e-5)
    for statistics in (*found["features"]["sites"].values(), found["features"]["icc"]):
        assert statistics["share_excellent"]["after"]["value"] == 1.0
        # Not lower: most texture features do not see that C inverts the contrast.
        assert statistics["share_excellent"]["before"]["value"] < 0.8
    classifier = found["site_classifier"]
    assert classifier["before"]["n_volumes"] == 3 * len(PATIENTS)
    assert classifier["after"]["balanced_accuracy"] < classifier["before"]["balanced_accuracy"]


def test_an_identity_harmonizer_changes_no_number(folders: Folders) -> None:
    found = report(replace(folders, after=folders.before))
    for channels in found["sites"].values():
        for values in channels["0000"].values():
            # Sums of the same numbers may differ in the last bit, as arrays lie at other addresses.
            assert values["before"] == pytest.approx(values["after"], rel=1e-12)
            assert values["change"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-12)
    assert found["features"]["icc"]["median"]["change"]["value"] == pytest.approx(0.0, abs=1e-12)
    assert found["site_classifier"]["before"] == found["site_classifier"]["after"]
    assert found["sites"]["C"]["0000"]["nrmse"]["before"]["value"] == pytest.approx(2, abs=1e-4)


def test_a_harmonizer_that_erases_lesions_is_found_out(folders: Folders) -> None:
    for path in sorted(folders.after.iterdir()):
        image = nib.load(path)
        lesion = np.asarray(nib.load(folders.labels / f"A_{path.name.split('_')[1]}.nii.gz").dataobj) > 0
        save(path, np.where(lesion, np.asarray(image.dataobj)[~lesion].mean(), image.dataobj))
    found = report(folders, radiomics=False)
    assert abs(found["sites"]["all"]["0000"]["cnr_over_truth"]["after"]["value"]) < 0.2
    assert found["features"] is None
    assert found["site_classifier"] is None


def test_lesion_recall_pools_lesions_and_false_ones_are_counted_by_volume(folders: Folders, tmp_path: Path) -> None:
    """Scans: lesions found at B only. Harmonized: all found, and one false lesion at every case of C."""
    free = np.zeros(SHAPE, bool)
    save(folders.labels / "A_p4.nii.gz", free)
    for site in "BC":
        for patient in PATIENTS:
            lesion = np.asarray(nib.load(folders.labels / f"A_{patient}.nii.gz").dataobj) > 0
            false = free.copy()
            false[11, 13, 9] = site == "C"
            save(tmp_path / "predicted" / f"{site}_{patient}.nii.gz", lesion if site == "B" else free)
            save(tmp_path / "harmonized" / f"{site}_{patient}.nii.gz", lesion | false)
    segmented = replace(folders, predictions_before=tmp_path / "predicted", predictions_after=tmp_path / "harmonized")
    found = measure_pairs(pairs_of(folders), segmented, radiomics=False, progress=False)
    summary = summarize_lesions(found, seed=0)
    assert summary is not None
    values = {
        (site, name): tuple(summary[site][name][state]["value"] for state in ("before", "after"))
        for site in ("B", "C", "all")
        for name in ("lesion_recall", "false_lesions", "false_lesions_on_lesion_free")
    }
    assert values["B", "lesion_recall"] == (1.0, 1.0)
    assert values["C", "lesion_recall"] == (0.0, 1.0)
    assert values["all", "lesion_recall"] == (0.5, 1.0)
    assert values["C", "false_lesions"] == (0.0, 1.0)
    assert values["all", "false_lesions_on_lesion_free"] == (0.0, 0.5)
    assert summary["all"]["n_lesions"] == 6
    shown = report(segmented, radiomics=False)
    assert shown["pairs"]["C_p1"]["lesions"]["after"] == {"lesions": 1, "found": 1, "false_lesions": 1}


def test_features_of_a_lesion_free_volume_are_left_out(folders: Folders) -> None:
    save(folders.labels / "A_p4.nii.gz", np.zeros(SHAPE, bool))
    found = report(folders, permutations=0)
    assert found["features"]["sites"]["B"]["median"]["n"] == 3
    assert found["sites"]["B"]["0000"]["ssim"]["n"] == 4
    assert found["pairs"]["B_p4"]["channels"]["0000"]["cnr_over_truth"] == {"before": None, "after": None}
    json.dumps(found, allow_nan=False)


def test_without_labels_features_are_those_of_the_foreground(folders: Folders) -> None:
    found = report(replace(folders, labels=None), permutations=0)
    names = found["features"]["names"]
    assert len(names) == 93 - len(FIXED_BY_ZSCORE)
    assert "0000/firstorder_Skewness" in names
    assert "0000/firstorder_Mean" not in names
    assert "cnr_over_truth" not in found["sites"]["B"]["0000"]


def test_masks_from_files_replace_the_foreground(folders: Folders, tmp_path: Path) -> None:
    for patient in PATIENTS:
        mask = np.zeros(SHAPE, bool)
        mask[:6] = True
        save(tmp_path / "masks" / f"A_{patient}.nii.gz", mask)
        after = np.asarray(nib.load(folders.after / f"B_{patient}_0000.nii.gz").dataobj).copy()
        after[6:] = -1000
        save(folders.after / f"B_{patient}_0000.nii.gz", after)
    masked = report(replace(folders, masks=tmp_path / "masks"), radiomics=False)
    assert masked["sites"]["B"]["0000"]["nrmse"]["after"]["value"] == pytest.approx(0, abs=1e-5)
    assert report(folders, radiomics=False)["sites"]["B"]["0000"]["nrmse"]["after"]["value"] > 0.5


def test_every_channel_is_measured(folders: Folders) -> None:
    for folder in (folders.reference, folders.before, folders.after):
        for path in sorted(folder.glob("*_0000.nii.gz")):
            second = 100 - np.asarray(nib.load(path).dataobj) if folder == folders.after else nib.load(path).dataobj
            save(path.with_name(path.name.replace("_0000", "_0001")), np.asarray(second))
    found = report(folders, permutations=0)
    assert list(found["sites"]["B"]) == ["0000", "0001"]
    assert found["sites"]["B"]["0001"]["gradient_correlation"]["after"]["value"] == pytest.approx(-1, abs=1e-4)
    assert len(found["features"]["names"]) == 2 * 93


def test_pairs_have_the_same_name_where_no_file_says_otherwise(folders: Folders) -> None:
    pairs = find_pairs(folders.reference, folders.reference, sites={f"A_{patient}": "A" for patient in PATIENTS})
    assert pairs == [Pair(f"A_{patient}", f"A_{patient}", "A") for patient in PATIENTS]
    assert {pair.site for pair in find_pairs(folders.reference, folders.reference)} == {"all"}
    assert set(images_in(folders.before)["B_p1"]) == {"0000"}


def test_a_patient_at_several_sites_counts_once_in_the_pool(folders: Folders) -> None:
    found = measure_pairs(pairs_of(folders), folders, radiomics=False, progress=False)
    pooled = summarize_metrics(found, seed=0)["all"]["0000"]["nrmse"]
    mean = np.mean([item.metrics["0000"]["nrmse"][0] for item in found])
    assert pooled["n"] == len(PATIENTS)
    assert pooled["before"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"B_p1": 3}, "entry of B_p1"),
        ({"B_p1": {"reference": "A_p1", "scanner": "B"}}, "unknown key 'scanner'"),
        ({"B_p1": "A_p1", "C_p1": "A_p1"}, "B_p1 and C_p1 are both patient A_p1 at site all"),
        ({}, "is empty"),
    ],
)
def test_a_malformed_pairs_file_is_refused(folders: Folders, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        find_pairs(folders.before, folders.reference, pairs_file=path)


def test_a_case_without_a_site_is_named(folders: Folders) -> None:
    with pytest.raises(DataError, match="No site is known for case A_p2"):
        find_pairs(folders.reference, folders.reference, sites={"A_p1": "A"})


def test_missing_files_are_named_before_anything_is_measured(folders: Folders, tmp_path: Path) -> None:
    (folders.after / "C_p3_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"after/C_p3_0000\.nii\.gz is missing"):
        report(folders)
    (folders.labels / "A_p1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"labels holds no A_p1\.nii\.gz or B_p1\.nii\.gz"):
        report(replace(folders, after=folders.before))
    with pytest.raises(DataError, match="nowhere does not exist"):
        report(replace(folders, before=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        report(replace(folders, reference=tmp_path / "empty"))
    with pytest.raises(DataError, match="needs all three"):
        replace(folders, predictions_before=tmp_path)


def test_unusable_files_are_named(folders: Folders) -> None:
    path = folders.after / "B_p2_0000.nii.gz"
    good = np.asarray(nib.load(path).dataobj)
    wrong = [
        (lambda: save(path, good[:-1]), r"B_p2_0000\.nii\.gz has shape \(11, 14, 10\)"),
        (lambda: save(path, good, AFFINE + 0.5), r"B_p2_0000\.nii\.gz lies elsewhere in space than .*A_p2_0000"),
        (lambda: save(path, np.where(good > 300, np.nan, good)), r"B_p2_0000\.nii\.gz holds NaN"),
        (lambda: save(path, np.stack([good, good], -1)), r"B_p2_0000\.nii\.gz has shape \(12, 14, 10, 2\)"),
        (lambda: path.write_bytes(b"broken"), r"Cannot read .*B_p2_0000"),
        (lambda: path.write_bytes(path.read_bytes()[:400]), r"Cannot read .*B_p2_0000"),
    ]
    for spoil, message in wrong:
        save(path, good)
        spoil()
        with pytest.raises(DataError, match=message):
            report(folders, radiomics=False)


def test_a_truth_without_foreground_is_named(folders: Folders) -> None:
    save(folders.reference / "A_p1_0000.nii.gz", np.zeros(SHAPE))
    with pytest.raises(DataError, match=r"A_p1_0000\.nii\.gz is zero everywhere"):
        report(folders, radiomics=False)


def test_a_last_axis_of_one_voxel_is_dropped(tmp_path: Path) -> None:
    save(tmp_path / "x_0000.nii.gz", np.ones((8, 9, 1, 1)))
    volume = read_volume(tmp_path / "x_0000.nii.gz")
    assert volume.array.shape == (8, 9)
    assert volume.spacing_mm == (1.0, 1.5)


def test_too_few_patients_skip_the_classifier_with_the_reason(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"B_p1": "A_p1"}))
    found = report(folders, pairs_file=path)
    assert "two patients at every site" in found["site_classifier"]["skipped"]
    assert found["features"]["icc"] is None
    assert found["sites"]["all"]["0000"]["ssim"]["before"]["low"] is None


def test_the_reference_site_is_named_by_the_sites_file() -> None:
    assert reference_site({"A_1": "A", "A_2": "A"}, ["A_1", "A_2"]) == "A"
    assert reference_site({"A_1": "A"}, ["A_1", "A_2"]) == "reference"
    assert reference_site(None, ["A_1"]) == "reference"


def test_the_command_prints_the_table_and_writes_strict_json(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    output = tmp_path / "out" / "quality.json"
    words = f"--reference {folders.reference} --before {folders.before} --after {folders.after} -o {output} "
    words += f"--labels {folders.labels} --pairs {tmp_path / 'pairs.json'} --permutations 2 --trees 5"
    assert command.run(parser.parse_args(words.split())) == 0
    shown = capsys.readouterr().out
    assert "SSIM to truth" in shown
    assert "features: share with ICC(2,1) >= 0.9" in shown
    assert "permutation null" in shown
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["conventions"]["radiomics"]["bin_count"] == 32
    assert written["pairs"]["B_p1"]["reference"] == "A_p1"
    with pytest.raises(SystemExit):
        parser.parse_args([*words.split(), "--permutations", "-1"])


@pytest.mark.benchmark_data
def test_real_travelling_subjects_show_what_is_known_of_their_sites(benchmark_data: Path, tmp_path: Path) -> None:
    """B and C keep the contrast of A, D inverts it."""
    cases = sorted(images_in(benchmark_data / "imagesTravelling"))
    pairs = {case: {"reference": f"A{case[1:]}", "site": case[0]} for case in cases}
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    scans = benchmark_data / "imagesTravelling"
    real = Folders(benchmark_data / "imagesTr", scans, scans, labels=benchmark_data / "labelsTr")
    found = report(real, pairs_file=tmp_path / "pairs.json", radiomics=False)["sites"]
    value = {site: {name: v["before"]["value"] for name, v in found[site]["0000"].items()} for site in "BCD"}
    assert value["D"]["nrmse"] == pytest.approx(2, abs=0.05)
    assert value["D"]["ssim"] < 0 < 0.5 < min(value["B"]["ssim"], value["C"]["ssim"])
    assert value["D"]["gradient_correlation"] < -0.8 < 0.6 < value["C"]["gradient_correlation"]
    assert value["D"]["cnr_over_truth"] < 0 < value["B"]["cnr_over_truth"]
    assert not any(math.isnan(number) for row in value.values() for number in row.values())
