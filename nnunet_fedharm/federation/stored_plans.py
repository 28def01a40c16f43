"""The final plans of a run as a site keeps them, and what it says where it has lost them."""

from __future__ import annotations

from typing import Any

from nnunet_fedharm.errors import CheckpointError, FederationError
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.messages import json_hash
from nnunet_fedharm.federation.site import Site

PLANS_FILE = "federation.json"
"""Final plans, dataset.json and fingerprint of a run, in the site's folder of that run."""


class OtherPlansError(FederationError):
    """A site holds no plans of this run, or others than the server: its folder was damaged, or restored from a backup."""


def held_hash(site: Site, run_id: str) -> str:
    """Hash of the plans that the site holds; empty where there are none yet, or damaged ones: the server sends them (again)."""
    try:
        return json_hash(read_json(site.folder / run_id / PLANS_FILE)["plans"])
    except CheckpointError:
        return ""


def stored_plans(site: Site, run_id: str, plans_hash: str) -> dict[str, Any]:
    """Plans, dataset.json and fingerprint of a run.

    Args:
        plans_hash: of the plans that the server means.

    Raises:
        OtherPlansError: they are not these; the server reads this error's name and sends them again.
    """
    held = held_hash(site, run_id)
    if held != plans_hash:
        what = "other plans than the server" if held else "no plans of this run, or damaged ones"
        raise OtherPlansError(f"Site {site.name} holds {what}. It gets them again before the next round.")
    return read_json(site.folder / run_id / PLANS_FILE)
