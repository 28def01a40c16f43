"""Patients for DP-SGD: each step draws some, and hands out their patches one patient after the other."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from nnunet_fedharm.privacy.patient_gradients import draw_patients

Batch = TypeVar("Batch")
Cases = tuple[str, ...]


def by_patient(cases: Iterable[str], patient_of: Mapping[str, str]) -> list[Cases]:
    """Cases of each patient, sorted; a case without an entry is a patient of its own."""
    members: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        members[patient_of.get(case, case)].append(case)
    return [tuple(sorted(members[patient])) for patient in sorted(members)]


class PatientDraw(Generic[Batch]):
    """The batches of one step, one for each patient that was drawn; may be empty. Iterate once."""

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self._batches = batches
        self.count = count

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __len__(self) -> int:
        return self.count


class PatientLoader(Generic[Batch]):
    """Endless steps of patients.

    Args:
        patients: cases of each patient.
        sample_rate: probability of a patient in a step.
        load: cases of one patient -> batch; called from several threads at once if `workers` is above 1.
        workers: threads that load ahead, one step at most; 0 loads when asked.
    """

    def __init__(
        self, patients: Sequence[Cases], sample_rate: float, load: Callable[[Cases], Batch], *, workers: int = 0
    ) -> None:
        self.patients = list(patients)
        self.sample_rate = sample_rate
        self._load = load
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="patient") if workers > 0 else None
        self._ahead: list[Future[Batch]] | None = None

    def __iter__(self) -> PatientLoader[Batch]:
        return self

    def __next__(self) -> PatientDraw[Batch]:
        if self._pool is None:
            drawn = draw_patients(self.patients, self.sample_rate)
            return PatientDraw(map(self._load, drawn), len(drawn))
        now = self._ahead if self._ahead is not None else self._submit(self._pool)
        self._ahead = self._submit(self._pool)
        return PatientDraw((future.result() for future in now), len(now))

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor) -> list[Future[Batch]]:
        return [pool.submit(self._load, cases) for cases in draw_patients(self.patients, self.sample_rate)]


def from_stock_loader(loader: Any, patches: int) -> Callable[[Cases], dict[str, Any]]:
    """`load` of a PatientLoader that draws and augments as nnU-Net's own loader does.

    Args:
        loader: an `nnUNetDataLoader`; it is left as it is.
        patches: of one patient, drawn among their cases.
    """

    def load(cases: Cases) -> dict[str, Any]:
        own = copy.copy(loader)  # shallow: settings of this patient, data and transforms shared
        own.indices, own.batch_size = list(cases), patches
        batch: dict[str, Any] = own.generate_train_batch()
        return batch

    return load
