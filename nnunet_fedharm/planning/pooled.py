"""Plans of data that lie in one place, whatever fingerprint they are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.earlier_plans import read_if_there, renamed
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.section import STOCK_PLANS
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, read_json, reader_class, write_json

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


def base_plans(root: NnunetRoot, name: str, fingerprint: Mapping[str, Any], options: PlanOptions) -> dict[str, Any]:
    """Stock plans under our name (sharing stock nnU-Net's preprocessed folders), or new ones where another size is asked.

    Args:
        name: folder of the dataset.

    Raises:
        PlanError: nnU-Net cannot plan from this fingerprint.
    """
    stock = root.preprocessed / name / f"{STOCK_PLANS}.json"
    planned = options if options.resizes else replace(options, plans_name=STOCK_PLANS)
    if not options.resizes and stock.is_file():
        plans = read_json(stock, what="nnU-Net's plans")
    else:
        before = read_if_there(root.preprocessed / name / f"{planned.plans_name}.json")
        plans = plan_pooled(root.raw / name, fingerprint, planned, root=root)
        if before is not None:
            write_json(before, root.preprocessed / name / f"{planned.plans_name}.json")
        # As stock nnU-Net leaves it; the planner's copy lacks the key that lists single files.
        write_json(
            read_json(root.raw / name / "dataset.json", what="The dataset description"),
            root.preprocessed / name / "dataset.json",
        )
    return renamed(plans, options.plans_name)
