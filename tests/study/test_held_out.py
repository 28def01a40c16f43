"""Sites that are held out of all training: nothing of them is in what cells see, and finished models are adapted to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.errors import DataError, FederationError
from nnunet_fedharm.evaluation import adapt_model
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.study import data as study_data
from nnunet_fedharm.study.data import READY_FILE, StudyData
from nnunet_fedharm.study.matrix import Arm, Cell, arms_of
from nnunet_fedharm.study.new_site import adapt_to_held_out
from nnunet_fedharm.study.quality import travelling_pairs
from nnunet_fedharm.study.study_file import STUDY_FILE, StudyFile, read_study
from nnunet_fedharm.study.trained import Trained
from nnunet_fedharm.study.training import check_whole

STUDY = """
[study]
name = "blobs"
dataset = "{dataset}"
configuration = "2d"
reference = "A"
labelled_sites = ["A"]
held_out_sites = {held_out}
[arms]
oracle = false
[training]
base_features = 4
max_features = 8
batch_size = 2
num_processes = 1
"""
ENDING = ".nii.gz"


def study_of(folder: Path, make_raw_dataset: Callable[..., Path], sites: str) -> StudyFile:
    """A study whose site C, where it has one, differs in grid and intensities, and is held out."""
    raw = folder
    for index, site in enumerate(sites):
        shape = (20, 24, 24) if site != "C" else (28, 30, 32)
        raw = make_raw_dataset(folder, n_labelled=5, site=f"{site}_", gain=1.0 + 5 * index, shape=shape, seed=index)
    if "C" in sites:
        for image in (raw / "imagesTr").glob("C_*"):
            nibabel.save(nibabel.Nifti1Image(nibabel.load(image).get_fdata(), np.diag([2.0, 2, 2, 1])), image)
            label = raw / "labelsTr" / image.name.replace("_0000", "")
            mask = np.asarray(nibabel.load(label).dataobj, dtype=np.uint8)
            nibabel.save(nibabel.Nifti1Image(mask, np.diag([2.0, 2, 2, 1])), label)
    cases = {path.name[:-12]: path.name[0] for path in (raw / "imagesTr").glob("*_0000.nii.gz")}
    SitesFile({site: SiteInfo() for site in sites}, cases).save(raw / "sites.json")
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(cases)}))
    (folder / "study").mkdir()
    held_out = json.dumps(["C"] if "C" in sites else [])
    (folder / "study" / STUDY_FILE).write_text(STUDY.format(dataset=raw, held_out=held_out))
    return read_study(folder / "study")


def names_below(folder: Path) -> Iterator[str]:
    """Of all files and folders, and what text files say."""
    for path in folder.rglob("*"):
        yield path.name
        if path.suffix == ".json":
            yield path.read_text()


@pytest.mark.long
def test_nothing_of_a_held_out_site_is_in_what_trainings_see(
    tmp_path: Path, make_raw_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_data, "ADAPT_VOLUMES", 3)
    data = StudyData(study_of(tmp_path / "with", make_raw_dataset, "ABC"))
    data.prepare()
    for root in (data.consortium, data.pooled.path):
        assert any("A_case" in name for name in names_below(root))
        assert not [name for name in names_below(root) if name == "C" or "C_case" in name or '"C"' in name]

    # Fingerprint, plans and everybody's test cases are those of a dataset that never had the site.
    never = StudyData(study_of(tmp_path / "without", make_raw_dataset, "AB"))
    never.prepare()
    for name in ("dataset_fingerprint.json", "nnUNetStudyPlans.json", "sites.json", "dataset.json"):
        texts = [(item.pooled.preprocessed / item.dataset_name / name).read_text() for item in (data, never)]
        assert texts[0] == texts[1], name
    for site in "AB":
        tested = [sorted(path.name for path in (item.test(site) / "images").iterdir()) for item in (data, never)]
        assert tested[0] == tested[1]

    # Its own cases are for its own training, for the test, and, without labels, for the adaptation.
    tested_here = {path.name for path in (data.test("C") / "images").iterdir()}
    own = {path.name for path in (data.own("C").raw / data.dataset_name / "imagesTr").iterdir()}
    given = {path.name for path in data.adapt("C").rglob("*")}
    assert len(tested_here) == 1
    assert len(own) == 4
    assert given < own
    assert len(given) == 3
    assert not given & tested_here

    ready = data.folder / READY_FILE
    assert json.loads(ready.read_text())["held_out_sites"] == ["C"]
    for item in (never, data):  # a record of an earlier release, which held nothing out
        file = item.folder / READY_FILE
        content = json.loads(file.read_text())
        del content["held_out_sites"]
        file.write_text(json.dumps(content))
    never.prepare()
    with pytest.raises(DataError, match="held_out_sites"):
        data.prepare()


def take_labels_away(raw: Path, site: str) -> None:
    """The site takes part with images alone."""
    unlabelled = raw / "imagesUnlabelled"
    unlabelled.mkdir()
    for image in sorted((raw / "imagesTr").glob(f"{site}_*")):
        image.rename(unlabelled / image.name)
        (raw / "labelsTr" / image.name.replace("_0000", "")).unlink()


def test_a_held_out_site_without_test_case_is_refused(tmp_path: Path, make_raw_dataset: Callable[..., Path]) -> None:
    study = study_of(tmp_path, make_raw_dataset, "ABC")
    take_labels_away(study.raw_dataset, "C")
    with pytest.raises(DataError, match="held-out site C has no case with a label to test on"):
        StudyData(study).prepare()


def test_a_patient_of_a_training_site_is_none_of_a_new_hospital(
    tmp_path: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    study = study_of(tmp_path, make_raw_dataset, "ABC")
    registry = SitesFile.load(study.raw_dataset / "sites.json")
    patients = {case: "P1" for case in registry.cases if case[0] in "AC"}
    SitesFile(registry.sites, registry.cases, patients).save(study.raw_dataset / "sites.json")
    with pytest.raises(DataError, match=r"Site A has \d labelled cases, of which 0 would be left"):
        StudyData(
            read_study(study.folder)
        ).prepare()  # one person is all of A and of C, where somebody has to be tested

    patients = {f"{site}_case{number:03d}": f"P{number}" for site in "AC" for number in range(2)}
    assert set(patients) < set(registry.cases)
    SitesFile(registry.sites, registry.cases, patients).save(study.raw_dataset / "sites.json")
    data = StudyData(read_study(study.folder))
    data.prepare()
    trained = {path.name[:9] for path in (data.pooled.raw / data.dataset_name / "imagesTr").iterdir()}
    tested = {path.name[:9] for site in "ABC" for path in (data.test(site) / "labels").iterdir()}
    assert not {patients.get(case) for case in trained} & {patients.get(case) for case in tested} - {None}

    # Data of an earlier release, which dealt cases and not patients.
    mixed = {min(trained): "P9", max(tested): "P9"}
    SitesFile(registry.sites, registry.cases, mixed).save(study.raw_dataset / "sites.json")
    with pytest.raises(DataError, match=r"Patient P9 would be tested at the site C and trained on at A \(case A_c"):
        StudyData(read_study(study.folder)).prepare()


def test_travelling_subjects_are_test_cases_wherever_they_are_at_home(
    tmp_path: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    """A is called UCSF and C UCSF_3T; two subjects of C travelled to A, which is the reference."""
    study = study_of(tmp_path, make_raw_dataset, "ABC")
    raw, names = study.raw_dataset, {"A": "UCSF", "B": "B", "C": "UCSF_3T"}
    registry, cases = SitesFile.load(raw / "sites.json"), {}
    for case, site in registry.cases.items():
        cases[f"{names[site]}{case[1:]}"] = names[site]
        for path in (raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"):
            path.rename(path.with_name(names[site] + path.name[1:]))
    for folder in ("images", "labels"):
        (raw / f"{folder}Travelling").mkdir()
        for number in range(2):
            ending = "_0000.nii.gz" if folder == "images" else ".nii.gz"
            home = raw / f"{folder}Tr" / f"UCSF_3T_case{number:03d}{ending}"
            shutil.copy(home, raw / f"{folder}Travelling" / f"UCSF_case{number:03d}_x{ending}")
    home = {f"UCSF_3T_case{number:03d}": f"P{number}" for number in range(2)}
    patients = home | {f"UCSF_case{number:03d}_x": f"P{number}" for number in range(2)}
    SitesFile({name: SiteInfo() for name in names.values()}, cases, patients).save(raw / "sites.json")
    file = study.folder / STUDY_FILE
    file.write_text(file.read_text().replace('"A"', '"UCSF"').replace('["C"]', "[]").replace('"C"', '"UCSF_3T"'))
    data = StudyData(read_study(study.folder))
    data.prepare()
    trained = {
        path.name.removesuffix("_0000.nii.gz") for path in (data.pooled.raw / data.dataset_name).glob("images*/*")
    }
    assert not trained & set(patients)
    for site in names.values():
        for path in (data.test(site) / "images").iterdir():
            assert data.study.registry.site_of(path.name.removesuffix("_0000.nii.gz")) == site
    assert travelling_pairs(data) == {
        f"UCSF_3T_case{number:03d}": {"reference": f"UCSF_case{number:03d}_x", "site": "UCSF_3T"} for number in range(2)
    }


def test_a_hospital_with_images_alone_is_prepared_and_never_trained_or_tested_alone(
    tmp_path: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    study = study_of(tmp_path, make_raw_dataset, "AB")
    take_labels_away(study.raw_dataset, "B")
    file = study.folder / STUDY_FILE
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("labelled_sites")))
    data = StudyData(read_study(study.folder))
    data.prepare()
    assert (data.study.labelled_sites, data.study.unlabelled_sites) == (("A",), ("B",))
    assert {arm.site for arm in arms_of(data.study) if arm.site} <= {"A"}
    assert not list((data.test("B") / "labels").iterdir())


class Recorded:
    """Stands for `adapt_model`: writes what marks a finished adaptation."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, Path, str]] = []

    def __call__(self, model: Path, images: Path, output: Path, *, site: str, **_: object) -> None:
        self.calls.append((model, images, site))
        output.mkdir(parents=True)
        (output / "adaptation.json").write_text("{}")


def test_each_kind_of_arm_meets_a_held_out_site_as_it_should_and_once(
    tmp_path: Path, make_raw_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = StudyData(study_of(tmp_path, make_raw_dataset, "ABC"))
    recorded = Recorded()
    monkeypatch.setattr(adapt_model, "adapt_model", recorded)
    trained = Trained({"A": "model", "B": "model", "C": "given"}, {"A": "A", "B": "B", "C": "stored"})
    for arm in (Arm("central", "none"), Arm("federated", "augment"), Arm("local", "none", site="C")):
        assert adapt_to_held_out(data, Cell(arm, 0), tmp_path / arm.name, trained, device="cpu") == trained
    assert not recorded.calls
    folder = tmp_path / "cell"
    (folder / "adapted" / ".C.writing-x").mkdir(parents=True)
    for _ in range(2):
        found = adapt_to_held_out(data, Cell(Arm("federated", "polarity"), 0), folder, trained, device="cpu")
        assert dict(found.models) == {"A": "model", "B": "model", "C": str(folder / "adapted" / "C")}
        assert found.styles == trained.styles
    assert recorded.calls == [(Path("given"), data.adapt("C"), "C")]
    assert [path.name for path in (folder / "adapted").iterdir() if path.is_dir()] == ["C"]


def test_a_servers_folder_that_no_new_hospital_could_use_is_refused(tmp_path: Path) -> None:
    for name in ("plans.json", "dataset.json", "fold_all/checkpoint_final.pth"):
        with pytest.raises(FederationError, match=name):
            check_whole(tmp_path, "all")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_whole(tmp_path, "all")
    (tmp_path / "fold_all" / "local_groups.json").touch()
    with pytest.raises(FederationError, match="each site's own"):
        check_whole(tmp_path, "all")
