"""What all tests share: a calm environment, shape checks in the harmonizers, a tiny valid raw data set."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch, numpy and nnU-Net are imported by anyone: their thread pools are sized once. Children inherit all of it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(
    {
        "nnUNet_compile": "f",
        "nnUNet_def_n_proc": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MPLBACKEND": "Agg",
    }
)
# A developer's own folders must not leak in. nnUNet_n_proc_DA=0 would break planning; who trains sets it.
for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_n_proc_DA"):
    os.environ.pop(_name, None)
# Hundreds of child processes import the package: without bytecode on disk each of them compiles it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import nibabel
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked by beartype in tests only. The harmonizers are plain tensor code, so it costs little.
install_import_hook("nnunet_fedharm.harmonizers", "beartype.beartype")

BENCHMARK = "Dataset910_HippocampusSites"


def benchmark_folder() -> Path | None:
    """The multi-site benchmark data set, where this machine has it."""
    given = os.environ.get("NNUNET_FEDHARM_BENCHMARK_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = folder if folder.name == BENCHMARK else folder / BENCHMARK
    return folder if (folder / "dataset.json").is_file() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--long"):
        text = "Tests marked long were left out: `python3 start.py test --long` runs them too, `.ci/run` as well."
        terminalreporter.write_line(text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    # Files with minutes of work first, so that one worker does not begin the longest when the other has nothing left.
    heavy = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in heavy)
    if benchmark_folder() is None:
        skip = pytest.mark.skip(reason=f"{BENCHMARK} is not here; set NNUNET_FEDHARM_BENCHMARK_DATA")
        for item in items:
            if "benchmark_data" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[pytest.MonkeyPatch]:
    """No progress.png from trainings in this process: it takes a second or more of epochs that take less.

    Tests marked `pictures`, and programs that tests start, draw it.
    """
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaLogger, "plot_progress_png", lambda *_: None)
        yield patch


@pytest.fixture(scope="session", autouse=True)
def fingerprints_in_this_process() -> Iterator[None]:
    """nnU-Net's fingerprint extractor of tests that plan in this process works in a thread of it, on the same cases.

    Its pool starts a new interpreter that imports torch and nnU-Net: 5 to 10 s for a test's few cases. What tests start as
    programs of their own (`nnUNetv2_*`, cells of a study, a federation) has the real pool.
    """
    import multiprocessing
    from multiprocessing.pool import ThreadPool

    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

    class Threads:
        Pool = ThreadPool

    class Here:
        """In the place of the module `multiprocessing` there."""

        def __getattr__(self, name: str) -> Any:
            return getattr(multiprocessing, name)

        def get_context(self, method: str) -> type[Threads]:
            assert method == "spawn"
            return Threads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint_extractor, "multiprocessing", Here())
        yield


@pytest.fixture(autouse=True)
def _pictures_where_asked(request: pytest.FixtureRequest, no_pictures: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("pictures") is None:
        yield
        return
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    without = MetaLogger.plot_progress_png
    no_pictures.undo()
    yield
    no_pictures.setattr(MetaLogger, "plot_progress_png", without)


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """Folder of the multi-site benchmark data set; use it with the marker `benchmark_data`."""
    folder = benchmark_folder()
    if folder is None:
        pytest.skip(f"{BENCHMARK} is not here; set NNUNET_FEDHARM_BENCHMARK_DATA")
    return folder


@pytest.fixture(scope="session")
def make_raw_dataset() -> Callable[..., Path]:
    """The function `write_raw_dataset`, for tests that need more than one data set or another size."""
    return write_raw_dataset


@pytest.fixture
def raw_dataset(tmp_path: Path) -> Path:
    """`nnUNet_raw/Dataset001_Blobs` with four labelled cases of bright balls in noise, valid for nnU-Net."""
    return write_raw_dataset(tmp_path / "nnUNet_raw")


def write_raw_dataset(
    raw: Path,
    *,
    name: str = "Dataset001_Blobs",
    n_labelled: int = 4,
    n_unlabelled: int = 0,
    shape: tuple[int, int, int] = (20, 24, 24),
    n_channels: int = 1,
    site: str = "",
    gain: float = 1.0,
    seed: int = 0,
) -> Path:
    """A tiny valid raw data set: every case is a bright ball (label 1) in positive noise, spacing 1 mm.

    Args:
        raw: the `nnUNet_raw` folder, made where missing.
        site: put before case names, so that sites do not share any.
        gain: all intensities are multiplied by it; a crude site effect.

    Returns:
        The data set's folder.
    """
    folder = raw / name
    generator = np.random.default_rng(seed)
    for sub in ("imagesTr", "labelsTr", *(["imagesUnlabelled"] if n_unlabelled else [])):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(n_labelled + n_unlabelled):
        labelled = index < n_labelled
        case = f"{site}case{index:03d}"
        centre = [size / 2 + generator.uniform(-2, 2) for size in shape]
        distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)))
        ball = distance < min(shape) / 4
        for channel in range(n_channels):
            image = gain * (100 + 60 * ball + generator.normal(0, 5, shape)).astype(np.float32)
            target = folder / ("imagesTr" if labelled else "imagesUnlabelled") / f"{case}_{channel:04d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), target)
        if labelled:
            nibabel.save(nibabel.Nifti1Image(ball.astype(np.uint8), np.eye(4)), folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(n_channels)},
        "labels": {"background": 0, "ball": 1},
        "numTraining": n_labelled,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
