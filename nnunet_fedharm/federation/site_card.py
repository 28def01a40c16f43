"""`privacy.json` beside the checkpoints of a federation: what was promised, and at a site what its own ledger says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.durable import write_bytes
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE


def write_card(folder: Path, statement: Mapping[str, Any]) -> None:
    """Write the statement; without one, remove what another run left there.

    Args:
        folder: of the fold.
        statement: `site_privacy.privacy_statement`, or `statement_at`.
    """
    if statement:
        write_bytes(folder / PRIVACY_FILE, json.dumps(statement, indent=1).encode())
    else:
        (folder / PRIVACY_FILE).unlink(missing_ok=True)


def statement_at(site: Site, promised: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The run's promise with what this site's patients have paid by its ledger, of this run and all others.

    Args:
        promised: the server's statement; empty without differential privacy.
        facts: of the training at this site.

    Raises:
        PrivacyError: the ledger is damaged.
    """
    said = dict(promised)
    patients = said.get("patient_level")
    if patients is not None:
        from nnunet_fedharm.trainers.private_card import privacy_card

        card = privacy_card(Ledger(site.folder), float(patients["delta"]), {**facts, "promised": patients})
        said["patient_level"] = card
    return said
