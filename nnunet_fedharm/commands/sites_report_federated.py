"""The site report of a federation: aggregates through Flower, on this machine, and the page of any report.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fedharm.errors import DataError

if TYPE_CHECKING:
    from nnunet_fedharm.differences.findings import Findings

OWN_OPTIONS = ("min_patients", "epsilon", "delta", "secure_sums", "parallel_sites")
"""Fields of SiteReportConfig that have an option here; more are told through `flwr run`."""
LISTS = {
    "scales": "intensity scales (z-score, raw)",
    "regions": "regions (foreground, image, 'label NAME')",
    "features": "features or families (intensity, texture, shape, quality)",
}
"""Further ones, which are lists; noise grows with the number of what is sent."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; their defaults are SiteReportConfig's."""
    group = parser.add_argument_group("federated: sites measure at home and send counts and sums, no case")
    group.add_argument("--root", metavar="ROOT", help="consortium folder with sites/<SITE>/, as `sites split` makes it")
    group.add_argument("--min-patients", type=int, metavar="N", help="a site with fewer patients sends nothing")
    group.add_argument("--epsilon", type=float, metavar="X", help="differential privacy by patient; default: no noise")
    group.add_argument("--delta", type=float, metavar="X", help="of differential privacy")
    group.add_argument(
        "--secure-sums", action="store_true", default=None, help="the server learns only sums over all sites"
    )
    for name, what in LISTS.items():
        group.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"{what} that the sites send (default: all)")
    group.add_argument("--parallel-sites", type=int, metavar="N", help="sites that measure at the same time")
    group.add_argument(
        "--findings", type=Path, metavar="REPORT_JSON", help="only make the page of a report.json, federated or pooled"
    )


def federated_findings(args: argparse.Namespace) -> tuple[Findings, Path]:
    """Run the report across ROOT/sites/* and read what the server wrote: findings, and the folder that they are in.

    Raises:
        FedHarmError: the run cannot start or stopped; its sentence.
    """
    from nnunet_fedharm.federation.launch import launch
    from nnunet_fedharm.federation.report.config import SiteReportConfig

    if args.model:
        raise DataError("--model needs the images in one place; leave out --root or --model.")
    if args.cases_per_site is not None:
        raise DataError("--cases-per-site chooses among images in one place; leave out --root or --cases-per-site.")
    options: dict[str, Any] = {name: getattr(args, name) for name in OWN_OPTIONS if getattr(args, name) is not None}
    options |= {name: ",".join(getattr(args, name)) for name in LISTS if getattr(args, name)}
    if args.bootstrap is not None:
        options["bootstrap"] = args.bootstrap
    if args.permutations is not None:
        options["simulations"] = args.permutations
    config = SiteReportConfig(
        root=args.root,
        dataset=args.dataset or "",
        seed=args.seed,
        num_processes=args.num_processes,
        image_region=args.image_region,
        channels=",".join(args.channels or []),
        **options,
    )
    path = Path(str(launch(config)["results"]))
    return read_findings(path), path.parent


def read_findings(path: Path) -> Findings:
    """Findings from a report.json.

    Raises:
        DataError: the file is missing or holds something else.
    """
    from nnunet_fedharm.differences.findings import Findings
    from nnunet_fedharm.differences.findings_file import from_json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}. Give the report.json of a site report.") from error
    return from_json(Findings, data)
