"""The site's own rules held against each request before any work; `policy.py` has the rules.

The run config tells early what a run means to do, so that it is refused at preflight. It is only what the server says: plans and
requests are checked again when they come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from nnunet_fedharm.errors import CheckpointError, PrivacyError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.durable import read_json, write_json
from nnunet_fedharm.federation.entries import begin_ledger
from nnunet_fedharm.federation.own_privacy import RULE, Admit, settled
from nnunet_fedharm.federation.policy import refusal
from nnunet_fedharm.federation.report import site as report_site
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, read_section
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.gaussian import gaussian_sigma
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.trainers.names import trainer_name_for

USE_FILE = "policy-use.json"
"""What each run has had of this site: rounds, epochs, and the epsilon that it may cost."""

_SURELY = 0.9
"""Share of its epsilon that a run spends at least: its noise is made for a few more steps than are planned."""
_TRAINING = {
    schema.name
    for schema in (
        messages.PREFLIGHT,
        messages.SUMMARIZE,
        messages.PREPARE,
        messages.STORE_PLANS,
        messages.TRAIN,
        messages.FINISH,
    )
}
_REPORT = {schema.name for schema, _ in report_site.ACTIONS.values()}
Values = Mapping[str, Any]


def enforce(site: Site, request: str, values: Values, run_config: Values, plans: Path) -> None:
    """Refuse a request that the site's policy does not allow; count what it uses. Call it under the site's lock.

    Args:
        request: name of the request's schema.
        values: of the request.
        run_config: of the run, as the server sent it.
        plans: file with the plans that the site holds for the run; may be missing.

    Raises:
        FederationError: the rule, what it allows and what was asked, in one sentence that names the site.
    """
    policy = site.policy
    if request in _REPORT and not policy.site_report:
        _refuse(site, "work.site_report", "it takes no part in site reports")
    if request not in _TRAINING:
        return
    if not policy.training:
        _refuse(site, "work.training", "it takes no part in trainings")
    _check_dataset(site, values)
    if request == messages.PREFLIGHT.name:
        _check_run(site, run_config, values)
    elif request in (messages.SUMMARIZE.name, messages.PREPARE.name):
        _check_statistics(site, values)
    elif request == messages.STORE_PLANS.name:
        for section in _sections(values["plans"]):
            _check_section(site, section, values)
    elif request == messages.TRAIN.name:
        _check_trainer(site, values["trainer_name"])
        held = _section(plans, values["configuration"])
        privacy = None if held is None else _check_section(site, held, values)
        _check_patients(site, values["dataset_name"], labelled_only=values["phase"] == "segmenter")
        _count(site, values, 0.0 if privacy is None else privacy.epsilon)


def _refuse(site: Site, rule: str, why: str) -> NoReturn:
    raise refusal(site.name, rule, why)


def _check_statistics(site: Site, values: Values) -> None:
    """Of a fingerprint summary or a style: noise, where the site insists on it and does not add its own."""
    rule = "require_privacy" if site.policy.require_privacy else "private_epsilon" * bool(site.policy.private_epsilon)
    asked = PrivacyOptions(epsilon=values["epsilon"], delta=values["delta"]) if values["epsilon"] else None
    private = settled(site, asked, values["run_id"], _fits_patients(site, values, own=asked is None)) is not None
    if rule and not values["noise"] and (asked is not None or not private):
        _refuse(site, f"patients.{rule}", "the run asks for statistics without noise")


def _one_of(site: Site, rule: str, allowed: Collection[str], asked: str) -> None:
    if allowed and asked not in allowed:
        _refuse(site, rule, f"{asked} is not among {', '.join(allowed)}")


def _at_most(site: Site, rule: str, limit: float, asked: float, what: str) -> None:
    if limit and asked > limit:
        _refuse(site, rule, f"{asked:g} {what}, at most {limit:g} are allowed")


def _check_dataset(site: Site, values: Values) -> None:
    asked = values.get("dataset_name") or values.get("dataset")
    if asked and (site.policy.datasets or site.policy.min_patients):
        name = site.raw_dataset(asked).name
        _one_of(site, "work.datasets", site.policy.datasets, name)
        _check_patients(site, name, labelled_only=False)


def _check_patients(site: Site, dataset: str, *, labelled_only: bool) -> None:
    least = site.policy.min_patients
    if least and site.patients_of(dataset, labelled_only=labelled_only) < least:  # the number stays at the site
        _refuse(
            site, "patients.min_patients", f"it sends nothing about fewer than {least} patients, and here are fewer"
        )


def _fits_patients(site: Site, values: Values, *, own: bool) -> Admit:
    """Refuses a delta that is too large for so many patients as the dataset of a request has.

    Args:
        own: the site's own policy makes the run private here.
    """

    def admit(privacy: PrivacyOptions | None) -> None:
        if privacy is not None:
            patients = site.patients_of(values.get("dataset_name") or values["dataset"])
            mend = "Set patients.delta of its policy" if own else "Start the run with --delta"
            privacy.check_delta(patients, who=f"Site {site.name}", mend=mend)

    return admit


def _check_run(site: Site, run_config: Values, values: Values) -> None:
    """What the run config says about a training; keys that are missing are checked when the plans come."""
    known = {key: run_config[key] for key in _RUN_KEYS if key in run_config}
    kind = known.get("harmonizer")
    if kind is not None:
        _one_of(site, "work.harmonizers", site.policy.harmonizers, str(kind))
        _check_trainer(site, trainer_name_for(str(kind)))
    if "epsilon" in known:
        asked, run_id = _privacy_of(known), values["run_id"]

        def admit(privacy: PrivacyOptions | None) -> None:
            _check_privacy(site, privacy, run_id)
            _fits_patients(site, values, own=asked is None)(privacy)
            if privacy is not None:
                _check_left(site, privacy, run_id, own=asked is None)

        settled(site, asked, run_id, admit)
    rounds = float(known.get("harmonizer-rounds", 0)) + float(known.get("segmenter-rounds", 0))
    _at_most(site, "work.max_rounds", site.policy.max_rounds, rounds, "rounds are planned")
    epochs = rounds * float(known.get("local-epochs", 1))
    _at_most(site, "work.max_epochs", site.policy.max_epochs, epochs, "epochs are planned")
    steps = float(known.get("iterations-per-epoch", 0))
    _at_most(site, "work.max_iterations_per_epoch", site.policy.max_iterations_per_epoch, steps, "steps an epoch")
    if site.secure_only and str(known.get("secure-aggregation", "segmenter")) == "off":
        _refuse(
            site,
            "patients.secure_only",
            "its updates leave in secure sums only; start the run with --secure-aggregation",
        )


_RUN_KEYS = (
    *(
        "harmonizer",
        "harmonizer-rounds",
        "segmenter-rounds",
        "local-epochs",
        "iterations-per-epoch",
        "secure-aggregation",
    ),
    *(item.name.replace("_", "-") for item in fields(PrivacyOptions)),
)


def _privacy_of(known: Values) -> PrivacyOptions | None:
    if not known["epsilon"]:
        return None
    values = {key.replace("-", "_"): value for key, value in known.items()}
    return PrivacyOptions(**{item.name: values[item.name] for item in fields(PrivacyOptions) if item.name in values})


def _check_trainer(site: Site, name: str) -> None:
    _one_of(site, "work.trainers", site.policy.trainers, name)


def _sections(plans: Values) -> Iterator[FedHarmSection]:
    for name, configuration in dict(plans.get("configurations", {})).items():
        if SECTION in configuration:
            yield read_section(configuration, configuration_name=name)


def _section(plans: Path, configuration: str) -> FedHarmSection | None:
    try:
        held = read_json(plans)["plans"]["configurations"][configuration]
    except (CheckpointError, KeyError):
        return None  # nothing is trained then: the site has no plans, and says so
    return read_section(held, configuration_name=configuration)


def _check_section(site: Site, section: FedHarmSection, values: Values) -> PrivacyOptions | None:
    """Refuse what the plans ask for and the rules do not allow; what the site trains with."""
    policy, schedule = site.policy, section.schedule
    _one_of(site, "work.harmonizers", policy.harmonizers, section.kind)
    steps = max(schedule.iterations_per_epoch, schedule.val_iterations_per_epoch)
    _at_most(site, "work.max_iterations_per_epoch", policy.max_iterations_per_epoch, steps, "steps an epoch")
    run_id = values["run_id"]
    privacy = settled(site, section.privacy, run_id, _fits_patients(site, values, own=section.privacy is None))
    _check_privacy(site, privacy, run_id)
    return privacy


def _check_privacy(site: Site, privacy: PrivacyOptions | None, run_id: str) -> None:
    policy = site.policy
    if privacy is None:
        if policy.require_privacy:
            _refuse(site, "patients.require_privacy", "it trains under differential privacy only; give --epsilon")
        return
    if not policy.max_epsilon:
        return
    if privacy.delta > policy.delta:
        _refuse(site, "patients.delta", f"delta {privacy.delta:g} is above {policy.delta:g}")
    before = _promised(site, run_id)
    if before + privacy.epsilon > policy.max_epsilon * (1 + 1e-9):
        _refuse(
            site,
            "patients.max_epsilon",
            f"epsilon {privacy.epsilon:g} with what earlier runs may cost is above {policy.max_epsilon:g}",
        )


def _check_left(site: Site, privacy: PrivacyOptions, run_id: str, *, own: bool) -> None:
    """Refuse at the start what the ledger would refuse at the first round, when fingerprint and style were told and paid.

    The run is counted as one Gaussian release of somewhat less than its epsilon: what fits narrowly is left to the ledger.

    Args:
        own: the site's own policy makes the run private here.

    Raises:
        PrivacyError: with what was released before, the run cannot end within its own epsilon.
    """
    before = [item.noise for item in Ledger(site.folder).releases() if item.bounded and item.run_id != run_id]
    if not before:
        return
    run = Noise(gaussian_sigma(_SURELY * privacy.epsilon, privacy.delta))
    if epsilon_of([*before, run], privacy.delta) > privacy.epsilon:
        more = f"Let the site raise {RULE} of its policy" if own else "Start it with a larger --epsilon"
        raise PrivacyError(
            f"Site {site.name}: a run's epsilon counts all that its patients were charged here, and epsilon "
            f"{epsilon_of(before, privacy.delta):.3g} at delta {privacy.delta:g} is spent by earlier runs: this one cannot end "
            f"within {privacy.epsilon:g}. {more}, or leave the site out."
        )


def _promised(site: Site, run_id: str) -> float:
    """Epsilon of everything but this run: what runs that were trained here may cost, and other releases with noise.

    A run's epsilon has its fingerprint, style and votes in it; those of a run that never came to a round count by themselves.
    """
    runs = {name: float(run["epsilon"]) for name, run in _use(site).items() if run["epsilon"] and name != run_id}
    releases = [item for item in Ledger(site.folder).releases() if item.bounded and item.run_id not in (*runs, run_id)]
    return sum(runs.values()) + (epsilon_of([item.noise for item in releases], site.policy.delta) if releases else 0.0)


def _use(site: Site) -> dict[str, dict[str, Any]]:
    path = site.folder / USE_FILE
    return dict(read_json(path)) if path.is_file() else {}


def _count(site: Site, values: Values, epsilon: float) -> None:
    """Count a round before it is trained: a crash in it counts too."""
    policy, use = site.policy, _use(site)
    run = use.get(values["run_id"], {"rounds": 0, "epochs": 0, "epsilon": 0.0})
    paid = max(run["epsilon"], epsilon)  # the plans, which say it, may be lost in the midst of a run
    run = {"rounds": run["rounds"] + 1, "epochs": run["epochs"] + int(values["epochs"]), "epsilon": paid}
    use[values["run_id"]] = run
    _at_most(site, "work.max_rounds", policy.max_rounds, run["rounds"], "rounds of this run")
    total = sum(int(one["rounds"]) for one in use.values())
    _at_most(site, "work.max_rounds_of_all_runs", policy.max_rounds_of_all_runs, total, "rounds of all runs")
    _at_most(site, "work.max_epochs", policy.max_epochs, run["epochs"], "epochs of this run")
    begin_ledger(site.folder, values["run_id"])  # which is missed where this file is left of it
    write_json(site.folder / USE_FILE, use)
