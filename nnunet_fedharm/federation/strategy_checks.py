"""What of a strategy's options contradicts another one: refused before the start, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.run_options import RunOptions
from nnunet_fedharm.federation.strategy import ROBUST, SERVER_LR, STRATEGIES, check_replies, strategy_of
from nnunet_fedharm.planning.facts import SiteFacts

LOCAL_GROUPS = ("harmonizer", "norm", "encoder", "decoder", "heads")
"""As in `trainers.groups`, which is too slow to import here."""
_ADAPTIVE = ("fedadam", "fedyogi")
_OF: Mapping[str, Sequence[str]] = {
    "server_lr": tuple(SERVER_LR),
    "server_momentum": ("fedavgm",),
    "server_beta1": _ADAPTIVE,
    "server_beta2": _ADAPTIVE,
    "server_tau": _ADAPTIVE,
    "trim": ("trimmed-mean",),
    "byzantine": ("krum", "multi-krum"),
}
"""Option -> the strategies that read it."""
MOST_PROXIMAL = 1.0
"""Of mu times the learning rate: from 1.33 on Nesterov's momentum blows the proximal term up by itself."""


def check_strategy(config: RunOptions) -> None:
    """Check everything about the strategy that the configuration alone can tell.

    Raises:
        FederationError: an option is out of range, belongs to another strategy, or contradicts another option.
    """
    if config.strategy not in STRATEGIES:
        raise FederationError(f"strategy is {config.strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    _check_ranges(config)
    for name, strategies in _OF.items():  # the class holds the defaults
        if getattr(config, name) != getattr(type(config), name) and config.strategy not in strategies:
            raise FederationError(
                f"{name.replace('_', '-')} is for {' and '.join(strategies)}; the strategy {config.strategy} does not read it."
            )
    strategy = strategy_of(config)
    if config.site_names:
        check_replies(strategy, len(config.site_names), where="this federation")
    if config.quorum and config.quorum < strategy.least_replies:
        raise FederationError(
            f"quorum is {config.quorum}, but the strategy {config.strategy} needs {strategy.least_replies} replies in each round."
        )
    if config.strategy == "scaffold" and not config.segmenter_rounds:
        raise FederationError("The strategy scaffold corrects segmenter rounds, and segmenter-rounds is 0.")
    if config.server_ema and not config.segmenter_rounds:
        raise FederationError("server-ema averages segmenter rounds, and segmenter-rounds is 0.")
    _check_local_groups(config)


def check_sites(config: RunOptions, facts: Sequence[SiteFacts]) -> None:
    """Check the strategy against what the sites have.

    Raises:
        FederationError: too few sites with labels, or a site that could never train its own part of the segmenter.
    """
    if not config.segmenter_rounds:
        return
    labelled = [fact.site for fact in facts if fact.n_labelled]
    check_replies(strategy_of(config), len(labelled), where="the segmenter phase (sites with labels)")
    own = [group for group in config.own_groups if group != "harmonizer"]
    without = sorted({fact.site for fact in facts} - set(labelled))
    if own and without:
        raise FederationError(
            f"local-groups is {config.local_groups}, but {', '.join(without)} has no labels to train its own "
            f"{' and '.join(own)} with. Leave that site out of sites, or these groups out of local-groups."
        )


def strategy_warnings(config: RunOptions) -> list[str]:
    """What of the strategy is allowed but may surprise; one sentence each."""
    found = []
    if config.own_groups:
        found.append(
            f"Each site keeps its own {' and '.join(config.own_groups)}: the server's own model stays untrained there, and a "
            "hospital that takes no part gets none."
        )
    if config.strategy in ("median", "trimmed-mean") and config.weighting == "cases":
        found.append(
            f"The strategy {config.strategy} counts all sites alike: weighting cases does not reach the weights."
        )
    return found


def noise_warnings(config: RunOptions, facts: Sequence[SiteFacts]) -> list[str]:
    """What may surprise where some sites train privately by their own policy, and others do not; one sentence each."""
    labelled = [fact for fact in facts if fact.n_labelled]
    noisy = sorted(fact.site for fact in labelled if fact.own_privacy)
    compares = ["norm-bound"] * bool(config.norm_bound) + [f"strategy {config.strategy}"] * (config.strategy in ROBUST)
    if not compares or not noisy or len(noisy) == len(labelled):
        return []
    return [
        f"The noise of {', '.join(noisy)}, private by its own policy, makes its updates unlike the others', and "
        f"{' and '.join(compares)} may leave them out in every round while its patients pay; use fedavg without norm-bound."
    ]


def _check_ranges(config: RunOptions) -> None:
    below_one = ("server_momentum", "server_beta1", "server_beta2", "server_ema")
    for name in below_one:
        if not 0 <= getattr(config, name) < 1:
            raise FederationError(
                f"{name.replace('_', '-')} must be at least 0 and below 1, got {getattr(config, name)}."
            )
    for name in ("server_lr", "proximal_mu"):
        if not getattr(config, name) >= 0:
            raise FederationError(f"{name.replace('_', '-')} must be >= 0, got {getattr(config, name)}.")
    if not config.server_tau > 0:
        raise FederationError(f"server-tau must be > 0, got {config.server_tau}.")
    if not 0 < config.trim < 0.5:
        raise FederationError(f"trim is the share cut at each end, above 0 and below 0.5; got {config.trim}.")
    if config.byzantine < 1:
        raise FederationError(f"byzantine must be >= 1, got {config.byzantine}.")
    if config.norm_bound and not config.norm_bound > 1:
        raise FederationError(
            f"norm-bound is a multiple of the median norm, above 1 (0 = off); got {config.norm_bound}."
        )
    if config.proximal_mu * config.initial_lr > MOST_PROXIMAL:
        raise FederationError(
            f"proximal-mu {config.proximal_mu:g} times initial-lr {config.initial_lr:g} is above {MOST_PROXIMAL:g}: steps would "
            f"overshoot the received weights. Use proximal-mu of at most {MOST_PROXIMAL / config.initial_lr:g}."
        )


def _check_local_groups(config: RunOptions) -> None:
    groups = config.own_groups
    for group in groups:
        if group not in LOCAL_GROUPS:
            raise FederationError(f"local-groups names {group!r}; choose from {', '.join(LOCAL_GROUPS)}.")
    if len(set(groups)) != len(groups):
        raise FederationError(f"A group is named twice in local-groups: {config.local_groups}.")
    if "harmonizer" in groups and config.harmonizer != "curve":
        raise FederationError(
            f"local-groups names the harmonizer, but {config.harmonizer!r} is not trained at every site. Only curve is."
        )
    nothing = set(LOCAL_GROUPS) - set(groups) <= {"harmonizer"} and config.harmonizer_rounds == 0
    if nothing or set(groups) == set(LOCAL_GROUPS):
        raise FederationError(
            "With these local-groups no tensor is shared: there is nothing to federate. Leave one group out."
        )
    if set(groups) - {"harmonizer"} and config.start_from:
        raise FederationError(
            "start-from reaches the sites with the shared tensors only: what local-groups keeps at home would start at random. "
            "Use one of the two."
        )
    for name, used in (("The strategy scaffold", config.strategy == "scaffold"), ("server-ema", config.server_ema > 0)):
        if groups and used:
            raise FederationError(
                f"{name} is not made for local-groups: what it keeps at the server would not fit what each site keeps. "
                "Use one of the two."
            )
