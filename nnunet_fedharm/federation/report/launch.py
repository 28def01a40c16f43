"""`federated_findings`: the site report of a federation on this machine, through the real `flwr run`, in simulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.federation.launch import launch
from nnunet_fedharm.federation.report.config import SiteReportConfig


def federated_findings(config: SiteReportConfig, *, show: Callable[[str], None] | None = None) -> Findings:
    """Report on the sites in ROOT/sites from aggregates only.

    Every site keeps its table and what it found out about itself in `fedharm/site-report/<run>/`; the server's findings are
    stored there too, and in the server's folder of the same name as `report.json`.

    Args:
        config: `root` and `dataset` have to be given.
        show: receives one line per event; None prints it.

    Raises:
        SetupError: Flower cannot start.
        FedHarmError: the report stopped; its sentence.
    """
    last = launch(config, show=show)
    return from_json(Findings, json.loads(Path(str(last["results"])).read_text(encoding="utf-8")))
