"""Tables of `learned_harmonizers.py` as Markdown on standard output."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SITES = "ABCD"
RESAMPLES = 2000
Scores = npt.NDArray[np.float64]
"""(seeds, cases)."""
LABEL = {
    "none": "none (nnU-Net's augmentation)",
    "augment": "strong augmentation",
    "inverse": "inverse alone (judge and quantile map)",
}


@dataclass(frozen=True)
class Row:
    """Arms that differ by their seed alone."""

    scenario: str
    kind: str
    dims: str
    mode: str
    augmentation: bool

    @property
    def title(self) -> str:
        name = LABEL.get(self.kind, self.kind) if self.augmentation else "none, without augmentation"
        return f"{name}{', ' + self.mode if self.mode and self.kind != 'inverse' else ''}"


class Results:
    """All metrics of a work folder."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.entries: dict[Row, list[Mapping[str, Any]]] = defaultdict(list)
        for path in sorted((work / "metrics").glob("*.json")):
            entry = json.loads(path.read_text())
            arm = entry["arm"]
            self.entries[Row(arm["scenario"], arm["kind"], arm["dims"], arm["mode"], arm["augmentation"])].append(entry)

    def seeds(self, row: Row, site: str) -> set[int]:
        return {entry["arm"]["seed"] for entry in self.entries.get(row, []) if site in entry["sites"]}

    def scores(self, row: Row, site: str, metric: str, seeds: set[int] | None = None) -> Scores | None:
        """(seeds, cases) of a row's test site, cases sorted by name; None where nothing was measured."""
        found = [
            entry["sites"][site]["cases"]
            for entry in self.entries.get(row, [])
            if site in entry["sites"] and (seeds is None or entry["arm"]["seed"] in seeds)
        ]
        if not found:
            return None
        return np.array([[cases[name][metric] for name in sorted(cases)] for cases in found])

    def rows(self, scenarios: Iterable[str], dims: str) -> list[Row]:
        order = ["none", "augment", "nyul", "curve", "inverse", "polarity", "cyclegan", "diffusion"]
        chosen = [row for row in self.entries if row.scenario in scenarios and row.dims == dims]
        return sorted(chosen, key=lambda row: (not row.augmentation, order.index(row.kind), row.mode))

    def oracle(self, site: str, dims: str, metric: str, seeds: set[int] | None = None) -> Scores | None:
        return self.scores(Row("A" if site == "A" else f"own-{site}", "none", dims, "", True), site, metric, seeds)


def mean_cell(scores: Scores | None, digits: int = 3) -> str:
    """Mean over cases and seeds, and the range of the seeds' means."""
    if scores is None:
        return "-"
    means = np.nanmean(scores, axis=1)
    spread = f" ({means.min():.{digits}f} to {means.max():.{digits}f})" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def resampled(scores: Scores, generator: np.random.Generator, cases: npt.NDArray[np.int64]) -> float:
    """Mean after drawing seeds with replacement, of the cases drawn (the same ones for every method)."""
    seeds = generator.integers(len(scores), size=len(scores))
    return float(np.mean(scores[seeds][:, cases]))


def gap_recovered(triples: list[tuple[Scores, Scores, Scores]]) -> tuple[float, float, float, float, float, float]:
    """Gap recovered and gap over sites, each with a 95% bootstrap interval over seeds and cases.

    Args:
        triples: per site (method, none, oracle), each (seeds, cases) on the same cases.
    """

    def of(means: list[tuple[float, float, float]]) -> tuple[float, float]:
        gained, gap = sum(m - n for m, n, _ in means), sum(o - n for _, n, o in means)
        return gained / gap, gap / len(means)

    generator = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        means = []
        for triple in triples:
            cases = generator.integers(triple[0].shape[1], size=triple[0].shape[1])
            method, none, oracle = (resampled(scores, generator, cases) for scores in triple)
            means.append((method, none, oracle))
        draws.append(of(means))
    value, gap = of([(float(m.mean()), float(n.mean()), float(o.mean())) for m, n, o in triples])
    (low, gap_low), (high, gap_high) = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    return value, float(low), float(high), gap, float(gap_low), float(gap_high)


def gap_cell(triples: list[tuple[Scores, Scores, Scores]]) -> str:
    if not triples:
        return "-"
    value, low, high, _, gap_low, _ = gap_recovered(triples)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if gap_low > 0 else "no gap"


def report(work: Path, n4: Path | None) -> None:
    """Print every table for what was measured; `n4` is the work folder of the same subjects after N4."""
    results, corrected = Results(work), None if n4 is None else Results(n4)
    for dims in ("3d", "2d", "3d-long", "2d-long"):
        rows = results.rows(["A"], dims)
        if rows:
            name = dims.upper().replace("-LONG", ", segmenter trained five times as long")
            print(f"\n### Labels at A alone, {name}: Dice\n")
            one_site_table(results, rows, dims, "dice", 3, corrected)
            print(f"\n### Labels at A alone, {name}: HD95 in mm\n")
            one_site_table(results, rows, dims, "hd95_mm", 2, corrected)
    for dims in ("3d", "2d"):
        if results.rows(["not-D"], dims):
            print(f"\n### One site without labels, {dims.upper()}: Dice at that site\n")
            left_out_table(results, dims, "dice", 3)
            print(f"\n### One site without labels, {dims.upper()}: HD95 in mm at that site\n")
            left_out_table(results, dims, "hd95_mm", 2)
    print("\n### Polarity votes and gates\n")
    polarity_table(results)
    print("\n### Quality on travelling subjects\n")
    quality_table(work)
    print("\n### Radiomics of the labelled region and site classifier\n")
    agreement_table(work)
    print("\n### Cost\n")
    cost_table(results)


def one_site_table(
    results: Results, rows: list[Row], dims: str, metric: str, digits: int, corrected: Results | None
) -> None:
    none = Row("A", "none", dims, "", True)
    with_gap = metric == "dice"
    more = " | worst site | gap recovered at D | gap recovered at B, C and D" if with_gap else ""
    print(f"| harmonizer | seeds | {' | '.join(SITES)}{more} |\n|---|---|{'---|' * (4 + 3 * with_gap)}")
    measured = [(row.title, row, results) for row in rows]
    if corrected is not None:
        measured += [(f"N4, then {row.title}", row, corrected) for row in corrected.rows(["A"], dims)]
    for title, row, source in measured:
        found = {site: source.scores(row, site, metric) for site in SITES}
        cells = [mean_cell(found[site], digits) for site in SITES]
        if with_gap:
            means = [float(scores.mean()) for scores in found.values() if scores is not None]
            cells.append(f"{min(means):.3f}")
            if row == none and source is results:
                cells += ["0", "0"]
            else:
                cells += [gap_cell(triples_of(results, row, none, sites, dims, source)) for sites in ("D", "BCD")]
        print(f"| {title} | {len(source.entries[row])} | {' | '.join(cells)} |")
    cells = [mean_cell(results.oracle(site, dims, metric), digits) for site in SITES]
    if with_gap:
        oracles = [results.oracle(site, dims, metric) for site in SITES]
        cells += [f"{min(float(o.mean()) for o in oracles if o is not None):.3f}", "1", "1"]
    print(f"| oracle: the site's own labels | | {' | '.join(cells)} |")
    if with_gap:
        print()
        for site in "BCD":
            triples = triples_of(results, none, none, site, dims)
            if triples:
                *_, gap, low, high = gap_recovered(triples)
                print(f"Gap at {site} (oracle - none): {gap:+.3f} [{low:+.3f}, {high:+.3f}].")


def triples_of(
    results: Results, row: Row, none: Row, sites: str, dims: str, source: Results | None = None
) -> list[tuple[Scores, Scores, Scores]]:
    """(method, none, oracle) of each site; empty where one of them was not measured. `source` holds the method's scores."""
    source = source or results
    triples = []
    for site in sites:
        seeds = source.seeds(row, site)  # the same seeds of all three
        found = (
            source.scores(row, site, "dice"),
            results.scores(none, site, "dice", seeds),
            results.oracle(site, dims, "dice", seeds),
        )
        if any(scores is None for scores in found):
            return []
        triples.append(found)
    return triples  # type: ignore[return-value]  # no None is left


def left_out_table(results: Results, dims: str, metric: str, digits: int) -> None:
    """Each row with the number of its seeds at A to D; its gap recovered is against the same seeds of the others."""
    kinds = {(row.kind, row.mode, row.title) for row in results.rows([f"not-{site}" for site in SITES], dims)}
    order = ["none", "augment", "nyul", "curve", "polarity", "cyclegan", "diffusion"]
    with_gap = metric == "dice"
    print(f"| harmonizer | seeds | {' | '.join(SITES)}{' | worst | gap recovered at D' if with_gap else ''} |")
    print("|---|---|" + "---|" * (4 + 2 * with_gap))
    for kind, mode, title in sorted(kinds, key=lambda item: (order.index(item[0]), item[1])):
        rows = {site: Row(f"not-{site}", kind, dims, mode, True) for site in SITES}
        found = {site: results.scores(row, site, metric) for site, row in rows.items()}
        counts = [0 if scores is None else len(scores) for scores in found.values()]
        cells = [str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))]
        cells += [mean_cell(found[site], digits) for site in SITES]
        if with_gap:
            means = [float(scores.mean()) for scores in found.values() if scores is not None]
            triples = triples_of(results, rows["D"], Row("not-D", "none", dims, "", True), "D", dims)
            cells += [f"{min(means):.3f}", "0" if kind == "none" else gap_cell(triples)]
        print(f"| {title} | {' | '.join(cells)} |")
    cells = [mean_cell(results.oracle(site, dims, metric), digits) for site in SITES]
    print(f"| oracle: the site's own labels alone | | {' | '.join(cells)}{' | | 1' if with_gap else ''} |")


def polarity_table(results: Results) -> None:
    print(f"| harmonizer | votes of {', '.join(SITES)} by seed | gates |\n|---|---|---|")
    for dims in ("3d", "2d"):
        for row in results.rows(["A"], dims):
            if row.kind in ("polarity", "cyclegan", "diffusion"):
                votes = "; ".join(
                    " ".join(f"{np.mean(site):+.2f}" for site in entry["polarity"]) for entry in results.entries[row]
                )
                gates = "; ".join(" ".join(f"{gate:.0f}" for gate in entry["gate"]) for entry in results.entries[row])
                print(f"| {row.title}, {dims} | {votes} | {gates} |")


METRICS = {
    "ssim": ("SSIM", 3), "psnr_db": ("PSNR, dB", 1), "nrmse": ("nRMSE", 3),
    "gradient_correlation": ("gradient corr.", 3), "edges_kept": ("edges kept", 3),
    "cnr_over_truth": ("CNR / truth", 2), "cnr_over_input": ("CNR / input", 2),
}  # fmt: skip
Quality = Mapping[str, Any]


def qualities(work: Path) -> dict[str, list[Quality]]:
    """Title -> quality reports of all its seeds."""
    found: dict[str, list[Quality]] = defaultdict(list)
    for path in sorted((work / "quality").glob("*.json")):
        kind, dims, *rest = path.stem.split("_")
        found[", ".join([kind, dims.upper(), *(part for part in rest if part in ("central", "federated"))])].append(
            json.loads(path.read_text())
        )
    order = ["nyul", "curve", "polarity", "cyclegan", "diffusion"]
    return dict(sorted(found.items(), key=lambda item: (", 2D" in item[0], order.index(item[0].split(",")[0]))))


def quality_table(work: Path) -> None:
    found = qualities(work)
    if not found:
        print("Not measured.")
        return
    for site in "BCD":
        print(f"\nSite {site}:\n\n| harmonizer | seeds | {' | '.join(title for title, _ in METRICS.values())} |")
        print("|---|---|" + "---|" * len(METRICS))
        first = next(iter(found.values()))[:1]
        for title, reports, state in [("as scanned", first, "before"), *((t, r, "after") for t, r in found.items())]:
            (channel,) = reports[0]["sites"][site]
            cells = [
                spread([report["sites"][site][channel][name][state] for report in reports], digits)
                for name, (_, digits) in METRICS.items()
            ]
            print(f"| {title} | {len(reports) if state == 'after' else ''} | {' | '.join(cells)} |")


def agreement_table(work: Path) -> None:
    """Radiomics against the truth, and what a site classifier still finds."""
    found = qualities(work)
    if not found:
        print("Not measured.")
        return
    print(
        "| harmonizer | seeds | median CCC at B, C, D | median ICC(2,1) | site classifier's accuracy "
        "| its null, 95th percentile |\n|---|---|---|---|---|---|"
    )
    first = next(iter(found.values()))[:1]
    for title, reports, state in [("as scanned", first, "before"), *((t, r, "after") for t, r in found.items())]:
        features = [report["features"] for report in reports]
        ccc = ", ".join(
            spread([f["sites"][site]["median"][state] for f in features], 2, ranged=False) for site in "BCD"
        )
        icc = spread([f["icc"]["median"][state] for f in features], 2)
        accuracy = [report["site_classifier"][state] for report in reports]
        cells = [spread([found[name] for found in accuracy], 2) for name in ("balanced_accuracy", "null_high")]
        print(f"| {title} | {len(reports) if state == 'after' else ''} | {ccc} | {icc} | {' | '.join(cells)} |")


def spread(estimates: list[Any], digits: int, *, ranged: bool = True) -> str:
    """Mean over seeds and, with more than one, their range."""
    values = [estimate["value"] if isinstance(estimate, Mapping) else estimate for estimate in estimates]
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 or not ranged else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def cost_table(results: Results) -> None:
    lines = [json.loads(line) for line in (results.work / "trained.jsonl").read_text().splitlines()]
    spent: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["what"].startswith("harmonizer"):
            kind, dims, mode = line["what"].split()[1].split("_")[:3]
            spent[f"{kind}, {dims}, {mode}"].append(line.get("cpu_s", line.get("wall_s", float("nan"))))
    print("| harmonizer | training: CPU s (central), wall s (federated) |\n|---|---|")
    for name, seconds in sorted(spent.items()):
        print(f"| {name} | {np.mean(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f}) |")
    print("\n| harmonizer | CPU s per volume, stock predictor, sites B to D |\n|---|---|")
    for dims in ("3d", "2d"):
        for row in results.rows(["A"], dims):
            found = [e["sites"][s]["cpu_s_per_volume"] for e in results.entries[row] for s in "BCD" if s in e["sites"]]
            if found:
                print(f"| {row.title}, {dims} | {np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}) |")
