"""`sites report` end to end: a tiny dataset of two sites, real radiomics, few permutations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.commands.sites_report import default_output, statistics_options
from nnunet_fedharm.differences.findings import Findings, to_json
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.sites.features.table_files import read_table
from tests.evaluation.site_findings import make_findings
from tests.evaluation.test_site_report_page import Checked

FEW = ("--permutations", "3", "--bootstrap", "10", "-np", "1")


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Path:
    """Dataset001_Blobs: three cases of a dark and three of a bright scanner."""
    raw = tmp_path_factory.mktemp("raw")
    folder = make_raw_dataset(raw, n_labelled=3, shape=(16, 16, 16), site="north_")
    make_raw_dataset(raw, n_labelled=3, shape=(16, 16, 16), site="south_", gain=3.0, seed=1)
    write_sites(folder, {"north": ["north"], "south": ["south"]})
    return folder


def write_sites(folder: Path, sites: dict[str, list[str]]) -> None:
    """sites.json: site -> beginnings of its cases' names."""
    names = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir())
    cases = {name: site for site, starts in sites.items() for name in names if name.startswith(tuple(starts))}
    scanner = {"vendor": "Siemens", "field": 3.0}
    (folder / "sites.json").write_text(json.dumps({"sites": dict.fromkeys(sites, scanner), "cases": cases}))


@pytest.fixture(scope="module")
def report(two_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the two sites."""
    folder = tmp_path_factory.mktemp("report")
    assert main(["sites", "report", "-d", str(two_sites), "-o", str(folder), *FEW]) == 0
    return folder


def test_the_command_writes_page_json_and_tables(report: Path) -> None:
    assert {"report.html", "report.json", "features.csv", "differences.csv"} <= {path.name for path in report.iterdir()}
    findings = from_json(Findings, json.loads((report / "report.json").read_text()))
    assert findings.mode == "pooled"
    assert [card.site for card in findings.sites] == ["north", "south"]
    assert [card.n_labelled for card in findings.sites] == [3, 3]
    assert findings.failures == []
    assert {(part.region, part.scale) for part in findings.variants[0].parts} == {
        ("foreground", "z-score"),
        ("foreground", "raw"),
        ("image", "raw"),
    }
    raw = next(part for part in findings.variants[0].parts if (part.region, part.scale) == ("foreground", "raw"))
    assert raw.pairs[0].wasserstein.value is not None
    assert raw.pairs[0].wasserstein.value > 0
    table = read_table(report / "features.csv")
    assert table.sites == ("north", "south")
    lines = (report / "differences.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(part.features) for part in findings.variants[0].parts)


def test_the_page_shows_three_slices_of_each_site_and_names_no_case_in_them(report: Path) -> None:
    found = Checked((report / "report.html").read_text())
    assert len(found.alternatives) == 2 + 6
    assert not [text for text in found.alternatives if "case" in text]
    assert "Siemens, 3 T" in (report / "report.html").read_text()


def test_a_second_run_takes_what_was_measured_and_prints_where_the_page_is(
    two_sites: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (report / "features.csv").read_text(), (report / "differences.csv").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (report / "cache").iterdir()}
    assert main(["sites", "report", "-d", str(two_sites), "-o", str(report), "--no-slices", *FEW]) == 0
    assert {path: path.stat().st_mtime_ns for path in (report / "cache").iterdir()} == kept
    assert ((report / "features.csv").read_text(), (report / "differences.csv").read_text()) == before
    assert "<img" not in (report / "report.html").read_text()
    printed = capsys.readouterr().out
    assert str(report / "report.html") in printed
    assert printed.splitlines()[0].endswith(".")


def test_one_site_alone_gets_a_report_that_says_so(
    tmp_path: Path, raw_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sites(raw_dataset, {"only": ["case"]})
    assert main(["sites", "report", "-d", str(raw_dataset), "-o", str(tmp_path / "report"), *FEW]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert "There are no two sites to compare." in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--channels", "FLAIR"], "has no channel 'FLAIR'. It has: MR0."),
        (["--model", "nowhere/{site}"], "has no plans.json"),
        (["--permutations", "-1"], "cannot be negative"),
        (["-np", "0"], "-np must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    two_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["sites", "report", "-d", str(two_sites), "-o", str(tmp_path / "report"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_dataset_without_sites_is_refused_in_one_sentence(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sites", "report", "-d", str(raw_dataset), "-o", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err
    assert "sites.json" in said
    assert len(said.splitlines()) == 1


def test_a_damaged_case_is_listed_and_the_rest_is_reported(
    tmp_path: Path, make_raw_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_raw_dataset(tmp_path / "raw", n_labelled=3, shape=(16, 16, 16))
    write_sites(folder, {"only": ["case"]})
    (folder / "imagesTr" / "case001_0000.nii.gz").write_bytes(b"not an image")
    assert main(["sites", "report", "-d", str(folder), "-o", str(tmp_path / "report"), *FEW]) == 0
    findings = from_json(Findings, json.loads((tmp_path / "report" / "report.json").read_text()))
    assert [failure.case for failure in findings.failures] == ["case001"]
    assert "1 measurement failed" in capsys.readouterr().out


def test_the_report_lies_beside_the_trained_models_or_here(
    two_sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_output(two_sites) == Path("Dataset001_Blobs_site_report")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert default_output(two_sites) == tmp_path / "nnUNet_results" / "Dataset001_Blobs" / "site_report"


def test_more_permutations_do_not_make_the_slow_nulls_slower() -> None:
    many, few, standard = (statistics_options(0, number, None) for number in (5000, 3, None))
    assert (many.permutations, many.mmd_permutations) == (5000, 5000)
    assert many.forest_permutations == standard.forest_permutations
    assert (few.forest_permutations, few.slice_permutations) == (3, 3)


def test_the_page_of_a_federated_report_json_is_made_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "report.json"
    written.write_text(json.dumps(to_json(make_findings(mode="federated"))))
    assert main(["sites", "report", "--findings", str(written)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert "What left the sites" in (tmp_path / "report.html").read_text()


def test_a_pooled_page_is_not_replaced_by_one_without_pictures(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sites", "report", "--findings", str(report / "report.json")]) == 2
    assert "would lose them" in capsys.readouterr().err
    assert main(["sites", "report", "--findings", str(report / "report.json"), "-o", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Say what to report on"),
        (["--findings", "nowhere.json"], "Cannot read nowhere.json"),
        (["--root", "nowhere", "-d", "1", "--model", "m"], "needs the images in one place"),
        (["--root", "nowhere"], "Say which dataset"),
    ],
)
def test_what_is_not_said_is_asked_for(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["sites", "report", *words]) == 2
    assert message in capsys.readouterr().err
