"""A consortium's folder, made once and copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.federation.deploy.server_folder import ServerFolder, ServerOptions, init_server
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.deploy.site_join import JoinOptions, join

SITES = ("hospital-north", "hospital-south")


@pytest.fixture(scope="session")
def server_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ServerOptions(name="Test study", hosts=["localhost"], sites=SITES, port=19092, bind="127.0.0.1")
    return init_server(tmp_path_factory.mktemp("server") / "study", options).path


@pytest.fixture
def server(tmp_path: Path, server_template: Path) -> ServerFolder:
    shutil.copytree(server_template, tmp_path / "study")
    return ServerFolder(tmp_path / "study")


@pytest.fixture
def join_site(tmp_path: Path, server: ServerFolder) -> Callable[..., SiteFolder]:
    """Join as a site with an empty nnU-Net root."""

    def make(site: str = SITES[0], **options: object) -> SiteFolder:
        (tmp_path / site / "nnUNet_raw" / "Dataset001_Blobs").mkdir(parents=True, exist_ok=True)
        settings = JoinOptions(**{"site": site, "device": "cpu", **options})  # type: ignore[arg-type]
        return join(server.consortium_file, tmp_path / site, settings)[0]

    return make
