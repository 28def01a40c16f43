"""Which cases a bounded site report measures."""

from __future__ import annotations

from pathlib import Path

from nnunet_fedharm.sites.features.cases import ListedCase, spread_cases
from nnunet_fedharm.sites.files import CaseFiles


def listed(case: str, *, patient: str = "", labelled: bool = True, travelling: bool = False) -> ListedCase:
    files = CaseFiles(case, (Path(f"{case}_0000.nii.gz"),), Path(f"{case}.nii.gz") if labelled else None)
    return ListedCase(files, case[0], patient or case, travelling)


def names(cases: list[ListedCase]) -> list[str]:
    return [item.files.case for item in cases]


def test_cases_of_each_site_are_spread_over_their_names_and_no_patient_is_taken_twice() -> None:
    many = [listed(f"A_{index:02d}", patient=f"P{index // 2}") for index in range(20)]  # two visits of each patient
    few = [listed(f"B_{index}") for index in range(3)]
    found = spread_cases([*many, *few], 4)
    assert names(found) == ["A_00", "A_06", "A_12", "A_18", "B_0", "B_1", "B_2"]
    assert spread_cases([*many, *few], 100) == [*many[::2], *few]


def test_labelled_cases_come_first_and_others_fill_up() -> None:
    cases = [
        listed("A_0"),
        listed("A_1", labelled=False),
        listed("A_2"),
        *(listed(f"B_{n}", labelled=False) for n in "123"),
    ]
    assert names(spread_cases(cases, 2)) == ["A_0", "A_2", "B_1", "B_3"]
    assert names(spread_cases(cases, 3)) == ["A_0", "A_1", "A_2", "B_1", "B_2", "B_3"]


def test_travelling_subjects_are_taken_with_all_their_scans_and_count_at_home() -> None:
    home = [listed(f"A_{index}") for index in range(6)]
    away = [listed(f"B_{index}", patient=f"A_{index}", travelling=True) for index in (1, 3, 5)]
    found = spread_cases([*home, *away], 2)
    assert names(found) == ["A_1", "A_5", "B_1", "B_5"]
    assert names(spread_cases([*home, *away], 4)) == ["A_0", "A_1", "A_3", "A_5", "B_1", "B_3", "B_5"]
