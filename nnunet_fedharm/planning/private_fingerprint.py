"""Fingerprint with noise of data that lies in one place: as a federated site's, of one "site".

It is drawn once for these cases and this noise and kept beside the preprocessed cases, so that planning again costs nothing.
nnU-Net's own dataset_fingerprint.json, where there is one, is neither read nor changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.drawn_once import drawn_once
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.pooled import HERE, plan_pooled
from nnunet_fedharm.planning.private_merge import merge_private
from nnunet_fedharm.planning.private_summary import fingerprint_release, summarize_private
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.files import (
    labelled_cases,
    read_dataset_json,
    unlabelled_cases,
)


def fingerprint_file(preprocessed: Path, noise: float) -> Path:
    """Where the fingerprint of a noise multiplier is kept.

    Args:
        preprocessed: folder of the dataset.
    """
    return preprocessed / f"private_fingerprint_{noise:.6g}.json"


def private_fingerprint(
    raw: Path, preprocessed: Path, privacy: PrivacyOptions, *, num_processes: int = 1, check: bool = True
) -> dict[str, Any]:
    """nnU-Net's fingerprint form with noise, entered in the ledger before it is used.

    Args:
        raw, preprocessed: folders of the dataset.
        privacy: noise and budget.
        num_processes: to read cases with.
        check: read and check every image first.

    Raises:
        DataError: the dataset cannot be used.
        PrivacyError: the budget does not hold it.
    """
    noise = privacy.fingerprint_multiplier

    def draw() -> dict[str, Any]:
        if check:
            check_raw_dataset(raw, site=HERE, num_processes=num_processes)
        summary = summarize_private(raw, site=HERE, noise_multiplier=noise, num_processes=num_processes)
        channels = len(read_dataset_json(raw, site=HERE)["channel_names"])
        return merge_private([summary], n_channels=channels)

    return drawn_once(
        fingerprint_file(preprocessed, noise),
        "fingerprint",
        _digest_of_cases(raw),
        release=fingerprint_release(noise),
        budget=privacy.budget,
        ledger=Ledger(preprocessed.parent.parent / "fedharm"),
        draw=draw,
    )


def private_plans(raw: Path, fingerprint: Mapping[str, Any], options: PlanOptions) -> dict[str, Any]:
    """Plans from a private fingerprint; nothing is written, and no image is opened but for the kind of its file.

    Raises:
        PlanError: nnU-Net cannot plan from this fingerprint.
    """
    with TemporaryDirectory() as scratch:
        return plan_pooled(raw, fingerprint, options, root=NnunetRoot(Path(scratch)))


def _digest_of_cases(raw: Path) -> str:
    """Which cases there are; stays here."""
    description = read_dataset_json(raw, site=HERE)
    cases = [*labelled_cases(raw, description), *unlabelled_cases(raw, description)]
    names = [f"{case.case} {case.label is not None}" for case in cases]
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
