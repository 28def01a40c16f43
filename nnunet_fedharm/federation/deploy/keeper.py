"""What `server start` does for a kept run: look every ten seconds whether it goes on, and submit it again where it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy.control import operator
from nnunet_fedharm.federation.deploy.kept_run import (
    MOST_FAILURES,
    KeptRun,
    alone_with,
    kept_run,
    let_go,
    outcome,
    save,
)
from nnunet_fedharm.federation.deploy.server import submit
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.server_root import is_at_work

_logger = logging.getLogger(__name__)

_LOOK_S = 10.0


class Keeper:
    """Holds on to a consortium's kept run.

    Args:
        show: is told what is done.
        finished: is given the results' folder of a run that has ended well.
    """

    def __init__(
        self, folder: ServerFolder, *, show: Callable[[str], None], finished: Callable[[Path], None] = lambda _: None
    ) -> None:
        self._folder, self._show, self._finished = folder, show, finished
        self._next_look = 0.0
        self._due: float | None = None
        self._refused = self._trouble = ""

    def look(self) -> None:
        """Look after the run, if it is time. A reason why that could not be done is shown, and it is done later."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        try:
            with alone_with(self._folder, wait_s=0.0) as mine:
                if mine:  # else the operator starts or stops a run just now
                    self._look(now)
                    self._trouble = ""
        except FedHarmError as error:
            self._tell(str(error))
        except Exception as error:  # whatever it is, sites that are connected must not lose the server by it
            _logger.warning("Looking after the kept run", exc_info=True)
            self._tell(f"It could not be looked after ({type(error).__name__}: {error}).")

    def _look(self, now: float) -> None:
        kept = kept_run(self._folder)
        if kept is None or self._goes_on():
            self._due = None  # of a former try: this one has its own end
        elif self._due is None:
            self._due = now + self._counted(kept)
        elif now >= self._due:
            self._due = None
            self._submit(kept)

    def _tell(self, trouble: str) -> None:
        """Once, not every ten seconds until somebody mends it."""
        if trouble != self._trouble:
            self._show(f"The kept run: {trouble}")
        self._trouble = trouble

    def _goes_on(self) -> bool:
        # Flower lists a run whose process was killed for about a minute; a killed SuperLink's process ends a little later.
        with operator(self._folder) as connection:
            return bool(connection.active_runs()) or is_at_work(self._folder.results / "fedharm")

    def _counted(self, kept: KeptRun) -> float:
        """Seconds to the next try; none comes where the run has ended well, or never gets anywhere."""
        events = read_events(self._folder.results / "fedharm" / EVENTS_FILE, kept.offset)[0]
        found = outcome(kept, events, self._folder.registered())
        why = self._refused or found.why
        if found.event is not None:
            let_go(self._folder)
            self._show("The kept run has ended, and every site has its model.")
            self._finished(Path(found.event["results"]))
        elif found.failures > MOST_FAILURES:
            let_go(self._folder)
            ended = f"failed {MOST_FAILURES} times without a complete round between"
            if found.results:
                ended = f"has ended, and was resumed {MOST_FAILURES} times for a site that never fetched the model"
            self._show(
                f"The kept run {ended}; it is kept no more. The last reason: "
                f"{why or 'none was given; logs/superexec.log may have it.'} "
                "`nnunet-fedharm server run … --keep` takes it up again."
            )
        else:
            save(self._folder, replace(kept, failures=found.failures, counted=True))
            when = f"in {found.wait_s / 60:.0f} min" if found.wait_s else "now"
            self._show(f"The kept run is resumed {when}. {why or 'It was cut off.'}")
            if found.results and not kept.counted:
                self._finished(Path(found.results))
        return found.wait_s

    def _submit(self, kept: KeptRun) -> None:
        self._refused = ""
        try:
            config = FederateConfig.from_run_config(kept.config)
            with operator(self._folder) as connection:
                _, offset = submit(self._folder, connection, config, self._show)
        except FedHarmError as error:
            self._refused = str(error)
            save(self._folder, replace(kept, failures=kept.failures + 1))
            raise
        save(self._folder, replace(kept, offset=offset, counted=False))
