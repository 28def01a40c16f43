"""Noisy statistics of data that lie in one place: drawn once for these cases, entered in the ledger, and kept beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import Budget, Release
from nnunet_fedharm.sites.files import read_json, write_json


def ledger_of(root: NnunetRoot) -> Ledger:
    """The ledger of data in one place, in the folder `fedharm` beside nnUNet_preprocessed."""
    return Ledger(root.preprocessed.parent / "fedharm")


def drawn_once(
    path: Path,
    name: str,
    cases: str,
    *,
    release: Release,
    budget: Budget,
    ledger: Ledger,
    draw: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What is kept at `path` for these cases, or else a new draw; entered before it is used, the same bytes once.

    Args:
        name: what is drawn, as it stands in the file.
        cases: digest of whose images it is made of; stays here.
        draw: makes it, with its noise.

    Raises:
        PrivacyError: the budget does not hold a new draw.
    """
    kept = read_json(path, what=f"The private {name}") if path.is_file() else {}
    if kept.get("cases") != cases:
        ledger.refuse_beyond(budget, [release])
        kept = {"cases": cases, name: draw()}
        write_json(kept, path)
    drawn: dict[str, Any] = kept[name]
    digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
    ledger.record(replace(release, digest=digest))
    return drawn
