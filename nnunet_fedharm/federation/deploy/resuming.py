"""Which sites a `server run` is for: those of the stopped run that it resumes, also where some have left or come since."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from nnunet_fedharm.errors import CheckpointError, SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.state import STATE_FILE

Show = Callable[[str], None]


@dataclass(frozen=True)
class FormerRun:
    """What the server's state says of a run.

    Attributes:
        planned: whether its plans are made, which takes all of its sites.
        with_model: sites that hold its final model; none before its end.
    """

    run_id: str
    sites: tuple[str, ...]
    planned: bool
    with_model: frozenset[str]


def choose_sites(
    config: FederateConfig | SiteReportConfig, fedharm: Path, registered: Collection[str], mend: str, show: Show
) -> str:
    """Names for a run, comma separated: those that were asked for, those of the run that is resumed, or all registered ones.

    A run's sites are part of what it is, so they stay the same when it is resumed; the server does not wait for those that
    are not registered any more.

    Args:
        fedharm: the server's folder with the states of its runs.
        mend: how a site is registered.
        show: told in one line who is left out.

    Raises:
        SetupError: a site is not registered, or there is none.
    """
    asked = config.site_names
    former = None if isinstance(config, SiteReportConfig) or config.restart else former_run(fedharm, config)
    if former is not None and set(former.sites) & set(registered) - former.with_model:
        gone = sorted(set(former.sites) - set(registered))
        new = sorted(set(registered) - set(former.sites))
        if not gone or former.planned:
            if gone:
                show(f"{_are(gone)} not registered any more: the run {former.run_id} goes on without.")
            if new and not asked:
                show(
                    f"{_are(new)} registered since: part of the next run, not of {former.run_id} (`--sites` names a run's)."
                )
            return ",".join(former.sites)
        if not asked:
            show(
                f"{former.run_id} was stopped before it had plans, and {_are(gone)} not registered any more: a new run."
            )
    sites = asked or tuple(sorted(registered))
    unknown = sorted(set(sites) - set(registered))
    if unknown or not sites:
        raise SetupError(f"{', '.join(unknown) or 'No site'} is not registered. {mend}")
    return ",".join(sites)


def former_run(fedharm: Path, config: FederateConfig) -> FormerRun | None:
    """The last run of a configuration: of the sites that it names, or of any where it names none."""
    wanted = config.identity()
    for path in sorted(fedharm.glob(f"*/{STATE_FILE}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            state = read_json(path)
        except CheckpointError:
            continue  # damaged: it cannot be resumed
        sites = tuple(state["config"].get("sites", "").split(","))
        if state["config"] == wanted | {"sites": ",".join(config.site_names or sites)}:
            return FormerRun(state["run_id"], sites, bool(state["plans"]), frozenset(state["finished_sites"]))
    return None


def _are(sites: list[str]) -> str:
    return f"{', '.join(sites)} {'is' if len(sites) == 1 else 'are'}"
