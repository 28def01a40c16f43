"""What a site answers to each message: unpack, check, call planning or trainers inside the site's own nnU-Net root, pack.

Nothing raises: Flower's error replies carry tracebacks, which may name cases. A failure is a reply with one sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import RecordDict

from nnunet_fedharm.errors import FederationError, FedHarmError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.aggregation import finite
from nnunet_fedharm.federation.codec import Weights, decode
from nnunet_fedharm.federation.durable import file_lock, write_json
from nnunet_fedharm.federation.entries import begin_ledger, enter_release
from nnunet_fedharm.federation.kept_reply import KEPT_FILE, KeptReply
from nnunet_fedharm.federation.messages import Unpacked, error_reply, json_hash, reply, unpack
from nnunet_fedharm.federation.own_privacy import kept_privacy, own_statistics, told_facts
from nnunet_fedharm.federation.ownership import ownership_of
from nnunet_fedharm.federation.policy_checks import enforce
from nnunet_fedharm.federation.report import site as report_site
from nnunet_fedharm.federation.secure import home as secure_home
from nnunet_fedharm.federation.secure.home import Offer
from nnunet_fedharm.federation.secure.patient_noise import step_offer
from nnunet_fedharm.federation.secure.rounds import Trained, offer_of, train_for_sum
from nnunet_fedharm.federation.site import Site, describe_error, locate_site, training_environment
from nnunet_fedharm.federation.site_card import statement_at, write_card
from nnunet_fedharm.federation.site_counts import count_release
from nnunet_fedharm.federation.site_privacy import adds_own_noise, own_release, updates_only, with_own_noise
from nnunet_fedharm.federation.site_training import local_training, whole_weights
from nnunet_fedharm.federation.statistics import answer_once
from nnunet_fedharm.federation.stored_plans import PLANS_FILE, held_hash, trained_configurations
from nnunet_fedharm.federation.updates import encode_with_control, split_control, travelling
from nnunet_fedharm.planning.received import check_received
from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.privacy.site_level import SitePrivacy

Work = Callable[[Site, Unpacked], RecordDict]


def answer(kind: str, content: RecordDict, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> RecordDict:
    """The reply to one message.

    Args:
        kind: Flower's message type, a key of `HANDLERS`.
        content: of the message.
        node_config, run_config: of Flower's context.
    """
    schema, work = HANDLERS[kind]
    try:
        site = locate_site(node_config, run_config)
    except FedHarmError as error:
        return error_reply(type(error).__name__, str(error))
    try:
        return _answer(site, content, schema, work, run_config)
    except Exception as error:  # noqa: BLE001 - the one place where a failure becomes a reply; it is logged at the site
        return error_reply(*describe_error(site, error))


def _answer(
    site: Site, content: RecordDict, schema: messages.Schema, work: Work, run_config: Mapping[str, Any]
) -> RecordDict:
    request = unpack(schema, content, source="the server")
    check_received(request.values, source="the server")
    # The lock, because after a server crash this site may still be busy with the former round.
    with file_lock(site.folder / "site.lock"), site.root.create().activate():
        kept = KeptReply.to(site, request) if work is _train else None
        again = kept.read() if kept else None
        if again is not None:
            return again
        plans = site.folder / request.values.get("run_id", "-") / PLANS_FILE
        enforce(site, schema.name, request.values, run_config, plans)
        if schema in (messages.SUMMARIZE, messages.PREPARE):
            request = own_statistics(site, request, run_config)
        answered = work(site, request)
        # Those three enter what they release themselves, with its noise.
        if schema not in (messages.SUMMARIZE, messages.PREPARE, messages.TRAIN):
            enter_release(site.folder, schema.name, request.values, answered)
        if kept:
            kept.write(answered)
    return answered


def _preflight(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.facts import collect_facts
    from nnunet_fedharm.sites.checks import check_raw_dataset

    raw_dataset = site.raw_dataset(request.values["dataset"])
    if request.values["check_data"]:
        check_raw_dataset(raw_dataset, site=site.name, num_processes=site.num_processes)
    facts = collect_facts(raw_dataset, site=site.name)
    told = told_facts(site, request.values["run_id"], facts)
    held = held_hash(site, request.values["run_id"])
    return reply(messages.PREFLIGHT_REPLY, {"site": site.name, "facts": told, "plans_hash": held})


def _summarize(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.federation.secure.fingerprint import offer_summary
    from nnunet_fedharm.planning.noisy_cases import as_site_summary
    from nnunet_fedharm.planning.private_summary import fingerprint_release, summarize_private
    from nnunet_fedharm.planning.summary import summarize_site
    from nnunet_fedharm.sites.files import read_dataset_json

    values = request.values
    where: dict[str, Any] = {"site": site.name, "num_processes": site.num_processes}
    raw_dataset, noise = site.raw_dataset(values["dataset_name"]), values["noise"]
    if values["summed_over"]:
        exact = summarize_private(raw_dataset, noise_multiplier=0.0, **where)
        told = offer_summary(site, request, exact)
        return reply(messages.SUMMARIZE_REPLY, {"site": site.name, "summary": told.to_dict()})
    if noise > 0:

        def measure() -> dict[str, Any]:
            noisy = summarize_private(raw_dataset, noise_multiplier=noise, **where)
            if kept_privacy(site, values["run_id"]) is None:
                return noisy.to_dict()
            channels = read_dataset_json(raw_dataset, site=site.name)["channel_names"]
            return as_site_summary(noisy, n_channels=len(channels)).to_dict()  # the run merges exact ones

        summary = answer_once(site, request, fingerprint_release(noise), measure)
        return reply(messages.SUMMARIZE_REPLY, {"site": site.name, "summary": summary})
    whole = summarize_site(raw_dataset, **where).to_dict()
    content = reply(messages.SUMMARIZE_REPLY, {"site": site.name, "summary": whole})
    enter_release(site.folder, messages.SUMMARIZE.name, values, content)
    return content


def _prepare(site: Site, request: Unpacked) -> RecordDict:
    from nnunet_fedharm.planning.private_style import neutral_style, style_release
    from nnunet_fedharm.planning.style import site_style

    start = time.monotonic()
    values = request.values
    name, configuration, noise = values["dataset_name"], values["configuration"], values["noise"]
    _preprocess(site, values, [configuration])
    told = {"site": site.name, "seconds": 0.0}  # a private run's seconds would tell of the images

    def measure() -> dict[str, Any]:
        return site_style(site.root, name, values["plans"], configuration, noise_multiplier=noise).to_dict()

    if not values["styled"]:
        neutral = neutral_style(len(values["dataset_json"]["channel_names"]), n_cases=0)
        return reply(messages.PREPARE_REPLY, {**told, "style": neutral.to_dict()})
    if noise > 0:
        style = answer_once(site, request, style_release(site.name, noise), measure)
        return reply(messages.PREPARE_REPLY, {**told, "style": style})
    exact = {**told, "style": measure(), "seconds": site.policy.allowed_seconds(time.monotonic() - start)}
    content = reply(messages.PREPARE_REPLY, exact)
    enter_release(site.folder, messages.PREPARE.name, values, content)
    return content


def _store_plans(site: Site, request: Unpacked) -> RecordDict:
    values = request.values
    begin_ledger(site.folder, values["run_id"])
    content = {key: values[key] for key in ("plans", "dataset_json", "fingerprint")}
    _preprocess(site, values, trained_configurations(values["plans"]))  # at once where all cases are there
    write_json(site.folder / values["run_id"] / PLANS_FILE, content)
    return reply(messages.STORE_PLANS_REPLY, {"site": site.name, "plans_hash": json_hash(content["plans"])})


def _train(site: Site, request: Unpacked) -> RecordDict:
    if site.secure_only:
        raise FederationError(
            f"Site {site.name} sends its updates in secure sums only (secure-only in its node config or policy), and this "
            "round has none. Start the run with --secure-aggregation."
        )
    start = time.monotonic()
    values = request.values
    trained, control = _local_round(site, request)
    promised = SitePrivacy.from_dict(values["site_dp"]) if values["site_dp"] else None
    weights = trained.weights
    if adds_own_noise(promised):
        count_release(site, values["run_id"], promised)
        weights = with_own_noise(promised, trained.received, weights, trained.ownership)
    answer = {
        "site": site.name,
        **{key: values[key] for key in ("phase", "round", "plans_hash")},
        "n_steps": trained.n_steps,
        "n_cases": trained.n_cases,
        "metrics": dict(trained.metrics),
        # Under differential privacy the time would tell how many patients were drawn.
        "seconds": 0.0 if trained.private or promised else site.policy.allowed_seconds(time.monotonic() - start),
    }
    content = reply(messages.TRAIN_REPLY, answer, encode_with_control(weights, control, fp16=values["fp16"]))
    if trained.private:
        return content  # the trainer has entered its steps
    if adds_own_noise(promised):
        what = f"weights, {values['phase']} round {values['round'] + 1}"
        Ledger(site.folder).record(own_release(promised, what, values["run_id"]))
    else:
        enter_release(site.folder, messages.TRAIN.name, values, content)
    return content


def _train_for_sum(site: Site, request: Unpacked) -> RecordDict:
    values = request.values
    if values["shared_steps"] and values["phase"] == "segmenter":
        return train_for_sum(site, request, lambda key, question: _private_step(site, request, key, question))
    return train_for_sum(
        site, request, lambda key, question: offer_of(key, question, values, _local_round(site, request)[0])
    )


def _private_step(site: Site, request: Unpacked, key: str, question: str) -> Offer:
    """This site's part of a step whose noise all sites add together."""
    from nnunet_fedharm.trainers.clipped_sum import clipped_sum

    values = request.values
    shared = SharedSteps.from_dict(values["shared_steps"])
    with training_environment(site.device):
        training, federation = local_training(site, values, shared_noise=True)
        weights = whole_weights(decode(request.weights, source="the server"), federation, values)
        found = clipped_sum(training, weights, shared, round_index=values["round"])
    return step_offer(key, question, values, shared, found)


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
        training, federation = local_training(site, values)
        result = training.run(
            phase=values["phase"],
            round_index=values["round"],
            first_epoch=values["first_epoch"],
            epochs=values["epochs"],
            weights=whole_weights(received, federation, values),
            objective=objective,
            shared=_before_shared_steps(values, federation["plans"]),
        )
    ownership = ownership_of(federation["plans"], values["configuration"], values["phase"])
    ownership = updates_only(ownership) if values["site_dp"] else ownership
    changed = ownership.contribution(site.name, travelling(values["phase"], result.weights))
    steps, cases = int(result.n_steps), int(result.n_cases)
    metrics = site.policy.allowed_metrics(finite(result.metrics))
    if result.private or values["site_dp"]:
        metrics = {name: value for name, value in metrics.items() if name == "epsilon"}
    trained = Trained(received, changed, ownership, steps, cases, metrics, result.private)
    return trained, result.control


def _before_shared_steps(values: dict[str, Any], plans: Mapping[str, Any]) -> SharedSteps | None:
    """Noise and sample rate of a harmonizer round before shared steps of a private run.

    Privacy by the site's own policy alone follows from its own options: with the server's one step could spend all of it.
    """
    if values["phase"] != "harmonizer" or not values["shared_steps"]:
        return None
    name = values["configuration"]
    private = read_section(plans["configurations"][name], configuration_name=name).privacy is not None
    return SharedSteps.from_dict(values["shared_steps"]) if private else None


def _finish(site: Site, request: Unpacked) -> RecordDict:
    with training_environment(site.device):
        training, federation = local_training(site, request.values)
        weights = decode(request.weights, source="the server")
        folder = training.finish(weights, federation["fingerprint"], epoch=request.values["epoch"])
    privacy = training.section.privacy
    facts = {} if privacy is None else {"clip": privacy.clip, "patients_per_step": privacy.patients_per_step}
    own = kept_privacy(site, request.values["run_id"])
    write_card(folder, statement_at(site, request.values["privacy"], facts, own))
    (site.folder / request.values["run_id"] / KEPT_FILE).unlink(missing_ok=True)  # there is no further round
    return reply(messages.FINISH_REPLY, {"site": site.name})


def _preprocess(site: Site, values: dict[str, Any], configurations: Iterable[str]) -> None:
    """Bring the site's cases up to date with the plans of a request, as this site's."""
    from nnunet_fedharm.planning.preprocess import preprocess_site

    for configuration in configurations:
        preprocess_site(
            site.root,
            values["dataset_name"],
            values["plans"],
            configuration,
            num_processes=site.num_processes,
            dataset_json=values["dataset_json"],
            fingerprint=values["fingerprint"],
        )
    _own_every_case(site, values["dataset_name"])


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


HANDLERS: dict[str, tuple[messages.Schema, Work]] = {
    "train": (messages.TRAIN, _train),
    "train.secure": (messages.TRAIN, _train_for_sum),
    "query.preflight": (messages.PREFLIGHT, _preflight),
    "query.summarize": (messages.SUMMARIZE, _summarize),
    "query.prepare": (messages.PREPARE, _prepare),
    "query.plans": (messages.STORE_PLANS, _store_plans),
    "query.finish": (messages.FINISH, _finish),
    **{f"query.{action}": handler for action, handler in (report_site.ACTIONS | secure_home.ACTIONS).items()},
}
"""Flower's message type -> schema of the request and what answers it."""
