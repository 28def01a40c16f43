"""`nnunet-fedharm study init|prepare|run|slurm|status|report`: the whole comparison of a multi-site dataset from one file."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_fedharm.commands.slurm import add_cluster, hand_over
from nnunet_fedharm.commands.slurm_scripts import Job, quoted
from nnunet_fedharm.errors import SetupError

if TYPE_CHECKING:
    from rich.console import Console

    from nnunet_fedharm.study.matrix import Cell
    from nnunet_fedharm.study.study_file import StudyFile

HELP = (
    "Compare central, federated and local training, harmonizers, augmentation and epsilons on one dataset, and report."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="init|prepare|run|slurm|status|report")
    init = actions.add_parser("init", help="write study.toml for a dataset, every value explained")
    init.add_argument("folder", type=Path, help="new folder of the study")
    init.add_argument(
        "-d",
        "--dataset",
        required=True,
        help="raw dataset with sites.json: a folder, or its number or name in nnUNet_raw",
    )
    init.add_argument("--reference", help="site to harmonize to (default: the first one with labels)")
    init.add_argument(
        "--labelled-sites", nargs="+", default=[], metavar="SITE", help="sites whose labels are used (default: all)"
    )
    init.add_argument(
        "--held-out-sites",
        nargs="+",
        default=[],
        metavar="SITE",
        help="sites that take part in no training and stand for new hospitals (default: none)",
    )
    init.add_argument(
        "-c", "--configuration", choices=("2d", "3d_fullres"), default="3d_fullres", help="(default: 3d_fullres)"
    )
    init.add_argument("--quick", action="store_true", help="lengths and sizes for two CPU cores and a small dataset")
    prepare = actions.add_parser("prepare", help="hold out test cases, plan and preprocess")
    run_ = actions.add_parser("run", help="run the cells that have no result yet")
    run_.add_argument("--dry-run", action="store_true", help="only list the cells and what they will cost")
    run_.add_argument("--cell", metavar="NAME", help="this one, in this process")
    run_.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cells whose names begin so")
    run_.add_argument(
        "--parallel", type=int, metavar="N", help="cells at once (default: one for each of --gpus, else 1)"
    )
    run_.add_argument("--gpus", nargs="+", default=[], metavar="ID", help="GPUs that the parallel cells share out")
    run_.add_argument("--device", help="cpu or cuda (default: the study's)")
    run_.add_argument("--hours", type=float, metavar="H", help="start no cell that would end later, by the estimate")
    slurm = actions.add_parser("slurm", help="write a job script that runs the cells without a result on a cluster")
    slurm.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cells whose names begin so")
    slurm.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="tasks at a time (default: as the cluster can)"
    )
    add_cluster(slurm, gpus=1, nnunet_root=False)
    status = actions.add_parser("status", help="what is finished, running, failed and waiting")
    report = actions.add_parser("report", help="one page with the answers, figures, tables and methods")
    report.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: report/ in the study's folder")
    for action in (prepare, run_, slurm, status, report):
        action.add_argument("folder", type=Path, help="folder with study.toml")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    chosen = {"init": _init, "prepare": _prepare, "run": _run, "slurm": _slurm, "status": _status, "report": _report}
    return chosen[args.action](args)


def _init(args: argparse.Namespace) -> int:
    from nnunet_fedharm.commands.datasets import find_raw_dataset
    from nnunet_fedharm.study.template import write_template

    path = write_template(
        args.folder,
        find_raw_dataset(args.dataset),
        reference=args.reference,
        labelled_sites=args.labelled_sites,
        held_out_sites=args.held_out_sites,
        configuration=args.configuration,
        quick=args.quick,
    )
    print(f"Written: {path}. Read it, change what you like, then:")
    print(f"  nnunet-fedharm study prepare {args.folder}")
    print(f"  nnunet-fedharm study run {args.folder} --dry-run")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from nnunet_fedharm.study.data import StudyData

    study = _study(args.folder)
    StudyData(study).prepare()
    print(f"Data of the study: {StudyData(study).folder}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from nnunet_fedharm.study.cell_files import cell_folder
    from nnunet_fedharm.study.matrix import cells_of
    from nnunet_fedharm.study.runner import count_waiting_lesions, missing_cells, run_missing
    from nnunet_fedharm.study.settings import check_settings

    study = _study(args.folder)
    device = _device(args.device or study.subject.device)
    if args.cell:
        return _run_cell(study, args.cell, device)
    for cell in cells_of(study):
        check_settings(study, cell)
    cells = missing_cells(study, args.only)
    parallel = max(1, args.parallel or len(args.gpus))
    if args.dry_run:
        _print_estimate(study, cells, device, parallel)
        return 0
    hours = study.subject.hours if args.hours is None else args.hours
    bounded = bool(hours) or args.hours is not None
    if not args.only:
        hours -= _compare_sites(study, hours if bounded else math.inf)
    if not cells:
        count_waiting_lesions(study, device=device, show=_say)
        print("Every cell has its result. Next: nnunet-fedharm study report " + str(args.folder))
        return 0
    if bounded:
        cells = _within(study, cells, device, hours * parallel)
    failed = run_missing(study, cells, device=device, devices=args.gpus, parallel=parallel, show=_say)
    count_waiting_lesions(study, device=device, show=_say)
    for item in failed:
        print(f"\n{item.cell.name} failed; the end of its log.txt:\n{item.reason}")
        print(f"Run it again when that is mended; it goes on. To begin it anew, remove {cell_folder(study, item.cell)}")
    return 1 if failed else 0


def _compare_sites(study: StudyFile, hours: float) -> float:
    """The site report before the first cell, if it fits; the hours that it took."""
    from nnunet_fedharm.study.estimate import estimate_site_report
    from nnunet_fedharm.study.site_report import make_site_report, site_report_missing

    if not site_report_missing(study):
        return 0.0
    began = time.monotonic()
    if hours < math.inf and (estimate_site_report(study).seconds or 0.0) > 3600 * hours:
        _say("How different the sites are is left for another run: by the estimate it does not fit into the hours.")
    else:
        make_site_report(study, show=_say)
    return (time.monotonic() - began) / 3600


def _run_cell(study: StudyFile, name: str, device: str) -> int:
    from nnunet_fedharm.federation.daemon import terminate_as_interrupt
    from nnunet_fedharm.study.runner import LOCKED, count_waiting_lesions, find_cell, run_here

    cell = find_cell(study, name)
    with terminate_as_interrupt():  # a cluster that needs the node back lets the cell write down how long it ran
        if not run_here(study, cell, device=device, show=lambda step: _say(f"step: {step}")):
            print(f"Another process runs the cell {name}. Run it again if that one is stopped.", file=sys.stderr)
            return LOCKED
        count_waiting_lesions(study, device=device, show=_say)
    print("finished")
    return 0


def _say(line: str) -> None:
    """At once, also into a file."""
    print(line, flush=True)


def _slurm(args: argparse.Namespace) -> int:
    from nnunet_fedharm.study.data import StudyData
    from nnunet_fedharm.study.runner import missing_cells

    study = _study(args.folder)
    cells = missing_cells(study, args.only)
    if not cells:
        raise SetupError("Every cell that was asked for has its result, so there is no job to write.")
    command = ["nnunet-fedharm", "study", "run", str(study.folder), "--cell"]
    job = Job(
        name=args.job_name or "fedharm-study",
        command=[*quoted(command), '"$cell"', "--device", "cuda" if args.gpus else "cpu"],
        array={"cell": [cell.name for cell in cells]},
        at_once=max(0, args.at_once),
        # On a CPU nnU-Net's loader works in the training process.
        environment={"nnUNet_n_proc_DA": "$SLURM_CPUS_PER_TASK"} if args.gpus else {},
        binds=[str(study.folder), str(study.raw_dataset)],
    )
    if not StudyData(study).ready:
        print(
            "Run `nnunet-fedharm study prepare` first, or the tasks wait while the first of them does.", file=sys.stderr
        )
    return hand_over(job, args, {})


def _status(args: argparse.Namespace) -> int:
    from rich.table import Table

    from nnunet_fedharm.study.cell_files import is_finished
    from nnunet_fedharm.study.matrix import cells_of
    from nnunet_fedharm.study.results import read_cell
    from nnunet_fedharm.study.runner import current_step

    study = _study(args.folder)
    table = Table(title=f"{study.subject.name}: {study.folder}", title_justify="left")
    for name in ("cell", "state", "Dice by site", "minutes"):
        table.add_column(name)
    cells = cells_of(study)
    for cell in cells:
        if not is_finished(study, cell):
            table.add_row(cell.name, current_step(study, cell), "", "")
            continue
        result = read_cell(study, cell)
        sites = {
            site: entry["labels"]["mean"]["dice"]["mean"]
            for site, entry in result.metrics["sites"].items()
            if site != "all"
        }
        dice = " ".join(f"{site} {value:.3f}" for site, value in sites.items() if value is not None)
        table.add_row(cell.name, "finished", dice, f"{result.cost.train_s / 60:.1f}")
    _console().print(table)
    print(f"{sum(is_finished(study, cell) for cell in cells)} of {len(cells)} cells are finished.")
    return 0


def _report(args: argparse.Namespace) -> int:
    from nnunet_fedharm.errors import DataError
    from nnunet_fedharm.study.report.build import write_report
    from nnunet_fedharm.study.results import read_results
    from nnunet_fedharm.study.runner import count_waiting_lesions
    from nnunet_fedharm.study.site_report import make_site_report

    study = _study(args.folder)
    device = _device("cpu" if study.subject.device == "cpu" else "auto")  # a report may be made where no GPU is
    count_waiting_lesions(study, device=device, show=_say)
    make_site_report(study, show=_say)  # cells that a cluster ran left it to this command
    results = read_results(study)
    if not results.finished:
        raise DataError(
            f"No cell of {study.folder} has a result yet. Run `nnunet-fedharm study run {args.folder}` first."
        )
    page = write_report(results, args.output or study.folder / "report", show=print)
    print(f"The report: {page}\n            {page.resolve().as_uri()}")
    return 0


def _study(folder: Path) -> StudyFile:
    from nnunet_fedharm.study.study_file import read_study

    return read_study(folder.expanduser())


def _console() -> Console:
    """Wide where the output is a file or a pipe: names are cut nowhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _device(asked: str) -> str:
    from nnunet_fedharm.planning.situation import find_device

    return find_device(asked).kind


def _print_estimate(study: StudyFile, cells: Sequence[Cell], device: str, parallel: int) -> None:
    from rich.table import Table

    from nnunet_fedharm.study.estimate import Estimator, estimate_site_report
    from nnunet_fedharm.study.results import read_results
    from nnunet_fedharm.study.site_report import site_report_missing

    estimator = Estimator(study, read_results(study), device)
    estimates = [estimator.of(cell) for cell in cells]
    before = estimate_site_report(study) if site_report_missing(study) else None
    table = Table(title=f"{len(cells)} cells without a result, on {device}", title_justify="left")
    for name in ("cell", "minutes", "from"):
        table.add_column(name)
    rows = [("(how different the sites are)", before)] if before else []
    for name, item in [*rows, *((cell.name, item) for cell, item in zip(cells, estimates, strict=True))]:
        table.add_row(name, "?" if item.seconds is None else f"{item.seconds / 60:.1f}", item.basis)
    _console().print(table)
    known = [item.seconds for item in estimates if item.seconds is not None]
    unknown = len(cells) - len(known)
    if known or not cells:
        hours = ((before.seconds or 0.0) if before else 0.0) / 3600 + sum(known) / 3600 / parallel
        which = f" for the {len(known)} whose time is known" if unknown else ""
        print(f"About {hours:.1f} hours{which}, with {parallel} at once; prediction is not counted.")
    if unknown:
        which = f"How long {unknown} of them take" if known else "How long they take"
        print(f"{which} is not known before the data are prepared: nnunet-fedharm study prepare {study.folder}")


def _within(study: StudyFile, cells: Sequence[Cell], device: str, hours: float) -> list[Cell]:
    from nnunet_fedharm.errors import DataError
    from nnunet_fedharm.study.data import StudyData
    from nnunet_fedharm.study.estimate import Estimator
    from nnunet_fedharm.study.results import read_results

    StudyData(study).prepare()  # a step's time is measured on the planned network
    estimator, left, chosen = Estimator(study, read_results(study), device), 3600 * hours, []
    for cell in cells:
        seconds = estimator.of(cell).seconds
        if seconds is None:
            raise DataError(
                f"How long the cell {cell.name} takes is not known yet. Leave --hours out for the first cells."
            )
        if seconds <= left:
            chosen.append(cell)
            left -= seconds
    print(f"{len(chosen)} of {len(cells)} cells fit into {hours:g} hours of computing by the estimate.")
    return chosen
