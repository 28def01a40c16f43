"""The Flower ServerApp: preparation, harmonizer rounds, segmenter rounds, last broadcast; resumable at any moment."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig, warnings_of
from nnunet_fedharm.federation.durable import write_bytes
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.later import Later
from nnunet_fedharm.federation.messages import PHASES
from nnunet_fedharm.federation.ownership import GATE, ownership_of
from nnunet_fedharm.federation.preparation import Preparation
from nnunet_fedharm.federation.report.config import SiteReportConfig, task_of, training_keys
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.rounds import RoundLoop
from nnunet_fedharm.federation.secure.patient_noise import LOCAL
from nnunet_fedharm.federation.server_root import LOCAL_GROUPS_FILE, locked_server, resolve_sites
from nnunet_fedharm.federation.site_card import write_card
from nnunet_fedharm.federation.site_privacy import OFF, privacy_statement, updates_only
from nnunet_fedharm.federation.state import ServerState, find_run, load_state, new_state, save_state, unfinished_runs
from nnunet_fedharm.federation.strategy import final_weights
from nnunet_fedharm.federation.updates import with_open_gate
from nnunet_fedharm.nnunet_root import NnunetRoot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point for Flower: a training, or a site report where the run config's `task` says so."""
    if task_of(context.run_config) == "site-report":
        from nnunet_fedharm.federation.report.server import run_site_report

        run_site_report(grid, SiteReportConfig.from_run_config(context.run_config))
    else:
        run_server(grid, FederateConfig.from_run_config(training_keys(context.run_config)))


def run_server(grid: Grid, config: FederateConfig) -> Path:
    """Run a federation to its end, or go on where a former run of the same configuration stopped.

    Returns:
        The server's nnU-Net results folder (of the fold).

    Raises:
        FedHarmError: the run cannot start or go on; the sentence is in the event log too.
    """
    with locked_server(config) as (root, log):
        return _run(grid, resolve_sites(config), root, log)


def _run(grid: Grid, config: FederateConfig, root: NnunetRoot, log: EventLog) -> Path:
    from nnunet_fedharm.trainers.groups import planned_tensors_of, trained_names
    from nnunet_fedharm.trainers.names import trainer_name_for
    from nnunet_fedharm.trainers.results import initial_weights

    fedharm = root.path / "fedharm"
    state, weights = _open_state(fedharm, config, log)
    folder = fedharm / state.run_id
    roster = Roster(grid, log, state.run_id, config.dataset, config.site_names)
    trainer_name = trainer_name_for(config.harmonizer)
    kept = weights
    state = Preparation(roster, config, log, root, save=lambda new: save_state(folder, new, kept)).run(state)
    if weights is None:
        weights = initial_weights(
            state.plans, state.dataset_json, config.configuration, trainer_name, config.seed, config.start_from
        )
        save_state(folder, state, weights)

    later = Later()

    def put_results(new: ServerState, mean: Weights, is_best: bool) -> None:
        which = ("best", "latest") if is_best else ("latest",)
        later.put(partial(_write_results, root, config, new, mean, trainer_name, which))

    def checkpoint(new: ServerState, mean: Weights, is_best: bool) -> None:
        save_state(folder, new, mean)
        later.do()
        put_results(new, mean, is_best)

    batch_size = int(state.plans["configurations"][config.configuration]["batch_size"])
    local = planned_tensors_of(state.plans, state.dataset_json, config.configuration, trainer_name, config.own_groups)
    ownership = {
        phase: replace(ownership_of(state.plans, config.configuration, phase), local=local) for phase in PHASES
    }
    if config.site_dp != OFF:
        ownership = {phase: updates_only(owned) for phase, owned in ownership.items()}
        log.write("site_privacy", **privacy_statement(config, state.facts)["site_level"])
    stepped: frozenset[str] = frozenset()
    if config.patient_noise != LOCAL:
        ownership["segmenter"] = updates_only(
            ownership["segmenter"]
        )  # rounds of the harmonizer are no sums of clipped gradients
        stepped = trained_names(state.plans, state.dataset_json, config.configuration, trainer_name)
        log.write("patient_noise", **privacy_statement(config, state.facts)["patient_level"])
    loop = RoundLoop(roster, config, log, trainer_name, batch_size, ownership, checkpoint, stepped, later)
    state, weights = loop.run_phase("harmonizer", config.harmonizer_rounds, state, weights)
    if GATE in weights and not weights[GATE]:
        state = replace(state, finished_sites=[])  # by a release that left the gate shut: they get the model again
    weights = with_open_gate(weights)
    if state.rounds_done["segmenter"]:  # the former server may have ended before it wrote them
        put_results(state, weights, state.last_is_best)
    state, weights = loop.run_phase("segmenter", config.segmenter_rounds, state, weights)
    last = final_weights(state.memory, weights)
    results = _write_results(root, config, state, last, trainer_name, _last_checkpoints(state))
    if local:
        _state_what_is_missing(results, config, local, log)
    state = loop.finish(state, last)
    save_state(folder, state, weights)
    without = sorted(set(config.site_names) - set(state.finished_sites))
    log.write("finished", results=str(results), sites_without_model=without)
    return results


def _open_state(fedharm: Path, config: FederateConfig, log: EventLog) -> tuple[ServerState, Weights | None]:
    former = None if config.restart else find_run(fedharm, config.fingerprint())
    if former is None:
        for text in unfinished_runs(fedharm, config.identity(), config.segmenter_rounds):
            log.write("warning", text=text)
        state, weights = new_state(config.fingerprint(), config.identity()), None
        save_state(fedharm / state.run_id, state, None)
    else:
        state, weights = load_state(former)
    log.write("started", run_id=state.run_id, resumed=former is not None, rounds_done=state.rounds_done)
    for text in warnings_of(config):
        log.write("warning", text=text)
    return state, weights


def _state_what_is_missing(results: Path, config: FederateConfig, local: frozenset[str], log: EventLog) -> None:
    """Say, beside the model and in the log, which tensors of the server's own model nobody trained."""
    held = (
        f"The tensors of {' and '.join(config.own_groups)} are each site's own, never sent or averaged. This folder holds "
        f"their untrained start (seed {config.seed}): predict with a site's results folder, not with this one."
    )
    write_bytes(results / LOCAL_GROUPS_FILE, json.dumps({"held": held, "tensors": sorted(local)}, indent=1).encode())
    log.write("local_groups", groups=list(config.own_groups), tensors=len(local), text=held)


def _last_checkpoints(state: ServerState) -> tuple[str, ...]:
    """`best` too where no round had a Dice that could be compared."""
    return ("final", "latest") if state.best_dice is not None else ("final", "best", "latest")


def _write_results(
    root: NnunetRoot,
    config: FederateConfig,
    state: ServerState,
    weights: Weights,
    trainer_name: str,
    which: tuple[str, ...],
) -> Path:
    """The standard nnU-Net results folder at the server, with what this run promises: a former one left its word there."""
    from nnunet_fedharm.trainers.results import write_results_folder

    rounds = [entry for entry in state.history if entry["phase"] == "segmenter"]
    names = {"train_losses": "train_loss", "val_losses": "val_loss", "mean_fg_dice": "dice"}
    history = {
        key: [float("nan") if entry[name] is None else entry[name] for entry in rounds] for key, name in names.items()
    }
    folder = write_results_folder(
        root,
        state.dataset_name,
        state.plans,
        state.dataset_json,
        state.fingerprint,
        config.configuration,
        int(config.fold) if config.fold.isdigit() else config.fold,
        trainer_name,
        weights,
        epoch=max(0, state.rounds_done["segmenter"] * config.local_epochs - 1),
        history=history,
        which=which,  # type: ignore[arg-type]  # only the three names that nnU-Net knows
    )
    write_card(folder, privacy_statement(config, state.facts))
    return folder
