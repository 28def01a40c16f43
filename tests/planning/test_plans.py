"""Plans made from site summaries are the plans that stock nnU-Net makes from the pooled data."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import PlanError, SetupError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.facts import collect_facts, federation_dataset_json
from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation, require_configuration
from nnunet_fedharm.planning.summary import SiteSummary, summarize_site
from nnunet_fedharm.sites.split import SplitOptions, split_dataset
from tests.sites.raw import write_multi_site

NAME = "Dataset001_Small"
INTENSITIES = "foreground_intensity_properties_per_channel"


def federate_planning(
    raw: Path, consortium: Path, options: PlanOptions
) -> tuple[dict[str, Any], dict[str, Any], NnunetRoot]:
    """Split, summarize at each site, send as JSON, merge and plan at a server without images."""
    shares = split_dataset(raw, consortium, SplitOptions(held_out_fraction=0.0))
    sites = [(share.root.raw / raw.name, share.site) for share in shares]
    sent = [json.dumps(summarize_site(folder, site=site).to_dict()) for folder, site in sites]
    fingerprint = merge_summaries([SiteSummary.from_dict(json.loads(text)) for text in sent])
    facts = [collect_facts(folder, site=site) for folder, site in sites]
    server = NnunetRoot(consortium / "server")
    plans = plan_federation(
        fingerprint,
        federation_dataset_json(facts),
        dataset_name=raw.name,
        reader=facts[0].reader,
        root=server,
        options=options,
    )
    assert not list(server.raw.iterdir())
    return fingerprint, plans, server


def stock_planning(root: NnunetRoot, name: str, *, samples: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `nnUNetv2_extract_fingerprint` and `nnUNetv2_plan_experiment` do, with fewer drawn voxels."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    with root.activate(), redirect_stdout(StringIO()):
        extractor = DatasetFingerprintExtractor(name, 1)
        extractor.num_foreground_voxels_for_intensitystats = samples
        extractor.run()
        ExperimentPlanner(name).plan_experiment()
    folder = root.preprocessed / name
    return json.loads((folder / "dataset_fingerprint.json").read_text()), json.loads(
        (folder / "nnUNetPlans.json").read_text()
    )


def assert_fingerprints_agree(merged: dict[str, Any], stock: dict[str, Any]) -> None:
    """Geometry equal; intensities within the noise of nnU-Net's drawing and the bins."""
    for key in ("spacings", "shapes_after_crop"):
        for percent in (10, 50, 90):
            np.testing.assert_array_equal(np.percentile(merged[key], percent, 0), np.percentile(stock[key], percent, 0))
    key = "median_relative_size_after_cropping"
    assert merged[key] == pytest.approx(stock[key], abs=1 / 1024)
    for channel, expected in stock[INTENSITIES].items():
        found = merged[INTENSITIES][channel]
        for name in ("mean", "std", "median", "percentile_00_5", "percentile_99_5"):
            assert found[name] == pytest.approx(expected[name], rel=0.01, abs=0.01 * expected["std"]), name
        for name in ("min", "max"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> NnunetRoot:
    root = NnunetRoot(tmp_path_factory.mktemp("pooled")).create()
    write_multi_site(root.raw / NAME, {"A": 4, "B": 3, "C": 2}, channels=("MR", "CT"))
    return root


@pytest.fixture(scope="module")
def federated(
    pooled: NnunetRoot, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], NnunetRoot]:
    return federate_planning(pooled.raw / NAME, tmp_path_factory.mktemp("federated"), PlanOptions())


def test_plans_from_merged_summaries_equal_stock_plans_on_pooled_data(
    pooled: NnunetRoot, federated: tuple[dict[str, Any], dict[str, Any], NnunetRoot]
) -> None:
    fingerprint, plans, server = federated
    stock_fingerprint, stock_plans = stock_planning(pooled, NAME, samples=1e6)
    assert_fingerprints_agree(fingerprint, stock_fingerprint)
    assert {**plans, INTENSITIES: None} == {**stock_plans, INTENSITIES: None}
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization", "CTNormalization"]
    written = {path.name for path in (server.preprocessed / NAME).iterdir()}
    assert written == {"nnUNetPlans.json", "dataset.json", "dataset_fingerprint.json"}
    assert json.loads((server.preprocessed / NAME / "nnUNetPlans.json").read_text()) == plans
    assert "dataset" not in json.loads((server.preprocessed / NAME / "dataset.json").read_text())


@pytest.mark.benchmark_data
def test_plans_of_the_benchmark_data_equal_stock_plans(benchmark_data: Path, tmp_path: Path) -> None:
    pooled = NnunetRoot(tmp_path / "pooled").create()
    (pooled.raw / benchmark_data.name).symlink_to(benchmark_data)
    fingerprint, plans, _ = federate_planning(benchmark_data, tmp_path / "federated", PlanOptions())
    stock_fingerprint, stock_plans = stock_planning(pooled, benchmark_data.name, samples=2e6)
    assert_fingerprints_agree(fingerprint, stock_fingerprint)
    assert {**plans, INTENSITIES: None} == {**stock_plans, INTENSITIES: None}


@pytest.mark.parametrize("bound", [(8, 16, 16), (5, 17, 31), (100, 100, 100), (16, 24)])
def test_small_plans_keep_the_bound_and_a_valid_topology(
    federated: tuple[dict[str, Any], dict[str, Any], NnunetRoot], bound: tuple[int, ...], tmp_path: Path
) -> None:
    fingerprint, _, server = federated
    dataset_json = json.loads((server.preprocessed / NAME / "dataset.json").read_text())
    options = PlanOptions(base_features=4, max_features=8, batch_size=3, patch_size=bound, plans_name="Tiny")
    root = NnunetRoot(tmp_path)
    plans = plan_federation(
        fingerprint, dataset_json, dataset_name=NAME, reader="SimpleITKIO", root=root, options=options
    )
    assert plans["plans_name"] == "Tiny"
    assert set(plans["configurations"]) == {"2d", "3d_fullres"}
    for name, n_axes in (("2d", 2), ("3d_fullres", 3)):
        configuration = plans["configurations"][name]
        features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
        assert features[0] == 4
        assert max(features) <= 8
        assert configuration["batch_size"] == 3
        divisors = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0)
        assert not (np.asarray(configuration["patch_size"]) % divisors).any()
        if len(bound) >= n_axes:
            assert (np.asarray(configuration["patch_size"]) <= bound[-n_axes:]).all()
        assert configuration["median_image_size_in_voxels"] != list(bound[-n_axes:])


def test_planning_works_where_nnunet_would_set_no_threads(
    federated: tuple[dict[str, Any], dict[str, Any], NnunetRoot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint, plans, server = federated
    dataset_json = json.loads((server.preprocessed / NAME / "dataset.json").read_text())
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    again = plan_federation(
        fingerprint,
        dataset_json,
        dataset_name=NAME,
        reader="SimpleITKIO",
        root=NnunetRoot(tmp_path),
        options=PlanOptions(),
    )
    assert again == plans


@pytest.mark.parametrize("name", ["3d_lowres", "3d_cascade_fullres", "4d"])
def test_unsupported_configurations_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(
        PlanError, match=f"'{name}' is not supported.*2d or 3d_fullres, not with 3d_lowres or the cascade"
    ):
        require_configuration({"configurations": {name: {}}}, name)


def test_configuration_missing_from_the_plans_is_refused() -> None:
    with pytest.raises(PlanError, match="have no configuration '3d_fullres', only 2d"):
        require_configuration({"plans_name": "P", "configurations": {"2d": {}}}, "3d_fullres")


@pytest.mark.parametrize(
    "options",
    [{"base_features": 0}, {"batch_size": -1}, {"patch_size": (3,)}, {"patch_size": (0, 4)}, {"gpu_memory_gb": 0.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(options))):
        PlanOptions(**options)


def test_unwritable_server_folder_is_refused(
    federated: tuple[dict[str, Any], dict[str, Any], NnunetRoot], tmp_path: Path
) -> None:
    (tmp_path / "nnUNet_preprocessed").write_text("a file, no folder")
    with pytest.raises(SetupError, match=r"Cannot create .*nnUNet_preprocessed"):
        plan_federation(
            federated[0], {}, dataset_name=NAME, reader="SimpleITKIO", root=NnunetRoot(tmp_path), options=PlanOptions()
        )
