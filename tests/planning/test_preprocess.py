"""Sites preprocess as stock nnU-Net does, unlabelled cases apart, and nothing twice."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import DataError, PlanError, SetupError
from nnunet_fedharm.harmonizers.style import volume_quantiles
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.facts import collect_facts, federation_dataset_json
from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.style import preprocessed_cases, site_style, style_by_site
from nnunet_fedharm.planning.summary import summarize_site
from nnunet_fedharm.sites.registry import SitesFile
from tests.sites.raw import ENDING, write_case, write_multi_site, write_volume

NAME = "Dataset001_Small"


@pytest.fixture
def site(tmp_path: Path) -> tuple[NnunetRoot, dict[str, Any]]:
    """A site with labelled cases of two scanners and one unlabelled case, and plans for it."""
    root = NnunetRoot(tmp_path / "Hill").create()
    raw = write_multi_site(root.raw / NAME, {"A": 2, "B": 2})
    write_case(raw, "A_900", np.random.default_rng(5), shape=(9, 33, 35), spacing=(2.5, 0.7, 0.7), labelled=False)
    registry = SitesFile.load(raw / "sites.json")
    SitesFile(registry.sites, {**registry.cases, "A_900": "A"}).save(raw / "sites.json")
    plans = plan_federation(
        merge_summaries([summarize_site(raw, site="Hill")]),
        federation_dataset_json([collect_facts(raw, site="Hill")]),
        dataset_name=NAME,
        reader="SimpleITKIO",
        root=NnunetRoot(tmp_path / "server"),
        options=PlanOptions(base_features=4, max_features=8, batch_size=2, patch_size=(8, 16, 16)),
    )
    return root, plans


def load(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2

    assert infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2
    data, segmentation, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return np.asarray(data[:]), np.asarray(segmentation[:]), properties


def folders(root: NnunetRoot) -> tuple[Path, Path]:
    folder = root.preprocessed / NAME / "nnUNetPlans_3d_fullres"
    return folder, folder.with_name(folder.name + "_unlabelled")


def test_labelled_cases_equal_stock_preprocessing(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    root, plans = site
    preprocess_site(root, NAME, plans, "3d_fullres")
    folder, _ = folders(root)
    ours = {case: load(folder, case) for case in ("A_000", "A_001", "B_000", "B_001")}
    with root.activate(), redirect_stdout(StringIO()):
        DefaultPreprocessor(verbose=False).run(NAME, "3d_fullres", "nnUNetPlans", num_processes=1)
    for case, (data, segmentation, properties) in ours.items():
        stock_data, stock_segmentation, stock_properties = load(folder, case)
        np.testing.assert_array_equal(data, stock_data)
        np.testing.assert_array_equal(segmentation, stock_segmentation)
        assert properties["class_locations"].keys() == stock_properties["class_locations"].keys()
    assert {path.name for path in (root.preprocessed / NAME / "gt_segmentations").iterdir()} == {
        f"{case}{ENDING}" for case in ours
    }


def test_unlabelled_cases_lie_apart_without_class_locations(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    preprocess_site(root, NAME, plans, "3d_fullres", num_processes=2)
    folder, unlabelled = folders(root)
    data, segmentation, properties = load(unlabelled, "A_900")
    assert properties["class_locations"] == {}
    assert data.shape == segmentation.shape
    assert not list(folder.glob("A_900*"))
    assert SitesFile.load(root.preprocessed / NAME / "sites.json").cases["A_900"] == "A"
    assert set(preprocessed_cases(root, NAME, plans, "3d_fullres")) == {"A_000", "A_001", "A_900", "B_000", "B_001"}


def test_only_what_changed_is_done_again(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site

    def times() -> dict[str, int]:
        preprocess_site(root, NAME, plans, "3d_fullres")
        return {path.name: path.stat().st_mtime_ns for folder in folders(root) for path in folder.glob("*.pkl")}

    first = times()
    assert times() == first
    write_case(root.raw / NAME, "B_001", np.random.default_rng(9), shape=(9, 33, 35), spacing=(3.0, 0.8, 0.8))
    for file in (*(root.raw / NAME / "imagesTr").glob("B_000*"), root.raw / NAME / "labelsTr" / f"B_000{ENDING}"):
        file.unlink()
    second = times()
    assert "B_000.pkl" not in second
    assert {name for name in second if second[name] != first[name]} == {"B_001.pkl"}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["spacing"] = [value * 1.5 for value in configuration["spacing"]]
    third = times()
    assert not any(third[name] == second[name] for name in second)


def test_an_interrupted_site_goes_on_with_the_rest(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    label = root.raw / NAME / "labelsTr" / f"B_000{ENDING}"
    whole = label.read_bytes()
    write_volume(np.ones((2, 2, 2), dtype=np.uint8), label)
    with pytest.raises(DataError, match=r"Site Hill, case B_000: nnU-Net cannot preprocess .*sites check"):
        preprocess_site(root, NAME, plans, "3d_fullres")
    folder, _ = folders(root)
    done = (folder / "A_000.pkl").stat().st_mtime_ns
    label.write_bytes(whole)
    preprocess_site(root, NAME, plans, "3d_fullres")
    assert (folder / "A_000.pkl").stat().st_mtime_ns == done
    assert (folder / "B_001.pkl").is_file()


def test_unwritable_folder_is_refused(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    (root.preprocessed / NAME).write_text("a file, no folder")
    with pytest.raises(SetupError, match=r"Cannot write .*this user may write"):
        preprocess_site(root, NAME, plans, "3d_fullres")


def test_cascade_is_refused_before_any_work(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    with pytest.raises(PlanError, match="not with 3d_lowres or the cascade"):
        preprocess_site(root, NAME, plans, "3d_cascade_fullres")
    assert not list(root.preprocessed.iterdir())


def test_site_without_dataset_is_refused(site: tuple[NnunetRoot, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Site Lake has no dataset"):
        preprocess_site(NnunetRoot(tmp_path / "Lake"), NAME, site[1], "3d_fullres")


def test_a_site_keeps_the_medians_when_no_fingerprint_is_sent(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    preprocess_site(root, NAME, plans, "3d_fullres")
    written = json.loads((root.preprocessed / NAME / "dataset_fingerprint.json").read_text())
    assert len(written["spacings"]) == 1
    assert sorted(written["spacings"][0]) == sorted(plans["original_median_spacing_after_transp"])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_style_is_the_mean_over_labelled_and_unlabelled_cases(
    site: tuple[NnunetRoot, dict[str, Any]], configuration: str
) -> None:
    root, plans = site
    with pytest.raises(PlanError, match="No preprocessed case"):
        site_style(root, NAME, plans, configuration)
    preprocess_site(root, NAME, plans, configuration)
    cases = preprocessed_cases(root, NAME, plans, configuration)
    expected = {case: volume_quantiles(load(folder, case)[0])[0] for case, folder in cases.items()}
    whole = site_style(root, NAME, plans, configuration)
    assert whole.n_cases == 5
    np.testing.assert_allclose(whole.quantiles, np.mean(list(expected.values()), axis=0))
    styles = style_by_site(root, NAME, plans, configuration)
    assert {name: style.n_cases for name, style in styles.items()} == {"A": 3, "B": 2}
    np.testing.assert_allclose(styles["B"].quantiles, (expected["B_000"] + expected["B_001"]) / 2)


def test_case_without_a_site_has_no_style(site: tuple[NnunetRoot, dict[str, Any]]) -> None:
    root, plans = site
    preprocess_site(root, NAME, plans, "3d_fullres")
    registry = SitesFile.load(root.raw / NAME / "sites.json")
    some = SitesFile(registry.sites, {case: owner for case, owner in registry.cases.items() if case != "B_001"})
    with pytest.raises(DataError, match="which site case B_001 comes from"):
        style_by_site(root, NAME, plans, "3d_fullres", sites=some)
