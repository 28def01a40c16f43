"""How different the sites are: measured by the study itself, once, on some cases, and never in the way of a training."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnunet_fedharm.cli import main
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.study import estimate, site_report
from nnunet_fedharm.study.estimate import estimate_site_report
from nnunet_fedharm.study.site_report import LOCK, make_site_report, read_site_report, site_report_missing
from nnunet_fedharm.study.study_file import read_study
from tests.study.cells import Study

FEW = StatisticsOptions(bootstrap=20, permutations=19, mmd_permutations=99, forest_permutations=4, trees=5)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two sites whose tissue differs, with finished cells of the control; seven cases of each site are measured."""
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    monkeypatch.setattr(site_report, "STATISTICS", FEW)
    study = Study(tmp_path)
    text = (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text.replace("[arms]", "site_report_cases = 7\n[arms]"))
    rng = np.random.default_rng(0)
    ball = np.linalg.norm(np.indices((12, 12, 12)) - 5.5, axis=0) < 4
    for image in sorted((study.study.raw_dataset / "imagesTr").iterdir()):
        noise = rng.normal(0, 8, ball.shape)
        noise = noise if image.name.startswith("A") else 5 * gaussian_filter(noise, 1)
        nibabel.save(nibabel.Nifti1Image((100 + 60 * ball + noise).astype(np.float32), np.eye(4)), image)
        label = image.parents[1] / "labelsTr" / image.name.replace("_0000", "")
        nibabel.save(nibabel.Nifti1Image(ball.astype(np.uint8), np.eye(4)), label)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    return study


def test_the_report_of_a_study_has_the_sites_measured_once(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "run", str(study.folder), "--dry-run", "--device", "cpu"]) == 0
    assert "(how different the sites are)" in capsys.readouterr().out
    assert site_report_missing(study.study)  # a dry run measures one case and keeps nothing
    assert main(["study", "report", str(study.folder)]) == 0
    assert "on at most 7 cases of each" in capsys.readouterr().out
    answer = json.loads((study.folder / "report" / "study.json").read_text())["answers"][0]
    assert answer["headline"].startswith("A and B differ even after z-score")
    page = (study.folder / "report" / "report.html").read_text()
    assert "Measured on at most 7 cases of each site" in page
    assert "14 volumes as scanned (at most 7 cases of each site" in (study.folder / "report" / "methods.md").read_text()
    found = read_site_report(study.folder)
    assert found is not None
    assert [(card.site, card.n_cases) for card in found.sites] == [("A", 7), ("B", 7)]
    assert {part.scale for part in found.variants[0].parts if part.region == "foreground"} == {"z-score"}

    # Made again by neither command, nor where another one's numbers lie there.
    file = study.folder / "site-report" / "report.json"
    before = file.stat().st_mtime_ns
    assert main(["study", "report", str(study.folder)]) == 0
    file.rename(file.with_name("findings.json"))
    said: list[str] = []
    make_site_report(study.study, show=said.append)
    assert said == []
    assert not file.exists()
    assert (file.with_name("findings.json")).stat().st_mtime_ns == before

    # A stopped one goes on: every measured case is still there, so its time is that of the statistics alone.
    file.with_name("findings.json").unlink()
    cache = {path: path.stat().st_mtime_ns for path in (study.folder / "site-report" / "cache").iterdir()}
    assert len(cache) == 14
    seconds = estimate_site_report(study.study).seconds
    assert seconds
    assert seconds % site_report.PART_S == 0
    make_site_report(study.study, show=said.append)
    assert {path: path.stat().st_mtime_ns for path in (study.folder / "site-report" / "cache").iterdir()} == cache
    assert file.is_file()


def test_what_is_in_the_way_is_told_and_stops_no_training(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    with file_lock(study.folder / LOCK):
        said: list[str] = []
        make_site_report(study.study, show=said.append)
    assert said == ["Another process measures how different the sites are."]
    for image in (study.study.raw_dataset / "imagesTr").iterdir():
        image.write_bytes(b"")
    assert estimate_site_report(study.study).seconds is None
    assert main(["study", "report", str(study.folder)]) == 0
    printed = capsys.readouterr().out
    assert "How different the sites are was not measured: " in printed
    assert site_report_missing(study.study)
    page = (study.folder / "report" / "report.html").read_text()
    assert "<code>nnunet-fedharm study run</code> measures them" in page


def test_run_measures_the_sites_first_unless_it_was_asked_for_certain_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunet_fedharm.study import runner

    def cells(*_: object, **__: object) -> list[object]:
        print("the cells begin")
        return []

    monkeypatch.setattr(runner, "run_missing", cells)
    command = [
        "study",
        "run",
        str(Study(tmp_path).folder),
        "--device",
        "cpu",
    ]  # its images are empty, which is soon told
    assert main([*command, "--only", "central_polarity"]) == 0
    assert capsys.readouterr().out.splitlines() == ["the cells begin"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.index("was not measured") < printed.index("the cells begin")
    monkeypatch.setattr(estimate, "seconds_of_site_report", lambda _: 3600.0)
    assert main([*command, "--hours", "0.5"]) == 2  # then the cells' time is asked for, which is not known here
    assert "left for another run" in capsys.readouterr().out


def test_a_study_may_leave_it_out_but_not_judge_sites_by_a_few_cases(tmp_path: Path) -> None:
    study = Study(tmp_path)
    text = (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text.replace("[arms]", "site_report_cases = 0\n[arms]"))
    assert not site_report_missing(study.study)
    (study.folder / "study.toml").write_text(text.replace("[arms]", "site_report_cases = 4\n[arms]"))
    with pytest.raises(DataError, match="site_report_cases must be 0 or at least 5, got 4"):
        read_study(study.folder)
