"""The report of harmonization quality: strict JSON and a plain-text table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_fedharm.differences.agreement import EXCELLENT, GOOD
from nnunet_fedharm.evaluation.fidelity import SSIM_WINDOW
from nnunet_fedharm.evaluation.lesions import DETECTED_OVERLAP, RIM_VOXELS
from nnunet_fedharm.evaluation.quality import METRICS, PairQuality
from nnunet_fedharm.evaluation.resampling import RESAMPLES
from nnunet_fedharm.sites.features.radiomics import SETTINGS

TITLES = {
    "ssim": ("SSIM to truth", 3),
    "psnr_db": ("PSNR to truth, dB", 2),
    "nrmse": ("nRMSE to truth", 3),
    "gradient_correlation": ("gradient correlation to truth", 3),
    "edges_kept": ("edges kept", 3),
    "cnr_over_truth": ("region CNR / truth's (median)", 3),
    "cnr_over_input": ("region CNR / input's (median)", 3),
    "lesion_recall": ("lesion recall", 3),
    "false_lesions": ("false lesions per volume", 2),
    "false_lesions_on_lesion_free": ("false lesions per lesion-free volume", 2),
    "median": ("features: median {}", 3),
    "share_good": (f"features: share with {{}} >= {GOOD}", 3),
    "share_excellent": (f"features: share with {{}} >= {EXCELLENT}", 3),
}
"""Key -> title and digits; {} is CCC or ICC(2,1)."""


def conventions() -> dict[str, Any]:
    """How the numbers were computed, written into every report."""
    return {
        "intensities": "every channel z-scored over the mask of its pair",
        "mask": "folder of --masks, else voxels where the truth is not zero, holes filled",
        "metrics": METRICS,
        "ssim_window_voxels": SSIM_WINDOW,
        "surroundings_voxels": RIM_VOXELS,
        "detected_overlap": DETECTED_OVERLAP,
        "radiomics": SETTINGS,
        "intervals": f"95% percentile bootstrap over patients, {RESAMPLES} draws, paired for the change",
        "icc": "ICC(2,1): two-way random effects, absolute agreement, single measurement; truth and all sites",
    }


def pair_rows(found: Sequence[PairQuality]) -> dict[str, Any]:
    """Case -> site, reference and metrics before and after; what is not finite becomes null."""
    return {
        item.pair.case: {
            "site": item.pair.site,
            "reference": item.pair.reference,
            "channels": {
                channel: {
                    name: dict(zip(("before", "after"), map(_finite, pair), strict=True)) for name, pair in m.items()
                }
                for channel, m in item.metrics.items()
            },
            "lesions": None
            if item.lesions is None
            else {name: vars(count) for name, count in zip(("before", "after"), item.lesions, strict=True)},
        }
        for item in found
    }


def format_quality(report: Mapping[str, Any]) -> str:
    """Plain-text table: a row per site and number, before, after and change with 95% intervals."""
    rows = [("site", "patients", "what", "before", "after", "change [95% interval]")]
    for site, channels in report["sites"].items():
        for channel, metrics in channels.items():
            suffix = f", channel {channel}" if len(channels) > 1 else ""
            rows += [_row(site, name, values, suffix) for name, values in metrics.items()]
        for name, values in ((report["lesions"] or {}).get(site) or {}).items():
            if isinstance(values, Mapping) and values["before"]["value"] is not None:
                rows.append(_row(site, name, values))
        agreement = ((report["features"] or {}).get("sites") or {}).get(site) or {}
        rows += [_row(site, name, values, of="CCC") for name, values in agreement.items()]
    icc = (report["features"] or {}).get("icc") or {}
    rows += [_row("all", name, values, of="ICC(2,1)") for name, values in icc.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *_classifier(report["site_classifier"])])


def _classifier(summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return []
    if "skipped" in summary:
        return ["", f"Site classifier skipped: {summary['skipped']}"]
    lines = ["", "Site classifier (random forest, patient-grouped cross-validation), balanced accuracy:"]
    for state in ("before", "after"):
        found = summary[state]
        null = "no permutations"
        if found["p_value"] is not None:
            null = f"permutation null {found['null_mean']:.3f}, 95th percentile {found['null_high']:.3f}"
            null += f", p = {found['p_value']:.3f}"
        size = f"{found['n_volumes']} volumes, {found['n_patients']} patients, {found['n_sites']} sites"
        lines.append(f"  {state:<6} {found['balanced_accuracy']:.3f}; {null} ({size})")
    return lines


def _row(
    site: str, name: str, values: Mapping[str, Any], suffix: str = "", *, of: str = ""
) -> tuple[str, str, str, str, str, str]:
    title, digits = TITLES[name]
    cells = [_cell(values[part], digits, sign=part == "change") for part in ("before", "after", "change")]
    return site, str(values["n"]), title.format(of) + suffix, cells[0], cells[1], cells[2]


def _cell(value: Mapping[str, float | None], digits: int, *, sign: bool) -> str:
    if value["value"] is None:
        return "-"
    plus = "+" if sign else ""
    text = f"{value['value']:{plus}.{digits}f}"
    if value["low"] is None or value["low"] == value["high"]:
        return text
    return f"{text} [{value['low']:{plus}.{digits}f}, {value['high']:{plus}.{digits}f}]"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
