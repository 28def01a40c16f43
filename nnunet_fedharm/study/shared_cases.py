"""Preprocessed cases that the federated cells of a study share.

A federated cell plans by itself, as a federation does. Its sites take a preprocessed case only where the record beside it names
the plans that this cell's server sent and the raw files that lie there; `planning.preprocess` decides that. So a cell that plans
otherwise, as every cell with a private fingerprint does, preprocesses anew.

data/federated/<SITE>/<dataset>/…   as in nnUNet_preprocessed: folders of cases and the record of each
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.preprocess import RECORD_SUFFIX
from nnunet_fedharm.sites.split import place


def take_cases(store: Path, root: NnunetRoot, dataset_name: str) -> None:
    """Link the cases that an earlier cell preprocessed into a site's root; what is there already stays."""
    source, target = store / dataset_name, root.preprocessed / dataset_name
    with file_lock(store.with_name(f"{store.name}.lock")):
        for record in _records(source):
            if (target / record.name).exists():
                continue
            cases = source / record.name.removesuffix(RECORD_SUFFIX)
            shutil.rmtree(target / cases.name, ignore_errors=True)  # a cell that was stopped while it took them
            for file in sorted(cases.iterdir()):
                place(file, target / cases.name / file.name, link=True)
            half = target / f".{record.name}.half"
            shutil.copy2(record, half)
            half.replace(target / record.name)  # last, and whole: cases without a record count as none


def keep_cases(root: NnunetRoot, dataset_name: str, store: Path) -> None:
    """Move a trained cell's cases into the store, unless it holds the same already."""
    source, target = root.preprocessed / dataset_name, store / dataset_name
    with file_lock(store.with_name(f"{store.name}.lock")):
        target.mkdir(parents=True, exist_ok=True)
        for record in _records(source):
            kept = target / record.name
            if kept.is_file() and kept.read_bytes() == record.read_bytes():
                continue
            name = record.name.removesuffix(RECORD_SUFFIX)
            kept.unlink(missing_ok=True)
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.move(source / name, target / name)
            shutil.move(record, kept)


def _records(folder: Path) -> Iterator[Path]:
    """Records of folders that are there."""
    for record in sorted(folder.glob(f"*{RECORD_SUFFIX}")):
        if (folder / record.name.removesuffix(RECORD_SUFFIX)).is_dir():
            yield record
