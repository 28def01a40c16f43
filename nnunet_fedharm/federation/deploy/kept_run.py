"""The run that is kept: what `server run --keep` leaves in the consortium's folder, and what its events say of it.

Flower forgets a run whose SuperLink was killed, and nobody may be there to type `server run` again when a machine has rebooted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.durable import file_lock, read_json, write_json
from nnunet_fedharm.federation.events import ends_run

MOST_FAILURES = 8
"""Ends in a row without a complete round after which a run is kept no more; the waits between them add up to about two hours."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 60.0, 3600.0


@dataclass(frozen=True)
class KeptRun:
    """A run that `server start` submits again until it has ended well.

    Attributes:
        config: run config that resumes it.
        offset: byte of the event log at its last submission; what came before is not of this try.
        failures: tries in a row that ended without a complete round.
        counted: the end of the last try is among them. The server may be started again while the run waits.
    """

    config: dict[str, Any]
    offset: int
    failures: int = 0
    counted: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a try ended.

    Attributes:
        event: the good end; None where it has to be tried again.
        failures: as in KeptRun, with this try.
        wait_s: seconds to the next try.
        why: the sentence of the failure; empty where the try was cut off without one, as by a reboot.
        results: folder of the model, where the training is complete and a site lacks the model.
    """

    event: Mapping[str, Any] | None
    failures: int = 0
    wait_s: float = 0.0
    why: str = ""
    results: str = ""


def keep(folder: ServerFolder, config: FederateConfig, offset: int) -> None:
    """Keep a run that was submitted. It is resumed, whatever it was begun with: `--restart` counts once."""
    save(folder, KeptRun(replace(config, restart=False).to_run_config(), offset))


def save(folder: ServerFolder, kept: KeptRun) -> None:
    """Write down how far a kept run is."""
    write_json(folder.kept_run, asdict(kept))


def kept_run(folder: ServerFolder) -> KeptRun | None:
    """The run that is kept, if any.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not folder.kept_run.exists():
        return None
    try:
        return KeptRun(**read_json(folder.kept_run))
    except TypeError as error:
        raise CheckpointError(f"{folder.kept_run} is damaged. Delete it, then `server run --keep` again.") from error


@contextmanager
def alone_with(folder: ServerFolder, *, wait_s: float | None = None) -> Iterator[bool]:
    """Read and change the kept run while nobody else does: a stop between the two would be undone by the change."""
    with file_lock(folder.flower_home / "kept-run.lock", wait_s=wait_s) as mine:
        yield mine


def let_go(folder: ServerFolder) -> None:
    """Keep no run any more."""
    folder.kept_run.unlink(missing_ok=True)


def outcome(kept: KeptRun, events: Iterable[Mapping[str, Any]], registered: Collection[str]) -> Outcome:
    """How the last try of a kept run ended.

    A site that was away at the last broadcast has no model yet: the same run gives it to it, without training. One that was shut
    out since is not waited for.

    Args:
        events: since its submission.
        registered: sites that may connect.
    """
    rounds, last = 0, None
    for event in events:
        rounds += event["event"] == "round_end"
        if ends_run(event) and event["event"] != "reported":  # a report may have been made while it waited
            last = event
    why = results = ""
    if last is not None and last["event"] == "finished":
        without = sorted(set(last["sites_without_model"]) & set(registered))
        if not without:
            return Outcome(last)
        why = f"{', '.join(without)} had no connection at the end, and has no model yet."
        results = str(last["results"])
    elif last is not None:
        why = str(last["error"])
    failures = kept.failures if kept.counted else 1 if rounds else kept.failures + 1
    # What a reboot or a crash has cut off goes on at once, unless that is all that happens.
    wait = 0.0 if not why and failures == 1 else min(_FIRST_WAIT_S * 2 ** (failures - 1), _LONGEST_WAIT_S)
    return Outcome(None, failures, wait, why, results)
