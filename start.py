#!/usr/bin/env python3
"""From a clone to a running demo or test suite: `python3 start.py demo`, `python3 start.py test`.

Needs Python 3.11 or newer and nothing else; works on Linux, macOS and Windows. Everything is installed in a virtual
environment (`.venv` in this folder, `--venv PATH`, or the environment variable NNUNET_FEDHARM_VENV). The second call
finds it ready. Standard library only, and no syntax that an older Python cannot read, so that it can say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
MINIMUM_PYTHON = (3, 11)
NEEDED_GB = 12
"""A Linux environment with PyTorch's CUDA build takes about 6 GB; pip's cache holds the downloads once more."""

STAMP = "nnunet-fedharm-setup.json"
WHEEL_TESTS = ("__init__.py", "conftest.py", "packaging", "test_cli.py", "test_doctor.py")
"""What is run a second time against the installed wheel, from outside the repository; see tests/packaging."""


TEST_WORKERS = 4
"""Most tests at the same time: some start a federation of several processes, so more would crowd a small machine."""


class Refused(Exception):
    """One sentence for the user; no traceback."""


def say(text: str) -> None:
    print(f"[start] {text}", flush=True)


def call(*words: object, cwd: Path = REPOSITORY, **environment: str) -> int:
    """Echo a command, run it, return its exit status."""
    command = [str(word) for word in words]
    say("$ " + " ".join(f'"{word}"' if " " in word else word for word in command))
    began = time.monotonic()
    status = subprocess.call(command, cwd=cwd, env={**os.environ, **environment})
    say(f"  exit status {status} after {time.monotonic() - began:.0f} s")
    return status


def must(*words: object, why: str) -> None:
    if call(*words) != 0:
        raise Refused(why)


def check_python() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(str(number) for number in sys.version_info[:3])
        raise Refused(f"Python {found} is too old: run start.py with Python 3.11 or newer (https://www.python.org).")


def check_disk(venv: Path) -> None:
    folder = next(parent for parent in (venv, *venv.parents) if parent.exists())
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB:
        raise Refused(
            f"{folder} has {free_gb:.1f} GB free and the environment needs about {NEEDED_GB} GB: free some space, or "
            "choose another disk with --venv PATH."
        )


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_packages_of(venv: Path) -> Path:
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python_of(venv)), "-c", question], text=True).strip())


def digest(paths: list[Path]) -> str:
    total = hashlib.sha256(sys.version.encode())
    for path in sorted(paths):
        total.update(path.relative_to(REPOSITORY).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def requirements_digest() -> str:
    return digest([REPOSITORY / name for name in ("constraints.txt", "pyproject.toml", "setup.py")])


def sources_digest() -> str:
    """Of everything that a regular install copies."""
    folders = [REPOSITORY / name for name in ("nnunet_fedharm", "harmonizers", "trainers")]
    return digest([path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".toml")])


def read_stamp(venv: Path) -> dict[str, str]:
    try:
        return dict(json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError):
        return {}


def make_environment(venv: Path) -> None:
    """The virtual environment itself, with what source builds need."""
    if not python_of(venv).exists():
        must(
            *(sys.executable, "-m", "venv", venv),
            why=f"Python cannot make a virtual environment at {venv}. On Debian and Ubuntu: apt install python3-venv.",
        )
    pip_install(venv, "numpy", "setuptools", "wheel")


def pip_install(venv: Path, *words: str) -> None:
    must(
        *(python_of(venv), "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation"),
        *("-c", REPOSITORY / "constraints.txt", *words),
        why="pip could not install what the last lines above name. Check the network and the free disk, and run the "
        "same command again: it goes on where it stopped.",
    )


def install_radiomics(venv: Path) -> None:
    """pyradiomics has no wheel for Python 3.9+; its sdist builds only without isolation, after numpy."""
    command = (python_of(venv), "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation")
    if call(*command, "-c", REPOSITORY / "constraints.txt", "pyradiomics==3.0.1") != 0:
        say(
            "pyradiomics could not be built: it needs a C compiler and Python's headers (Debian: apt install gcc "
            "python3-dev). Everything but radiomics features works without it; going on."
        )


def set_up(venv: Path, *, develop: bool) -> None:
    """Bring the environment up to date; a stamp file says what is in it.

    Args:
        venv: the environment's folder.
        develop: editable install with the development tools; otherwise a regular install.
    """
    stamp = read_stamp(venv)
    wanted = {"requirements": requirements_digest(), "mode": "develop" if develop else "regular"}
    same_requirements = stamp.get("requirements") == wanted["requirements"] and python_of(venv).exists()
    editable_is_ready = same_requirements and stamp.get("mode") == "develop"
    if editable_is_ready or (not develop and same_requirements and stamp.get("sources") == sources_digest()):
        say(f"environment ready: {venv}")
        return
    check_disk(venv)
    say(f"setting up {venv} (some GB of downloads the first time, a few minutes)")
    make_environment(venv)
    if not same_requirements:
        install_radiomics(venv)
    shutil.rmtree(REPOSITORY / "build", ignore_errors=True)  # a former build's leftovers would enter the new one
    pip_install(venv, *(["-e", ".[dev]"] if develop else ["."]))
    if not develop:
        wanted["sources"] = sources_digest()
    (venv / STAMP).write_text(json.dumps(wanted, indent=1))
    call(python_of(venv), "-P", "-m", "nnunet_fedharm.cli", "doctor", "--fix", cwd=venv)


def run_demo(venv: Path, extra: list[str]) -> int:
    set_up(venv, develop=False)
    # -P: the installed package runs, not the clone's folder of the same name.
    return call(python_of(venv), "-P", "-m", "nnunet_fedharm.cli", "demo", *extra, cwd=Path.cwd())


def run_tests(venv: Path, extra: list[str]) -> int:
    """Linters, types, layers, tests, and the wheel; all of them run, then the failed ones are named."""
    set_up(venv, develop=True)
    python = python_of(venv)
    lint_imports = python.with_name("lint-imports" + (".exe" if os.name == "nt" else ""))
    results = {
        "ruff check": call(python, "-m", "ruff", "check", "."),
        "ruff format": call(python, "-m", "ruff", "format", "--check", "."),
        "mypy": call(python, "-m", "mypy"),
        "import-linter": call(lint_imports),
        "pytest": call(
            python,
            *(
                "-m",
                "pytest",
                "-n",
                min(TEST_WORKERS, os.cpu_count() or 1),
                "--dist",
                "loadfile",
                "--no-loadscope-reorder",
                "--durations",
                "30",
            ),
            *extra,
        ),
        "wheel": check_wheel(venv),
    }
    for name, status in results.items():
        say(f"{name:<14} {'passed' if status == 0 else f'FAILED (exit status {status})'}")
    return 0 if not any(results.values()) else 1


def check_wheel(venv: Path) -> int:
    """Build the wheel, install it beside the packages of `venv`, and run part of the tests outside the repository."""
    with tempfile.TemporaryDirectory(prefix="nnunet-fedharm-wheel-") as name:
        folder = Path(name).resolve()
        shutil.rmtree(REPOSITORY / "build", ignore_errors=True)
        pip = (python_of(venv), "-m", "pip", "--disable-pip-version-check")
        if call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, REPOSITORY) != 0:
            return 1
        second = borrow_packages(venv, folder / "venv")
        wheel = next(folder.glob("*.whl"))
        if call(*pip, "--python", python_of(second), "install", "-q", "--no-deps", wheel) != 0:
            return 1
        tests = folder / "outside" / "tests"
        tests.mkdir(parents=True)
        for item in WHEEL_TESTS:
            source = REPOSITORY / "tests" / item
            if source.is_dir():
                shutil.copytree(
                    source,
                    tests / item,
                    ignore=shutil.ignore_patterns("__pycache__", "test_repository.py", "test_start.py"),
                )
            else:
                shutil.copy(source, tests)
        shutil.copy(REPOSITORY / "pyproject.toml", tests.parent)
        expected = str(site_packages_of(second))
        command = (python_of(second), "-m", "pytest", "-p", "no:cacheprovider")
        return call(*command, cwd=tests.parent, NNUNET_FEDHARM_INSTALLED_IN=expected, PYTHONPATH="")


def borrow_packages(first: Path, second: Path) -> Path:
    """A second environment that sees the first one's packages, but not its editable install of ours.

    A plain path in a .pth file adds the folder without running the .pth files inside it, where the editable install
    lives. nnU-Net is copied, since our wheel adds a module to its trainer folder.
    """
    must(python_of(first), "-m", "venv", "--without-pip", second, why=f"cannot make an environment at {second}")
    lent, own = site_packages_of(first), site_packages_of(second)
    (own / "borrowed.pth").write_text(f"{lent}\n")
    bridge = shutil.ignore_patterns("__pycache__", "nnunet_fedharm_trainers.py")
    for item in lent.glob("nnunetv2*"):
        shutil.copytree(item, own / item.name, ignore=bridge)
    return second


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "what", choices=["demo", "test"], help="demo: train and predict on shipped data; test: all checks"
    )
    default = os.environ.get("NNUNET_FEDHARM_VENV") or REPOSITORY / ".venv"
    parser.add_argument(
        "--venv", type=Path, default=Path(default), help="the virtual environment (default: %(default)s)"
    )
    options, extra = parser.parse_known_args()
    try:
        check_python()
        run = run_demo if options.what == "demo" else run_tests
        return run(options.venv.absolute(), extra)
    except Refused as reason:
        say(str(reason))
        return 2
    except KeyboardInterrupt:
        say("interrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
