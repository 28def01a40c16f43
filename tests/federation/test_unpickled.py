"""Nothing that comes over the network is unpickled: neither here nor in what we use of Flower."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

import nnunet_fedharm
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import decode

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"}
FLOWER_PATH = ("app", "clientapp", "common", "proto", "serverapp", "supercore", "superlink", "supernode")
"""Everything of Flower that a message of a deployment passes; its simulation, which is on one machine, pickles."""


def uses(path: Path) -> list[str]:
    """Forbidden imports and calls of a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("allow_pickle") != "False":
                found.append(f"{ast.unparse(node.func)} in line {node.lineno}")
    return found


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import pickle\nfrom dill import loads\nimport numpy as np\nnp.load('a')\nnp.load('a', allow_pickle=False)\n"
    )
    assert uses(path) == ["pickle", "dill", "np.load in line 4"]


@pytest.mark.parametrize("room", ["federation", "privacy"])
def test_no_module_that_meets_messages_unpickles(room: str) -> None:
    folder = Path(nnunet_fedharm.__file__).parent / room
    found = {str(path.relative_to(folder)): uses(path) for path in folder.rglob("*.py")}
    assert {name: what for name, what in found.items() if what} == {}


def test_neither_does_flower_on_the_way_of_a_message() -> None:
    root = Path(flwr.__file__).parent
    found = {
        str(path.relative_to(root)): uses(path) for folder in FLOWER_PATH for path in (root / folder).rglob("*.py")
    }
    assert {name: what for name, what in found.items() if what} == {}


def test_an_array_of_objects_is_refused_before_it_is_read() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    for dtype in ("object", "float32"):
        record = ArrayRecord({"w": Array(dtype=dtype, shape=(1,), stype="numpy.ndarray", data=stream.getvalue())})
        with pytest.raises(FederationError, match="Cannot read w from A"):
            decode(record, source="A")
