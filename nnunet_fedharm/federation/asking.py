"""Asking several sites by name, as the roster knows them, and saying in one line who failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message, RecordDict

from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.exchange import Answers, exchange
from nnunet_fedharm.federation.roster import Roster


def ask(
    roster: Roster,
    log: EventLog,
    sites: list[str],
    content: RecordDict,
    message_type: str,
    *,
    deadline_s: float,
    accept: Callable[[str, RecordDict], Any],
    what: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> Answers[Any]:
    """Send the same content to several sites by name and collect the replies until the deadline.

    Args:
        meanwhile: called once, when all requests are on their way.
    """
    requests = {
        site: Message(content, dst_node_id=roster.nodes[site], message_type=message_type, ttl=deadline_s)
        for site in sites
    }
    return exchange(
        roster.grid,
        requests,
        deadline_s=deadline_s,
        accept=roster.noting_lost_plans(accept),
        meanwhile=meanwhile,
        waiting=lambda left, seconds: log.write("waiting", what=what, sites=sorted(left), seconds=round(seconds)),
    )


def join_reasons(failures: Mapping[str, str]) -> str:
    """Who failed and why, in one line; a sentence that names its site already is not prefixed."""
    named = (text if site in text else f"{site}: {text}" for site, text in sorted(failures.items()))
    return "; ".join(text.rstrip(".") for text in named)
