"""Independent pieces of work, one after the other or in several processes, with one progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from nnunet_fedharm.differences.options import Progress


class Meter:
    """Turns finished steps into shares of the whole; a step that is cut short counts as done once the next one begins."""

    def __init__(self, progress: Progress | None, total: float) -> None:
        self._progress = progress
        self._total = max(total, 1e-9)
        self._end = 0.0

    def step(self, name: str, size: float, ticks: int = 1) -> Callable[[], None]:
        """Begin a step.

        Args:
            name: what is being computed.
            size: its part of the total.
            ticks: how often what is returned will be called.
        """
        start, done = self._end, 0
        self._end = start + size
        self.tell(name, start)

        def tick() -> None:
            nonlocal done
            done = min(done + 1, ticks)
            self.tell(name, start + size * done / ticks)

        return tick

    def begin(self, start: float) -> None:
        """The next step starts here, whatever the last one was."""
        self._end = start

    def tell(self, name: str, reached: float) -> None:
        """So much of the total is done."""
        if self._progress is not None:
            self._progress(name, min(1.0, reached / self._total))


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: what is being computed.
        size: its part of the whole.
        function: meter -> result; picklable, and the same whatever ran before.
    """

    name: str
    size: float
    function: Callable[[Meter], Any]


def run_jobs(jobs: Sequence[Job], *, num_processes: int = 1, progress: Progress | None = None) -> list[Any]:
    """Results in the order of the jobs.

    Args:
        jobs: independent of each other.
        num_processes: 1 stays in this process, which also works inside daemonic workers.
        progress: told what is being computed and the share that is done.
    """
    total = sum(job.size for job in jobs)
    meter, reached, results = Meter(progress, total), 0.0, []
    if num_processes > 1 and len(jobs) > 1:
        results = _in_processes(jobs, meter, num_processes)
    else:
        for job in jobs:
            meter.begin(reached)
            results.append(job.function(meter))
            reached += job.size
    meter.tell("done", total)
    return results


def _in_processes(jobs: Sequence[Job], meter: Meter, num_processes: int) -> list[Any]:
    """The largest jobs first, so that no process waits long at the end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context) as pool:
        order = sorted(range(len(jobs)), key=lambda index: -jobs[index].size)
        meter.tell(jobs[order[0]].name, 0.0)
        waiting = {pool.submit(_alone, jobs[index].function): index for index in order}
        results: list[Any] = [None] * len(jobs)
        reached = 0.0
        for future in as_completed(waiting):
            index = waiting[future]
            results[index] = future.result()
            reached += jobs[index].size
            meter.tell(jobs[index].name, reached)
    return results


def _alone(function: Callable[[Meter], Any]) -> Any:
    return function(Meter(None, 1.0))
