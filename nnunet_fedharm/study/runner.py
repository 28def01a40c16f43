"""Runs the missing cells of a study, each in a process of its own, as many at once as asked."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunet_fedharm.errors import DataError, FedHarmError
from nnunet_fedharm.federation.daemon import program, stop_process, terminate_as_interrupt
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.study.cell import run_cell
from nnunet_fedharm.study.cell_files import cell_folder, is_finished
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.matrix import Cell, cells_of, control_cell
from nnunet_fedharm.study.quality import lesions_wait, measure_quality
from nnunet_fedharm.study.study_file import StudyFile

LOG, LOCK, STEP = "log.txt", "cell.lock", "step.txt"
LOCKED = 75
"""Exit status of `study run --cell` where another process runs the cell: try again later (EX_TEMPFAIL of sysexits.h)."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Failed:
    """A cell that stopped."""

    cell: Cell
    reason: str


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    began: float


def find_cell(study: StudyFile, name: str) -> Cell:
    """A cell by its name.

    Raises:
        DataError: the study has no such cell.
    """
    cells = {cell.name: cell for cell in cells_of(study)}
    if name not in cells:
        raise DataError(f"The study has no cell {name!r}. `nnunet-fedharm study status` lists them.")
    return cells[name]


def missing_cells(study: StudyFile, names: Sequence[str] = ()) -> list[Cell]:
    """Cells without a result, in order; only these names (or beginnings of names) where given."""
    cells = [cell for cell in cells_of(study) if not is_finished(study, cell)]
    return [cell for cell in cells if not names or any(cell.name.startswith(name) for name in names)]


def run_here(study: StudyFile, cell: Cell, *, device: str, show: Callable[[str], None]) -> bool:
    """Run one cell in this process; False where another process is running it.

    Raises:
        FedHarmError: a step failed; its sentence.
    """
    folder = cell_folder(study, cell)
    with file_lock(folder / LOCK, wait_s=0.0) as mine:
        if not mine:
            return False
        if is_finished(study, cell):
            return True

        def step(name: str) -> None:
            (folder / STEP).write_text(name)
            show(name)

        run_cell(study, cell, device=device, show=step)
        (folder / STEP).unlink()
    return True


def count_waiting_lesions(study: StudyFile, *, device: str, show: Callable[[str], None]) -> None:
    """Measure the cells again that were finished before the control, which judges the lesions in their harmonized volumes.

    Every cell calls this after its own result is written, so whichever of the two comes last finds the other one finished.

    Args:
        show: receives a line for each cell that is measured, waits for the control, or cannot be measured.
    """
    control = control_cell(study)
    for cell in cells_of(study):
        if not lesions_wait(study, cell):
            continue
        if not is_finished(study, control):
            show(f"The lesions of {cell.name} are counted when {control.name}, which judges them, has its result.")
            continue
        with file_lock(cell_folder(study, cell) / LOCK, wait_s=0.0) as mine:
            if not mine or not lesions_wait(study, cell):  # another process counts them, or has just done so
                continue
            show(f"Lesions in the harmonized volumes of {cell.name} are counted.")
            try:
                measure_quality(StudyData(study), cell, device=device)
            except FedHarmError as error:
                show(f"The lesions of {cell.name} were not counted: {error}")


def run_missing(
    study: StudyFile,
    cells: Sequence[Cell],
    *,
    device: str,
    devices: Sequence[str],
    parallel: int,
    show: Callable[[str], None],
) -> list[Failed]:
    """Run cells in processes of their own; a failed one does not stop the others.

    Args:
        device: cpu or cuda.
        devices: values of CUDA_VISIBLE_DEVICES that slots take in turn; empty leaves it alone.
        parallel: cells at once.
        show: receives one line when a cell begins or ends.

    Returns:
        The cells that failed, with the last lines of their logs.
    """
    waiting, running, failed = list(cells), list[_Running](), list[Failed]()
    with terminate_as_interrupt(), _stopped_at_the_end(running):
        while waiting or running:
            free = sorted(set(range(parallel)) - {item.slot for item in running})
            while waiting and free:
                running.append(
                    _start(study, waiting.pop(0), free.pop(0), device=device, devices=devices, parallel=parallel)
                )
                show(f"{running[-1].cell.name} begins")
            time.sleep(_POLL_S)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                minutes = (time.monotonic() - item.began) / 60
                if item.process.returncode == LOCKED:
                    show(f"{item.cell.name} is left to the other process that runs it; {len(waiting)} waiting")
                elif item.process.returncode == 0:
                    show(f"{item.cell.name} finished after {minutes:.1f} min; {len(waiting)} waiting")
                else:
                    reason = _last_lines(cell_folder(study, item.cell) / LOG)
                    failed.append(Failed(item.cell, reason))
                    show(f"{item.cell.name} failed after {minutes:.1f} min: {reason.splitlines()[-1]}")
    return failed


@contextmanager
def _stopped_at_the_end(running: list[_Running]) -> Iterator[None]:
    """After Ctrl-C or SIGTERM no cell goes on alone; what they have trained stays, and the next `run` goes on."""
    try:
        yield
    finally:
        for item in running:
            stop_process(item.process)


def _start(study: StudyFile, cell: Cell, slot: int, *, device: str, devices: Sequence[str], parallel: int) -> _Running:
    folder = cell_folder(study, cell)
    folder.mkdir(parents=True, exist_ok=True)
    command = [program("nnunet-fedharm"), "study", "run", str(study.folder), "--cell", cell.name, "--device", device]
    own: dict[str, str] = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    if device == "cpu":
        # nnU-Net asks torch for every core; cells side by side would wait for each other's threads. Who shares the machine
        # with others says so by OMP_NUM_THREADS.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // parallel))
        own |= dict.fromkeys(("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS"), threads)
    with (folder / LOG).open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _Running(cell, process, slot, time.monotonic())


def _last_lines(log: Path, count: int = 3) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "it left no line in its log"


def current_step(study: StudyFile, cell: Cell) -> str:
    """What is known about a cell without a result: its step, "stopped in …" or "waiting"."""
    folder = cell_folder(study, cell)
    if not (folder / STEP).is_file():
        return "waiting"
    step = (folder / STEP).read_text()
    with file_lock(folder / LOCK, wait_s=0.0) as free:
        return f"stopped in: {step}" if free else f"runs: {step}"
