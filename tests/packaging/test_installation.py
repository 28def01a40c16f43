"""The installed package: editable in the default suite, and the wheel when start.py runs this file elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import distribution, version
from importlib.resources import files
from pathlib import Path

import pytest

import nnunet_fedharm
from nnunet_fedharm import trainers
from nnunet_fedharm.commands.doctor import BRIDGE, TRAINERS, discovered_trainers

_PICKLE_ROUND_TRIP = """
import json, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
names = sys.argv[1:]
classes = [find(name) for name in names]
print("\\n" + json.dumps([pickle.loads(pickle.dumps(c)) is c and issubclass(c, nnUNetTrainer) for c in classes]))
"""


def in_new_process(code: str, *arguments: str, cwd: Path, **environment: str) -> object:
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.strip().splitlines()[-1])


@pytest.mark.skipif("NNUNET_FEDHARM_INSTALLED_IN" not in os.environ, reason="only for the wheel check of start.py")
def test_the_package_comes_from_the_wheel_and_not_from_the_repository() -> None:
    where = Path(os.environ["NNUNET_FEDHARM_INSTALLED_IN"])
    assert Path(nnunet_fedharm.__file__).is_relative_to(where)
    assert distribution("nnunet_fedharm").read_text("RECORD") is not None
    assert not any("__editable__" in str(file) for file in distribution("nnunet_fedharm").files or [])


def test_metadata_and_package_name_the_same_version() -> None:
    assert version("nnunet_fedharm") == nnunet_fedharm.__version__


def test_unmodified_nnunet_finds_every_trainer_in_a_new_process_and_by_its_own_module() -> None:
    found = discovered_trainers()
    assert set(found) == set(TRAINERS)
    assert all(module.startswith("nnunet_fedharm.trainers") for module in found.values())


def test_found_trainers_survive_pickling_and_subclass_the_stock_trainer(tmp_path: Path) -> None:
    assert in_new_process(_PICKLE_ROUND_TRIP, *TRAINERS, cwd=tmp_path) == [True] * len(TRAINERS)


def test_bridge_folder_also_works_as_nnunet_exttrainer(tmp_path: Path) -> None:
    code = _PICKLE_ROUND_TRIP.replace("find(name)", "external(name)").replace(
        "names = ",
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as search\n"
        f"external = lambda name: search({str(BRIDGE.parent)!r}, name, None, {str(BRIDGE.parent)!r}, False, True)\n"
        "names = ",
    )
    assert in_new_process(code, *TRAINERS, cwd=tmp_path) == [True] * len(TRAINERS)


def test_bridge_only_reexports_and_is_no_package() -> None:
    tree = ast.parse(BRIDGE.read_text())
    assert [type(node) for node in tree.body] == [ast.Expr, ast.ImportFrom]
    assert {name for name in trainers.__all__ if name.startswith("nnUNetTrainer")} == set(TRAINERS)
    assert not (BRIDGE.parent / "__init__.py").exists()


def test_package_data_is_installed() -> None:
    package = files("nnunet_fedharm")
    assert (package / "nnunet_ext" / "nnunet_fedharm_trainers.py").is_file()
    assert (package / "flower_app" / "pyproject.toml").is_file()
    assert (package / "py.typed").is_file()


def test_no_generic_top_level_names_reach_site_packages(tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec as f; print([f('trainers'), f('harmonizers')] == [None, None] and 'true')"
    )
    assert in_new_process(code, cwd=tmp_path) is True


def test_nnunet_names_its_paths_at_each_use_so_that_one_process_can_serve_several_roots(tmp_path: Path) -> None:
    from nnunetv2 import paths

    from nnunet_fedharm.nnunet_root import NnunetRoot

    for site in ("A", "B"):
        with NnunetRoot(tmp_path / site).activate() as root:
            assert Path(os.fspath(paths.nnUNet_raw)) == root.raw
    assert not paths.nnUNet_raw.is_set()


def test_errors_survive_pickling() -> None:
    from nnunet_fedharm.errors import SetupError

    assert str(pickle.loads(pickle.dumps(SetupError("one sentence")))) == "one sentence"  # noqa: S301
