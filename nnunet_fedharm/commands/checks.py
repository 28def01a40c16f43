"""The checks of `nnunet-fedharm doctor`: each looks at one thing and never raises."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warning", "problem"]

NNUNET_TESTED = ("2.8.1", "2.9")
"""Tested from the first, below the second; trainers override hooks whose signatures change between minor versions."""

FLOWER_TESTED = ("1.41", "1.42")
LOW_DISK_GB = 5.0
PATH_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
FLOWER_PORT_VARIABLE = "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
"""Flower 1.41 reads it for the local SuperLink that `flwr run` starts; 39091 when unset."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `warning` limits something, `problem` stops training, federation or prediction.
        found: what is there, in a few words.
        mend: the one line to run; empty when nothing has to be done.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_numbers(text: str) -> tuple[int, ...]:
    """`2.8.1` -> (2, 8, 1), up to the first part that is no number."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_python() -> Check:
    found = sys.version.split()[0]
    if sys.version_info < (3, 11):  # noqa: UP036 - a copied source tree may run on any Python
        return Check("Python", "problem", found, "install Python 3.11 or newer and run: python3 start.py demo")
    return Check("Python", "ok", f"{found} at {sys.executable}")


def check_torch() -> Check:
    mend = f"{sys.executable} -m pip install --force-reinstall -c constraints.txt torch torchvision"
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's operators do not fit this torch
        return Check("torch, torchvision", "problem", f"do not import: {str(error)[:160]}", mend)
    return Check("torch, torchvision", "ok", f"{torch.__version__}, {torchvision.__version__}")


def check_version(name: str, package: str, tested: tuple[str, str]) -> Check:
    found = installed(package)
    mend = f'{sys.executable} -m pip install "{package}>={tested[0]},<{tested[1]}"'
    if found is None:
        return Check(name, "problem", "not installed", mend)
    if not as_numbers(tested[0]) <= as_numbers(found) < as_numbers(tested[1]):
        return Check(name, "warning", f"{found}; tested with {tested[0]} up to below {tested[1]}", mend)
    return Check(name, "ok", found)


def check_nnunet_version() -> Check:
    return check_version("nnU-Net", "nnunetv2", NNUNET_TESTED)


def check_flower() -> Check:
    if installed("flwr") is not None and installed("ray") is None:
        mend = f'{sys.executable} -m pip install -c constraints.txt "flwr[simulation]"'
        return Check("Flower", "problem", "installed without ray, which runs the simulated sites", mend)
    return check_version("Flower", "flwr", FLOWER_TESTED)


def check_paths(*, fix: bool) -> list[Check]:
    """nnU-Net's three folders. Unset is a warning only: a federation brings its own folders for every site."""
    return [check_path(variable, fix=fix) for variable in PATH_VARIABLES]


def check_path(variable: str, *, fix: bool) -> Check:
    value = os.environ.get(variable)
    if not value:
        return Check(
            variable, "warning", "not set; nnUNetv2_* and `plan` need it", f"export {variable}=$HOME/{variable}"
        )
    folder = Path(value)
    if fix and not folder.exists():
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            return Check(variable, "problem", f"{folder} cannot be made: {error.strerror}", f"export {variable}=FOLDER")
    if not folder.is_dir():
        return Check(variable, "problem", f"{folder} does not exist", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        return Check(variable, "problem", f"{folder} cannot be written", f"chmod u+w {folder}")
    return Check(variable, "ok", str(folder))


def check_radiomics() -> Check:
    found = installed("pyradiomics")
    if found is None:
        mend = f"{sys.executable} -m pip install numpy setuptools wheel && {sys.executable} -m pip install "
        mend += "--no-build-isolation pyradiomics==3.0.1"
        return Check("pyradiomics", "warning", "not installed; only radiomics features need it", mend)
    return Check("pyradiomics", "ok", found)


def check_gpu() -> Check:
    try:
        import torch
    except (ImportError, RuntimeError):
        return Check("GPU", "warning", "unknown: torch does not import")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check("GPU", "ok", names)
    if torch.backends.mps.is_available():
        return Check("GPU", "ok", "Apple MPS")
    mend = "export nnUNet_compile=f nnUNet_n_proc_DA=0 (training only), and plan small networks: --base-features 8"
    return Check("GPU", "warning", "none; training runs on the CPU", mend)


def check_disk() -> Check:
    folder = Path(os.environ.get("nnUNet_preprocessed") or Path.cwd())
    if not folder.exists():
        folder = Path.cwd()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < LOW_DISK_GB:
        return Check("free disk", "warning", f"{free_gb:.1f} GB at {folder}", "free some space before you preprocess")
    return Check("free disk", "ok", f"{free_gb:.0f} GB at {folder}")


def check_flower_daemon() -> Check:
    """A local SuperLink keeps the environment of its first start, so a later `flwr run` may read other folders.

    Only a warning: `nnunet-fedharm federate` starts and stops a SuperLink of its own.
    """
    from nnunet_fedharm.federation.daemon import is_answering

    name = "Flower daemon"
    port = os.environ.get(FLOWER_PORT_VARIABLE, "39091")
    if not is_answering(port):
        return Check(name, "ok", f"none on 127.0.0.1:{port}")
    process = superlink_process(port)
    if process is None:
        return Check(
            name, "warning", f"a SuperLink answers on 127.0.0.1:{port}; its environment cannot be read", "stop it"
        )
    pid, programs, environment = process
    differs = [key for key in PATH_VARIABLES if environment.get(key) != os.environ.get(key)]
    if programs != Path(sys.executable).parent:
        differs.append(f"Python environment ({programs})")
    if differs:
        found = f"stale for `flwr run`: process {pid} was started with another {', '.join(differs)}"
        return Check(name, "warning", found, f"kill {pid}")
    return Check(name, "ok", f"process {pid} on 127.0.0.1:{port}, same environment")


def superlink_process(port: str) -> tuple[int, Path, dict[str, str]] | None:
    """(process id, folder of its program, environment) of the local SuperLink on this port, as /proc tells.

    Returns:
        None where /proc does not tell: not Linux, or a process of another user.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            program = next((word for word in words if Path(word).name == "flower-superlink"), None)
            if program is None or port not in words:
                continue
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process ended meanwhile, or belongs to somebody else
            continue
        return int(folder.name), Path(program).parent, dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return None
