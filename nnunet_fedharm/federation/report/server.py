"""The server's side of the report: a handful of exchanges, then findings.

| exchange | the server announces | the sites answer |
|---|---|---|
| hello | the dataset | channels, labels, versions, scanner |
| measure | what to measure | parts, features, numbers of patients |
| locate | parts, features | counts on the public grid |
| histograms, two to four times | edges | counts |
| moments | features, centre and scale of each | sums and sums of products |
| folds | principal axes, number of folds | the same on the axes, for each fold |
| classify | a discriminant for each fold | how often its patients were taken for which site |
| keep | the findings | that they are stored |

With secure sums `moments`, `folds` and `classify` are left out, each count is a sum over all sites, and one more exchange,
`ranks`, gives the rank test from such sums.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from flwr.serverapp import Grid

from nnunet_fedharm.differences.findings import Findings, to_json
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.report import messages
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.exchange import Sites
from nnunet_fedharm.federation.report.findings import findings_of
from nnunet_fedharm.federation.report.steps import Steps
from nnunet_fedharm.federation.server_root import locked_server, resolve_sites
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.sites.files import write_text

REPORT_FILE = "report.json"


def run_site_report(grid: Grid, config: SiteReportConfig) -> Path:
    """Report on a federation from aggregates.

    Returns:
        `report.json` in the server's folder; `findings_file.from_json` reads it.

    Raises:
        FedHarmError: the report cannot start or go on; the sentence is in the event log too.
    """
    with locked_server(config) as (root, log):
        return _run(grid, resolve_sites(config), root, log)


def _run(grid: Grid, config: SiteReportConfig, root: NnunetRoot, log: EventLog) -> Path:
    run_id = f"{config.fingerprint()}-{secrets.token_hex(3)}"
    log.write("report_started", run_id=run_id, sites=list(config.site_names))
    sites = Sites(grid, config, log, run_id)
    sites.gather()
    findings = _findings(sites, config)
    folder = root.path / "fedharm" / "site-report" / run_id
    path = folder / REPORT_FILE
    write_text(json.dumps(to_json(findings), indent=1, allow_nan=False), path)
    _hand_out(sites, findings)
    log.write("reported", results=str(path), sites=sites.names)
    return path


def _findings(sites: Sites, config: SiteReportConfig) -> Findings:
    steps = Steps(sites, config)
    steps.measure()
    steps.histograms()
    if config.secure_sums:
        steps.ranks()
    else:
        steps.moments()
        steps.classify()
    return findings_of(steps)


def _hand_out(sites: Sites, findings: Findings) -> None:
    """Every site keeps the findings; who cannot is named in the log, the report is whole without that."""
    try:
        sites.ask(
            "report_keep",
            messages.KEEP,
            {"run_id": sites.run_id, "findings": to_json(findings)},
            messages.KEEP_REPLY,
            lambda site, message: None,
        )
    except FederationError as error:
        sites.log.write("warning", text=f"Not every site keeps the findings. {error}")
