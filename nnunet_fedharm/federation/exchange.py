"""One exchange with several sites over Flower's Grid: push, then pull until all answered or the deadline passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from nnunet_fedharm.errors import CheckpointError, FedHarmError

T = TypeVar("T")
WAITING_EVERY_S = 15.0
"""How often a long wait is reported."""
_POLL_S = (0.1, 1.0, 0.05)
"""Shortest and longest time between two looks, and what each open request adds to the longest."""

_FLOWER_ERRORS = {
    0: "the site failed for an unknown reason",
    1: "its client app could not be loaded; install nnunet_fedharm at the site",
    2: "its client app raised an exception; see the site's own log",
    3: "the message ran out of time",
    4: "the reply came too late or was lost",
    5: "its node is gone",
    7: "its node refused the app bundle",
    8: "its process died",
}


@dataclass
class Answers(Generic[T]):
    """What came back from one exchange.

    Attributes:
        accepted: key -> what `accept` made of the reply.
        failures: key -> one sentence; an error reply, a reply that was refused, or no reply in time.
        undelivered: keys whose failure is Flower's (node gone, no reply in time), not the site's own words.
    """

    accepted: dict[str, T] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    undelivered: set[str] = field(default_factory=set)


def exchange(
    grid: Grid,
    requests: Mapping[str, Message],
    *,
    deadline_s: float,
    accept: Callable[[str, RecordDict], T],
    waiting: Callable[[set[str], float], None] = lambda left, seconds: None,
    meanwhile: Callable[[], None] = lambda: None,
    enough: Callable[[Answers[T]], bool] = lambda answers: False,
) -> Answers[T]:
    """Send one request to each site and collect the replies.

    Args:
        grid: Flower's grid.
        requests: key (a site's name, or a node not yet identified) -> message.
        deadline_s: seconds after which missing replies count as silent.
        accept: turns a reply into a value; a FedHarmError from it sets the reply aside with its sentence.
        waiting: called about every 15 s with who is still missing and the seconds so far.
        meanwhile: called once, when all requests are on their way.
        enough: asked after each reply; True ends the wait early.

    Returns:
        One entry per request, in `accepted` or in `failures`.

    Raises:
        CheckpointError: from `accept`; the server cannot keep what came.
    """
    answers: Answers[T] = Answers()
    start = reported = time.monotonic()
    open_requests = _push(grid, requests, answers)
    meanwhile()
    pause = _POLL_S[0]
    while open_requests:
        late = time.monotonic() - start >= deadline_s  # before the pull: what has arrived by now still counts
        before = len(open_requests)
        for identifier in list(open_requests):
            _pull(grid, identifier, open_requests, accept, answers)
        if late or not open_requests or enough(answers):
            break
        if time.monotonic() - reported > WAITING_EVERY_S:
            reported = time.monotonic()
            waiting(set(open_requests.values()), reported - start)
        longest = max(_POLL_S[1], _POLL_S[2] * len(open_requests))
        pause = _POLL_S[0] if len(open_requests) < before else min(1.5 * pause, longest)
        time.sleep(pause)
    for key in open_requests.values():
        answers.undelivered.add(key)
        answers.failures[key] = f"no reply within {time.monotonic() - start:.0f} s"
    return answers


def _push(grid: Grid, requests: Mapping[str, Message], answers: Answers[T]) -> dict[str, str]:
    """Push every request; message id -> key of those that Flower took."""
    keys = list(requests)
    ids = list(grid.push_messages([requests[key] for key in keys]))
    taken: dict[str, str] = {}
    # Flower answers None for a node that it does not know any more.
    for position, key in enumerate(keys):
        identifier = ids[position] if position < len(ids) else None
        if identifier:
            taken[identifier] = key
        else:
            answers.undelivered.add(key)
            answers.failures[key] = _FLOWER_ERRORS[5]
    return taken


def _pull(
    grid: Grid,
    identifier: str,
    open_requests: dict[str, str],
    accept: Callable[[str, RecordDict], T],
    answers: Answers[T],
) -> None:
    """Take the reply to one message, if it is there.

    One at a time: Flower hands over all replies that have arrived, and the server has memory for a few models, not for
    one of every site.
    """
    for reply in grid.pull_messages([identifier]):
        key = open_requests.pop(reply.metadata.reply_to_message_id, None)
        if key is not None:
            _take(key, reply, accept, answers)


def _take(key: str, reply: Message, accept: Callable[[str, RecordDict], T], answers: Answers[T]) -> None:
    if reply.has_error():
        # Flower's own reason can hold a traceback of the site, which may name cases: it is not repeated here.
        answers.undelivered.add(key)
        answers.failures[key] = _FLOWER_ERRORS.get(reply.error.code, f"Flower error {reply.error.code}")
        return
    try:
        answers.accepted[key] = accept(key, reply.content)
    except CheckpointError:
        raise  # the server's own disk: no fault of the site, and no reason to let it train again
    except FedHarmError as error:
        answers.failures[key] = str(error)
    except Exception as error:  # noqa: BLE001 (whatever a broken or hostile site sends, the others go on)
        answers.failures[key] = f"the reply of {key} cannot be read ({type(error).__name__})."
