"""A run's curves as TensorBoard event files: per site, worst site and mean, at the times when the rounds ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.watch.view import RoundView, RunView

_SUFFIX = ".fedharm"


class TensorBoardExport:
    """Writes complete rounds once each; a new export of the same run replaces the former one.

    Args:
        folder: TensorBoard's log folder; each run gets a folder of its own in it.

    Raises:
        SetupError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError(
                "The export needs tensorboard. Install it with `pip install 'nnunet_fedharm[watch]'`."
            ) from error
        self._make: Any = SummaryWriter
        self._folder = folder.expanduser()
        self._writers: dict[str, Any] = {}
        self._written: set[tuple[str, str, int]] = set()

    def write(self, run: RunView) -> int:
        """Write the rounds that are not written yet; returns how many.

        Raises:
            SetupError: the folder cannot be written.
        """
        fresh = [
            entry
            for entry in run.rounds
            if entry.ended and (run.run_id, entry.phase, entry.number) not in self._written
        ]
        try:
            writer = self._writer(run.run_id)
            for entry in fresh:
                for tag, value in scalars(entry).items():
                    at = entry.ended.timestamp() if entry.ended else None
                    writer.add_scalar(tag, value, global_step=entry.number, walltime=at)
                self._written.add((run.run_id, entry.phase, entry.number))
            writer.flush()
        except OSError as error:
            raise SetupError(f"Cannot write to {self._folder}: {error.strerror}. Choose another folder.") from error
        return len(fresh)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, run_id: str) -> Any:
        if run_id not in self._writers:
            folder = self._folder / run_id
            for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
                old.unlink()
            self._writers[run_id] = self._make(str(folder), filename_suffix=_SUFFIX)
        return self._writers[run_id]


def scalars(entry: RoundView) -> dict[str, float]:
    """Tag -> value of one round: `segmenter/dice/site A`, `segmenter/dice/worst site`, `segmenter/dice/mean`, …"""
    found = {f"{entry.phase}/{name}/mean": value for name, value in entry.metrics.items()}
    for site, done in entry.sites.items():
        found |= {f"{entry.phase}/{name}/site {site}": value for name, value in done.metrics.items()}
        if done.seconds is not None:
            found[f"{entry.phase}/seconds/site {site}"] = done.seconds
    worst = entry.worst_site()
    if worst is not None:
        found[f"{entry.phase}/dice/worst site"] = worst[1]
    if entry.seconds is not None:
        found[f"{entry.phase}/seconds/round"] = entry.seconds
    found[f"{entry.phase}/bytes/down"], found[f"{entry.phase}/bytes/up"] = entry.bytes_down, entry.bytes_up
    found[f"{entry.phase}/sites/took part"] = len(entry.sites)
    found[f"{entry.phase}/sites/set aside"] = len(entry.set_aside)
    return found
