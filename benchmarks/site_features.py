"""How long the features of a dataset take with one process and with more.

    python benchmarks/site_features.py -d DATASET_FOLDER [--cases 40] [--processes 1 2] [--image] [--repeats 1]

Wall time of `measure_dataset` on an empty cache (start of the processes included), and once more on the full one. CPU time of all
processes stands beside it, because wall times of a machine with other work on it say little: as long as CPU time does not grow
with the number of processes, and the parent's own share is small, a free core each is worth its full speed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_fedharm.sites.features.extraction import FeatureOptions, measure_dataset
from nnunet_fedharm.sites.files import CaseFiles, labelled_cases, read_dataset_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile


def part_of(raw_dataset: Path, count: int, folder: Path) -> SitesFile:
    """Links to `count` labelled cases, the sites in turn, in `folder`; their sites."""
    description = read_dataset_json(raw_dataset, site="all")
    registry = SitesFile.load(raw_dataset / SITES_FILE)
    by_site: dict[str, list[CaseFiles]] = {site: [] for site in registry.sites}
    for case in labelled_cases(raw_dataset, description):
        by_site[registry.cases[case.case]].append(case)
    order = sorted((rank, site) for site, cases in by_site.items() for rank in range(len(cases)))
    chosen = [by_site[site][rank] for rank, site in order[:count]]
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    for case in chosen:
        for image in case.images:
            (folder / "imagesTr" / image.name).symlink_to(image.resolve())
        if case.label is not None:
            (folder / "labelsTr" / case.label.name).symlink_to(case.label.resolve())
    description.pop("dataset", None)
    (folder / "dataset.json").write_text(json.dumps(description))
    return SitesFile(registry.sites, {case.case: registry.cases[case.case] for case in chosen})


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its children that ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def measure(
    dataset: Path, registry: SitesFile, options: FeatureOptions, cache: Path, processes: int
) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of this process, CPU seconds of the others."""
    start, before = time.perf_counter(), cpu_seconds()
    measure_dataset(dataset, registry=registry, options=options, cache=cache, num_processes=processes)
    wall, after = time.perf_counter() - start, cpu_seconds()
    return wall, after[0] - before[0], after[1] - before[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", type=Path, required=True, help="raw dataset with sites.json")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--image", action="store_true", help="radiomics of the whole body too")
    args = parser.parse_args(arguments)
    options = FeatureOptions(image_region=args.image)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, {args.cases} cases")
    print(f"{'processes':>9} {'wall s':>8} {'CPU s here':>11} {'CPU s others':>13} {'wall s again':>13}")
    with tempfile.TemporaryDirectory() as temporary:
        dataset = Path(temporary) / "dataset"
        dataset.mkdir()
        registry = part_of(args.dataset, args.cases, dataset)
        measure(dataset, registry, options, Path(temporary) / "warm", 1)  # imports, and files into the system's cache
        for repeat in range(args.repeats):
            for processes in args.processes:
                cache = Path(temporary) / f"{repeat}-{processes}"
                wall, here, others = measure(dataset, registry, options, cache, processes)
                again = measure(dataset, registry, options, cache, processes)[0]
                print(f"{processes:>9} {wall:>8.1f} {here:>11.1f} {others:>13.1f} {again:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
