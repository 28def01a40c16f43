"""Federated cells share preprocessed cases where their plans agree, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.facts import collect_facts, federation_dataset_json
from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.summary import summarize_site
from nnunet_fedharm.study.shared_cases import keep_cases, take_cases
from nnunet_fedharm.study.training import link

NAME = "Dataset001_Blobs"


@pytest.fixture
def planned(tmp_path: Path, make_raw_dataset: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
    raw = make_raw_dataset(tmp_path / "raw", n_labelled=2, n_unlabelled=1)
    plans = plan_federation(
        merge_summaries([summarize_site(raw, site="A")]),
        federation_dataset_json([collect_facts(raw, site="A")]),
        dataset_name=NAME,
        reader="SimpleITKIO",
        root=NnunetRoot(tmp_path / "server"),
        options=PlanOptions(base_features=4, max_features=8, batch_size=2, patch_size=(16, 16)),
    )
    return raw, plans


def cell_root(folder: Path, raw: Path) -> NnunetRoot:
    root = NnunetRoot(folder).create()
    link(raw, root.raw / NAME)
    return root


def times(root: NnunetRoot) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in root.preprocessed.rglob("*.pkl")}


def test_a_second_cell_takes_the_first_ones_cases_and_other_plans_make_their_own(
    tmp_path: Path, planned: tuple[Path, dict[str, Any]]
) -> None:
    raw, plans = planned
    store = tmp_path / "data" / "federated" / "St. A"
    first, second, third = (cell_root(tmp_path / "cells" / name, raw) for name in ("first", "second", "third"))
    take_cases(store, first, NAME)  # nothing is there yet
    preprocess_site(first, NAME, plans, "2d")
    made = times(first)
    assert len(made) == 3
    keep_cases(first, NAME, store)
    assert not times(first)

    take_cases(store, second, NAME)
    preprocess_site(second, NAME, plans, "2d")
    assert times(second) == made
    keep_cases(second, NAME, store)

    other = copy.deepcopy(plans)
    other["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    take_cases(store, third, NAME)
    preprocess_site(third, NAME, other, "2d")
    anew = times(third)
    assert set(anew) == set(made)
    assert not set(anew.values()) & set(made.values())
    take_cases(store, second, NAME)  # the store's own files did not change
    assert times(second) == made


def test_what_a_stopped_cell_left_without_its_record_is_taken_again(
    tmp_path: Path, planned: tuple[Path, dict[str, Any]]
) -> None:
    raw, plans = planned
    store = tmp_path / "store"
    first, second = (cell_root(tmp_path / name, raw) for name in ("first", "second"))
    preprocess_site(first, NAME, plans, "2d")
    made = times(first)
    keep_cases(first, NAME, store)
    take_cases(store, second, NAME)
    for record in second.preprocessed.glob(f"{NAME}/*.fedharm.json"):
        record.unlink()
    next(second.preprocessed.rglob("*.pkl")).unlink()
    take_cases(store, second, NAME)
    assert times(second) == made


def test_a_record_that_a_power_cut_left_half_copied_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, root = tmp_path / "store", NnunetRoot(tmp_path / "site").create()
    cases = store / "Dataset001_Blobs" / "plans_2d"
    cases.mkdir(parents=True)
    (cases / "a.pkl").write_text("a case")
    record = cases.with_name(f"{cases.name}.fedharm.json")
    record.write_text('{"plans": "stamp"}')

    def cut(source: Path, target: Path) -> None:
        Path(target).write_text(Path(source).read_text()[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_fedharm.study.shared_cases.shutil.copy2", cut)
        with pytest.raises(KeyboardInterrupt):
            take_cases(store, root, "Dataset001_Blobs")
    take_cases(store, root, "Dataset001_Blobs")
    assert (root.preprocessed / "Dataset001_Blobs" / record.name).read_text() == record.read_text()
