"""Flower's own differential privacy of sites against `--site-dp`, on the same updates, clip and noise multiplier.

    pip install 'dp-accounting>=0.6,<0.7'        # Flower's accountant, its extra `dp`
    python benchmarks/site_level.py [--output tables.md]

Updates have the shapes of a small 2D nnU-Net and norms of .3 to 3 clips, and come from 4 and 20 sites of unequal size. Flower's
side is the message API's wrappers and mods, called as a ServerApp and a ClientApp call them, and the wrappers of the legacy API;
ours is what a round calls. Only the updates are made up.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import site_level_faults as faults
import site_level_wrappers as wrappers
from site_level_faults import Method, Rows, Z, outcome
from site_level_updates import SITES, exact_mean, flat, former_weights, round_of, worst_inputs
from site_level_wrappers import CLIP, DELTA, Round, Weights

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon, gaussian_sigma
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, LOCAL, SERVER

ROUNDS = (1, 10, 50)
METHODS: Mapping[str, tuple[Method, bool]] = {
    "Flower, server-side": (wrappers.flower_server, False),
    "Flower, server-side with accountant": (wrappers.flower_accounted, False),
    "Flower, client-side": (wrappers.flower_client, False),
    "Flower legacy, server-side": (wrappers.flower_legacy, False),
    "Flower legacy, client-side": (wrappers.flower_legacy_client, False),
    "Flower, LocalDpMod": (wrappers.flower_local, True),
    "`--site-dp server`": (wrappers.our_server, False),
    "`--site-dp distributed`": (wrappers.our_distributed, False),
    "`--site-dp local`": (wrappers.our_local, True),
}
"""Name -> function, and whether each site has all of the noise."""
EQUAL_ONLY = {"`--site-dp server`": SERVER, "`--site-dp local`": LOCAL}


def noise_and_bound(former: Weights) -> Rows:
    """What is added to the mean, and how far one site can move it."""
    rows: Rows = []
    for count in SITES:
        whole = round_of(former, count)
        for name, (method, at_sites) in METHODS.items():
            for weights, one in (("equal", whole.equal()), ("cases", whole)):
                found = measured(one, method, at_sites) if weights == "equal" or name not in EQUAL_ONLY else ()
                if not found and name in EQUAL_ONLY:
                    FederateConfig(sites="A,B,C,D", weighting="sites", site_dp=EQUAL_ONLY[name])
                    options = {"sites": "A,B,C,D", "weighting": "cases", "site_dp": EQUAL_ONLY[name]}
                    found = (outcome(lambda options=options: FederateConfig(**options)), "", "", "")
                rows.append((str(count), name, weights, *found))
    return rows


def measured(one: Round, method: Method, at_sites: bool) -> tuple[str, ...]:
    """Noise, and the largest moves of the mean, in S/n; and the noise over what it has to hide."""
    count = len(one.updates)
    try:
        noisy = method(one, Z)
    except ValueError as error:
        return (f"refused: {error}", "", "", "")
    noise = float((flat(noisy or {}) - flat(exact_mean(one))).std()) * count / CLIP
    bare = wrappers.flower_server if method is wrappers.flower_accounted else method
    against, nothing, there = (flat(bare(given, 0.0) or {}) for given in worst_inputs(one))
    far, farthest = (float(np.linalg.norm(against - other)) * count / CLIP for other in (nothing, there))
    # Alone, each update has noise z S, and any two of them are 2 S apart.
    hidden = Z / 2 if at_sites else noise / far
    return f"{noise:.2f}", f"{far:.2f}", f"{farthest:.2f}", f"{hidden:.2f}"


def epsilons(former: Weights) -> Rows:
    """What is said of T rounds, and what holds."""
    rows: Rows = []

    def row(name: str, accountant: str, said: Callable[[int], float | None], holds: Callable[[int], float]) -> None:
        told = ["none" if (value := said(rounds)) is None else f"{value:.2f}" for rounds in ROUNDS]
        rows.append((name, accountant, *told, *(f"{holds(rounds):.2f}" for rounds in ROUNDS)))

    def by_flower(rounds: int) -> float:
        from flwr.supercore.privacy_accounting import GaussianPrivacyEvent

        book = wrappers.accountant(4)
        book.compose(GaussianPrivacyEvent(Z, 4, 4), rounds)
        return float(book.get_privacy_spent().epsilon)

    def gaussian(multiplier: float) -> Callable[[int], float]:
        return lambda rounds: gaussian_epsilon(multiplier, DELTA, math.sqrt(rounds))

    row("Flower, either side, with accountant", "RDP, `dp-accounting`", by_flower, gaussian(Z))
    row("Flower, either side, equal weights", "no accountant", lambda rounds: None, gaussian(Z))
    for count, sizes in SITES.items():
        share = max(sizes) / sum(sizes)
        row(
            f"the same, weights by cases, {count} sites",
            "no accountant",
            lambda rounds: None,
            gaussian(Z / share / count),
        )
    of_mod = math.sqrt(2 * math.log(1.25 / DELTA)) / Z
    row("Flower, LocalDpMod", "formula, one round", lambda rounds: of_mod if rounds == 1 else None, gaussian(Z / 2))
    for mode, name in ((SERVER, "server"), (DISTRIBUTED, "distributed"), (LOCAL, "local")):
        said = {rounds: wrappers.promise(mode, Z, sites=4, rounds=rounds).epsilon() for rounds in ROUNDS}
        paid = gaussian(Z / 2 if mode == LOCAL else Z)
        row(f"`--site-dp {name}`", "exact Gaussian", lambda rounds, said=said: said[rounds], paid)
    return rows


def formula_of_the_mod() -> Rows:
    """The noise that LocalDpMod adds for an epsilon, over what that epsilon needs."""
    rows = []
    for epsilon in (0.5, 1.0, 4.0, 8.0, 12.0, 20.0):
        given = math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon
        holds = gaussian_epsilon(given, DELTA, 1.0)
        rows.append((f"{epsilon:g}", f"{given / gaussian_sigma(epsilon, DELTA):.2f}", f"{holds:.2f}",
                     f"{gaussian_epsilon(given, DELTA, 2.0):.2f}"))  # fmt: skip
    return rows


def dropouts(former: Weights) -> Rows:
    """One of 4 and of 20 asked sites says nothing, or answers with an error."""
    rows: Rows = []
    for count in SITES:
        whole = round_of(former, count).equal()
        left = dict(list(whole.updates.items())[:-1])
        for name, (method, at_sites) in METHODS.items():

            def measure(failed: int, method: Method = method, at_sites: bool = at_sites) -> str:
                one = replace(whole, updates=left, asked=count, failed=failed)  # noqa: B023 - called here
                noisy = method(one, Z)
                if noisy is None:
                    return "no new model"
                if at_sites:
                    return "goes on; each update keeps its noise"
                noise = float((flat(noisy) - flat(exact_mean(one))).std())
                return f"goes on, noise over bound {noise * len(left) / CLIP:.2f}"  # noqa: B023

            rows.append((str(count), name, *(outcome(lambda failed=failed: measure(failed)) for failed in (0, 1))))
    return rows


TABLES: tuple[tuple[str, tuple[str, ...], Callable[[Weights], Rows]], ...] = (
    ("Noise of the mean, and how far one site moves it", ("sites", "wrapper", "weights", "noise, S/n",
     "site replaced by nothing, S/n", "by any other, S/n", "noise over bound"), noise_and_bound),
    ("Epsilon of T rounds", ("wrapper", "said by", *(f"said, {t}" for t in ROUNDS), *(f"holds, {t}" for t in ROUNDS)), epsilons),
    ("LocalDpMod's formula", ("epsilon asked for", "noise over what it takes", "holds, replaced by nothing",
     "holds, any two updates"), lambda former: formula_of_the_mod()),
    ("One asked site drops out", ("sites", "wrapper", "says nothing", "answers with an error"), dropouts),
    ("Odd tensors and updates", ("what", *faults.CHOSEN), faults.odd_tensors),
    ("Tensors under several names", ("sent", "names", "entries", "norm of the unique tensors after a clip of 1"), faults.aliases),
    ("Digits", ("sites", "wrapper", "not explained by the mean", "not explained without the largest site"), faults.digits),
    ("Generator", ("wrapper", "noise after the same seeds of numpy and torch"), faults.generators),
    ("Adaptive clipping of updates of norm 1", ("clip at the start", "after 5", "after 10", "after 30 rounds"), faults.adaptive),
    ("Noise of adaptive clipping", ("its bound over the clip", "norm bit of an update above the clip", "z = 1 with 4 sites"),
     faults.adaptive_noise),
)  # fmt: skip


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the tables there too")
    parser.add_argument("--only", default="", help="tables whose name begins so")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    former, parts = former_weights(), []
    for title, heads, rows in TABLES:
        if title.startswith(args.only):
            lines = [heads, ["---"] * len(heads), *rows(former)]
            parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
            print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
