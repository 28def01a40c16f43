"""Plans of data that lie in one place, whatever fingerprint they are made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, reader_class

HERE = "central"
"""Name of the one place in messages, where a federation names a site."""


def plan_pooled(raw: Path, fingerprint: Mapping[str, Any], options: PlanOptions, *, root: NnunetRoot) -> dict[str, Any]:
    """Plans for the dataset; no image is opened but the first labelled one, for the kind of its file.

    Args:
        raw: folder of the dataset.
        root: where the planner may write.

    Raises:
        DataError: nnU-Net has no reader for the images.
        PlanError: nnU-Net cannot plan from this fingerprint.
    """
    description = read_dataset_json(raw, site=HERE)
    reader = reader_class(description, labelled_cases(raw, description)[0].images[0], site=HERE).__name__
    return plan_federation(fingerprint, description, dataset_name=raw.name, reader=reader, root=root, options=options)
