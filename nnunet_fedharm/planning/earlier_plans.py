"""What is taken over from plans that an earlier run, or stock nnU-Net, has written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunet_fedharm.planning.section import SECTION, FedHarmSection
from nnunet_fedharm.sites.files import read_json

log = logging.getLogger(__name__)


def renamed(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Plans of another name without a `fedharm` section, on the same preprocessed cases."""
    renamed = deepcopy(dict(plans))
    renamed["plans_name"] = name
    for configuration in renamed["configurations"].values():
        configuration.pop(SECTION, None)
    return renamed


def read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path, what="The plans") if path.is_file() else None


def known_sections(path: Path, plans: Mapping[str, Any]) -> dict[str, FedHarmSection]:
    """Sections of an earlier run for configurations whose plan has not changed since."""
    before = read_if_there(path)
    kept: dict[str, FedHarmSection] = {}
    for name, configuration in (before or {}).get("configurations", {}).items():
        if SECTION not in configuration or name not in plans["configurations"]:
            continue
        plain = {key: value for key, value in configuration.items() if key != SECTION}
        if plain == plans["configurations"][name]:
            kept[name] = FedHarmSection.from_dict(configuration[SECTION])
        else:
            log.warning("The plan of %s changed: its fedharm section of an earlier run was dropped.", name)
    return kept
