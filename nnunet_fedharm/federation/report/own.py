"""What a site finds out about itself in a report; it names cases and stays at the site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import to_json
from nnunet_fedharm.differences.panel import panel_of
from nnunet_fedharm.differences.sketch import quantile
from nnunet_fedharm.differences.sketch_statistics import cut_of, ks_bounds, wasserstein
from nnunet_fedharm.federation.report.home import FAILURES_FILE, table_of_run
from nnunet_fedharm.federation.report.messages import Part
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.sites.features.table import FeatureTable
from nnunet_fedharm.sites.files import write_json

REPORT_FILE, COMPARISON_FILE = "report.json", "against-others.json"

Array = npt.NDArray[np.float64]


def own_report(site: Site, folder: Path, findings: Mapping[str, Any]) -> None:
    """Write the server's findings with this site's own failures and outliers."""
    failures = json.loads((folder / FAILURES_FILE).read_text(encoding="utf-8"))["failures"]
    outliers = _outliers(table_of_run(folder))
    own = json.loads(json.dumps(findings))
    own["failures"] = [one for one in own["failures"] if one["site"] != site.name] + failures
    for variant in own["variants"]:
        for part in variant["parts"]:
            part["outliers"] = outliers.get((part["channel"], part["region"], part["scale"]), [])
    write_json(own, folder / REPORT_FILE)


def keep_comparison(folder: Path, part: Part, own: Array, pooled: Array, edges: Array) -> None:
    """Write how far this site is from all others together, feature by feature.

    Args:
        own, pooled: (F, B + 3) counts of this site and of all sites.
        edges: (F, B + 1).
    """
    others = np.maximum(pooled - own, 0)
    ks, _ = ks_bounds(own[:, :-1], others[:, :-1])
    distance, _ = wasserstein(own[:, :-1], others[:, :-1], edges, cut_of(pooled[:, :-1], edges))
    numbers = {
        "ks": ks,
        "wasserstein": distance,
        "median": quantile(own, edges, 0.5),
        "median_of_others": quantile(others, edges, 0.5),
    }
    features = [
        {"name": name, **{what: float(values[row]) for what, values in numbers.items()}}
        for row, name in enumerate(part.names)
    ]
    entry = {"channel": part.channel, "region": part.region, "scale": part.scale, "features": features}
    path = folder / COMPARISON_FILE
    known = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else []
    rest = [one for one in known if (one["channel"], one["region"], one["scale"]) != part.key]
    write_json({"parts": to_json([*rest, entry])}, path)


def _outliers(table: FeatureTable) -> dict[tuple[str, str, str], list[Any]]:
    from nnunet_fedharm.differences.options import StatisticsOptions
    from nnunet_fedharm.differences.outliers import outliers

    return {key: to_json(outliers(panel_of(table.part(*key)), StatisticsOptions())) for key in table.parts}
