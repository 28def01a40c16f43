"""Run one function over many cases, in this process or in several, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_cases(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_processes: int, description: str
) -> Iterator[Result]:
    """Results in the order of the items.

    Args:
        function: picklable when num_processes > 1 (a module-level function or a partial of one).
        num_processes: 1 stays in this process, which also works inside daemonic workers (Ray, nnU-Net's pools).
        description: text of the progress bar; never names a case.
    """
    if num_processes <= 1 or len(items) < 2:
        yield from tqdm(map(function, items), total=len(items), desc=description, leave=False)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(num_processes, len(items))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_itk_thread) as pool:
        yield from tqdm(pool.map(function, items), total=len(items), desc=description, leave=False)


def _one_itk_thread() -> None:
    """Processes that each start as many ITK threads as there are cores stand in each other's way."""
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
