"""Whether a site's device is there, asked of a process of its own: `site start` stays for weeks and holds no torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

_LOG = logging.getLogger(__name__)
_WAIT_S = 120.0
_QUESTION = """
import sys, torch
try:
    device = torch.device(sys.argv[1])
except RuntimeError:
    print("unknown")
    sys.exit()
if device.type == "cuda":
    print(torch.cuda.device_count() - (device.index or 0))
elif device.type == "mps":
    print(int(torch.backends.mps.is_available()))
else:
    print(1 if device.type == "cpu" else "unknown")
"""


def device_trouble(device: str, *, file: Path) -> str:
    """Why a device cannot be used here, and what to do; empty where it can, or where nobody can tell.

    Args:
        file: where the device stands.
    """
    if device == "cpu":
        return ""
    said = f"{file} says device = {json.dumps(device)}"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _QUESTION, device], capture_output=True, text=True, timeout=_WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        _LOG.warning("torch did not say within %.0f s whether there is a device %s.", _WAIT_S, device)
        return ""
    answer = (asked.stdout.split() or [""])[-1]
    if asked.returncode or not answer:
        last = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        return f"{said}, and torch does not start here ({last[:200]}). Run `nnunet-fedharm doctor`."
    if answer == "unknown":
        return f"{said}, which is no device: write cuda, cuda:1, mps or cpu."
    if int(answer) > 0:
        return ""
    what = "no GPU is here" if device in ("cuda", "cuda:0", "mps") else "there are fewer GPUs here"
    return f'{said}, and {what}: set device = "cpu", or mend the driver if there is one (`nnunet-fedharm doctor`).'
