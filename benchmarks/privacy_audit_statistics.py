"""The part of `privacy_audit.py` about statistics: the command on all four hospitals, and the same audit on broken mechanisms."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_fedharm import cli
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.privacy.options import PrivacyOptions
from tests.evaluation.audit.broken import statistics_noise, statistics_without_bounds

NAME, PLANS = "Dataset910_HippocampusSites", "auditPlans"
BROKEN: dict[str, tuple[Callable[[], AbstractContextManager[None]], int]] = {
    "noise off": (partial(statistics_noise, 1e-3), 100),
    "half of the noise": (partial(statistics_noise, 0.5), 1000),
    "three quarters of the noise": (partial(statistics_noise, 0.75), 1000),
    "clipping off": (statistics_without_bounds, 100),
}
"""Name -> what breaks it, and scores of each kind."""
COLUMNS = ("patients", "noise_multiplier", "noise_most", "share", "together", "epsilon_low", "gaussian_low", "claimed")


def sites_root(data: Path, root: NnunetRoot, privacy: PrivacyOptions) -> None:
    """All hospitals in one place, planned for a private training with `polarity`; images are linked, not copied."""
    if (root.preprocessed / NAME / f"{PLANS}.json").is_file():
        return
    raw = root.create().raw / NAME
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("imagesTr", "labelsTr", "sites.json", "dataset.json"):
        if not (raw / part).exists():
            (raw / part).symlink_to((data / part).resolve())
    options = CentralOptions(
        configurations=("2d",), kind="polarity", reference="A", privacy=privacy, check=False,
        schedule=Schedule(harmonizer_epochs=1, segmenter_epochs=15, iterations_per_epoch=20, val_iterations_per_epoch=1),
        plan=PlanOptions(base_features=32, max_features=128, batch_size=8, patch_size=(32, 32), plans_name=PLANS),
    )  # fmt: skip
    plan_central(root, "910", options)


def run(data: Path, work: Path, privacy: PrivacyOptions) -> None:
    """Reports of the command, as it is and broken; what is there already is not made again."""
    root = NnunetRoot(work / "sites")
    sites_root(data, root, privacy)
    arms: dict[str, tuple[Callable[[], AbstractContextManager[None]] | None, int]] = {
        "as it is": (None, 1000),
        **BROKEN,
    }
    for name, (breaking, draws) in arms.items():
        output = work / "reports" / f"statistics {name}"
        if (output / "report.json").is_file():
            continue
        command = ["audit", "statistics", "--site-root", str(root.path), "-d", "910", "-c", "2d", "-p", PLANS]
        command += ["--draws", str(draws), "-o", str(output)]
        if breaking is None:
            cli.main(command)
            continue
        with breaking():
            cli.main(command)


def table(work: Path) -> list[str]:
    """Rows of every release as it is, and one row for each broken mechanism."""

    def read(name: str) -> list[dict[str, Any]]:
        content = json.loads((work / "reports" / f"statistics {name}" / "report.json").read_text())
        found: list[dict[str, Any]] = content["statistics"]
        return found

    lines = [
        "| release | patients | noise | found at most | a patient moves | together | epsilon >= | if Gaussian | claimed <= |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for audit in read("as it is"):
        values = [audit[column] for column in COLUMNS]
        cells = [str(value) if isinstance(value, int) else "-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {audit['what']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| broken | scores | refuted | largest share of the promised noise that was found |",
        "|---|---|---|---|",
    ]
    for name in BROKEN:
        audits = read(name)
        refuted = [audit["what"] for audit in audits if audit["refuted"]]
        most = max((audit["noise_most"] or float("inf")) / audit["noise_multiplier"] for audit in audits)
        whole = "all" if len(refuted) == len(audits) else ", ".join(refuted) or "none"
        lines.append(f"| {name} | {audits[0]['draws']} | {len(refuted)} of {len(audits)}: {whole} | {most:.2f} |")
    return lines
