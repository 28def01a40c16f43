"""One dataset of several sites becomes one nnU-Net root per site, and nothing gets lost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.commands import sites as command
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.sites.split import SplitOptions, split_dataset
from tests.sites.raw import ENDING, write_case, write_multi_site

NAME = "Dataset001_Small"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_multi_site(tmp_path / NAME, {"A": 6, "B": 5})


def names(folder: Path) -> set[str]:
    return (
        {path.name.removesuffix(ENDING).removesuffix("_0000") for path in folder.glob("*")}
        if folder.is_dir()
        else set()
    )


def test_every_case_lies_at_its_own_site_once(dataset: Path, tmp_path: Path) -> None:
    shares = split_dataset(dataset, tmp_path / "out")
    assert [(share.site, share.n_labelled, share.n_held_out) for share in shares] == [("A", 5, 1), ("B", 4, 1)]
    found = {}
    for share in shares:
        raw = share.root.raw / NAME
        found[share.site] = names(raw / "imagesTr") | names(raw / "imagesTs")
        assert not names(raw / "imagesTr") & names(raw / "imagesTs")
        assert names(raw / "imagesTr") == names(raw / "labelsTr")
        assert json.loads((raw / "dataset.json").read_text())["numTraining"] == share.n_labelled
        assert set(SitesFile.load(raw / "sites.json").sites) == {share.site}
        check_raw_dataset(raw, site=share.site)
    assert found == {site: set(SitesFile.load(dataset / "sites.json").cases_of(site)) for site in "AB"}
    for folder in ("sites/A", "sites/B", "server"):
        assert {path.name for path in (tmp_path / "out" / folder).iterdir()} == {
            "nnUNet_raw",
            "nnUNet_preprocessed",
            "nnUNet_results",
            "fedharm",
        }


def test_sites_without_labels_keep_their_images_only(dataset: Path, tmp_path: Path) -> None:
    _, share = split_dataset(dataset, tmp_path / "out", SplitOptions(labelled_sites=("A",)))
    raw = share.root.raw / NAME
    assert (share.n_labelled, share.n_unlabelled, share.n_held_out) == (0, 4, 1)
    assert len(names(raw / "imagesUnlabelled")) == 4
    assert not names(raw / "imagesTr")
    assert not names(raw / "labelsTr")
    assert names(raw / "imagesTs") == names(raw / "labelsTs")


def test_held_out_cases_follow_the_seed_and_not_the_other_sites(dataset: Path, tmp_path: Path) -> None:
    def held_out(folder: str, **options: object) -> list[set[str]]:
        shares = split_dataset(dataset, tmp_path / folder, SplitOptions(**options))  # type: ignore[arg-type]
        return [names(share.root.raw / NAME / "imagesTs") for share in shares]

    first = held_out("one", seed=3)
    assert held_out("two", seed=3) == first
    assert held_out("three", seed=3, labelled_sites=("A",)) == first
    assert any(held_out(f"seed{seed}", seed=seed) != first for seed in range(4, 8))


def test_a_site_that_is_left_out_gets_no_folder_and_changes_nothing_for_the_others(
    dataset: Path, tmp_path: Path
) -> None:
    both = split_dataset(dataset, tmp_path / "both")
    (share,) = split_dataset(dataset, tmp_path / "one", SplitOptions(without_sites=("B",)))
    assert [path.name for path in (tmp_path / "one" / "sites").iterdir()] == ["A"]
    for folder in ("imagesTr", "imagesTs"):
        assert names(share.root.raw / NAME / folder) == names(both[0].root.raw / NAME / folder)
    assert not [path for path in (tmp_path / "one").rglob("*") if path.name.startswith("B")]


def test_cases_that_must_be_held_out_are_beside_those_that_are_drawn(dataset: Path, tmp_path: Path) -> None:
    drawn, forced = (
        split_dataset(dataset, tmp_path / name, SplitOptions(held_out_cases=cases))[0]
        for name, cases in (("a", ()), ("b", ("A_000", "A_001")))
    )
    assert {"A_000", "A_001"} < {
        name.removesuffix(f"_0000{ENDING}") for name in names(forced.root.raw / NAME / "imagesTs")
    }
    assert forced.n_held_out == 2 + max(1, round(0.2 * (drawn.n_labelled + drawn.n_held_out - 2)))


@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_tested_and_trained_on(tmp_path: Path, seed: int) -> None:
    """Patients 0 to 2 were at both sites; 3 to 8 came twice to one site, the second time without a label at times."""
    folder = write_multi_site(tmp_path / NAME, {"A": 9, "B": 9})
    registry = SitesFile.load(folder / "sites.json")
    patients = {f"{site}_{number:03d}": f"P{number}" for site in "AB" for number in range(3)}
    cases = dict(registry.cases)
    for site in "AB":
        for number in range(3, 9):
            again = f"{site}_{number:03d}_again"
            write_case(folder, again, np.random.default_rng(number), labelled=number % 2 == 0)
            cases[again] = site
            patients |= {f"{site}_{number:03d}": f"{site}{number}", again: f"{site}{number}"}
    SitesFile(registry.sites, cases, patients).save(folder / "sites.json")
    shares = split_dataset(folder, tmp_path / "out", SplitOptions(held_out_fraction=0.34, seed=seed))
    trained, tested = set(), set()
    for share in shares:
        raw = share.root.raw / NAME
        tested |= {patients[case] for case in names(raw / "imagesTs")}
        trained |= {patients[case] for part in ("imagesTr", "imagesUnlabelled") for case in names(raw / part)}
    assert not tested & trained
    assert tested | trained == set(patients.values())
    assert len(tested) == 1 + 2 + 2, "a third of the travelled and of each site's own"
    placed = sum(share.n_labelled + share.n_unlabelled + share.n_held_out + share.n_left_out for share in shares)
    assert placed == len(cases)


@pytest.mark.parametrize("link", [True, False])
def test_files_are_linked_or_copied_as_asked(dataset: Path, tmp_path: Path, link: bool) -> None:
    split_dataset(dataset, tmp_path / "out", SplitOptions(held_out_fraction=0.0, link=link))
    source = dataset / "imagesTr" / f"A_000_0000{ENDING}"
    assert source.samefile(tmp_path / "out/sites/A/nnUNet_raw" / NAME / "imagesTr" / source.name) is link


def test_unlabelled_cases_of_the_dataset_go_to_their_site(dataset: Path, tmp_path: Path) -> None:
    write_case(dataset, "B_900", np.random.default_rng(1), labelled=False)
    registry = SitesFile.load(dataset / "sites.json")
    SitesFile(registry.sites, {**registry.cases, "B_900": "B"}).save(dataset / "sites.json")
    shares = split_dataset(dataset, tmp_path / "out")
    assert [share.n_unlabelled for share in shares] == [0, 1]


def test_occupied_folder_is_refused_and_nothing_is_changed(dataset: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "out/sites/B/nnUNet_raw" / NAME
    occupied.mkdir(parents=True)
    (occupied / "mine.txt").write_text("mine")
    with pytest.raises(SetupError, match="already holds a dataset"):
        split_dataset(dataset, tmp_path / "out")
    assert not (tmp_path / "out/sites/A").exists()


def test_unwritable_folder_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(SetupError, match=r"Cannot create .*this user may write"):
        split_dataset(dataset, tmp_path / "out")


def test_site_left_with_one_case_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Site A has 6 labelled cases, of which 1 would be left"):
        split_dataset(dataset, tmp_path / "out", SplitOptions(held_out_fraction=0.9))


def test_site_without_cases_is_refused(dataset: Path, tmp_path: Path) -> None:
    registry = SitesFile.load(dataset / "sites.json")
    SitesFile({**registry.sites, "C": SiteInfo()}, registry.cases).save(dataset / "sites.json")
    with pytest.raises(DataError, match="Site C is empty"):
        split_dataset(dataset, tmp_path / "out")


def test_unknown_labelled_site_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown site Z .*lists A, B"):
        split_dataset(dataset, tmp_path / "out", SplitOptions(labelled_sites=("Z",)))


def test_case_without_a_site_is_refused(dataset: Path, tmp_path: Path) -> None:
    write_case(dataset, "stray", np.random.default_rng(1))
    with pytest.raises(DataError, match="which site case stray comes from"):
        split_dataset(dataset, tmp_path / "out")


def test_command_splits_and_checks(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["split", "-d", str(dataset), "-o", str(tmp_path / "out")])) == 0
    printed = capsys.readouterr().out
    assert "Site B has too few labelled cases for nnU-Net's 5 folds: use fold all." in printed
    assert "Site A" not in printed
    site = tmp_path / "out/sites/A/nnUNet_raw" / NAME
    assert command.run(parser.parse_args(["check", "-d", str(site), "-np", "1"])) == 0
    (site / "labelsTr").rename(site / "elsewhere")
    with pytest.raises(DataError, match="Site A, case"):
        command.run(parser.parse_args(["check", "-d", str(site), "-np", "1"]))


def test_registry_survives_a_round_trip(tmp_path: Path) -> None:
    registry = SitesFile({"A": SiteInfo("GE", 1.5, "T1w"), "B": SiteInfo()}, {"x": "A", "y": "B"})
    registry.save(tmp_path / "sites.json")
    assert SitesFile.load(tmp_path / "sites.json") == registry
    assert registry.only("A") == SitesFile({"A": SiteInfo("GE", 1.5, "T1w")}, {"x": "A"})


def test_patients_of_several_cases_survive_a_round_trip_and_stay_with_their_site(tmp_path: Path) -> None:
    sites = {"A": SiteInfo(), "A_2": SiteInfo()}
    registry = SitesFile(sites, {"A_1": "A", "A_2_1": "A_2"}, {"A_1": "p", "A_2_1": "p", "A_2_9": "q"})
    registry.save(tmp_path / "sites.json")
    assert SitesFile.load(tmp_path / "sites.json") == registry
    assert registry.only("A").patients == {"A_1": "p"}
    assert registry.only("A_2").patients == {"A_2_1": "p", "A_2_9": "q"}  # the longest site's name counts
    assert registry.patient_of("A_2_1") == "p"
    assert registry.patient_of("other") == "other"
    assert registry.patient_of("A_2_9") == "q"
    assert registry.patient_of("A_2_5") == "5", "somebody of whom no other case is known"


def test_a_travelling_subject_is_the_patient_of_the_home_case_at_any_site() -> None:
    sites = {site: SiteInfo() for site in ("UCSF", "UCSF_3T", "B")}
    registry = SitesFile(sites, {"B_sub0": "B", "UCSF_sub1": "UCSF", "B_sub1": "B", "sub2": "B"}, {"B_sub0": "p"})
    assert [registry.patient_of(case) for case in ("UCSF_sub0", "UCSF_3T_sub0")] == ["p", "p"]
    assert registry.patient_of("UCSF_sub2") == "sub2"
    with pytest.raises(DataError, match=r"UCSF_3T_sub1: several cases could be the same person \(B_sub1, UCSF_sub1\)"):
        registry.patient_of("UCSF_3T_sub1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has to hold a JSON object"),
        ('{"cases": {}}', "no object 'sites'"),
        ('{"sites": {"A": {"colour": 1}}, "cases": {}}', "unknown key 'colour'"),
        ('{"sites": {"A": {}}, "cases": {"x": "B"}}', "case x belongs to site B"),
        ('{"sites": {"A": {}}, "cases": {}, "patient": {}}', "unknown key 'patient'"),
        ('{"sites": {"A": {}}, "cases": {}, "patients": []}', "`patients` holds a list"),
        ('{"sites": {"A": {}}, "cases": {}, "patients": {"x": "p"}}', "names the case x, which is neither"),
    ],
)
def test_damaged_registry_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "sites.json").write_text(content)
    with pytest.raises(DataError, match=message):
        SitesFile.load(tmp_path / "sites.json")


def test_missing_registry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        SitesFile.load(tmp_path / "sites.json")
