"""The final plans of a run as a site keeps them, and what it says where it has lost them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.errors import CheckpointError, FederationError
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.messages import json_hash
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.planning.section import SECTION

PLANS_FILE = "federation.json"
"""Final plans, dataset.json and fingerprint of a run, in the site's folder of that run."""


class OtherPlansError(FederationError):
    """A site holds no plans of this run, others than the server, or none of their preprocessed cases: a folder was damaged,
    cleared, or restored from a backup."""


def trained_configurations(plans: Mapping[str, Any]) -> list[str]:
    """Those that a run trains: with a `fedharm` section."""
    return [name for name, values in dict(plans.get("configurations", {})).items() if SECTION in values]


def held_hash(site: Site, run_id: str) -> str:
    """Hash of the plans that the site holds and has preprocessed its cases for.

    Empty where there are none yet, or damaged ones, or no preprocessed cases: the server sends the plans (again), and what is
    missing is made then.
    """
    return _held(site, run_id)[0]


def _held(site: Site, run_id: str) -> tuple[str, dict[str, Any]]:
    """That hash, and all that the file holds."""
    try:
        content = read_json(site.folder / run_id / PLANS_FILE)
    except CheckpointError:
        return "", {}
    return json_hash(content["plans"]) if _has_cases(site, content["plans"]) else "", content


def _has_cases(site: Site, plans: Mapping[str, Any]) -> bool:
    for name in trained_configurations(plans):
        folder = site.root.preprocessed / plans["dataset_name"]
        if not any(folder.glob(f"{plans['configurations'][name]['data_identifier']}*/*")):
            return False
    return True


def stored_plans(site: Site, run_id: str, plans_hash: str) -> dict[str, Any]:
    """Plans, dataset.json and fingerprint of a run.

    Args:
        plans_hash: of the plans that the server means.

    Raises:
        OtherPlansError: they are not these; the server reads this error's name and sends them again.
    """
    held, content = _held(site, run_id)
    if held != plans_hash:
        what = "other plans than the server" if held else "no plans of this run, damaged ones, or none of their cases"
        raise OtherPlansError(f"Site {site.name} holds {what}. It gets them again before the next round.")
    return content
