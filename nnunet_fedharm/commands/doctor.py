"""`nnunet-fedharm doctor`: is this machine ready, and which line mends what is not."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nnunet_fedharm.commands.checks import (
    Check,
    check_disk,
    check_flower,
    check_flower_daemon,
    check_gpu,
    check_nnunet_version,
    check_paths,
    check_python,
    check_radiomics,
    check_torch,
)

HELP = "Check every precondition of training, federation and prediction; each finding names the line that mends it."

TRAINERS = (
    "nnUNetTrainerFedHarm",
    "nnUNetTrainerFedHarmNone",
    "nnUNetTrainerFedHarmAugment",
    "nnUNetTrainerFedHarmNyul",
    "nnUNetTrainerFedHarmCurve",
    "nnUNetTrainerFedHarmPolarity",
    "nnUNetTrainerFedHarmCycleGAN",
    "nnUNetTrainerFedHarmDiffusion",
)
BRIDGE = Path(__file__).parents[1] / "nnunet_ext" / "nnunet_fedharm_trainers.py"

_DISCOVERY = """
import json, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
print("\\n" + json.dumps({name: find(name).__module__ for name in sys.argv[1:]}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fix",
        action="store_true",
        help="put the bridge module into nnU-Net's trainer folder if it is missing there, make missing nnU-Net folders",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line a check, and below a warning or problem the line that mends it.

    Returns:
        1 if any check is a problem, else 0.
    """
    checks = [
        check_python(),
        check_torch(),
        check_nnunet_version(),
        check_trainers(fix=args.fix),
        *check_paths(fix=args.fix),
        check_radiomics(),
        check_flower(),
        check_flower_daemon(),
        check_gpu(),
        check_disk(),
    ]
    for check in checks:
        print(f"{check.status:<8} {check.name:<20} {check.found}")
        if check.mend:
            print(f"{'':<8} {'':<20} -> {check.mend}")
    problems = sum(check.status == "problem" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    print(f"\n{problems} problems, {warnings} warnings" if problems or warnings else "\neverything is ready")
    return 1 if problems else 0


def discovered_trainers() -> dict[str, str]:
    """Trainer name -> defining module, as unmodified nnU-Net finds them in a new process outside this folder.

    Raises:
        subprocess.CalledProcessError: nnU-Net does not find one of them; its message is in `stderr`.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        answer = subprocess.run(
            [sys.executable, "-c", _DISCOVERY, *TRAINERS], cwd=elsewhere, capture_output=True, text=True, check=True
        )
    return dict(json.loads(answer.stdout.strip().splitlines()[-1]))


def check_trainers(*, fix: bool) -> Check:
    """Whether `nnUNetv2_train -tr` and `nnUNetv2_predict` find our classes with nothing exported by hand."""
    name = "trainers"
    try:
        found = discovered_trainers()
    except subprocess.CalledProcessError as error:
        if fix and (written := write_bridge()) is not None:
            again = check_trainers(fix=False)
            return again if again.status != "ok" else Check(name, "ok", f"{again.found}; wrote {written}")
        return Check(name, "problem", *explain_failure(error.stderr))
    return Check(
        name, "ok", f"nnU-Net finds {len(found)} of {len(TRAINERS)} in {', '.join(sorted(set(found.values())))}"
    )


def explain_failure(stderr: str) -> tuple[str, str]:
    """What nnU-Net said when it searched, and the line that mends it."""
    reason = next(iter(reversed(stderr.strip().splitlines())), "nnU-Net gave no reason")[:200]
    if "Could not find requested nnunet trainer" in stderr:
        export = f"export nnUNet_extTrainer={BRIDGE.parent}{os.pathsep}$nnUNet_extTrainer"
        return "unmodified nnU-Net does not find them", f"nnunet-fedharm doctor --fix   or   {export}"
    return f"they do not import: {reason}", f"{sys.executable} -m pip install --force-reinstall -c constraints.txt ."


def write_bridge() -> Path | None:
    """Copy the bridge module into the installed nnU-Net; None if nnU-Net is missing or its folder is read-only."""
    from importlib.util import find_spec

    spec = find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        return None
    target = Path(spec.submodule_search_locations[0], "training", "nnUNetTrainer", "variants", BRIDGE.name)
    try:
        target.write_bytes(BRIDGE.read_bytes())
    except OSError:
        return None
    return target
