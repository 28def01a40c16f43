"""Which site a node key belongs to, where the coordinator registered it: no site can speak under another one's name.

`nnunet-fedharm server` writes the file; without it (simulation, or Flower's own commands) a node is who it says it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunet_fedharm.federation.durable import read_json, write_json

NODES_FILE = "registered-nodes.json"


def write_registered(folder: Path, nodes: Mapping[int, str]) -> None:
    """Keep Flower's node numbers of the registered sites.

    Args:
        folder: the server's `fedharm` folder.
        nodes: node -> site.
    """
    write_json(folder / NODES_FILE, {"nodes": {str(node): site for node, site in nodes.items()}})


def registered_site(folder: Path, node: int) -> str:
    """The site whose key a node has; an empty text where nothing is known of it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / NODES_FILE
    return str(read_json(path)["nodes"].get(str(node), "")) if path.is_file() else ""


def still_registered(folder: Path, sites: Iterable[str]) -> list[str]:
    """Those of the sites that are registered now; all of them where nobody keeps a register.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / NODES_FILE
    if not path.is_file():
        return list(sites)
    known = set(read_json(path)["nodes"].values())
    return [site for site in sites if site in known]


def false_name(folder: Path, node: int, site: str) -> str:
    """Why a node may not use a site's name; an empty text where it may.

    Raises:
        CheckpointError: the file is damaged.
    """
    known = registered_site(folder, node)
    if known == site or not (folder / NODES_FILE).is_file():
        return ""
    whose = f"the key of {known}" if known else "a key that is not registered any more"
    return f"A node with {whose} calls itself {site}. It is set aside; correct the site's name, or register its key."
