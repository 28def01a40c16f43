"""Sites whose features are drawn instead of measured: a report's exchanges in a second, with the truth at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.federation.client_app import app
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.sites.features import extraction
from nnunet_fedharm.sites.features.table import Failure, FeatureTable, Row
from tests.federation.local_grid import Client, app_client

NAMES = (
    "firstorder_Mean",
    "firstorder_Energy",
    "glcm_Contrast",
    "glcm_Idmn",
    "ngtdm_Coarseness",
    "shape_Sphericity",
    "quality_noise",
    "quality_spacing",
)
PARTS = (("MR0", "foreground", "raw"), ("MR0", "foreground", "z-score"))
"""Those of a dataset with one label, as every site expects them of its dataset.json."""


def draw_table(site: str, patients: int, *, shift: float, seed: int, cases_each: int = 1) -> FeatureTable:
    """Features of a site: skewed, with a large offset, with an absurd value, one missing for a patient, one constant."""
    generator = np.random.default_rng(seed)
    rows, values = [], []
    for patient in range(patients):
        for case in range(cases_each):
            for part in PARTS:
                x = generator.normal(shift, 1, size=len(NAMES))
                x[1] = 1e7 * np.exp(x[1])
                x[3] = 0.9995 + 1e-4 * x[3]
                x[4] = 1e6 if patient == 0 else x[4]
                x[5] = generator.normal()
                x[6] = np.nan if patient == 1 and case == 0 else x[6]
                x[7] = 1.0
                rows.append(Row(f"secret_{site}_{patient:03d}_{case}", site, f"patient_{site}_{patient:03d}", *part))
                values.append(x)
    return FeatureTable(tuple(rows), NAMES, np.array(values))


def pooled_table(tables: Mapping[str, FeatureTable]) -> FeatureTable:
    """All sites' rows."""
    return FeatureTable(
        tuple(row for table in tables.values() for row in table.rows),
        NAMES,
        np.concatenate([table.values for table in tables.values()]),
    )


def drawn_features(monkeypatch: pytest.MonkeyPatch, tables: Mapping[str, FeatureTable]) -> None:
    """Let sites find these features where they would read their images; everything else is the real thing."""

    def measure(raw_dataset: Path, **options: Any) -> tuple[FeatureTable, list[Failure]]:
        site = raw_dataset.parts[raw_dataset.parts.index("sites") + 1]
        failures = [Failure(site, f"secret_{site}_broken", "secret reason")] if site == "A" else []
        return tables[site], failures

    monkeypatch.setattr(extraction, "measure_dataset", measure)


def report_config(root: Path, **options: Any) -> SiteReportConfig:
    """A quick report on Dataset001_Blobs."""
    small: dict[str, Any] = {"root": str(root), "dataset": "1", "simulations": 20, "bootstrap": 20, "join_wait_s": 2.0}
    return SiteReportConfig(**{**small, **options})


def report_sites(config: SiteReportConfig, count: int, **node: Any) -> dict[int, Client]:
    """Nodes of the simulated sites."""
    run_config = config.to_run_config()
    return {100 + index: app_client(app, {"partition-id": index, **node}, run_config) for index in range(count)}


def recorded(client: Client, into: list[Message]) -> Client:
    """The client, and everything that it sends."""

    def recording(message: Message) -> Message | None:
        answer = client(message)
        if answer is not None:
            into.append(answer)
        return answer

    return recording


def texts_of(message: Message) -> str:
    """All text and all bytes of a message as text."""
    records = message.content
    words = [str(value) for record in records.config_records.values() for value in record.values()]
    arrays = [array.data for record in records.array_records.values() for array in record.values()]
    return "\n".join(words) + b"\n".join(arrays).decode("latin-1")


MakeConsortium = Callable[..., Path]
SiteOf = Callable[[str], Site]
