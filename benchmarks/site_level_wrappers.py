"""Flower's wrappers and ours behind one signature, for `site_level.py`: replies of a round in, the next weights out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as api
from flwr.supercore.task_identity import TaskIdentity

from nnunet_fedharm.federation.aggregation import SiteUpdate, weighted_mean
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.secure.home import NOISY
from nnunet_fedharm.federation.secure.update import mean_update, site_arrays, update_layout
from nnunet_fedharm.federation.site_privacy import NOISY_MEAN, protect, with_own_noise
from nnunet_fedharm.federation.updates import quorum_of
from nnunet_fedharm.privacy.fixed_point import Share
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.secure_aggregation import MIN_SITES
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, LOCAL, SERVER, SitePrivacy, clipped

Weights = dict[str, npt.NDArray[Any]]

CLIP, DELTA = 1.0, 1e-5
CASES = "num-examples"
NO_NOISE = 1e-7
"""Noise multiplier where ours takes none that is 0."""


@dataclass(frozen=True)
class Round:
    """Replies of a round.

    Attributes:
        former: weights that all sites were given.
        updates: site -> weights after its training.
        cases: site -> its weight in the mean.
        asked: how many sites were asked, and are told to Flower; None: those that replied.
        failed: how many of the others reply with an error instead of nothing.
    """

    former: Weights
    updates: Mapping[str, Weights]
    cases: Mapping[str, int]
    asked: int | None = None
    failed: int = 0

    @property
    def sampled(self) -> int:
        return self.asked or len(self.updates)

    def equal(self) -> Round:
        """The same with equal weights."""
        return replace(self, cases=dict.fromkeys(self.updates, 1))


class Nodes:
    """As much of Flower's Grid as a strategy needs to choose sites."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.count + 1))


def record_of(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in weights.items()})


def _through(strategy: Any, one: Round, mod: Any = None) -> Weights | None:
    """One round of a message strategy: configure, reply, aggregate."""
    # Flower's processes know whose they are before they make a message.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    asked = list(strategy.configure_train(1, record_of(one.former), ConfigRecord(), Nodes(one.sampled)))
    replies = []
    for number, (site, weights) in enumerate(one.updates.items()):
        message = asked[number]
        message.metadata.__dict__["_message_id"] = site

        def train(message: Message, context: Context, site: str = site, weights: Weights = weights) -> Message:
            told = {"arrays": record_of(weights), "metrics": MetricRecord({CASES: one.cases[site]})}
            return Message(RecordDict(told), reply_to=message)

        context = Context(run_id=1, node_id=number + 1, node_config={}, state=RecordDict(), run_config={})
        reply = train(message, context) if mod is None else mod(message, context, train)
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        replies.append(reply)
    for message in asked[len(one.updates) :][: one.failed]:
        message.metadata.__dict__["_message_id"] = "lost"
        replies.append(Message(Error(code=0, reason="lost"), reply_to=message))
    arrays, _ = strategy.aggregate_train(1, replies)
    return None if arrays is None else {name: value.numpy() for name, value in arrays.items()}


def _fedavg(one: Round) -> Any:
    return api.FedAvg(fraction_train=1.0, min_train_nodes=one.sampled, min_available_nodes=one.sampled)


def flower_server(one: Round, z: float, accountant: Any = None) -> Weights | None:
    strategy = api.DifferentialPrivacyServerSideFixedClipping(_fedavg(one), z, CLIP, one.sampled, accountant=accountant)
    return _through(strategy, one)


def flower_accounted(one: Round, z: float) -> Weights | None:
    return flower_server(one, z, accountant(one.sampled))


def flower_client(one: Round, z: float) -> Weights | None:
    strategy = api.DifferentialPrivacyClientSideFixedClipping(_fedavg(one), z, CLIP, one.sampled)
    return _through(strategy, one, fixedclipping_mod)


def flower_adaptive(one: Round, z: float, **options: Any) -> Weights | None:
    kind = api.DifferentialPrivacyServerSideAdaptiveClipping
    return _through(kind(_fedavg(one), z, one.sampled, initial_clipping_norm=CLIP, **options), one)


def flower_local(one: Round, z: float) -> Weights | None:
    """Flower's mod at the epsilon for which its formula gives the standard deviation z S."""
    epsilon = math.sqrt(2 * math.log(1.25 / DELTA)) / (z or NO_NOISE)
    return _through(_fedavg(one), one, LocalDpMod(CLIP, CLIP, epsilon, DELTA))


def flower_legacy(one: Round, z: float) -> Weights | None:
    strategy = legacy.DifferentialPrivacyServerSideFixedClipping(legacy.FedAvg(), z, CLIP, one.sampled)
    strategy.current_round_params = list(one.former.values())
    return _legacy(strategy, one)


def flower_legacy_client(one: Round, z: float) -> Weights | None:
    """Sites clip with the function that Flower's legacy mod calls."""
    from flwr.supercore.differential_privacy import compute_clip_model_update

    cut = {}
    for site, weights in one.updates.items():
        values = list(weights.values())
        compute_clip_model_update(values, list(one.former.values()), CLIP)
        cut[site] = dict(zip(one.former, values, strict=True))
    strategy = legacy.DifferentialPrivacyClientSideFixedClipping(legacy.FedAvg(), z, CLIP, one.sampled)
    return _legacy(strategy, replace(one, updates=cut))


def _legacy(strategy: Any, one: Round) -> Weights | None:
    results = []
    for site, weights in one.updates.items():
        parameters = ndarrays_to_parameters([np.asarray(weights[name]) for name in one.former])
        results.append((None, FitRes(Status(Code.OK, ""), parameters, one.cases[site], {})))
    failures: list[Any] = [RuntimeError("lost")] * one.failed
    parameters, _ = strategy.aggregate_fit(1, results, failures)
    if parameters is None:
        return None
    return dict(zip(one.former, parameters_to_ndarrays(parameters), strict=True))


class AdaptiveRounds:
    """Flower's server-side adaptive clipping over several rounds of updates of the same size."""

    def __init__(self, count: int, z: float, start: float, stddev: float) -> None:
        self.strategy = api.DifferentialPrivacyServerSideAdaptiveClipping(
            api.FedAvg(min_train_nodes=count, min_available_nodes=count),
            z, count, initial_clipping_norm=start, clipped_count_stddev=stddev,
        )  # fmt: skip

    def run(self, one: Round) -> tuple[float, float, Weights]:
        """Bound that the updates were cut to, bound that the noise was made for, and the weights."""
        used = self.strategy.clipping_norm
        weights = _through(self.strategy, one)
        assert weights is not None
        return used, self.strategy.clipping_norm, weights


def client_adaptive_bit(one: Round) -> int:
    """`norm_bit` of Flower's adaptive mod for the first reply, at the clip."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    kind = api.DifferentialPrivacyClientSideAdaptiveClipping
    strategy = kind(_fedavg(one), 0.0, one.sampled, initial_clipping_norm=CLIP)
    (message, *_) = strategy.configure_train(1, record_of(one.former), ConfigRecord(), Nodes(one.sampled))
    message.metadata.__dict__["_message_id"] = "first"
    weights = next(iter(one.updates.values()))

    def train(message: Message, context: Context) -> Message:
        told = {"arrays": record_of(weights), "metrics": MetricRecord({CASES: 1})}
        return Message(RecordDict(told), reply_to=message)

    reply = adaptiveclipping_mod(message, Context(1, 1, {}, RecordDict(), {}), train)
    return int(next(iter(reply.content.metric_records.values()))["norm_bit"])


def accountant(sites: int) -> Any:
    """Flower's accountant as its fixed-clipping wrappers ask for it."""
    from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    return RdpAccountant(PrivacyConfig(DELTA, sites, relation, sampling))


def promise(mode: str, z: float, *, sites: int, rounds: int = 1) -> SitePrivacy:
    """Ours; with shares the quorum is the default, more than half of the asked sites, of which one may collude."""
    shared = {"least": max(MIN_SITES, quorum_of(0, sites)), "colluding": 1} if mode == DISTRIBUTED else {}
    return SitePrivacy(mode=mode, clip=CLIP, noise=z or NO_NOISE, delta=DELTA, rounds=rounds, **shared)


def our_server(one: Round, z: float) -> Weights:
    updates = {site: SiteUpdate(weights, 1, one.cases[site], {}) for site, weights in one.updates.items()}
    return dict(protect(promise(SERVER, z, sites=one.sampled), one.former, Ownership(), updates)[NOISY_MEAN].weights)


def our_local(one: Round, z: float) -> Weights:
    promised = promise(LOCAL, z, sites=one.sampled)
    sent = {site: with_own_noise(promised, one.former, weights, Ownership()) for site, weights in one.updates.items()}
    return weighted_mean(sent, dict.fromkeys(sent, 1 / len(sent)))


def our_distributed(one: Round, z: float) -> Weights:
    """The sum as the ring holds it once the masks are off; `benchmarks/secure_aggregation.py` has the masks."""
    promised = promise(DISTRIBUTED, z, sites=one.sampled)
    like = {name: value for name, value in one.former.items() if value.dtype.kind == "f"}
    most = max(one.cases.values())
    layout = update_layout(like, sites=len(one.updates), max_weight=most, clip=4.0, width=8, room=promised.room)
    total = np.zeros(layout.size, dtype=np.uint64)
    for site, weights in one.updates.items():
        arrays = site_arrays(one.former, weights, {}, like)
        noisy = {name: value for name, value in arrays.items() if name.startswith(NOISY)}
        scaled = {name: value * (one.cases[site] / most) for name, value in clipped(noisy, promised.clip).items()}
        share = Share(frozenset(noisy), promised.share, SecureNoise().wide)
        total += layout.encode({**arrays, **scaled}, one.cases[site], share)
    return one.former | mean_update(layout.decode(total), like, most).weights
