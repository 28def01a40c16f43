"""A whole small study by its command: data, central, local and federated cells, a held-out site, what a stop leaves, status."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnunet_fedharm.cli import main
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.study.cell_card import cell_facts
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.results import DICE, read_results
from nnunet_fedharm.study.study_file import STUDY_FILE, read_study

STUDY = """
[study]
name = "blobs"
dataset = "../nnUNet_raw/Dataset001_Blobs"
configuration = "2d"
reference = "A"
labelled_sites = ["A"]
held_out_sites = ["C"]
seeds = [0]
device = "cpu"
site_report_cases = 0
[arms]
harmonizers = ["polarity"]
baselines = ["no-augmentation"]
[report]
lesion_labels = [1]
[training]
harmonizer_epochs = 1
segmenter_epochs = 1
iterations_per_epoch = 2
val_iterations_per_epoch = 1
base_features = 4
max_features = 8
batch_size = 2
mirroring = false
num_processes = 1
"""


SEEN = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "fedharm", "sites", "server")
"""What a cell's training reads and writes, below its folder."""


@pytest.fixture
def folder(tmp_path: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    raw = tmp_path / "nnUNet_raw" / "Dataset001_Blobs"
    for index, site in enumerate("ABC"):
        make_raw_dataset(tmp_path / "nnUNet_raw", n_labelled=4, site=f"{site}_", gain=1.0 + index, seed=index)
    # A's first subject travelled: B's scan of it is a test case, and at home it is never trained on.
    for kind, name in (("images", "A_case000_0000"), ("labels", "A_case000")):
        target = raw / f"{kind}Travelling" / f"{name.replace('A_', 'B_', 1)}.nii.gz"
        target.parent.mkdir()
        shutil.copy(raw / f"{kind}Tr" / f"{name}.nii.gz", target)
    cases = {path.name[:-12]: path.name[0] for path in (raw / "imagesTr").glob("*_0000.nii.gz")}
    (raw / "imagesTr" / "B_case000_0000.nii.gz").rename(raw / "imagesTr" / "B_case009_0000.nii.gz")
    (raw / "labelsTr" / "B_case000.nii.gz").rename(raw / "labelsTr" / "B_case009.nii.gz")
    cases["B_case009"] = cases.pop("B_case000")
    patients = {"B_case000": "A_case000"}  # C has a case of that number too
    SitesFile({site: SiteInfo() for site in "ABC"}, cases, patients).save(raw / "sites.json")
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(cases)}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / STUDY_FILE).write_text(STUDY)
    return tmp_path / "study"


def trained_on(root: Path) -> set[str]:
    return {
        path.name[:-12]
        for part in ("imagesTr", "imagesUnlabelled")
        for path in root.glob(f"nnUNet_raw/*/{part}/*_0000.nii.gz")
    }


def files_below(folder: Path) -> list[Path]:
    """Through links too."""
    return [Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names]


def models_of(cell: Path, name: str) -> list[Path]:
    """The folder that a new hospital is given."""
    root = cell if name.startswith("central") else cell / "server"
    return [path.parents[1] for path in root.glob("nnUNet_results/*/*/fold_all/checkpoint_final.pth")]


def weights(model: Path) -> dict[str, torch.Tensor]:
    content = torch.load(model / "fold_all" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    found: dict[str, torch.Tensor] = content["network_weights"]
    return found


@pytest.mark.slow
def test_a_study_runs_from_one_file_and_goes_on_where_it_was_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "prepare", str(folder)]) == 0
    study = read_study(folder)
    data = StudyData(study)
    tested = {site: {path.name[:-7] for path in (data.test(site) / "labels").iterdir()} for site in "ABC"}
    assert "A_case000" in tested["A"]
    assert "B_case000" in tested["B"]
    for root in (data.pooled.path, data.consortium / "sites" / "A", data.own("B").path, data.own("C").path):
        assert trained_on(root)
        assert not trained_on(root) & (tested["A"] | tested["B"] | tested["C"])

    assert main(["study", "run", str(folder), "--dry-run"]) == 0
    assert "timed steps of the planned network" in " ".join(capsys.readouterr().out.split())
    # One cell in a process of its own, as `study run` starts them; the others here, where nothing has to be imported again.
    assert main(["study", "run", str(folder), "--only", "federated_polarity"]) == 0
    for name in ("central_none", "central_polarity", "local_C_none"):
        assert main(["study", "run", str(folder), "--cell", f"{name}_seed-0"]) == 0
    results = read_results(study)
    assert {result.cell.arm.name for result in results.finished} == {
        "central_none",
        "central_polarity",
        "federated_polarity",
        "local_C_none",
    }
    for result in results.finished:
        for site in ("C",) if result.cell.arm.site else ("A", "B", "C"):
            assert set(result.scores(site)) == tested[site]
        environment = json.loads((result.folder / "environment.json").read_text())
        assert environment["versions"]["nnunetv2"].startswith("2.")
        assert list(result.folder.rglob("checkpoint_final.pth"))
    by_name = {result.cell.arm.name: result for result in results.finished}
    assert by_name["federated_polarity"].cost.bytes_up > 0
    for name, result in by_name.items():  # what a user of the arm alone would wait for is told, whoever computed it
        assert result.cost.shared_s is not None
        assert (result.cost.shared_s > 0) == (result.cell.arm.mode != "federated"), (
            "the first federated cell was spared nothing"
        )
        assert (result.cost.adapt_s or 0) > 0 if name.endswith("polarity") else result.cost.adapt_s == 0
    for site in "AB":  # the next federated cell finds them
        assert list(data.preprocessed(site).glob(f"{data.dataset_name}/*/*.pkl"))
        assert not (by_name["federated_polarity"].folder / "sites" / site / "nnUNet_preprocessed").exists()
    quality = by_name["central_polarity"].quality
    assert quality is not None
    assert quality["lesions"]["B"]["n_lesions"] == 1
    assert (by_name["central_polarity"].folder / "harmonized" / "B").is_dir()
    assert results.scores(by_name["local_C_none"].cell.arm, "A", DICE) is None

    # As if the cell had been finished before the control: the report has its lesions counted.
    file = by_name["central_polarity"].folder / "quality.json"
    file.write_text(json.dumps({**quality, "lesions": None}))
    assert main(["study", "report", str(folder)]) == 0
    assert json.loads(file.read_text())["lesions"] == quality["lesions"]
    lesions = (folder / "report" / "report.html").read_text().split('id="lesions"')[1].split("</section>")[0]
    assert "Lesions found and made up, harmonized less as scanned" in lesions
    assert "polarity, B" in lesions
    assert f"<td>B</td><td>1</td><td>{quality['lesions']['B']['lesion_recall']['before']['value']:.2f} → " in lesions
    record = json.loads((by_name["federated_polarity"].folder / "trained.json").read_text())
    assert not any(Path(model).is_absolute() for model in record["models"].values())

    # C took part in nothing, and the finished models were adapted to it.
    for name in ("central_none", "central_polarity", "federated_polarity"):
        cell = by_name[name].folder
        files = [path for part in SEEN for path in files_below(cell / part)]
        assert [path for path in files if path.name.startswith("A_")]
        assert not [path for path in files if any(name.startswith("C") for name in path.relative_to(cell).parts)]
        plans = [json.loads(path.read_text()) for path in files if path.name == "plans.json"]
        assert plans
        assert all(set(content["configurations"]["2d"]["fedharm"]["styles"]) == {"A", "B"} for content in plans)
        assert (cell / "adapted").exists() == (name != "central_none")
    for name in ("central_polarity", "federated_polarity"):
        cell = by_name[name].folder
        found = json.loads((cell / "adapted" / "C" / "adaptation.json").read_text())
        assert (found["n_volumes"], found["n_labelled"]) == (3, 0)
        adapted, given = (weights(path) for path in (cell / "adapted" / "C", *models_of(cell, name)))
        assert bool(adapted["harmonizer.source_known"])
        assert not bool(given["harmonizer.source_known"])
        moved = {key for key, value in given.items() if not torch.equal(value, adapted[key])}
        assert moved
        assert all(key.startswith("harmonizer.source") for key in moved)
    card = cell_facts(study, by_name["federated_polarity"])
    assert [site.name for site in card.sites] == ["A", "B"]

    # A cell that lost its metrics is scored again and not trained again.
    folder_of = by_name["central_polarity"].folder
    checkpoints = sorted(folder_of.rglob("checkpoint_final.pth"))  # the trained one and C's
    before = [path.stat().st_mtime_ns for path in checkpoints]
    assert len(checkpoints) == 2
    (folder_of / "metrics.json").unlink()
    assert main(["study", "run", str(folder), "--cell", "central_polarity_seed-0"]) == 0
    assert [path.stat().st_mtime_ns for path in checkpoints] == before
    assert (folder_of / "metrics.json").is_file()

    capsys.readouterr()
    assert main(["study", "status", str(folder)]) == 0
    assert "4 of" in capsys.readouterr().out
    changed = (folder / STUDY_FILE).read_text().replace('labelled_sites = ["A"]', "labelled_sites = []")
    (folder / STUDY_FILE).write_text(changed)
    with pytest.raises(DataError, match="were made for other values"):
        StudyData(read_study(folder)).prepare()
