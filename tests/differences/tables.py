"""Synthetic feature tables."""

from __future__ import annotations

import numpy as np

from nnunet_fedharm.differences.panel import Panel, panel_of
from nnunet_fedharm.sites.features.table import FeatureTable, Row

NAMES = (
    *(f"firstorder_F{index}" for index in range(6)),
    *(f"glcm_F{index}" for index in range(8)),
    *(f"shape_F{index}" for index in range(4)),
    *(f"quality_F{index}" for index in range(2)),
)


def feature_table(
    sizes: dict[str, int],
    *,
    shift: dict[str, float] | None = None,
    families: tuple[str, ...] = ("firstorder", "glcm", "quality"),
    volumes: int = 1,
    seed: int = 0,
    names: tuple[str, ...] = NAMES,
    heavy: bool = False,
) -> FeatureTable:
    """Patients with correlated normal features; a site shifts some families by so many standard deviations."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(len(names), len(names))) / np.sqrt(len(names))
    moved = np.array([name.split("_")[0] in families for name in names])
    rows, values = [], []
    for site, size in sizes.items():
        for patient in range(size):
            drawn = generator.normal(size=len(names)) @ mixing + 0.5 * generator.normal(size=len(names))
            for volume in range(volumes):
                noisy = drawn + 0.1 * generator.normal(size=len(names)) * (volumes > 1)
                noisy = noisy + (shift or {}).get(site, 0.0) * moved
                values.append(np.exp(noisy) if heavy else noisy)
                rows.append(Row(f"{site}_{patient}_{volume}", site, f"{site}_{patient}", "MR", "foreground", "z-score"))
    return FeatureTable(tuple(rows), names, np.array(values).reshape(len(rows), len(names)))


def shuffled(table: FeatureTable, seed: int = 1) -> FeatureTable:
    """The same rows in another order."""
    order = np.random.default_rng(seed).permutation(len(table.rows))
    return FeatureTable(tuple(table.rows[index] for index in order), table.names, table.values[order])


def panel(sizes: dict[str, int], **more: object) -> Panel:
    return panel_of(feature_table(sizes, **more))  # type: ignore[arg-type]
