"""Energy is counted where counters can be read, over their overflow, and is None elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nnunet_fedharm.study.energy import Counter, measured, nvml_counters, rapl_counters


def package(folder: Path, name: str, microjoules: int, wraps: int = 10_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps}\n")
    return path


def test_packages_are_added_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 1_000_000), package(tmp_path, "intel-rapl:1", 9_500_000)
    package(tmp_path, "intel-rapl:0:0", 5)
    with measured(rapl_counters(tmp_path), every_s=60) as energy:
        (first / "energy_uj").write_text("4000000")
        (second / "energy_uj").write_text("500000")  # started again at 0
    assert energy.joules == pytest.approx(3.0 + 1.0)
    assert energy.counters == ("RAPL",)


def test_a_counter_that_overflows_twice_is_followed(tmp_path: Path) -> None:
    values = iter([0.0, 0.0, 8.0, 4.0, 2.0])
    last = [0.0]

    def read() -> float:
        last[0] = next(values, last[0])
        return last[0]

    with measured([Counter("RAPL", read, 10.0)], every_s=0.02) as energy:
        time.sleep(0.3)
    assert energy.joules == pytest.approx(8.0 + 6.0 + 8.0)


def test_without_a_readable_counter_nothing_is_claimed(tmp_path: Path) -> None:
    (package(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text("denied")
    with measured(rapl_counters(tmp_path)) as energy:
        pass
    assert (energy.joules, energy.counters) == (None, ())
    assert isinstance(nvml_counters(), list)
