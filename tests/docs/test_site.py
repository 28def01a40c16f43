"""The pages become a site: every link leads somewhere, every page is in the navigation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
REASON = "mkdocs-material is not installed (extra `docs`)"


def build(configuration: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Not with -q: it hides warnings from the count that --strict goes by."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            os.fspath(configuration),
            "-d",
            os.fspath(target),
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_documentation_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason=REASON)
    shown = build(REPOSITORY / "mkdocs.yml", tmp_path / "site")
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "site" / "how-to" / "study" / "index.html").is_file()


@pytest.mark.parametrize(
    ("link", "said"),
    [("gone.md", "gone.md"), ("other.md#no-such-heading", "no-such-heading"), ("/other.md", "absolute link")],
)
def test_a_broken_link_would_fail_it(tmp_path: Path, link: str, said: str) -> None:
    """The same configuration over two small pages; a third one is in no navigation."""
    pytest.importorskip("material", reason=REASON)
    head = (REPOSITORY / "mkdocs.yml").read_text().split("nav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{head}nav:\n  - index.md\n  - other.md\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[there](other.md#other)\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode == 0
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n[there]({link})\n")
    shown = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert shown.returncode != 0
    assert said in shown.stderr
