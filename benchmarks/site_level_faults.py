"""Where wrappers of sites' privacy break: odd tensors and updates, aliases, digits, generators, adaptive clipping.

Rows for the tables of `site_level.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import site_level_wrappers as wrappers
import torch
from site_level_updates import (
    difference,
    direction_of,
    exact_mean,
    flat,
    former_weights,
    length,
    moved,
    network,
    round_of,
    worst_inputs,
)
from site_level_wrappers import CLIP, Round, Weights

from nnunet_fedharm.privacy.noise import grid_of

Rows = list[Sequence[str]]
Method = Callable[[Round, float], Weights | None]
Z = 4.0
CHOSEN: dict[str, Method] = {
    "Flower, server-side": wrappers.flower_server,
    "Flower, client-side": wrappers.flower_client,
    "Flower, LocalDpMod": wrappers.flower_local,
    "`--site-dp server`": wrappers.our_server,
    "`--site-dp local`": wrappers.our_local,
    "`--site-dp distributed`": wrappers.our_distributed,
}


def outcome(work: Callable[[], Any], most: int = 60) -> str:
    """What came out, or the error that a run would end with."""
    try:
        return str(work())
    except Exception as error:  # noqa: BLE001 - any error is the result here
        return f"{type(error).__name__}: {str(error).splitlines()[0][:most].rstrip()}"


def odd_tensors(former: Weights) -> Rows:
    """What is no ordinary float tensor, or no ordinary update."""
    whole = round_of(former, 4).equal()
    first = next(iter(whole.updates))

    def instead(weights: Weights) -> Round:
        return replace(whole, updates=dict(whole.updates) | {first: weights})

    def with_extra(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> Round:
        updates = {site: {**weights, "extra": after} for site, weights in whole.updates.items()}
        return replace(whole, former={**former, "extra": before}, updates=updates)

    def extra_of(one: Round) -> Callable[[Method], str]:
        return lambda method: f"goes on, {(method(one, Z) or {})['extra'].tolist()} afterwards"

    def finite(one: Round) -> Callable[[Method], str]:
        def tell(method: Method) -> str:
            made = flat(method(one, Z) or {})
            return (
                "goes on" if np.isfinite(made).all() else f"goes on, {int((~np.isfinite(made)).sum())} weights are NaN"
            )

        return tell

    spoilt = {name: value.copy() for name, value in whole.updates[first].items()}
    next(iter(spoilt.values())).reshape(-1)[0] = np.nan
    one, other = _twins(former)
    swapped = {other: one, one: other}
    turned = instead({swapped.get(name, name): whole.updates[first][swapped.get(name, name)] for name in former})

    def in_order(method: Method) -> str:
        made = method(turned, 0.0) or {}
        off = length(difference({name: made[name] for name in former}, exact_mean(whole)))
        return "goes on, by name" if off < 0.01 * CLIP else f"goes on, the mean is off by {off / CLIP:.2f} S"

    tries = (
        ("an int64 counter, 7 before and 9 after", extra_of(with_extra(np.array([7]), np.array([9])))),
        ("a bool flag", extra_of(with_extra(np.array([True]), np.array([True])))),
        ("a site whose update is zero", finite(instead(former))),
        ("a NaN in one update", finite(instead(spoilt))),
        ("a site that sends two tensors of one shape in the other order", in_order),
    )
    return [
        (what, *(outcome(lambda m=method, tell=tell: tell(m)) for method in CHOSEN.values())) for what, tell in tries
    ]


def _twins(former: Weights) -> tuple[str, str]:
    """Two large tensors of one shape."""
    shapes: dict[tuple[int, ...], str] = {}
    for name, value in sorted(former.items(), key=lambda item: -item[1].size):
        if value.shape in shapes:
            return shapes[value.shape], name
        shapes[value.shape] = name
    raise AssertionError


def aliases(former: Weights) -> Rows:
    """One update of 10 clips by the names of nnU-Net's state dict, where a tensor has several, and by each tensor once."""
    rows = []
    names = {name: value.numpy() for name, value in network().state_dict().items()}
    for label, given in (("each tensor once", former_weights()), ("nnU-Net's state dict", names)):
        known: dict[bytes, npt.NDArray[Any]] = {}
        rng = np.random.default_rng(5)
        # Aliases have the same bytes, and get the same update.
        towards = {
            name: known.setdefault(value.tobytes(), rng.normal(0, 0.1, value.shape)) for name, value in given.items()
        }
        one = replace(round_of(given, 4).equal(), updates=dict.fromkeys("ABCD", moved(given, towards, 10 * CLIP)))
        made = wrappers.flower_server(replace(one, cases=dict.fromkeys("ABCD", 1)), 0.0) or {}
        change = difference({name: made[name] for name in former}, {name: given[name] for name in former})
        rows.append(
            (label, str(len(given)), f"{sum(value.size for value in given.values()):,}", f"{length(change):.2f}")
        )
    return rows


def digits(former: Weights) -> Rows:
    """Entries of the published mean that no float32 noise makes of the mean, and of the mean without the largest site."""
    rows: Rows = []
    for count in (4, 20):
        given, nothing, _ = worst_inputs(round_of(former, count).equal())
        published = flat(wrappers.flower_server(given, Z) or {}).astype(np.float32)
        means = (flat(wrappers.flower_server(one, 0.0) or {}).astype(np.float32) for one in (given, nothing))
        told = [f"{100 * (1 - _reachable(published, mean).mean()):.2f} %" for mean in means]
        rows.append((str(count), "Flower, server-side", *told))
        ours, start, step = flat(wrappers.our_server(given, Z)), flat(former), grid_of(Z * CLIP) / count
        near = np.rint((ours - start) / step)
        # Sums lie on a grid that is the same for both, so what one explains the other does.
        on_grid = [(start + (near + move) * step).astype(np.float32) == ours.astype(np.float32) for move in (-1, 0, 1)]
        alike = f"{100 * (1 - np.any(on_grid, axis=0).mean()):.2f} %"
        rows.append((str(count), "`--site-dp server`", alike, alike))
    return rows


def _reachable(published: npt.NDArray[Any], mean: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether some float32 noise makes this mean that number, in float32 arithmetic as Flower adds it."""
    noise = (published.astype(np.float64) - mean.astype(np.float64)).astype(np.float32)
    found = np.zeros(published.shape, bool)
    for near in (noise, np.nextafter(noise, np.float32(np.inf)), np.nextafter(noise, np.float32(-np.inf))):
        found |= (mean + near).astype(np.float32) == published
    return found


def generators(former: Weights) -> Rows:
    """Whether a program that seeds numpy and torch, as trainings do, gets the same noise again."""
    rows: Rows = []
    one = round_of(former, 4).equal()
    for name, method in CHOSEN.items():
        made = []
        for _ in range(2):
            np.random.seed(0)
            torch.manual_seed(0)
            made.append(flat(method(one, Z) or {}))
        rows.append((name, "the same" if np.array_equal(*made) else "new"))
    return rows


def adaptive(former: Weights) -> Rows:
    """The clip of Flower's adaptive wrapper where all updates have the norm 1, so that their median is 1."""
    one = round_of(former, 4).equal()
    alike = replace(one, updates={site: moved(former, direction_of(former, 3), 1.0) for site in one.updates})
    rows: Rows = []
    for start in (0.5, 2.0):
        rounds = wrappers.AdaptiveRounds(4, 0.1, start, 0.2)
        used = [rounds.run(alike)[0] for _ in range(31)]
        rows.append((f"{start:g}", *(f"{used[number]:.3g}" for number in (5, 10, 30))))
    return rows


def adaptive_noise(former: Weights) -> Rows:
    """The bound that its noise is made for, over the one that the updates were cut to, in 50 rounds; and few sites."""
    one = round_of(former, 4).equal()
    long = replace(one, updates={site: moved(former, direction_of(former, 3), 2.0) for site in one.updates})
    ratios = []
    for _ in range(50):
        used, made_for, _ = wrappers.AdaptiveRounds(4, 0.1, 1.0, 0.2).run(long)
        ratios.append(made_for / used)
    few = outcome(lambda: wrappers.flower_adaptive(one, 1.0), most=400)
    bit = wrappers.client_adaptive_bit(long)
    return [(f"{min(ratios):.2f} to {max(ratios):.2f}", str(bit), few)]
