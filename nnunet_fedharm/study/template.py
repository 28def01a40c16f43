"""A study file to start from: every value with its meaning, as the dataclasses of `study_file` state it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, FedHarmError, SetupError
from nnunet_fedharm.planning.explain import field_docstrings
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, write_text
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.study.study_file import STUDY_FILE, read_study
from nnunet_fedharm.study.study_tables import Arms, Report, Subject, Training

_QUICK: Mapping[str, Any] = {
    "harmonizer_epochs": 10,
    "segmenter_epochs": 16,
    "iterations_per_epoch": 40,
    "val_iterations_per_epoch": 1,
    "initial_lr": 0.1,
    "momentum": 0.9,
    "harmonizer_lr": 2e-3,
    "base_features": 8,
    "max_features": 64,
    "mirroring": False,
    "num_processes": 1,  # a second process takes longer to start than so few small cases take
}
QUICK: Mapping[str, Mapping[str, Any]] = {
    "2d": {**_QUICK, "batch_size": 16, "patch_size": (40, 32)},
    "3d_fullres": {**_QUICK, "batch_size": 2, "patch_size": (32, 40, 32)},
}
"""For a small dataset on two cores, by configuration: a minute a cell in 2d, some in 3d. nnU-Net's momentum of 0.99 does not get
going in so few steps."""
_TITLES = {
    "study": "The data and the question.",
    "arms": "What is compared with plain nnU-Net and its own augmentation, which is always there.",
    "training": "Size and length, alike for all arms but for [privacy]; a federated arm takes as many steps at each site.",
    "report": "What counts as good. Fix it before the first result: the report says so where it was changed later.",
}


def write_template(
    folder: Path,
    dataset: Path,
    *,
    reference: str | None,
    labelled_sites: Sequence[str],
    held_out_sites: Sequence[str] = (),
    configuration: str = "3d_fullres",
    quick: bool,
) -> Path:
    """Write study.toml and check it.

    Args:
        reference: site to harmonize to; None: the first one with labels that is not held out.
        labelled_sites: sites whose labels are used; empty: all that are not held out.
        held_out_sites: sites that take part in no training.
        configuration: 2d or 3d_fullres.
        quick: sizes and lengths for two cores and a small dataset, instead of nnU-Net's own.

    Raises:
        DataError: no dataset, no sites.json, no site with labels, or sites that contradict each other.
        SetupError: there is a study.toml already, or the folder cannot be written.
    """
    path = folder.expanduser() / STUDY_FILE
    if path.exists():
        raise SetupError(f"{path} exists. Edit it, or choose a new folder.")
    dataset = dataset.expanduser().resolve()
    registry = SitesFile.load(dataset / SITES_FILE)
    labelled = labelled_cases(dataset, read_dataset_json(dataset, site="study"))
    owners = {registry.cases.get(case.case) for case in labelled}
    with_labels = [site for site in registry.sites if site in owners and site not in held_out_sites]
    if not with_labels:
        rest = " that is not held out" if held_out_sites else ""
        raise DataError(f"No site of {dataset}{rest} has a labelled case in imagesTr, so there is nothing to train.")
    values: dict[str, dict[str, Any]] = {
        "study": {
            "name": dataset.name.split("_", 1)[-1],
            "dataset": str(dataset),
            "reference": reference or with_labels[0],
            "labelled_sites": tuple(labelled_sites),
            "held_out_sites": tuple(held_out_sites),
            "configuration": configuration,
        },
        "arms": {},
        "training": dict(QUICK[configuration]) if quick else {},
        "report": {},
    }
    write_text(_text(values), path)
    try:
        read_study(path.parent)
    except FedHarmError:
        path.unlink()  # or the corrected command would be refused, because the file exists
        raise
    return path


def _text(values: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for table, part in (("study", Subject), ("arms", Arms), ("training", Training), ("report", Report)):
        lines = [f"# {_TITLES[table]}", f"[{table}]"]
        meanings = field_docstrings(part)
        for item in fields(part):
            lines += textwrap.wrap(meanings[item.name], 110, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{item.name} = {_toml(values[table].get(item.name, item.default))}")
        parts.append("\n".join(lines))
    parts.append(
        "# Differential privacy of the arms at `epsilons`, as `nnunet-fedharm plan --help` explains the options.\n"
        "# Their training may be another: clipped and noisy gradients want a larger rate and fewer steps of more patients.\n"
        "[privacy]\n# delta = 1e-5\n# clip = 1.0\n# patients_per_step = 8.0\n# initial_lr = 0.0\n# segmenter_epochs = 0"
    )
    return "\n\n".join(parts) + "\n"


def _toml(value: Any) -> str:
    """Strings, numbers, truth values and lists read the same in JSON and TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
