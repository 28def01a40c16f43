"""`nnunet-fedharm simulate-sites`: a raw dataset as several scanners would show it, with ground truth."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

HELP = "Render a raw dataset as several simulated scanners, with travelling subjects as ground truth."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-d", "--dataset", required=True, help="raw dataset folder, or its number or name in nnUNet_raw"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="folder of the new dataset, such as nnUNet_raw/Dataset911_Simulated",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sites", type=Path, metavar="FILE", help="scanners as YAML or JSON")
    what.add_argument("--preset", type=int, metavar="N", help="the first N of six built-in scanners; A changes nothing")
    parser.add_argument("--travelling", type=int, default=0, metavar="K", help="travelling subjects (default: 0)")
    parser.add_argument("--reference", metavar="SITE", help="home of the travelling subjects (default: the first site)")
    parser.add_argument(
        "--contrast", choices=["T1w", "T2w", "FLAIR"], help="of the source, for tissue mixtures (default: T1w)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--copy", action="store_true", help="copy unchanged files instead of linking them")
    parser.add_argument("-np", "--num-processes", type=int, default=1, help="worker processes (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Write the dataset, print one line per site."""
    # Imported here: scikit-learn and nibabel take a while that --help need not wait for.
    from nnunet_fedharm.commands.datasets import find_raw_dataset
    from nnunet_fedharm.datasets.simulate import TRAVELLING, simulate_sites
    from nnunet_fedharm.datasets.simulate_config import load_simulation, preset

    options: dict[str, Any] = {"seed": args.seed, "travelling": args.travelling}
    options |= {name: getattr(args, name) for name in ("reference", "contrast") if getattr(args, name)}
    simulation = preset(args.preset, **options) if args.sites is None else load_simulation(args.sites, **options)
    raw = find_raw_dataset(args.dataset)
    jobs = simulate_sites(raw, args.output, simulation, num_processes=args.num_processes, link=not args.copy)
    counts = Counter((job.site, job.images == TRAVELLING[0]) for job in jobs)
    print(f"{'site':<16} {'cases':>6} {'travelling':>11}  scanner")
    for name, site in simulation.sites.items():
        at_home = f"{simulation.travelling} at home" if name == simulation.reference else str(counts[name, True])
        print(f"{name:<16} {counts[name, False]:>6} {at_home:>11}  {site.sequence or ''}".rstrip())
    print(f"\n{args.output}: check the voxels with `nnunet-fedharm sites check -d {args.output}`.")
    return 0
