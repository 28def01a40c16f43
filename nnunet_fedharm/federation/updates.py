"""What travels in a round, how many replies it needs, and how a reply is read."""

from __future__ import annotations

from flwr.app import RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights, decode, payload_bytes
from nnunet_fedharm.federation.messages import TRAIN_REPLY, unpack_reply


def travelling(phase: str, weights: Weights) -> Weights:
    """Tensors that a phase sends to its sites: only the harmonizer's while the segmenter rests, all of them otherwise."""
    if phase == "segmenter":
        return weights
    return {name: value for name, value in weights.items() if name.startswith("harmonizer.")}


def quorum_of(quorum: int, n_sites: int) -> int:
    """Replies that a round of `n_sites` needs: the configured number, or more than half of them where it is 0.

    Raises:
        FederationError: nobody can take part.
    """
    if n_sites == 0:
        raise FederationError(
            "No site can take part in this phase. The segmenter phase needs at least one site with labels."
        )
    return min(quorum, n_sites) if quorum else n_sites // 2 + 1


def read_update(site: str, content: RecordDict, like: Weights) -> tuple[SiteUpdate, int]:
    """A site's reply as an update, and its bytes.

    Raises:
        SiteFailure: the site says that it failed.
        FederationError, ShapeError: the reply does not follow the schema, or its weights do not fit.
    """
    message = unpack_reply(TRAIN_REPLY, content, source=site)
    values = message.values
    if values["site"] != site:
        raise FederationError(f"The reply of {site} carries the name {values['site']}.")
    weights = decode(message.weights, like=like, source=site)
    metrics = {
        name: float(value)
        for name, value in values["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    update = SiteUpdate(weights=weights, n_steps=values["n_steps"], n_cases=values["n_cases"], metrics=metrics)
    return update, payload_bytes(message.weights)
