"""Two hospitals over the internet: their page up to the start of the server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from nnunet_fedharm.federation.daemon import free_port
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from tests.conftest import BENCHMARK
from tests.docs.reading import follow, lines_with, run, toml_blocks

PAGE = "docs/how-to/two-hospitals.md"
INIT, JOIN, POLICY, SHOW = (
    tuple(lines_with(PAGE, text)) for text in ("server init", "site join", "site policy", "privacy show")
)
ENTER = tuple(lines_with(PAGE, "server register")[:2])
RUN = (*INIT, *JOIN, *POLICY, *ENTER, *SHOW)


def before_the_start(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """Steps 1 to 4 but for the start of the server: the consortium, two hospitals with the policy of the page, let in."""
    for index, site in enumerate(("north", "south")):
        raw = folder / site / "nnUNet_raw"
        make_raw_dataset(
            raw, name=BENCHMARK, n_labelled=20, site=f"{site}_", gain=1.0 + index, seed=index, shape=(16, 16, 16)
        )
    said = run(f"{INIT[0].replace('fed.example.org', '127.0.0.1')} --port {free_port()} --bind 127.0.0.1")
    shutil.copy(folder / "study" / "consortium.toml", folder)
    fingerprint = re.search(r"(?:[0-9a-f]{4}-){3,}[0-9a-f]{4}", said)
    assert fingerprint
    policy = toml_blocks(PAGE)[0]
    for site in ("north", "south"):
        said = follow(line.replace("north", site) for line in JOIN)
        assert fingerprint.group() in said, "the same one as the coordinator's"
        key = folder / site / "fedharm" / "consortium" / "node.pub"
        assert key.read_text().split()[1] in said, "the line that is sent"
        shutil.copy(key, f"{site}.pub")
        (folder / site / "fedharm" / "policy.toml").write_text(policy)
        said = follow(line.replace("north", site) for line in POLICY)
        assert "none, curve" in said
    follow(ENTER)


def test_they_meet(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """Up to the start; what the page writes into the site's settings is read by those who read them."""
    before_the_start(folder, make_raw_dataset)
    settings = folder / "north" / "fedharm" / "consortium" / "site.toml"
    text, once = re.subn(r"^proxy = .*$", toml_blocks(PAGE)[1], settings.read_text(), flags=re.M)
    assert once == 1
    settings.write_text(text)
    assert SiteFolder(folder / "north").settings()["proxy"] == "http://proxy.north.example:3128"
    assert "north" in follow(SHOW)
