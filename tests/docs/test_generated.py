"""Pages that follow from the code are up to date, and the architecture page tells the truth about rooms."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", REPOSITORY / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says_now(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    old = [str(path) for path, text in generator.pages().items() if path.read_text(encoding="utf-8") != text]
    assert old == [], "run: python docs/generate.py"


def test_every_command_and_every_key_of_a_study_is_in_the_reference() -> None:
    from nnunet_fedharm.cli import COMMANDS

    commands = (REPOSITORY / "docs" / "reference" / "commands.md").read_text()
    assert [name for name in COMMANDS if f"\n## {name}\n" not in commands] == []
    assert "`--segmenter-rounds" in commands
    assert "/root" not in commands  # no default is taken from the machine that wrote the page
    study = (REPOSITORY / "docs" / "reference" / "study-file.md").read_text()
    assert "| `margin` | 0.02 |" in study


def test_rooms_are_import_linters_layers_and_use_lower_ones_only(generator: ModuleType) -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(item["layers"] for item in contracts if item["type"] == "layers")
    order = [[name.strip() for name in layer.split("|")] for layer in layers]
    level = {name: len(order) - index for index, names in enumerate(order) for name in names}
    table = (REPOSITORY / "docs" / "architecture.md").read_text().split("<!-- generated: rooms -->")[1]
    listed = re.findall(r"^\| `(\w+)` \|", table.split("<!-- end -->")[0], flags=re.M)
    assert listed == [name for names in order for name in names if not name.startswith("(")]
    for room, used in generator.uses().items():
        assert room in level or room == "__init__", f"{room} is in no layer"
        assert all(level[other] < level[room] for other in used), room


def test_the_picture_is_readable_without_its_page() -> None:
    text = (REPOSITORY / "docs" / "architecture.svg").read_text()
    picture = ElementTree.fromstring(text)
    assert picture.get("viewBox")
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_a_block_that_is_not_marked_once_is_refused(generator: ModuleType) -> None:
    page = "<!-- generated: x -->\nold\n<!-- end -->\n"
    assert "new" in generator.with_block(page, "x", "new")
    with pytest.raises(ValueError, match="once"):
        generator.with_block(page, "y", "new")
