"""Tables and picture of `private_dice.py`: written between two marks of a page, so that the words around them stay."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BEGIN, END = "<!-- tables of private_dice.py -->", "<!-- end of tables -->"
SITES = ("A", "B", "C", "D")
MODES = {"central": "central", "federated": "federated", "shared": "federated, shared noise"}
"""Mode -> words, in the order of the rows."""
LINES = {"central": "-", "federated": "--", "shared": ":"}
Results = dict[tuple[str, str, float], dict[int, dict[str, float]]]
"""(recipe, mode, epsilon) -> seed -> site -> mean Dice."""


def load(work: Path) -> tuple[Results, dict[tuple[str, str, float], list[dict[str, Any]]]]:
    """Dice, and what else the arms' files say."""
    dice: Results = defaultdict(dict)
    rest: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((work / "arms").glob("*.json")):
        entry = json.loads(path.read_text())
        arm = entry["arm"]
        key = (arm["recipe"], arm["mode"], arm["epsilon"])
        dice[key][arm["seed"]] = {
            site: float(np.mean([case["dice"] for name, case in cases.items() if name.startswith("travelling")]))
            for site, cases in entry["sites"].items()
        }
        rest[key].append(entry)
    return dice, rest


def shown(epsilon: float) -> str:
    return "∞" if epsilon >= 1000 else f"{epsilon:g}"


def spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def row(
    found: dict[int, dict[str, float]], reference: dict[str, float], start: dict[int, dict[str, float]]
) -> list[str]:
    """Seeds, Dice by site, mean, worst, share of the reference, and share of the gap between start and reference."""
    sites = [f"{np.mean([seed[site] for seed in found.values()]):.3f}" for site in SITES]
    means = [float(np.mean(list(seed.values()))) for seed in found.values()]
    worst = [min(seed.values()) for seed in found.values()]
    wanted = float(np.mean(list(reference.values())))
    below = [float(np.mean(list(seed.values()))) for seed in start.values()] or [float("nan")]
    whole = wanted - np.mean(below)
    gap = f"{(np.mean(means) - np.mean(below)) / whole:.2f}" if whole > 0.02 else "no gap"
    return [
        str(len(found)),
        *sites,
        spread(means),
        f"{np.mean(worst):.3f}",
        f"{np.mean(means) / wanted:.0%}",
        gap,
    ]


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def tables(work: Path) -> str:
    dice, rest = load(work)
    by_seed = dice[("", "reference", 0.0)]
    reference = {site: float(np.mean([seed[site] for seed in by_seed.values()])) for site in SITES}
    starts = {recipe: found for (recipe, mode, _), found in dice.items() if mode == "start"}
    columns = ["epsilon", "mode", "seeds", *SITES, "mean", "worst site", "of non-private", "gap recovered"]
    parts = []
    for recipe in sorted({key[0] for key in dice if key[0]}):
        entry = next(entries[0]["recipe"] for key, entries in rest.items() if key[0] == recipe)
        told = {
            name: value for name, value in entry.items() if entry.get("judge_steps") or not name.startswith("judge")
        }
        text = ", ".join(f"{name} {value}" for name, value in told.items() if value not in ("", "none"))
        # Recipes that begin with the same word start from the same model, before which the harmonizer of each stands.
        like = sorted(other for other in starts if other.split("-")[0] == recipe.split("-")[0])
        own = starts[recipe if recipe in starts else like[0]] if like else {}
        rows = [["no privacy", "central, 640 steps", *row(by_seed, reference, own)]]
        keys = [key for key in dice if key[0] == recipe and key[1] in MODES]
        for key in sorted(keys, key=lambda key: (-key[2], list(MODES).index(key[1]))):
            rows.append([shown(key[2]), MODES[key[1]], *row(dice[key], reference, own)])
        if own:
            rows.append(["start", "no private label", *row(own, reference, own)])
        costs = []
        for mode, words in MODES.items():
            seconds = [
                entry["cpu_s"] for key, entries in rest.items() if key[:2] == (recipe, mode) for entry in entries
            ]
            costs += [f"{words} {np.median(seconds):.0f}"] if seconds else []
        cost = f" CPU seconds a training: {'; '.join(costs)}." if costs else ""
        parts.append(f"### `{recipe}`\n\n{text}.{cost}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def draw(work: Path, path: Path) -> None:
    """Mean Dice against epsilon, a line per recipe and mode, the range over seeds shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dice, _ = load(work)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    curves: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(dict)
    for (recipe, mode, epsilon), found in dice.items():
        if mode in MODES:
            curves[(recipe, mode)][min(epsilon, 100.0)] = [
                float(np.mean(list(seed.values()))) for seed in found.values()
            ]
    colours = dict(zip(sorted({recipe for recipe, _ in curves}), plt.get_cmap("tab10").colors, strict=False))
    for (recipe, mode), points in sorted(curves.items()):
        at = sorted(points)
        style = {"color": colours[recipe], "linestyle": LINES[mode], "marker": "o", "ms": 4}
        axes.plot(at, [np.mean(points[epsilon]) for epsilon in at], label=f"{recipe}, {MODES[mode]}", **style)
        low, high = [min(points[epsilon]) for epsilon in at], [max(points[epsilon]) for epsilon in at]
        axes.fill_between(at, low, high, color=colours[recipe], alpha=0.15, linewidth=0)
    wanted = float(np.mean([np.mean(list(seed.values())) for seed in dice[("", "reference", 0.0)].values()]))
    for level, text in ((wanted, "without privacy"), (0.8 * wanted, "80% of it")):
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(text, (1, level), va="bottom", fontsize=8, color="grey")
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 8, 32, 100], ["1", "3", "8", "32", "∞"])
    axes.set(xlabel="epsilon by patient, delta 0.001", ylabel="Dice, mean of four hospitals", ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def report(work: Path, page: Path | None) -> None:
    """Print the tables; with a page, write them between its marks and the picture beside it."""
    text = tables(work)
    print(text)
    if page is None:
        return
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    draw(work, page.with_suffix(".png"))
