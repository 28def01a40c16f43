"""Tiny consortia: a folder with one nnU-Net root per site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def make_consortium(make_raw_dataset: Callable[..., Path]) -> Callable[..., Path]:
    """Write ROOT/sites/<SITE>/nnUNet_raw/Dataset001_Blobs for site -> (labelled, unlabelled) cases; each site has a gain."""

    def make(root: Path, sites: dict[str, tuple[int, int]]) -> Path:
        for index, (site, (labelled, unlabelled)) in enumerate(sites.items()):
            make_raw_dataset(
                root / "sites" / site / "nnUNet_raw",
                n_labelled=labelled,
                n_unlabelled=unlabelled,
                site=site,
                gain=1.0 + index,
                seed=index,
                shape=(12, 24, 24),
            )
        return root

    return make
