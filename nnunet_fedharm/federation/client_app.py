"""The Flower ClientApp: unpack, check, call planning or trainers inside the site's own nnU-Net root, pack.

Nothing raises through Flower: its error replies carry tracebacks, which may name cases. A failure is a reply with one
sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from nnunet_fedharm.errors import CheckpointError, FederationError, FedHarmError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.aggregation import finite
from nnunet_fedharm.federation.codec import Weights, decode
from nnunet_fedharm.federation.durable import file_lock, read_json, write_json
from nnunet_fedharm.federation.entries import enter_release
from nnunet_fedharm.federation.messages import Unpacked, error_reply, json_hash, reply, unpack
from nnunet_fedharm.federation.ownership import ownership_of
from nnunet_fedharm.federation.report import site as report_site
from nnunet_fedharm.federation.secure import home as secure_home
from nnunet_fedharm.federation.secure.rounds import Trained, train_for_sum
from nnunet_fedharm.federation.site import Site, describe_error, locate_site, training_environment
from nnunet_fedharm.federation.updates import encode_with_control, split_control, travelling
from nnunet_fedharm.privacy.ledger import Ledger

app = ClientApp()

PLANS_FILE = "federation.json"
"""Final plans, dataset.json and fingerprint of a run, in the site's folder of that run."""


@app.query("preflight")
def preflight(message: Message, context: Context) -> Message:
    """Facts of the site, after its data was checked."""
    return _answer(message, context, messages.PREFLIGHT, _preflight)


@app.query("summarize")
def summarize(message: Message, context: Context) -> Message:
    """Bounded summary for the federated fingerprint."""
    return _answer(message, context, messages.SUMMARIZE, _summarize)


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Stock preprocessing with the federation's plans; the site's style comes back."""
    return _answer(message, context, messages.PREPARE, _prepare)


@app.query("plans")
def plans(message: Message, context: Context) -> Message:
    """Keep the final plans."""
    return _answer(message, context, messages.STORE_PLANS, _store_plans)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local epochs of one round."""
    return _answer(message, context, messages.TRAIN, _train)


@app.train("secure")
def train_secure(message: Message, context: Context) -> Message:
    """Local epochs of one round whose update goes into a secure sum."""
    return _answer(message, context, messages.TRAIN, _train_for_sum)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Write the standard nnU-Net results folder from the final weights."""
    return _answer(message, context, messages.FINISH, _finish)


def _register(action: str, schema: messages.Schema, work: Callable[[Site, Unpacked], RecordDict]) -> None:
    """Answer a query of the site report or of a secure sum."""

    @app.query(action)
    def handler(message: Message, context: Context) -> Message:
        return _answer(message, context, schema, work)


for _action, (_schema, _work) in (report_site.ACTIONS | secure_home.ACTIONS).items():
    _register(_action, _schema, _work)


def _answer(
    message: Message, context: Context, schema: messages.Schema, work: Callable[[Site, Unpacked], RecordDict]
) -> Message:
    try:
        site = locate_site(context.node_config, context.run_config)
    except FedHarmError as error:
        return Message(error_reply(type(error).__name__, str(error)), reply_to=message)
    try:
        request = unpack(schema, message.content, source="the server")
        # The lock, because after a server crash this site may still be busy with the former round.
        with file_lock(site.folder / "site.lock"), site.root.create().activate():
            content = work(site, request)
            if schema not in (messages.PREPARE, messages.TRAIN):  # which enter what they release, with its noise
                enter_release(site.folder, schema.name, request.values, content)
    except Exception as error:  # noqa: BLE001 - the one place where a failure becomes a reply; it is logged at the site
        content = error_reply(*describe_error(site, error))
    return Message(content, reply_to=message)


def _preflight(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.facts import collect_facts
    from nnunet_fedharm.sites.checks import check_raw_dataset

    raw_dataset = site.raw_dataset(request.values["dataset"])
    if request.values["check_data"]:
        check_raw_dataset(raw_dataset, site=site.name, num_processes=site.num_processes)
    facts = collect_facts(raw_dataset, site=site.name)
    try:
        held = json_hash(_federation(site, request.values["run_id"])["plans"])
    except CheckpointError:
        held = ""  # not there yet, or damaged: the server sends the plans (again)
    return reply(messages.PREFLIGHT_REPLY, {"site": site.name, "facts": facts.to_dict(), "plans_hash": held})


def _summarize(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.summary import summarize_site

    raw_dataset = site.raw_dataset(request.values["dataset_name"])
    summary = summarize_site(raw_dataset, site=site.name, num_processes=site.num_processes)
    return reply(messages.SUMMARIZE_REPLY, {"site": site.name, "summary": summary.to_dict()})


def _prepare(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.preprocess import preprocess_site
    from nnunet_fedharm.planning.private_style import style_release
    from nnunet_fedharm.planning.style import site_style

    start = time.monotonic()
    values = request.values
    name, configuration = values["dataset_name"], values["configuration"]
    preprocess_site(
        site.root,
        name,
        values["plans"],
        configuration,
        num_processes=site.num_processes,
        dataset_json=values["dataset_json"],
        fingerprint=values["fingerprint"],
    )
    _own_every_case(site, name)
    noise = values["style_noise"]
    style = site_style(site.root, name, values["plans"], configuration, noise_multiplier=noise)
    seconds = round(time.monotonic() - start, 3)
    content = reply(messages.PREPARE_REPLY, {"site": site.name, "style": style.to_dict(), "seconds": seconds})
    if noise > 0:
        Ledger(site.folder).record(style_release(site.name, noise))
    else:
        enter_release(site.folder, messages.PREPARE.name, values, content)
    return content


def _store_plans(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.preprocess import write_descriptions

    values = request.values
    content = {key: values[key] for key in ("plans", "dataset_json", "fingerprint")}
    descriptions = {key: values[key] for key in ("dataset_json", "fingerprint")}
    write_descriptions(site.root, values["dataset_name"], values["plans"], **descriptions)
    _own_every_case(site, values["dataset_name"])
    write_json(site.folder / values["run_id"] / PLANS_FILE, content)
    return reply(messages.STORE_PLANS_REPLY, {"site": site.name, "plans_hash": json_hash(content["plans"])})


def _train(site: Site, request: Unpacked) -> RecordDict:
    if site.secure_only:
        raise FederationError(
            f"Site {site.name} sends its updates in secure sums only (secure-only in its node config), and this round has none. "
            "Start the run with --secure-aggregation."
        )
    start = time.monotonic()
    values = request.values
    trained, control = _local_round(site, request)
    answer = {
        "site": site.name,
        **{key: values[key] for key in ("phase", "round", "plans_hash")},
        "n_steps": trained.n_steps,
        "n_cases": trained.n_cases,
        "metrics": dict(trained.metrics),
        "seconds": round(time.monotonic() - start, 3),
    }
    content = reply(messages.TRAIN_REPLY, answer, encode_with_control(trained.weights, control, fp16=values["fp16"]))
    if not trained.private:  # else the trainer has entered its steps
        enter_release(site.folder, messages.TRAIN.name, values, content)
    return content


def _train_for_sum(site: Site, request: Unpacked) -> RecordDict:
    return train_for_sum(site, request, lambda: _local_round(site, request)[0])


def _local_round(site: Site, request: Unpacked) -> tuple[Trained, Weights]:
    """Train one round; what the site may send of it, and the change of its control variate."""
    from nnunet_fedharm.trainers.local_objectives import Objective

    values = request.values
    received, control = split_control(decode(request.weights, source="the server"))
    objective = Objective(
        proximal_mu=values["proximal_mu"],
        control=control if values["scaffold"] else None,
        counted=values["counted"].get(site.name),
    )
    with training_environment(site.device):
        training, federation = _local_training(site, values)
        result = training.run(
            phase=values["phase"],
            round_index=values["round"],
            first_epoch=values["first_epoch"],
            epochs=values["epochs"],
            weights=_whole(received, federation, values),
            objective=objective,
        )
    ownership = ownership_of(federation["plans"], values["configuration"], values["phase"])
    changed = ownership.contribution(site.name, travelling(values["phase"], result.weights))
    steps, cases = int(result.n_steps), int(result.n_cases)
    trained = Trained(received, changed, ownership, steps, cases, finite(result.metrics), result.private)
    return trained, result.control


def _finish(site: Site, request: Unpacked) -> RecordDict:
    with training_environment(site.device):
        training, federation = _local_training(site, request.values)
        weights = decode(request.weights, source="the server")
        training.finish(weights, federation["fingerprint"], epoch=request.values["epoch"])
    return reply(messages.FINISH_REPLY, {"site": site.name})


def _own_every_case(site: Site, dataset_name: str) -> None:
    """Tell the trainers that all cases here are this site's, whatever name an own sites.json uses for it."""
    from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, unlabelled_cases
    from nnunet_fedharm.sites.registry import SITES_FILE, SiteInfo, SitesFile

    raw = site.root.raw / dataset_name
    description = read_dataset_json(raw, site=site.name)
    cases = [files.case for files in [*labelled_cases(raw, description), *unlabelled_cases(raw, description)]]
    known = SitesFile.load(raw / SITES_FILE).patients if (raw / SITES_FILE).is_file() else {}
    patients = {case: patient for case, patient in known.items() if case in set(cases)}
    owned = SitesFile({site.name: SiteInfo()}, dict.fromkeys(cases, site.name), patients)
    owned.save(site.root.preprocessed / dataset_name / SITES_FILE)


def _federation(site: Site, run_id: str) -> dict[str, Any]:
    return read_json(site.folder / run_id / PLANS_FILE)


def _local_training(site: Site, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """This site's LocalTraining and the plans that it stored for the run."""
    from nnunet_fedharm.trainers.local_training import LocalTraining

    federation = _federation(site, values["run_id"])
    if json_hash(federation["plans"]) != values["plans_hash"]:
        raise FederationError(f"Site {site.name} holds other plans than the server. Start its SuperNode again.")
    training = LocalTraining(
        root=site.root,
        dataset_name=values["dataset_name"],
        plans=federation["plans"],
        dataset_json=federation["dataset_json"],
        configuration=values["configuration"],
        fold=int(values["fold"]) if values["fold"].isdigit() else values["fold"],
        site=site.name,
        trainer_name=values["trainer_name"],
        state_folder=site.folder / values["run_id"],
        seed=values["seed"],
        device=site.device,
        local_groups=[group for group in values["local_groups"].split(",") if group],
    )
    return training, federation


def _whole(received: Weights, federation: dict[str, Any], values: dict[str, Any]) -> Weights:
    """All tensors of the network: what does not travel (a resting segmenter, local groups) begins at the run's seeded start."""
    if values["phase"] == "segmenter" and not values["local_groups"]:
        return received
    from nnunet_fedharm.trainers.results import initial_weights

    start = initial_weights(
        federation["plans"], federation["dataset_json"], values["configuration"], values["trainer_name"], values["seed"]
    )
    return {**start, **received}
