"""Commands of the pages that no test of this folder runs, how many of each there are, and why."""

from __future__ import annotations

import re

STUDY = "nnunet-fedharm study"
ELSEWHERE = (
    (
        r"python3 start.py (demo|test)",
        2,
        "makes an environment and runs this suite; tests/packaging/test_start.py has its parts",
    ),
    (r"python benchmarks/.*", 13, "hours of computing; results and their date stand on the page"),
    (f"{STUDY} (prepare|run|report) study3d", 3, "goes with the benchmark above it: hours"),
    (r"10 volumes|fold +distance.*|all +0\.117.*", 3, "what a command prints"),
)
"""A pattern, the number of commands that it takes, and the reason; the first entry that fits counts."""


def listed(command: str) -> str | None:
    """The entry that a command falls under."""
    return next((item for item, _, _ in ELSEWHERE if re.fullmatch(item, command)), None)
