"""Energy of a stretch of work, from the counters that a machine has and lets this user read.

| counter | counts | read from |
|---|---|---|
| RAPL | processor packages of the whole machine, whatever runs on it | /sys/class/powercap/intel-rapl:N/energy_uj |
| NVML | each NVIDIA GPU that `CUDA_VISIBLE_DEVICES` leaves visible | nvmlDeviceGetTotalEnergyConsumption (Volta and newer) |

A RAPL counter starts again at 0 after some minutes to an hour, so it is read every `EVERY_S` seconds. Many systems let root alone
read it. Memory, disks, fans and the power supply's losses are in neither.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RAPL = Path("/sys/class/powercap")
EVERY_S = 30.0


@dataclass(frozen=True)
class Counter:
    """One counter.

    Attributes:
        name: "RAPL" or "NVML".
        read: joules since some moment; None where it cannot be read.
        wraps_j: where it starts again at 0; None: never.
    """

    name: str
    read: Callable[[], float | None]
    wraps_j: float | None = None


@dataclass
class Energy:
    """What was counted so far; joules stays None where no counter can be read."""

    joules: float | None = None
    counters: tuple[str, ...] = ()
    _last: dict[int, float] = field(default_factory=dict)


@contextmanager
def measured(counters: list[Counter] | None = None, *, every_s: float = EVERY_S) -> Iterator[Energy]:
    """Energy of the work inside; its numbers are complete when the block is left.

    Args:
        counters: None: those of this machine.
        every_s: seconds between two readings.
    """
    found = [*rapl_counters(), *nvml_counters()] if counters is None else counters
    readable = [item for item in found if item.read() is not None]
    energy = Energy(0.0 if readable else None, tuple(dict.fromkeys(item.name for item in readable)))
    _add(energy, readable)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(every_s):
            _add(energy, readable)

    thread = threading.Thread(target=follow, daemon=True)
    if readable:
        thread.start()
    try:
        yield energy
    finally:
        ended.set()
        if readable:
            thread.join()
            _add(energy, readable)


def _add(energy: Energy, counters: list[Counter]) -> None:
    for index, counter in enumerate(counters):
        now, before = counter.read(), energy._last.get(index)
        if now is None:
            continue
        if before is not None and energy.joules is not None:
            step = now - before
            energy.joules += step + (counter.wraps_j or 0.0) if step < 0 else step
        energy._last[index] = now


def rapl_counters(folder: Path = RAPL) -> list[Counter]:
    """One for each processor package; the parts of a package (cores, memory controller) are in it already."""
    counters = []
    for package in sorted(folder.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") == 1:
            wraps = _microjoules(package / "max_energy_range_uj")
            counters.append(Counter("RAPL", lambda package=package: _microjoules(package / "energy_uj"), wraps))  # type: ignore[misc]
    return counters


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):  # not for this user, or none: the caller says that nothing was measured
        return None


def nvml_counters() -> list[Counter]:
    """One for each visible GPU; none without NVIDIA's driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver
        return []
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    handles = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if _is_visible(index) and not library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            handles.append(handle)

    def read(handle: ctypes.c_void_p) -> float | None:
        millijoules = ctypes.c_ulonglong()
        failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1e3

    return [Counter("NVML", lambda handle=handle: read(handle)) for handle in handles]  # type: ignore[misc]


def _is_visible(index: int) -> bool:
    """By number; where the variable holds other names, all GPUs count."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return True
    names = [name.strip() for name in asked.split(",") if name.strip()]
    return str(index) in names or any(not name.isdigit() for name in names)
