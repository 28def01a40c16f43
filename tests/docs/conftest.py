"""A reader's folder and data: four hospitals with five small cases each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from tests.conftest import BENCHMARK


def sit_down(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has nnU-Net's three folders, which are exported."""
    patch.chdir(folder)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        patch.setenv(name, str(folder / name))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, for one test."""
    return sit_down(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same for all tests of a file, which go on with what the ones before left."""
    with pytest.MonkeyPatch.context() as patch:
        yield sit_down(tmp_path_factory.mktemp("desk"), patch)


def write_hospitals(raw: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    """The raw dataset 910 of the hospitals A, B, C and D."""
    for index, site in enumerate("ABCD"):
        made = make_raw_dataset(
            raw, name=BENCHMARK, n_labelled=5, shape=(16, 16, 16), site=f"{site}_", gain=1.0 + index, seed=index
        )
    for path in made.glob("*Tr/*_case*"):
        site, rest = path.name.split("_case")
        path.rename(path.with_name(f"{site}_{'ABCD'.index(site)}{rest[1:]}"))  # A_000, B_100: B_000 is A_000 seen by B
    cases = {path.name.removesuffix(".nii.gz"): path.name[0] for path in (made / "labelsTr").iterdir()}
    SitesFile({site: SiteInfo("GE", 3.0, "T1w") for site in "ABCD"}, cases).save(made / "sites.json")
    description = json.loads((made / "dataset.json").read_text())
    (made / "dataset.json").write_text(json.dumps({**description, "numTraining": len(cases)}))
    return made


@pytest.fixture
def hospitals(folder: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    return write_hospitals(folder / "nnUNet_raw", make_raw_dataset)


@pytest.fixture(scope="module")
def data(desk: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    """The same at the desk of a file."""
    return write_hospitals(desk / "nnUNet_raw", make_raw_dataset)


def lay_out_some(data: Path, folder: Path) -> None:
    """IMAGES and LABELS of one case each of A and B, and sites.json, as the pages call them."""
    for name, source in (("IMAGES", "imagesTr"), ("LABELS", "labelsTr")):
        (folder / name).mkdir()
        for path in (data / source).glob("[AB]_?00*"):
            shutil.copy(path, folder / name)
    shutil.copy(data / "sites.json", folder)
