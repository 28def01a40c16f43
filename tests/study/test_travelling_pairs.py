"""Which scans of a subject that travelled belong together."""

from __future__ import annotations

import json
from pathlib import Path

from nnunet_fedharm.evaluation.paired_files import find_pairs
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.quality import quality_notes, travelling_pairs
from tests.study.cells import Study


def travel(study: Study, *cases: str, ending: str = ".nii.gz") -> StudyData:
    """Test cases of both sites; those of B are in imagesTravelling."""
    data = StudyData(study.study)
    for case in cases:
        for kind, name in (("images", f"{case}_0000{ending}"), ("labels", f"{case}{ending}")):
            places = [data.test(case[0]) / kind / name]
            places += [data.study.raw_dataset / f"{kind}Travelling" / name] if case[0] == "B" else []
            for path in places:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return data


def test_two_scans_of_one_subject_at_one_site_belong_to_no_one_truth(tmp_path: Path) -> None:
    study = Study(tmp_path)
    file = tmp_path / "Dataset001_Blobs" / "sites.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "patients": {"B_again": "A_subject000"}}))
    data = travel(study, "A_subject000", "A_subject001", "B_subject000", "B_again", "B_subject001")
    pairs = travelling_pairs(data)
    assert pairs == {"B_subject001": {"reference": "A_subject001", "site": "B"}}
    stated = tmp_path / "pairs.json"
    stated.write_text(json.dumps(pairs))
    assert len(find_pairs(data.test("B") / "images", data.test("A") / "images", pairs_file=stated)) == 1


def test_uncompressed_nifti_is_paired_and_other_files_are_named(tmp_path: Path) -> None:
    study = Study(tmp_path)
    description = tmp_path / "Dataset001_Blobs" / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "file_ending": ".nii"}))
    data = travel(study, "A_subject000", "B_subject000", ending=".nii")
    assert travelling_pairs(data) == {"B_subject000": {"reference": "A_subject000", "site": "B"}}
    assert quality_notes(data.study) == []
    description.write_text(json.dumps({**content, "file_ending": ".nrrd"}))
    data = travel(study, "A_subject000", "B_subject000", ending=".nrrd")
    assert travelling_pairs(data) == {}
    assert quality_notes(data.study) == [
        "Travelling subjects are in .nrrd files, so harmonization quality was not measured: it reads .nii.gz and .nii."
    ]
