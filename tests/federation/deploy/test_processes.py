"""Children of `server start` and `site start`: their logs stay small while they run for weeks."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

import pytest

from nnunet_fedharm.federation.deploy import processes
from nnunet_fedharm.federation.deploy.processes import children

CHATTY = "import time\nfor number in range(100000):\n    print('line', number, flush=True)\n    time.sleep(0.0005)"


def test_a_log_stays_small_while_its_child_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LOG_BYTES", 20_000)
    monkeypatch.setattr(processes, "_LAST_BYTES", 500)
    with children(tmp_path, {}) as family:
        family.start("talker", [sys.executable, "-c", CHATTY])
        path, older = family.log("talker"), tmp_path / "talker.log.1"
        end = time.monotonic() + 60
        rotated = 0
        while rotated < 2 and time.monotonic() < end:
            before = path.stat().st_size
            family.check()
            rotated += path.stat().st_size < before
            assert "line" in family.said("talker") or not before, "its last words are known all the time"
            time.sleep(0.02)
        assert rotated == 2
        assert path.stat().st_size < 40_000
        assert b"\0" not in path.read_bytes(), "the child goes on at the new end"
        assert older.stat().st_size >= 20_000
        assert {stat.S_IMODE(file.stat().st_mode) for file in (path, older)} == {0o600}
        path.unlink()
        family.check()  # somebody's logrotate is no reason to end
