"""The set-up script's own decisions; CI runs the set-up itself. Needs a clone, so the wheel check leaves it out."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start", REPOSITORY / "start.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_is_refused_in_one_sentence(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(start.Refused, match=r"Python 3\.10\.4 is too old: .* Python 3\.11 or newer"):
        start.check_python()


def test_a_full_disk_is_refused_before_anything_is_made(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    with pytest.raises(start.Refused, match=r"3\.0 GB free .* --venv PATH"):
        start.set_up(tmp_path / "deep" / "venv", develop=False)
    assert list(tmp_path.iterdir()) == []


def test_a_ready_environment_is_left_alone(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "call", lambda *_, **__: pytest.fail("nothing has to be run"))
    python = start.python_of(tmp_path)
    python.parent.mkdir()
    python.touch()
    (tmp_path / start.STAMP).write_text(json.dumps({"requirements": start.requirements_digest(), "mode": "develop"}))
    start.set_up(tmp_path, develop=True)
    start.set_up(tmp_path, develop=False)
    assert capsys.readouterr().out.count("environment ready") == 2


@pytest.mark.parametrize("stamp", ["", "{", json.dumps({"requirements": "older", "mode": "develop"})])
def test_a_stale_or_broken_stamp_means_a_new_set_up(
    start: ModuleType, stamp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / start.STAMP).write_text(stamp)
    monkeypatch.setattr(start, "call", lambda *_, **__: 1)
    with pytest.raises(start.Refused, match="virtual environment"):
        start.set_up(tmp_path, develop=True)


def test_a_missing_compiler_costs_the_radiomics_only(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "call", lambda *_, **__: 1)
    start.install_radiomics(tmp_path)
    assert "C compiler" in capsys.readouterr().out
