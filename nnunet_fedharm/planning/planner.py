"""nnU-Net's own planner on a fingerprint, on a machine that may hold no image, with an option to plan smaller networks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.nnunet_root import NnunetRoot, environment
from nnunet_fedharm.planning.section import CONFIGURATIONS
from nnunet_fedharm.sites.files import read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How the planner departs from nnU-Net's defaults; the defaults plan exactly what nnU-Net plans."""

    gpu_memory_gb: float = 8.0
    """GPU memory that nnU-Net plans for."""
    base_features: int = 32
    """Features of the first stage; they double at each stage."""
    max_features: int | None = None
    """Most features of a stage; None: nnU-Net's 512 (2d) and 320 (3d)."""
    batch_size: int | None = None
    """Batch size of every configuration; None: nnU-Net's choice."""
    patch_size: tuple[int, ...] | None = None
    """Upper bound of the patch, per axis in the transposed order. With three values, 2d uses the last two; two values bound
    2d only. The topology is planned anew. No 3d_lowres is planned then: the small patch is wanted."""
    plans_name: str = "nnUNetPlans"
    """Name of the plans file, and the prefix of the preprocessed folders."""

    def __post_init__(self) -> None:
        for name in ("gpu_memory_gb", "base_features", "max_features", "batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"{name} must be > 0, got {value}.")
        if self.patch_size is not None and (len(self.patch_size) not in (2, 3) or min(self.patch_size) < 1):
            raise PlanError(f"patch_size needs 2 or 3 values >= 1, got {self.patch_size}.")

    @property
    def sizes_network(self) -> bool:
        """Whether these options ask for a network or a patch of another size than would be planned."""
        usual = PlanOptions()
        names = ("base_features", "max_features", "patch_size")
        return any(getattr(self, name) != getattr(usual, name) for name in names)

    @property
    def resizes(self) -> bool:
        """Whether these options plan another network than stock nnU-Net does."""
        return self != PlanOptions(plans_name=self.plans_name)


class ResizingPlanner(ExperimentPlanner):
    """The stock planner with `PlanOptions`; the reader comes from the plan's caller, not from an example image."""

    def __init__(self, dataset_name: str, options: PlanOptions, reader: str) -> None:
        super().__init__(dataset_name, gpu_memory_target_in_gb=options.gpu_memory_gb, plans_name=options.plans_name)
        self._options = options
        self._reader = reader
        self.UNet_base_num_features = options.base_features
        if options.max_features is not None:
            self.UNet_max_features_2d = self.UNet_max_features_3d = options.max_features
        if options.patch_size is not None:
            self.lowres_creation_threshold = 0.0

    def determine_reader_writer(self) -> Any:
        """Replaces the base's look at an image file, which a server does not have."""
        return recursive_find_reader_writer_by_name(self._reader)

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Replaces the base's plan: the patch may be bounded (the base starts its search at the median shape)."""

        def plan_within(shape: Any) -> dict[str, Any]:
            planned: dict[str, Any] = super(ResizingPlanner, self).get_plans_for_configuration(
                spacing, shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
            return planned

        bound = self._bound(len(spacing))
        plan = plan_within(median_shape) if bound is None else _plan_within_bound(plan_within, median_shape, bound)
        plan["median_image_size_in_voxels"] = median_shape
        if self._options.batch_size is not None:
            plan["batch_size"] = self._options.batch_size
        return plan

    def _bound(self, n_axes: int) -> tuple[int, ...] | None:
        patch = self._options.patch_size
        return None if patch is None or len(patch) < n_axes else patch[-n_axes:]

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Replaces the base's merge with configurations of an older file, which may belong to other data."""
        recursive_fix_for_json_export(plans)
        # nnU-Net looks this name up among its own planners.
        plans["experiment_planner_used"] = ExperimentPlanner.__name__
        folder = Path(os.environ["nnUNet_preprocessed"]) / self.dataset_name
        write_json(plans, folder / f"{self.plans_identifier}.json")


def plan_federation(
    fingerprint: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    *,
    dataset_name: str,
    reader: str,
    root: NnunetRoot,
    options: PlanOptions,
) -> dict[str, Any]:
    """Plan with nnU-Net's planner and write plans, dataset.json and dataset_fingerprint.json into the preprocessed folder.

    Args:
        fingerprint: of all sites, from `merge_summaries`.
        dataset_json: of the federation, from `federation_dataset_json`; its numTraining counts labelled cases, because the
            planner derives the largest batch from it.
        reader: class name of the nnU-Net reader that all sites use.

    Returns:
        The plans, as written.

    Raises:
        PlanError: nnU-Net cannot plan from this fingerprint.
        SetupError: the folder cannot be written.
    """
    root.create()
    folder = root.preprocessed / dataset_name
    write_json(fingerprint, folder / "dataset_fingerprint.json")
    description = {key: value for key, value in dataset_json.items() if key != "dataset"}
    with TemporaryDirectory() as scratch, root.activate(), _planning_environment(Path(scratch)):
        # The planner lists the training images of the raw dataset; the empty `dataset` key tells it that there are none.
        write_json({**description, "dataset": {}}, Path(scratch) / dataset_name / "dataset.json")
        plans = _run_planner(dataset_name, options, reader)
    write_json(description, folder / "dataset.json")
    # As every reader of the file sees them: lists, no tuples.
    return read_json(folder / f"{plans['plans_name']}.json", what="The plans")


def require_configuration(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse what this package does not train, before any work.

    Raises:
        PlanError: the configuration is unknown, a cascade stage, or missing from the plans.
    """
    if configuration not in CONFIGURATIONS:
        raise PlanError(
            f"Configuration {configuration!r} is not supported: harmonized training runs with {' or '.join(CONFIGURATIONS)}, "
            "not with 3d_lowres or the cascade."
        )
    if configuration not in plans["configurations"]:
        raise PlanError(
            f"The plans {plans.get('plans_name')} have no configuration {configuration!r}, only "
            f"{', '.join(sorted(plans['configurations']))}. nnU-Net plans 3d_fullres only for volumes with more than one slice."
        )


def _run_planner(dataset_name: str, options: PlanOptions, reader: str) -> dict[str, Any]:
    output = StringIO()
    try:
        with redirect_stdout(output):
            plans: dict[str, Any] = ResizingPlanner(dataset_name, options, reader).plan_experiment()
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise PlanError(
            f"nnU-Net cannot plan {dataset_name} from this fingerprint: {error}. Check spacings and shapes of the sites' images, "
            "and the patch_size option."
        ) from error
    finally:
        log.debug("nnU-Net's planner printed:\n%s", output.getvalue())
    return plans


def _plan_within_bound(plan_within: Any, median_shape: Any, bound: tuple[int, ...]) -> dict[str, Any]:
    """Plan with a patch of at most `bound`: nnU-Net rounds a patch up to what its pooling divides, so round down first."""
    size = np.minimum(np.asarray(median_shape, dtype=float), bound)
    plan: dict[str, Any] = plan_within(size)
    for _ in range(sum(bound)):
        over = [axis for axis, limit in enumerate(bound) if plan["patch_size"][axis] > limit]
        if not over:
            break
        divisors = np.prod(np.asarray(plan["architecture"]["arch_kwargs"]["strides"]), axis=0)
        for axis in over:
            size[axis] = max(1, int(bound[axis] // divisors[axis]) * divisors[axis])
        plan = plan_within(size)
    return deepcopy(plan)


@contextmanager
def _planning_environment(raw: Path) -> Iterator[None]:
    """nnUNet_raw at `raw`; nnUNet_n_proc_DA at least 1, because the planner hands it to torch.set_num_threads."""
    changed = {"nnUNet_raw": str(raw)}
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        changed["nnUNet_n_proc_DA"] = "1"
    with environment(changed):
        yield
