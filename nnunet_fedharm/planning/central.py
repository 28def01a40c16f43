"""Central mode: all sites' data in one nnU-Net raw dataset, planned and preprocessed for the harmonized trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.harmonizers import check_options
from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot, environment_paths, find_dataset
from nnunet_fedharm.planning.defaults import complete_options, complete_schedule
from nnunet_fedharm.planning.drawn_once import ledger_of
from nnunet_fedharm.planning.earlier_plans import known_sections, renamed
from nnunet_fedharm.planning.explain import write_explanation
from nnunet_fedharm.planning.planner import PlanOptions, require_configuration
from nnunet_fedharm.planning.pooled import HERE, base_plans
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.private_bank import private_bank
from nnunet_fedharm.planning.private_fingerprint import private_fingerprint, private_plans
from nnunet_fedharm.planning.private_summary import exact_release
from nnunet_fedharm.planning.section import (
    CONFIGURATIONS,
    CONSENSUS,
    FedHarmSection,
    Schedule,
    check_plans_name,
    judge_of,
    reads_styles,
    with_section,
)
from nnunet_fedharm.planning.situation import Device, situation_of
from nnunet_fedharm.planning.start import models_behind, with_networks_of
from nnunet_fedharm.planning.style import style_by_site
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.files import (
    labelled_cases,
    read_dataset_json,
    read_json,
    unlabelled_cases,
    write_json,
)
from nnunet_fedharm.sites.registry import SITES_FILE, SiteInfo, SitesFile

DEFAULT_PLANS = "nnUNetFedHarmPlans"
ONE_SITE = "one_site"
"""Name of the only site where no sites.json tells sites apart."""


@dataclass(frozen=True)
class EnvironmentRoot(NnunetRoot):
    """nnU-Net's three folders wherever the environment variables point; they need not lie side by side.

    Attributes:
        path: not a folder; its name stands for the site in messages.
    """

    raw_folder: Path
    preprocessed_folder: Path
    results_folder: Path

    @property
    def raw(self) -> Path:
        return self.raw_folder

    @property
    def preprocessed(self) -> Path:
        return self.preprocessed_folder

    @property
    def results(self) -> Path:
        return self.results_folder

    @classmethod
    def from_environment(cls) -> EnvironmentRoot:
        """The stock nnU-Net paths.

        Raises:
            SetupError: a variable is not set.
        """
        raw, preprocessed, results = environment_paths()
        return cls(Path(HERE), raw, preprocessed, results)


@dataclass(frozen=True, kw_only=True)
class CentralOptions:
    """What to plan.

    Attributes:
        configurations: of 2d and 3d_fullres.
        kind: harmonizer.
        reference: site to map to, or "consensus".
        schedule: lengths and learning rates of both phases; a mapping holds what was asked for, and leaves the other values,
            and the harmonizer's sizes, to the rules of `planning.defaults`.
        harmonizer: its sizes and loss weights that were asked for.
        device: what the training will run on; the rules ask for it.
        plan: resizing of the network; `plan.plans_name` is the file that is written.
        num_processes: for checking and preprocessing.
        check: read and check every image first, where no fingerprint exists yet.
        privacy: differential privacy of the training; None trains without.
        noisy_fingerprint: plan from a fingerprint with the noise that `privacy` says; off, from nnU-Net's own.
        start_from: checkpoint that the training starts from, with its networks unless `plan` sizes them; "" starts at random.
        base_plans: name of plans whose networks and preprocessed cases are taken as they are, `plan`'s sizes unread; "" plans.
    """

    configurations: tuple[str, ...]
    kind: str
    reference: str = CONSENSUS
    schedule: Schedule | Mapping[str, Any]
    harmonizer: Mapping[str, Any] = field(default_factory=dict)
    device: Device = Device("cpu")  # noqa: RUF009 - frozen
    plan: PlanOptions
    num_processes: int = 1
    check: bool = True
    privacy: PrivacyOptions | None = None
    noisy_fingerprint: bool = False
    start_from: str = ""
    base_plans: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            Schedule(**{"harmonizer_epochs": 1, **self.schedule})  # refused here, before the data are read
        for name in self.configurations:
            require_configuration({"configurations": CONFIGURATIONS}, name)
        if self.private_fingerprint is not None and self.base_plans:
            raise PlanError(
                f"{self.base_plans} exist already, whatever noise their fingerprint has. Leave out the noise of the "
                "fingerprint, or plan anew."
            )
        check_plans_name(self.plan.plans_name)

    @property
    def private_fingerprint(self) -> PrivacyOptions | None:
        """Whose noise the fingerprint carries; None where it is nnU-Net's own."""
        return self.privacy if self.fingerprint_noise else None

    @property
    def fingerprint_noise(self) -> float:
        """Its noise multiplier; 0 where it is nnU-Net's own."""
        return self.privacy.fingerprint_multiplier if self.noisy_fingerprint and self.privacy is not None else 0.0


def plan_central(root: NnunetRoot, dataset: str, options: CentralOptions) -> dict[str, Any]:
    """Fingerprint, plans, preprocessing, style bank and `fedharm` section; what exists and fits is used again.

    Args:
        root: nnU-Net's folders.
        dataset: identifier or folder name.

    Returns:
        The plans as written to `<plans_name>.json`.

    Raises:
        DataError: the dataset cannot be used.
        PlanError: an option does not fit the dataset, or does not exist.
        PrivacyError: a delta that is too large for so many patients.
        SetupError: a folder cannot be written.
    """
    root.create()
    name = find_dataset(root.raw, dataset)
    raw, preprocessed = root.raw / name, root.preprocessed / name
    dataset_json = read_dataset_json(raw, site=HERE)
    registry = site_registry(raw, dataset_json)
    if options.reference != CONSENSUS and options.reference not in registry.sites:
        raise PlanError(
            f"The reference site {options.reference!r} is not in {SITES_FILE}; "
            f"choose one of {', '.join(registry.sites)} or {CONSENSUS}."
        )
    check_options(options.kind, options.harmonizer, private=options.privacy is not None)
    if options.privacy:
        options.privacy.check_delta(_patients(raw, dataset_json, registry), who=name)
    private = options.private_fingerprint
    fingerprint = None if private else _stock_fingerprint(root, name, options)
    if private is not None:
        noisy = private_fingerprint(
            raw, preprocessed, private, num_processes=options.num_processes, check=options.check
        )
        plans = private_plans(raw, noisy, options.plan)
    elif options.base_plans:
        plans = renamed(existing_plans(root, name, options.base_plans), options.plan.plans_name)
    else:
        assert fingerprint is not None
        plans = base_plans(root, name, fingerprint, options.plan)
    if not options.base_plans:
        plans = with_networks_of(options.start_from, plans, options.configurations, options.plan)
    sections = known_sections(preprocessed / f"{options.plan.plans_name}.json", plans)
    for configuration in options.configurations:
        require_configuration(plans, configuration)
        preprocess_site(
            root,
            name,
            plans,
            configuration,
            num_processes=options.num_processes,
            fingerprint=fingerprint,
            adopt_existing=True,
        )
        registry.save(preprocessed / SITES_FILE)
        if options.privacy and fingerprint is not None:
            ledger_of(root).record(exact_release(fingerprint))
        if options.privacy:
            styles = private_bank(
                root,
                name,
                plans,
                configuration,
                sites=registry,
                privacy=options.privacy,
                styled=reads_styles(options.kind),
            )
        else:
            styles = style_by_site(root, name, plans, configuration, sites=registry)
        sections[configuration] = _section(plans["configurations"][configuration], styles, options)
    for configuration, section in sections.items():
        plans = with_section(plans, section, (configuration,))
    write_json(plans, preprocessed / f"{options.plan.plans_name}.json")
    write_explanation(root, plans, options.device)
    return plans


def existing_plans(root: NnunetRoot, dataset: str, plans_name: str) -> dict[str, Any]:
    """Plans that an earlier run wrote.

    Raises:
        DataError: the dataset was not found.
        PlanError: it has no such plans.
    """
    file = root.preprocessed / find_dataset(root.raw, dataset) / f"{plans_name}.json"
    if not file.is_file():
        raise PlanError(f"There are no plans {file}. Make them with `nnunet-fedharm plan`, or give the right name.")
    return read_json(file, what="The plans")


def _section(configuration: Mapping[str, Any], styles: Mapping[str, Style], options: CentralOptions) -> FedHarmSection:
    harmonizer, schedule = dict(options.harmonizer), options.schedule
    if not isinstance(schedule, Schedule):
        situation = situation_of(
            configuration,
            kind=options.kind,
            reference=options.reference,
            styles=styles,
            device=options.device,
            private=options.privacy is not None,
        )
        harmonizer = complete_options(situation, harmonizer)
        schedule = complete_schedule(replace(situation, judge=judge_of(harmonizer)), schedule)
    return FedHarmSection(
        kind=options.kind,
        harmonizer=harmonizer,
        reference=options.reference,
        styles=dict(styles),
        schedule=schedule,
        privacy=options.privacy and replace(options.privacy, fingerprint_noise=options.fingerprint_noise),
        start_from=options.start_from,
        starts=models_behind(options.start_from),
    )


def site_registry(raw: Path, dataset_json: Mapping[str, Any]) -> SitesFile:
    """sites.json of a raw dataset; without one, all cases come from one site.

    Raises:
        DataError: sites.json is damaged or does not list a case.
    """
    cases = [case.case for case in [*labelled_cases(raw, dataset_json), *unlabelled_cases(raw, dataset_json)]]
    if not (raw / SITES_FILE).is_file():
        return SitesFile({ONE_SITE: SiteInfo()}, dict.fromkeys(cases, ONE_SITE))
    registry = SitesFile.load(raw / SITES_FILE)
    homeless = [case for case in cases if case not in registry.cases]
    if homeless:
        raise DataError(f"{raw / SITES_FILE} does not say which site case {homeless[0]} comes from. Add it to `cases`.")
    return registry


def _patients(raw: Path, dataset_json: Mapping[str, Any], registry: SitesFile) -> int:
    cases = [*labelled_cases(raw, dataset_json), *unlabelled_cases(raw, dataset_json)]
    return len({registry.patient_of(case.case) for case in cases})


def train_commands(
    plans: Mapping[str, Any], configurations: Sequence[str], trainer: str, *, n_labelled: int
) -> list[str]:
    """The stock commands that train these plans; fold `all` where nnU-Net cannot make five folds."""
    from nnunet_fedharm.sites.checks import N_FOLDS

    identifier = str(plans["dataset_name"])[len("Dataset") :][:3]
    fold = "0" if n_labelled >= N_FOLDS else "all"
    return [
        f"nnUNetv2_train {identifier} {name} {fold} -tr {trainer} -p {plans['plans_name']}" for name in configurations
    ]


def _stock_fingerprint(root: NnunetRoot, name: str, options: CentralOptions) -> dict[str, Any]:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    file = root.preprocessed / name / "dataset_fingerprint.json"
    if not file.is_file():
        if options.check:
            check_raw_dataset(root.raw / name, site=HERE, num_processes=options.num_processes)
        if not labelled_cases(root.raw / name, read_dataset_json(root.raw / name, site=HERE)):
            raise DataError(
                f"{root.raw / name} has no labelled case in imagesTr, so nnU-Net cannot plan. Add labelled cases."
            )
        with root.activate():
            DatasetFingerprintExtractor(name, max(1, options.num_processes)).run()
    return read_json(file, what="The fingerprint")
