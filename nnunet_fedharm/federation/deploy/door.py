"""Whether the server lets a site in: how a SuperNode's end is read, and when trying again does not help any more."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.deploy.processes import Children, watch

PATIENCE_S = 90.0
"""Flower lets a site that was killed in again once it has missed two heartbeats, about a minute later."""
REMOVED_S = 20.0
"""A site that was in has no former process to wait for; a server that was started anew knows it by then."""
_LOST = re.compile(r"ERROR\s*:\s+(?:Client|Server) error '(\d{3})[^']*' for url '\S*/v1/fleet/")
"""Flower's loop has ended with this error. The process lives on and does nothing, as the thread of its own door keeps it."""


class End(Enum):
    """How a SuperNode ended."""

    NOT_LET_IN = "Failed to activate SuperNode"
    SHUT_OUT = "SuperNode terminated gracefully"  # by itself: a heartbeat was refused
    TROUBLE = "the server could not do its work"


def watch_door(family: Children, stopped: threading.Event) -> End | None:
    """Wait for a signal, and return None; or how the SuperNode ended, where trying again may help.

    Raises:
        FederationError: a process ended for another reason.
    """

    def look() -> None:
        if _LOST.search(family.said("supernode")):
            raise FederationError("The SuperNode has lost the server.")

    try:
        watch(family, stopped, look)
    except FederationError:
        end = end_of(family.said("supernode"))
        if end is None:
            raise
        return end
    return None


def end_of(said: str) -> End | None:
    """How a SuperNode that wrote this ended; None where the server's door has nothing to do with it."""
    lost = _LOST.search(said)
    if lost:
        return End.SHUT_OUT if lost[1] == "401" else End.TROUBLE
    return next((end for end in (End.NOT_LET_IN, End.SHUT_OUT) if end.value in said), None)


@dataclass
class Door:
    """The server's door as a site has found it.

    Attributes:
        site: its name.
        public_key: file that the coordinator registers.
        shut_since: when it was found shut first, of a row of attempts.
        was_in: the site was in before it was refused.
    """

    site: str
    public_key: Path
    shut_since: float = float("inf")
    was_in: bool = False

    def why_again(self, end: End, *, was_up_s: float) -> str:
        """A sentence for the next attempt.

        Raises:
            SetupError: another attempt would not help.
        """
        if end is End.TROUBLE:
            return f"The server had trouble and has lost {self.site}. Trying again."
        now = time.monotonic()
        self.was_in = self.was_in or end is End.SHUT_OUT
        self.shut_since = now if was_up_s > PATIENCE_S else min(self.shut_since, now)
        shut_s = now - self.shut_since
        if self.was_in and shut_s > REMOVED_S:
            raise SetupError(
                f"The coordinator has removed {self.site}, or replaced its key: the server has ended the connection and does "
                "not let this key in again. Ask the coordinator; to come back, make another key (`nnunet-fedharm site join … "
                f"--new-key`) and send {self.public_key}."
            )
        if shut_s > PATIENCE_S:
            raise SetupError(
                f"The server does not let {self.site} in: this site's key is not registered there, or not any more. "
                f"Send {self.public_key} to the coordinator, and start again once it is registered."
            )
        if self.was_in:
            return (
                f"The server does not let {self.site} in any more. Trying again, as it may just have been started anew."
            )
        return (
            f"The server does not let {self.site} in. Either this site's key is not registered there, or a former "
            "process of this site was killed less than a minute ago and still counts as connected. Trying again."
        )
