"""`privacy.json` beside the checkpoints of a federation: what was promised, and at a site what its own ledger says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.durable import write_bytes
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE, PrivacyOptions


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


OWN_POLICY = "own_policy"
"""Where sites stand whose own policy makes their training private in a run that promises nothing to patients."""


def own_statement(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What those sites promise their own patients.

    Args:
        sites: name -> epsilon and delta.
    """
    return {
        "unit": "patient",
        "of": "all noisy releases at these sites, each by its own policy; patients of other sites are promised nothing",
        "sites": {name: dict(promised) for name, promised in sites.items()},
    }


def statement_at(
    site: Site, promised: Mapping[str, Any], facts: Mapping[str, Any], own: PrivacyOptions | None = None
) -> dict[str, Any]:
    """The run's promise with what this site's patients have paid by its ledger, of this run and all others.

    Args:
        promised: the server's statement; empty without differential privacy.
        facts: of the training at this site.
        own: what the site's own policy switched on; None where it did not.

    Raises:
        PrivacyError: the ledger is damaged.
    """
    from nnunet_fedharm.trainers.private_card import privacy_card

    said = dict(promised)
    if own is not None:
        others = said.get(OWN_POLICY, {}).get("sites", {})
        meant = {"epsilon": own.epsilon, "delta": own.delta}
        card = privacy_card(Ledger(site.folder), own.delta, {**facts, "promised": meant})
        said[OWN_POLICY] = own_statement({**others, site.name: card})
    patients = said.get("patient_level")
    if patients is not None:
        card = privacy_card(Ledger(site.folder), float(patients["delta"]), {**facts, "promised": patients})
        said["patient_level"] = card
    return said
