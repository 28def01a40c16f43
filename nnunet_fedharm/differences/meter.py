"""How far the statistics are, for a progress bar."""

from __future__ import annotations

from collections.abc import Callable

from nnunet_fedharm.differences.options import Progress


class Meter:
    """Turns finished steps into shares of the whole; a step that is cut short counts as done once the next one begins."""

    def __init__(self, progress: Progress | None, total: float) -> None:
        self._progress = progress
        self._total = max(total, 1e-9)
        self._end = 0.0

    def step(self, name: str, size: float, ticks: int = 1) -> Callable[[], None]:
        """Begin a step.

        Args:
            name: what is being computed.
            size: its part of the total.
            ticks: how often what is returned will be called.
        """
        start, done = self._end, 0
        self._end = start + size
        self._tell(name, start)

        def tick() -> None:
            nonlocal done
            done = min(done + 1, ticks)
            self._tell(name, start + size * done / ticks)

        return tick

    def finish(self) -> None:
        """Everything is done."""
        self._tell("done", self._total)

    def _tell(self, name: str, reached: float) -> None:
        if self._progress is not None:
            self._progress(name, min(1.0, reached / self._total))
