"""Job scripts for SLURM as text: pure functions, checked by ShellCheck in the tests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_fedharm.errors import SetupError

GRACE_S = 180
"""How long before the time limit a job is told to stop, so that it can be queued again."""
NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_WORD = re.compile(r"[A-Za-z0-9_.,:@%+=|&*/\[\]()-]+")
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}(:\d{2})?|\d+(-\d{1,2}(:\d{2}){0,2})?")
_SCRATCH = re.compile(r"[A-Za-z0-9_./${}-]+")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster wants to know, the same for all kinds of jobs; empty or 0 leaves a line out.

    Attributes:
        account, partition, constraint, time, mem: of `#SBATCH`.
        gpus, cpus: of a task.
        setup: shell lines before the work: `module load …`, `conda activate …`.
        container: Apptainer image that the work runs in.
        scratch: fast folder of the node, may hold variables such as $TMPDIR; caches go there, and for a training the
            preprocessed cases.
        paths: nnU-Net's variable -> folder.
        more: further `#SBATCH` options, such as `--reservation=x`.
        logs: folder of the output files; has to exist before the job starts.

    Raises:
        SetupError: a value that would end up as something else in the script.
    """

    account: str = ""
    partition: str = ""
    constraint: str = ""
    time: str = ""
    mem: str = ""
    gpus: int = 0
    cpus: int = 8
    setup: tuple[str, ...] = ()
    container: str = ""
    scratch: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    logs: Path = Path("slurm")

    def __post_init__(self) -> None:
        for name in ("account", "partition", "constraint", "mem"):
            value = getattr(self, name)
            if value and not _WORD.fullmatch(value):
                raise SetupError(f"--{name} {value!r} is no word that sbatch takes.")
        if self.time and not _TIME.fullmatch(self.time):
            raise SetupError(f"--time {self.time!r} is not a SLURM time; write 2-00:00:00 or 08:00:00.")
        if self.scratch and not _SCRATCH.fullmatch(self.scratch):
            raise SetupError(f"--scratch {self.scratch!r} may hold letters, digits, / . _ - and variables only.")
        if self.gpus < 0 or self.cpus < 1:
            raise SetupError(f"--gpus has to be >= 0 and --cpus >= 1, got {self.gpus} and {self.cpus}.")
        for line in (*self.setup, *self.more, str(self.logs)):
            if "\n" in line:
                raise SetupError(f"A line break in {line!r} would end the line in the script.")
        for line in self.more:
            if not re.fullmatch(r"-{1,2}[A-Za-z][^\n]*", line):
                raise SetupError(f"--sbatch {line!r} is no option of sbatch; write it as --sbatch=--reservation=NAME.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job.

    Attributes:
        name: of the job and its script.
        command: shell words, quoted where they have to be.
        array: bash variable -> its value in each task; all lists of the same length. Empty for a job without tasks.
        at_once: tasks that may run at the same time; 0 leaves that to the cluster.
        before: lines between set-up and command.
        environment: variable -> value as it stands in the script, inside double quotes.
        binds: folders that a container has to see, beside nnU-Net's.
    """

    name: str
    command: Sequence[str]
    array: Mapping[str, Sequence[str]] = field(default_factory=dict)
    at_once: int = 0
    before: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    binds: Sequence[str] = ()


def script(job: Job, cluster: Cluster) -> str:
    """The whole script.

    It stops its work GRACE_S before the time limit and queues itself again; everything that it starts resumes where it was.
    """
    lines = ["#!/bin/bash", *_directives(job, cluster), "", "set -eo pipefail", *_environment(job, cluster), ""]
    lines += [*cluster.setup] if cluster.setup else ["# no --setup was given: programs are those of the PATH"]
    # Only now: activation scripts of conda and module systems read variables that are not set.
    lines += ["set -u", "", *_tasks(job.array), *job.before, *_work(job, cluster)]
    return "\n".join(lines) + "\n"


def quoted(words: Sequence[str]) -> list[str]:
    """Words as the shell has to see them."""
    return [shlex.quote(word) for word in words]


def _directives(job: Job, cluster: Cluster) -> list[str]:
    count = len(next(iter(job.array.values()))) if job.array else 0
    output = str(cluster.logs / ("%x-%A_%a.out" if count else "%x-%j.out"))
    options = {
        "job-name": job.name,
        "account": cluster.account,
        "partition": cluster.partition,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "mem": cluster.mem,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(cluster.cpus),
        "gpus": str(cluster.gpus or ""),
        "array": f"0-{count - 1}{f'%{job.at_once}' if job.at_once else ''}" if count else "",
        "output": shlex.quote(output) if " " in output else output,
        "open-mode": "append",
        "signal": f"B:USR1@{GRACE_S}",
    }
    directives = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    return [*directives, "#SBATCH --requeue", *(f"#SBATCH {line}" for line in cluster.more)]


def _environment(job: Job, cluster: Cluster) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.paths.items())]
    scratch = cluster.scratch or "${TMPDIR:-/tmp}"
    lines += [
        f'scratch="{scratch}/fedharm-${{SLURM_JOB_ID}}"',
        'mkdir -p "$scratch"',
        # A home folder's quota is for files that stay.
        'export MPLCONFIGDIR="$scratch/matplotlib" TRITON_CACHE_DIR="$scratch/triton"',
        'export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"',
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"',
    ]
    return lines + [f'export {name}="{value}"' for name, value in job.environment.items()]


def _tasks(array: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    for name, values in array.items():
        lines.append(f"all_{name}=({' '.join(quoted(values))})")
        lines.append(f'{name}="${{all_{name}[$SLURM_ARRAY_TASK_ID]}}"')
    return lines


def _work(job: Job, cluster: Cluster) -> list[str]:
    command = list(job.command)
    if cluster.container:
        folders = sorted({*cluster.paths.values(), *job.binds})
        binds = [word for folder in folders for word in ("--bind", shlex.quote(folder))]
        scratch = ["--bind", '"$scratch"']
        gpu = ["--nv"] if cluster.gpus else []
        command = ["apptainer", "exec", *gpu, *binds, *scratch, shlex.quote(cluster.container), *command]
    return [
        "# shellcheck disable=SC2329  # the trap calls it",
        "again() {",
        '    echo "time is nearly up: the work stops here and the job is queued again"',
        '    kill -TERM "$work" 2>/dev/null || true',
        '    wait "$work" || true',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "    exit 0",
        "}",
        "trap again USR1",
        " ".join(command) + " &",
        "work=$!",
        "status=0",
        'wait "$work" || status=$?',
        'rm -rf "$scratch"',
        'exit "$status"',
    ]
