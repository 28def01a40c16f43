"""How the server makes the next model out of the replies: one strategy per run, checked before the start.

A strategy decides about what every site trains (`Ownership.common`). Rows belong to their sites, and what only the reference's
sites train is their mean, whatever the strategy: a robust mean of one site is that site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import (
    SiteUpdate,
    aggregate,
    amounts,
    mean_metric,
    median_metric,
    select,
    shares,
    weighted_mean,
)
from nnunet_fedharm.federation.codec import Tensors, Weights
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.robust import TRIMMED_LEAST, coordinate_median, krum_choice, krum_least, trimmed_mean
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.federation.server_steps import (
    adaptive_step,
    add_controls,
    mean_control,
    momentum_step,
    relaxed,
    running_average,
)
from nnunet_fedharm.federation.state import Memory

SERVER_LR = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01, "scaffold": 1.0}
"""Strategies with a server learning rate, and the one that they take where none is given."""
ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")
STRATEGIES = ("fedavg", *SERVER_LR, *ROBUST)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One strategy with its parameters; see `server_steps` and `robust` for the formulas.

    Attributes:
        name: of STRATEGIES.
        lr, momentum, beta1, beta2, tau: of the server optimizers.
        trim: share of the replies that a trimmed mean cuts at each end.
        byzantine: bad sites that Krum expects.
        average: decay of the running average of segmenter rounds; 0 keeps none.
    """

    name: str = "fedavg"
    lr: float = 1.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    trim: float = 0.25
    byzantine: int = 1
    average: float = 0.0

    @property
    def least_replies(self) -> int:
        """Replies below which the strategy is none: a median of two is their mean."""
        if self.name in ("median", "trimmed-mean"):
            return TRIMMED_LEAST
        return krum_least(self.byzantine) if self.name in ("krum", "multi-krum") else 1

    def keep(self, sent: Mapping[str, Tensors]) -> tuple[str, ...]:
        """Sites whose replies count: all of them, but with Krum the one, with multi-Krum the n - f, nearest to the others."""
        if self.name not in ("krum", "multi-krum"):
            return tuple(sorted(sent))
        return krum_choice(sent, self.byzantine, keep=1 if self.name == "krum" else len(sent) - self.byzantine)

    def combine(self, sent: Mapping[str, Tensors], share: Mapping[str, float]) -> Weights:
        """One set of tensors out of the sites' own; median and trimmed mean count all sites alike."""
        if self.name == "median":
            return coordinate_median(sent)
        if self.name == "trimmed-mean":
            return trimmed_mean(sent, self.trim)
        return weighted_mean(sent, share)

    def metric(self, updates: Mapping[str, SiteUpdate], share: Mapping[str, float], name: str) -> float | None:
        """A metric of the round: the weighted mean, with robust strategies the median, so that no site decides what is best."""
        return (median_metric if self.name in ROBUST else mean_metric)(updates, share, name)


def strategy_of(config: RunOptions) -> Strategy:
    """The strategy that a configuration asks for."""
    return Strategy(
        name=config.strategy,
        lr=config.server_lr or SERVER_LR.get(config.strategy, 1.0),
        momentum=config.server_momentum,
        beta1=config.server_beta1,
        beta2=config.server_beta2,
        tau=config.server_tau,
        trim=config.trim,
        byzantine=config.byzantine,
        average=config.server_ema,
    )


@dataclass(frozen=True)
class NextModel:
    """What a round makes of its replies.

    Attributes:
        weights: the travelling tensors after the round.
        memory: of the strategy.
        share: site -> share in the mean and in the metrics; 0 for sites that were left out.
        left_out: sites whose replies did not count.
    """

    weights: Weights
    memory: Memory
    share: dict[str, float]
    left_out: tuple[str, ...]


def next_model(
    strategy: Strategy,
    former: Weights,
    updates: Mapping[str, SiteUpdate],
    ownership: Ownership,
    memory: Memory,
    *,
    phase: str,
    number: int,
    weighting: str,
    batch_size: int,
) -> NextModel:
    """Combine the replies, take the server's step, and keep what the next round needs.

    Args:
        former: travelling tensors before the round.
        updates: site -> reply.
        ownership: of the phase.
        memory: after the round before.
        phase, number: the round, from 0.
        weighting, batch_size: as of `aggregation.shares`.

    Raises:
        FederationError: too few sites trained for this strategy.
        ShapeError: a reply lacks tensors.
    """
    share = shares(updates, weighting, batch_size=batch_size)
    common = ownership.common(former)
    kept = _kept(strategy, updates, share, common, trains_together(ownership, former))
    left_out = tuple(sorted(site for site in updates if share[site] > 0 and site not in kept))

    def combine(sent: Mapping[str, Tensors], part: Mapping[str, float]) -> Weights:
        total = sum(part[site] for site in kept)
        return strategy.combine({site: sent[site] for site in kept}, {site: part[site] / total for site in kept})

    robust = strategy.name in ROBUST and trains_together(ownership, former)
    merged = aggregate(former, updates, share, ownership, combine=combine if robust else None)
    mean = {name: merged[name] for name in common}
    moved, memory = _step(strategy, former, mean, memory, phase, number)
    merged |= moved
    if strategy.name == "scaffold" and phase == "segmenter":
        memory = _with_controls(memory, former, updates, number, amounts(updates, weighting, batch_size=batch_size))
    if strategy.average and phase == "segmenter":
        averaged = running_average(
            memory.part("average"), {name: merged[name] for name in common}, decay=strategy.average, count=number + 1
        )
        memory = memory.with_part("average", averaged)
    return NextModel(merged, memory, share | dict.fromkeys(left_out, 0.0), left_out)


def trains_together(ownership: Ownership, weights: Weights) -> bool:
    """Whether there is anything that all sites of a phase train; where the reference trains alone nobody can be outvoted."""
    return bool(controlled(ownership, weights))


def controlled(ownership: Ownership, weights: Weights) -> Weights:
    """The tensors that have a control variate: the floating ones that every site trains."""
    return {name: weights[name] for name in sorted(ownership.common(weights)) if weights[name].dtype.kind == "f"}


def current_control(memory: Memory, like: Weights) -> Weights:
    """SCAFFOLD's c of the coming round.

    Args:
        like: the controlled tensors.
    """
    return mean_control(memory.part("control"), memory.numbers.get("amounts", {}), like, like)


def final_weights(memory: Memory, weights: Weights) -> Weights:
    """The running average where one is kept, the weights of the last round for everything else."""
    return weights | memory.part("average")


def _kept(
    strategy: Strategy, updates: Mapping[str, SiteUpdate], share: Mapping[str, float], common: set[str], together: bool
) -> tuple[str, ...]:
    active = [site for site in updates if share[site] > 0]
    if not together:
        return tuple(sorted(active))
    if len(active) < strategy.least_replies:
        raise FederationError(
            f"The strategy {strategy.name} needs {strategy.least_replies} sites that train, and only {len(active)} did."
        )
    return strategy.keep(select(updates, active, common))


def _step(
    strategy: Strategy, former: Weights, mean: Weights, memory: Memory, phase: str, number: int
) -> tuple[Weights, Memory]:
    """The server's own step from `former` in the direction of `mean`; its memory begins anew with each phase."""
    if number == 0:
        memory = memory.without("velocity", "first", "second")
    if strategy.name == "fedavgm":
        moved, velocity = momentum_step(
            former, mean, memory.part("velocity"), lr=strategy.lr, momentum=strategy.momentum
        )
        return moved, memory.with_part("velocity", velocity)
    if strategy.name in ("fedadam", "fedyogi"):
        moved, first, second = adaptive_step(
            former,
            mean,
            memory.part("first"),
            memory.part("second"),
            kind=strategy.name,
            number=number + 1,
            lr=strategy.lr,
            beta1=strategy.beta1,
            beta2=strategy.beta2,
            tau=strategy.tau,
        )
        return moved, memory.with_part("first", first).with_part("second", second)
    # SCAFFOLD is of the segmenter phase; a harmonizer round is averaged.
    lr = 1.0 if strategy.name == "scaffold" and phase == "harmonizer" else strategy.lr
    return relaxed(former, mean, lr=lr), memory


def _with_controls(
    memory: Memory, like: Weights, updates: Mapping[str, SiteUpdate], number: int, given: Mapping[str, float]
) -> Memory:
    """Add the sites' changes of their control variates, and note whose were counted."""
    changes = {site: update.control for site, update in updates.items() if given[site] > 0}
    numbers: dict[str, Any] = dict(memory.numbers)
    # The first amount stays for the run: the sum holds each site's control variate times exactly this number.
    numbers["amounts"] = {**{site: given[site] for site in sorted(changes)}, **numbers.get("amounts", {})}
    numbers["counted"] = {**numbers.get("counted", {}), **dict.fromkeys(sorted(changes), number)}
    summed = add_controls(memory.part("control"), changes, numbers["amounts"], like)
    return replace(memory.with_part("control", summed), numbers=numbers)


def check_replies(strategy: Strategy, n_sites: int, *, where: str) -> None:
    """Refuse a strategy that never gets enough replies.

    Raises:
        FederationError: fewer sites than it needs.
    """
    if n_sites < strategy.least_replies:
        detail = f" with {strategy.byzantine} bad sites (2f + 3)" if "krum" in strategy.name else ""
        raise FederationError(
            f"The strategy {strategy.name}{detail} needs at least {strategy.least_replies} sites, {where} has {n_sites}. "
            f"Choose {', '.join(_fitting(strategy, n_sites))}."
        )


def _fitting(strategy: Strategy, n_sites: int) -> Iterable[str]:
    return (name for name in STRATEGIES if replace(strategy, name=name).least_replies <= n_sites)
