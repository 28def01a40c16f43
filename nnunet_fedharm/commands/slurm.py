"""`nnunet-fedharm slurm`: write job scripts for a cluster."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nnunet_fedharm.commands.slurm_scripts import NNUNET_VARIABLES, Cluster, Job, quoted, script
from nnunet_fedharm.errors import SetupError

HELP = "Write SLURM job scripts: preprocessing, training, a simulated federation, or one node as a site."
_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the kinds of jobs."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="preprocess|train|simulate|site")
    preprocess = kinds.add_parser(
        "preprocess", help="`nnunet-fedharm plan` of one or more data sets on CPUs, one task of an array for each"
    )
    preprocess.add_argument("-d", "--dataset", nargs="+", required=True, help="dataset numbers or names")
    train = kinds.add_parser("train", help="nnUNetv2_train on data in one place, one task of an array for each fold")
    train.add_argument("-d", "--dataset", required=True, help="dataset number or name")
    train.add_argument("-c", "--configuration", required=True, help="2d or 3d_fullres")
    train.add_argument("-f", "--fold", nargs="+", default=["0", "1", "2", "3", "4"], help="folds (default: all five)")
    train.add_argument("-tr", "--trainer", default="nnUNetTrainerFedHarm", help="default: nnUNetTrainerFedHarm")
    train.add_argument("-p", "--plans-name", default="nnUNetFedHarmPlans", help="default: nnUNetFedHarmPlans")
    simulate = kinds.add_parser(
        "simulate", help="`nnunet-fedharm federate` with all sites on one node, on as many GPUs as you ask for"
    )
    simulate.add_argument("--root", type=Path, required=True, help="folder with sites/<SITE>/")
    simulate.add_argument("--parallel-sites", type=int, help="sites that train at once (default: one for each GPU)")
    site = kinds.add_parser("site", help="this node takes part in a federation as a site that has joined it")
    site.add_argument("site_root", type=Path, metavar="FOLDER", help="the site's nnU-Net root, after `site join`")
    for kind, parser_of in (("preprocess", preprocess), ("train", train), ("simulate", simulate), ("site", site)):
        add_cluster(parser_of, gpus=0 if kind == "preprocess" else 1)
        if kind != "site":
            words = {"preprocess": "plan", "train": "nnUNetv2_train", "simulate": "federate"}[kind]
            parser_of.add_argument("words", nargs="*", help=f"after `--`: further words for {words}")


def add_cluster(parser: argparse.ArgumentParser, *, gpus: int, nnunet_root: bool = True) -> None:
    """Options of the cluster; `study slurm` has them too, without nnU-Net's folders."""
    group = parser.add_argument_group("cluster")
    group.add_argument("-A", "--account", default="", help="project that pays")
    group.add_argument("--partition", default="", help="left out where the cluster needs none")
    group.add_argument("-C", "--constraint", default="", help="feature of the node, for example thin or fat")
    group.add_argument("--gpus", type=int, default=gpus, help=f"default: {gpus}")
    group.add_argument("--cpus", type=int, default=8, help="of a task (default: 8)")
    group.add_argument("--mem", default="", help="for example 64G; left out takes the cluster's default")
    group.add_argument(
        "-t", "--time", default="1-00:00:00", help="limit; the job queues itself again (default: 1-00:00:00)"
    )
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell line before the work, may be repeated"
    )
    group.add_argument("--container", default="", metavar="IMAGE", help="run inside this Apptainer image")
    group.add_argument(
        "--scratch", default="", metavar="FOLDER", help="the node's own fast disk, for example /scratch/local"
    )
    if nnunet_root:
        words = "folder of nnUNet_raw etc. (default: the environment's three)"
        group.add_argument("--nnunet-root", type=Path, help=words)
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option: --sbatch=--reservation=NAME"
    )
    group.add_argument("--job-name", default="", help="default: fedharm-KIND")
    group.add_argument(
        "-o", "--output", type=Path, default=Path("slurm"), help="folder for script and logs (default: slurm)"
    )
    group.add_argument("--dry-run", action="store_true", help="print the script, write nothing")
    group.add_argument("--submit", action="store_true", help="hand the script to sbatch too")


def run(args: argparse.Namespace) -> int:
    """Write the script, and say how it is submitted."""
    return hand_over(_JOBS[args.kind](args), args, _paths(args))


def hand_over(job: Job, args: argparse.Namespace, paths: Mapping[str, str]) -> int:
    """Print, write or submit the script of a job, as the options of `add_cluster` say; returns the exit status.

    Args:
        paths: nnU-Net's variable -> folder.

    Raises:
        SetupError: an option that would be something else in the script, a folder that cannot be written, or no sbatch to
            submit with.
    """
    output = args.output.expanduser().resolve()
    text = script(job, _cluster(args, output, paths))
    if args.dry_run:
        print(text, end="")
        return 0
    path = output / f"{job.name}.sh"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"Cannot write {path}: {error.strerror}. Choose a folder that this user may write.") from error
    print(f"written: {path}")
    if not args.submit:
        print(f"Look at it, then: sbatch {shlex.quote(str(path))}")
        return 0
    try:
        return subprocess.run(["sbatch", str(path)], check=False).returncode
    except FileNotFoundError as error:
        raise SetupError("sbatch is not on this machine. Run it on a login node of the cluster.") from error


def _cluster(args: argparse.Namespace, logs: Path, paths: Mapping[str, str]) -> Cluster:
    return Cluster(
        account=args.account,
        partition=args.partition,
        constraint=args.constraint,
        time=args.time,
        mem=args.mem,
        gpus=args.gpus,
        cpus=args.cpus,
        setup=tuple(args.setup) or _own_setup(args.container),
        container=args.container,
        scratch=args.scratch,
        paths=paths,
        more=tuple(args.sbatch),
        logs=logs,
    )


def _own_setup(container: str) -> tuple[str, ...]:
    """The Python that writes the script is the one that shall run it."""
    return () if container else (f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',)


def _paths(args: argparse.Namespace) -> dict[str, str]:
    if args.kind in ("simulate", "site"):
        return {}  # every site has an nnU-Net root of its own
    if args.nnunet_root is not None:
        root = args.nnunet_root.expanduser().resolve()
        return {name: str(root / name) for name in NNUNET_VARIABLES}
    missing = [name for name in NNUNET_VARIABLES if not os.environ.get(name)]
    if missing:
        raise SetupError(f"{missing[0]} is not exported. Give --nnunet-root, or export nnU-Net's three folders.")
    return {name: os.environ[name] for name in NNUNET_VARIABLES}


def _preprocess(args: argparse.Namespace) -> Job:
    command = ["nnunet-fedharm", "plan", "-d", '"$dataset"', "-np", '"$SLURM_CPUS_PER_TASK"', *quoted(args.words)]
    return Job(name=args.job_name or "fedharm-preprocess", command=command, array={"dataset": args.dataset})


def _train(args: argparse.Namespace) -> Job:
    words = quoted([args.dataset, args.configuration])
    names = quoted(["-tr", args.trainer, "-p", args.plans_name])
    # --c: a fresh fold starts at epoch 0 with it, one that was stopped goes on.
    command = ["nnUNetv2_train", *words, '"$fold"', *names, "--c", *quoted(args.words)]
    before = []
    if args.scratch:
        number = f"{int(args.dataset):03d}" if args.dataset.isdigit() else ""
        folder = f"Dataset{number}_*" if number else shlex.quote(args.dataset)
        before = [
            'mkdir -p "$scratch/nnUNet_preprocessed"',
            f'cp -r "$nnUNet_preprocessed"/{folder} "$scratch/nnUNet_preprocessed/"',
            'export nnUNet_preprocessed="$scratch/nnUNet_preprocessed"',
        ]
    environment = {"nnUNet_n_proc_DA": "$SLURM_CPUS_PER_TASK"}
    name = args.job_name or "fedharm-train"
    return Job(name=name, command=command, array={"fold": args.fold}, before=before, environment=environment)


def _simulate(args: argparse.Namespace) -> Job:
    root = str(args.root.expanduser().resolve())
    parallel = args.parallel_sites or max(1, args.gpus)
    words = ["nnunet-fedharm", "federate", "--root", root, "--device", "cuda" if args.gpus else "cpu"]
    words += ["--parallel-sites", str(parallel), "--gpus", str(max(1, args.gpus))]
    environment = {"nnUNet_n_proc_DA": str(max(1, args.cpus // parallel)), **_FLOWER}
    command = quoted([*words, *args.words])
    name = args.job_name or "fedharm-simulate"
    return Job(name=name, command=command, environment=environment, binds=[root])


def _site(args: argparse.Namespace) -> Job:
    root = str(args.site_root.expanduser().resolve())
    environment = {"nnUNet_n_proc_DA": "$SLURM_CPUS_PER_TASK", **_FLOWER}
    command = quoted(["nnunet-fedharm", "site", "start", root])
    return Job(name=args.job_name or "fedharm-site", command=command, environment=environment, binds=[root])


_JOBS: dict[str, Callable[[argparse.Namespace], Job]] = {
    "preprocess": _preprocess,
    "train": _train,
    "simulate": _simulate,
    "site": _site,
}
