"""Work of the server that can wait until the sites have theirs.

nnU-Net's results folder and its progress.png take seconds of every round in which all sites would stand still. They are derived
from the state, which is on the disk before, so a server that dies in between writes them when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable


class Later:
    """One piece of work, done once; a newer one that comes first takes its place."""

    def __init__(self) -> None:
        self._work: Callable[[], object] | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Keep it for the next `do`."""
        self._work = work

    def do(self) -> None:
        """Do it now, if there is any; its errors are the caller's."""
        work, self._work = self._work, None
        if work is not None:
            work()
