"""A site's own rules, in its own file `fedharm/policy.toml`: what it takes part in and what may leave it, whatever a server asks.

The rules are read anew for every message, before any work. A site without the file has no rules beyond those of its node config.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import FederationError

POLICY_FILE = "policy.toml"
METRICS = ("train_loss", "val_loss", "dice", "seconds")
"""Everything that a round measures; `epsilon` of a private training says nothing about patients and is always sent."""

_ALWAYS_SENT = ("epsilon",)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules of one site. An empty list allows everything, a 0 sets no limit."""

    datasets: tuple[str, ...] = ()
    trainers: tuple[str, ...] = ()
    harmonizers: tuple[str, ...] = ()
    training: bool = True
    site_report: bool = True
    max_rounds: int = 0
    max_rounds_of_all_runs: int = 0
    max_epochs: int = 0
    max_iterations_per_epoch: int = 0
    min_patients: int = 0
    require_privacy: bool = False
    max_epsilon: float = 0.0
    delta: float = 1e-5
    private_epsilon: float = 0.0
    private_clip: float = 1.0
    private_patients_per_step: float = 8.0
    private_patches_per_patient: int = 2
    secure_only: bool = False
    metrics: tuple[str, ...] = METRICS

    def allowed_seconds(self, seconds: float) -> float:
        """How long work took; 0, which a reply has to have there, where that may not leave the site."""
        return round(seconds, 3) if "seconds" in self.metrics else 0.0

    def allowed_metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The metrics that may leave the site."""
        return {name: value for name, value in measured.items() if name in (*self.metrics, *_ALWAYS_SENT)}


SECTIONS: dict[str, tuple[str, ...]] = {
    "work": (
        *("training", "site_report", "datasets", "trainers", "harmonizers"),
        *("max_rounds", "max_rounds_of_all_runs", "max_epochs", "max_iterations_per_epoch"),
    ),
    "patients": (
        *("min_patients", "require_privacy", "max_epsilon", "delta", "secure_only"),
        *("private_epsilon", "private_clip", "private_patients_per_step", "private_patches_per_patient"),
    ),
    "messages": ("metrics",),
}
"""Where a rule stands in the file."""

TEMPLATE = """\
# What this site takes part in and what may leave it. The file is read anew for every message; no restart is needed.
# An empty list allows everything, a 0 sets no limit. A refusal reaches the server as one sentence that names this site and
# the rule, and nothing else. `nnunet-fedharm privacy show --site-root FOLDER` lists what has left this site so far.

[work]
training = true               # take part in trainings
site_report = true            # take part in reports on the differences between sites
datasets = []                 # for example ["Dataset910_Hippocampus"]
trainers = []                 # for example ["nnUNetTrainerFedHarmNone", "nnUNetTrainerFedHarmCurve"]
harmonizers = []              # for example ["none", "curve"]
max_rounds = 0                # rounds of one run that are trained here; a repeated round counts again
max_rounds_of_all_runs = 0    # the same over all runs, because any new run starts at 0
max_epochs = 0                # local epochs of one run
max_iterations_per_epoch = 0  # optimizer steps of one epoch

[patients]
min_patients = 5              # nothing is sent about fewer patients, neither weights nor counts
require_privacy = false       # trainings under differential privacy only (`federate --epsilon`)
max_epsilon = 0.0             # largest epsilon of this site's patients, over all that its ledger has; the site report then
                              # needs noise too. Add require_privacy, or trainings without noise stay allowed
delta = 1e-5                  # at which epsilon is counted; well below 1 / number of patients
private_epsilon = 0.0         # above 0: a run that asks for no differential privacy is trained under it here, within this
                              # epsilon; one that asks for it is taken part in up to this epsilon and delta
private_clip = 1.0            # of those trainings: bound on the norm of a patient's gradient
private_patients_per_step = 8.0  # expected number of patients in a step
private_patches_per_patient = 2
secure_only = false           # updates leave inside secure sums only (`federate --secure-aggregation`)

[messages]
# Others are dropped; [] sends none. Without "seconds" no reply says how long its work took; the server sees when replies come.
metrics = ["train_loss", "val_loss", "dice", "seconds"]
"""


def load_policy(path: Path, *, site: str) -> Policy:
    """Rules of a file; no rules where there is no file.

    Raises:
        FederationError: it cannot be read, or has an unknown key or a value of another type. Nothing is answered then.
    """
    if not path.is_file():
        return Policy()
    where = f"The {POLICY_FILE} of site {site}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FederationError(f"{where} cannot be read as TOML. Mend it there.") from error
    return policy_from_dict(content, where=where)


def policy_from_dict(content: Mapping[str, Any], *, where: str) -> Policy:
    """Rules from the sections of the file.

    Raises:
        FederationError: unknown section or rule, or a value of another type or out of range.
    """
    values: dict[str, Any] = {}
    for section, rules in content.items():
        if section not in SECTIONS or not isinstance(rules, dict):
            raise FederationError(f"{where} has the unknown section [{section}]; known are {', '.join(SECTIONS)}.")
        for name, value in rules.items():
            if name not in SECTIONS[section]:
                known = ", ".join(SECTIONS[section])
                raise FederationError(f"{where} has the unknown rule {section}.{name}; known there are {known}.")
            values[name] = _typed(f"{section}.{name}", value, getattr(Policy, name), where)
    odd = sorted(set(values.get("metrics", ())) - set(METRICS))
    if odd:
        raise FederationError(f"{where} allows the unknown metric {odd[0]!r}; known are {', '.join(METRICS)}.")
    if not 0 < values.get("delta", 0.5) < 1:
        raise FederationError(f"{where} has patients.delta = {values['delta']}; it must lie between 0 and 1.")
    for name in ("private_clip", "private_patients_per_step", "private_patches_per_patient"):
        if not values.get(name, 1):
            raise FederationError(f"{where} has patients.{name} = 0; it must be above 0. private_epsilon = 0.0 is off.")
    return Policy(**values)


def _typed(name: str, value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise FederationError(f"{where} has {name} = {value!r}; a list of texts belongs there.")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise FederationError(f"{where} has {name} = {value!r}; {type(default).__name__} belongs there.")
    if isinstance(value, int | float) and value < 0:
        raise FederationError(f"{where} has {name} = {value}; it must not be negative.")
    return value


def refusal(site: str, rule: str, why: str) -> FederationError:
    """What the server hears: one sentence with the site, the rule, and what does not fit."""
    return FederationError(f"Site {site} refuses by the rule {rule} of its own policy: {why}.")


def checked_policy(path: Path, *, site: str) -> Policy:
    """Rules of a file, for commands; a file that is missing is an error here.

    Raises:
        FederationError: there is none, or it is damaged, or names a trainer or harmonizer that does not exist.
    """
    if not path.is_file():
        raise FederationError(f"{path} does not exist. `nnunet-fedharm site policy` prints one to start from.")
    policy = load_policy(path, site=site)
    if policy.harmonizers or policy.trainers:
        from nnunet_fedharm.trainers.names import TRAINER_SUFFIX, trainer_name_for  # loads torch and nnU-Net

        trainers = [trainer_name_for(kind) for kind in TRAINER_SUFFIX]
        for rule, known in (("harmonizers", list(TRAINER_SUFFIX)), ("trainers", trainers)):
            odd = sorted(set(getattr(policy, rule)) - set(known))
            if odd:
                raise FederationError(f"{path} names {odd[0]!r} in work.{rule}; known are {', '.join(known)}.")
    return policy
