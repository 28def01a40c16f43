"""Promises of the repository itself; needs a clone, so the wheel check leaves it out."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def text(name: str) -> str:
    return (REPOSITORY / name).read_text()


@pytest.mark.parametrize("name", ["harmonizers", "trainers"])
def test_symlinks_are_committed_and_relative(name: str) -> None:
    listed = subprocess.check_output(
        ["git", "ls-files", "--stage", f"nnunet_fedharm/{name}"], cwd=REPOSITORY, text=True
    )
    assert listed.startswith("120000 ")
    assert (REPOSITORY / "nnunet_fedharm" / name).readlink() == Path("..", name)


def test_setup_does_nothing_when_it_is_imported() -> None:
    code = "import runpy; runpy.run_path('setup.py', run_name='setup')"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_readme_commands_exist_in_start_py() -> None:
    commands = re.findall(r"^python3 start\.py (\w+)$", text("README.md"), flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    helped = subprocess.check_output([sys.executable, "start.py", "--help"], cwd=REPOSITORY, text=True)
    assert "{demo,test}" in helped


def test_ci_runs_the_readme_test_command() -> None:
    assert "python3 start.py test" in text(".ci/run")


def test_start_py_reads_with_old_pythons_and_needs_no_package() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", text("start.py"), flags=re.MULTILINE)
    assert set(imported) <= set(sys.stdlib_module_names)
    compile(text("start.py"), "start.py", "exec", dont_inherit=True)


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    pinned = {line.split("==")[0].lower() for line in text("constraints.txt").splitlines() if "==" in line}
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted}
    assert names <= pinned


def test_constraints_are_exact_and_without_extras() -> None:
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)


def test_layers_are_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_modules_stay_short() -> None:
    """Past 300 lines a module wants to be two; a little air is left for what is being split."""
    folders = ("nnunet_fedharm", "harmonizers", "trainers")
    sizes = {
        path: len(path.read_text().splitlines()) for folder in folders for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert {str(path): lines for path, lines in sizes.items() if lines > 330} == {}


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_navigation_lists_every_page() -> None:
    listed = set(re.findall(r"[\w/.-]+\.md", text("mkdocs.yml")))
    there = {page.relative_to(REPOSITORY / "docs").as_posix() for page in (REPOSITORY / "docs").rglob("*.md")}
    assert listed == there
