"""Everything a federated run can be told: one dataclass for Flower's run config, the command line and Python.

A field `local_epochs` is the key `local-epochs` in `[tool.flwr.app.config]` and the option `--local-epochs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, cast

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.secure.checks import MODES, check_secure
from nnunet_fedharm.federation.secure.patient_noise import check_patient_noise
from nnunet_fedharm.federation.site_names import check_site_names
from nnunet_fedharm.federation.site_privacy import check_site_privacy
from nnunet_fedharm.federation.strategy import STRATEGIES
from nnunet_fedharm.federation.strategy_checks import LOCAL_GROUPS, check_strategy, strategy_warnings
from nnunet_fedharm.harmonizers import KINDS, LEARNED, check_options
from nnunet_fedharm.planning.section import CONFIGURATIONS, CONSENSUS, Schedule, check_plans_name, private_judge
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.site_level import MODES as MODES_OF_SITES

FOLDS = ("all", "0", "1", "2", "3", "4")
PHASES = ("frozen", "finetune")
"""Alternating phases are for training on one machine."""
WEIGHTINGS = ("steps", "cases", "sites")
DEVICES = ("cpu", "cuda", "mps")
_RATES = ("initial_lr", "harmonizer_lr", "finetune_lr_factor")
_DEADLINES = ("deadline_s", "prepare_deadline_s", "join_wait_s")

UserValue = bool | int | float | str


def _option(default: Any, text: str, *, identity: bool = True, launch: bool = False) -> Any:
    """A field with its help text. `identity`: another value makes another run; `launch`: only the launcher reads it."""
    return field(default=default, metadata={"help": text, "identity": identity, "launch": launch})


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """One federated run. Values are checked when it is made.

    Raises:
        FederationError: a value is out of range or contradicts another one.
    """

    root: str = _option("", "folder with sites/<SITE>/ and server/", identity=False)
    server_root: str = _option("", "the server's nnU-Net root; default ROOT/server", identity=False)
    sites: str = _option("", "names of the expected sites, comma separated; default: every folder in ROOT/sites")
    dataset: str = _option("", "nnU-Net dataset id or name, for example 910 or Dataset910_Hippocampus")
    configuration: str = _option("2d", "nnU-Net configuration: " + " or ".join(CONFIGURATIONS))
    harmonizer: str = _option("none", "harmonizer kind: " + ", ".join(KINDS))
    harmonizer_options: str = _option("", "sizes and loss weights of the harmonizer as a JSON object; default its own")
    reference: str = _option(CONSENSUS, "reference style: a site's name, or consensus of all sites")
    harmonizer_rounds: int = _option(0, "rounds of the harmonizer phase (all sites, no labels needed)")
    segmenter_rounds: int = _option(10, "rounds of the segmenter phase (sites with labels)")
    local_epochs: int = _option(1, "epochs at a site in one round")
    iterations_per_epoch: int = _option(250, "optimizer steps in one epoch")
    val_iterations: int = _option(50, "validation batches in one segmenter epoch")
    initial_lr: float = _option(1e-2, "start of nnU-Net's polynomial learning-rate decay")
    momentum: float = _option(0.99, "Nesterov momentum of the segmenter; 0.9 with ten times the rate for short runs")
    harmonizer_lr: float = _option(1e-3, "learning rate of the harmonizer phase")
    phases: str = _option("frozen", "frozen, or finetune: the segmentation loss moves the harmonizer too")
    finetune_lr_factor: float = _option(
        0.1, "learning rate of the harmonizer in finetune, as a share of the segmenter's"
    )
    trained_groups: str = _option(
        "",
        "groups of the segmenter's tensors that are trained, comma separated, of: norm, encoder, decoder, heads; empty = all",
    )
    augmentation: bool = _option(True, "nnU-Net's augmentation of the segmenter's patches")
    start_from: str = _option("", "results folder or checkpoint at the server: weights and network of the start")
    fold: str = _option("all", "fold of each site's own split: all, 0, 1, 2, 3 or 4")
    plans_name: str = _option("nnUNetFedHarmPlans", "name of the plans; stock nnUNetPlans are never overwritten")
    gpu_memory_gb: float = _option(8.0, "GPU memory that the planner plans for")
    base_features: int = _option(32, "features of the first stage")
    max_features: int = _option(0, "cap of the features of a stage; 0 = nnU-Net's own")
    batch_size: int = _option(0, "batch size; 0 = nnU-Net's own")
    patch_size: str = _option("", "largest patch, for example 64x64; empty = nnU-Net's own")
    weighting: str = _option(
        "steps", "weight of a site in the mean: steps (optimizer steps x batch), cases, or sites (equal)"
    )
    strategy: str = _option("fedavg", "how the replies become one model: " + ", ".join(STRATEGIES))
    proximal_mu: float = _option(0.0, "FedProx: pull of a site's weights to the received ones; 0 = off")
    server_lr: float = _option(0.0, "server learning rate; 0 = the strategy's own (1; fedadam and fedyogi 0.01)")
    server_momentum: float = _option(0.9, "momentum of fedavgm")
    server_beta1: float = _option(0.9, "first decay of fedadam and fedyogi")
    server_beta2: float = _option(0.99, "second decay of fedadam and fedyogi")
    server_tau: float = _option(1e-3, "adaptivity of fedadam and fedyogi: smallest change that counts as one")
    trim: float = _option(0.25, "share of the replies that trimmed-mean cuts at each end, rounded up")
    byzantine: int = _option(1, "bad sites that krum and multi-krum expect")
    norm_bound: float = _option(
        0.0, "set replies aside that change more than this many times the median; 0 = off, from three replies on"
    )
    server_ema: float = _option(
        0.0, "decay of the average of segmenter rounds that is the final model; 0 = the last one"
    )
    local_groups: str = _option(
        "", "groups that each site keeps for itself, comma separated: " + ", ".join(LOCAL_GROUPS)
    )
    epsilon: float = _option(0.0, "differential privacy: what a run may cost any patient of a site; 0 = off")
    delta: float = _option(1e-5, "chance that epsilon does not hold; well below 1 / number of patients")
    clip: float = _option(1.0, "bound on the norm of one patient's gradient")
    patients_per_step: float = _option(8.0, "expected number of patients in a private step")
    patches_per_patient: int = _option(2, "patches that one patient's gradient is the mean of")
    secure_aggregation: str = _option("off", "rounds of which the server sees sums only: " + ", ".join(MODES))
    secure_clip: float = _option(4.0, "secure aggregation: largest change of a weight in a round; larger ones are cut")
    secure_bytes: int = _option(5, "secure aggregation: bytes of a weight on the wire, 4 to 8; more are finer")
    secure_threshold: int = _option(0, "secure aggregation: sites that open a sum; 0 = the least that is safe")
    patient_noise: str = _option("local", "noise of private steps: local, or distributed: shares of one in secure sums")
    style_noise: float = _option(
        5.0, "noise multiplier of a site's style under differential privacy; 0 sends it as it is"
    )
    site_dp: str = _option(
        "off", "differential privacy of whole sites: off, or who adds the noise: " + ", ".join(MODES_OF_SITES)
    )
    site_clip: float = _option(1.0, "site-dp: bound on the norm of a site's update in a round")
    site_noise: float = _option(1.0, "site-dp: noise on the sum of updates, as a multiple of site-clip")
    site_colluding: int = _option(
        1, "sites that may side with the server; secure sums and shared noise hold against so many"
    )
    fingerprint_noise: float = _option(
        -1.0,
        "noise multiplier of a site's fingerprint under differential privacy; -1 = a tenth of the budget, 0 = none",
    )
    fp16: bool = _option(False, "send float32 weights as float16: half the bytes")
    seed: int = _option(0, "seed of the run")
    device: str = _option("cpu", "device of the sites: cpu, cuda or mps", identity=False)
    num_processes: int = _option(1, "processes for fingerprint and preprocessing at each site", identity=False)
    deadline_s: float = _option(3600.0, "seconds that a round waits for its sites", identity=False)
    prepare_deadline_s: float = _option(86400.0, "seconds that fingerprints and preprocessing may take", identity=False)
    join_wait_s: float = _option(
        300.0, "seconds to wait at the start until every expected site is there", identity=False
    )
    quorum: int = _option(0, "replies that a round needs; 0 = more than half of its sites", identity=False)
    max_retries: int = _option(2, "times that a round without quorum is repeated before the run stops", identity=False)
    restart: bool = _option(
        False, "start anew even where an unfinished run of the same configuration exists", identity=False
    )
    parallel_sites: int = _option(1, "sites that train at the same time in simulation", identity=False, launch=True)
    gpus: int = _option(1, "GPUs of this machine that simulated sites share", identity=False, launch=True)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        _check_names(self)
        check_strategy(self)
        check_secure(self)
        check_site_privacy(self)
        check_patient_noise(self)
        _ = self.privacy, self.schedule  # refuse values out of range

    @property
    def site_names(self) -> tuple[str, ...]:
        """Expected sites, sorted."""
        return tuple(sorted(name.strip() for name in self.sites.split(",") if name.strip()))

    @property
    def own_groups(self) -> tuple[str, ...]:
        """`local_groups` as names, sorted."""
        return tuple(sorted(name.strip() for name in self.local_groups.split(",") if name.strip()))

    @property
    def patch_shape(self) -> tuple[int, ...] | None:
        """`patch_size` as numbers; None for nnU-Net's own."""
        return tuple(int(part) for part in self.patch_size.split("x")) if self.patch_size else None

    @property
    def harmonizer_settings(self) -> dict[str, Any]:
        """`harmonizer_options` parsed."""
        return dict(json.loads(self.harmonizer_options)) if self.harmonizer_options else {}

    @property
    def schedule(self) -> Schedule:
        """Lengths and learning rates as they stand in the plans; one global clock over all rounds."""
        return Schedule(
            harmonizer_epochs=self.harmonizer_rounds * self.local_epochs,
            segmenter_epochs=max(1, self.segmenter_rounds * self.local_epochs),
            iterations_per_epoch=self.iterations_per_epoch,
            val_iterations_per_epoch=self.val_iterations,
            initial_lr=self.initial_lr,
            momentum=self.momentum,
            harmonizer_lr=self.harmonizer_lr,
            phases=self.phases,
            finetune_lr_factor=self.finetune_lr_factor,
            trained_groups=self.trained_groups,
            augmentation=self.augmentation,
        )

    @property
    def privacy(self) -> PrivacyOptions | None:
        """Differential privacy of the training, as the plans carry it; None without."""
        if not self.epsilon:
            return None
        return PrivacyOptions(**{item.name: getattr(self, item.name) for item in fields(PrivacyOptions)})

    def identity(self) -> dict[str, UserValue]:
        """The values that make this run this run: a stopped run resumes only with the same ones."""
        names = {item.name for item in fields(self) if item.metadata["identity"]}
        return {name: value for name, value in asdict(self).items() if name in names}

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the identity's SHA-256."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_run_config(self) -> dict[str, UserValue]:
        """Keys and values for Flower's run config."""
        return {key_of(item): getattr(self, item.name) for item in fields(self) if not item.metadata["launch"]}

    @classmethod
    def from_run_config(cls, values: Mapping[str, Any]) -> FederateConfig:
        """Inverse of `to_run_config`; integers are accepted where a float is meant.

        Raises:
            FederationError: unknown key, wrong type or value.
        """
        known = {key_of(item): item for item in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise FederationError(f"Unknown run config key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")
        typed: dict[str, Any] = {known[key].name: _typed(known[key], value) for key, value in values.items()}
        return cls(**typed)


def key_of(item: Field[Any]) -> str:
    """Flower's run config key of a field."""
    return item.name.replace("_", "-")


def _typed(item: Field[Any], value: Any) -> UserValue:
    wanted = type(item.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is not wanted:
        raise FederationError(f"{key_of(item)} must be {wanted.__name__}, got {value!r}.")
    return cast(UserValue, value)


def _check_choices(config: FederateConfig) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "configuration": CONFIGURATIONS,
        "harmonizer": tuple(KINDS),
        "phases": PHASES,
        "fold": FOLDS,
        "weighting": WEIGHTINGS,
        "device": DEVICES,
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed and not (name == "device" and re.fullmatch(r"cuda:\d+", value)):
            raise FederationError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")


def _check_ranges(config: FederateConfig) -> None:
    at_least = {
        "local_epochs": 1,
        "iterations_per_epoch": 1,
        "val_iterations": 1,
        "base_features": 1,
        "num_processes": 1,
    }
    at_least |= {"harmonizer_rounds": 0, "segmenter_rounds": 0, "quorum": 0, "max_retries": 0, "max_features": 0}
    at_least |= {"batch_size": 0, "seed": 0, "parallel_sites": 1, "gpus": 1}
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise FederationError(f"{name.replace('_', '-')} must be >= {least}, got {getattr(config, name)}.")
    for name in (*_RATES, *_DEADLINES, "gpu_memory_gb"):
        if not getattr(config, name) > 0:
            raise FederationError(f"{name.replace('_', '-')} must be > 0, got {getattr(config, name)}.")
    if config.harmonizer_rounds + config.segmenter_rounds == 0:
        raise FederationError("Both harmonizer-rounds and segmenter-rounds are 0: there is nothing to train.")
    if config.harmonizer_rounds and config.harmonizer not in LEARNED:
        raise FederationError(
            f"harmonizer-rounds is {config.harmonizer_rounds}, but the harmonizer {config.harmonizer!r} has nothing to "
            f"learn. Use 0, or one of {', '.join(sorted(LEARNED))}."
        )


def _check_names(config: FederateConfig) -> None:
    names = config.site_names
    check_site_names(names)
    check_plans_name(config.plans_name)
    if names and config.quorum > len(names):
        raise FederationError(
            f"quorum is {config.quorum}, but there are only {len(names)} sites. Use at most {len(names)}."
        )
    if names and config.reference != CONSENSUS and config.reference not in names:
        raise FederationError(
            f"The reference site {config.reference!r} is not in this federation; choose {CONSENSUS} or one of "
            f"{', '.join(names)}."
        )
    if config.patch_size and not re.fullmatch(r"\d+x\d+(x\d+)?", config.patch_size):
        raise FederationError(f"patch-size is {config.patch_size!r}; write it as 64x64 or 32x64x64.")
    if config.patch_shape and len(config.patch_shape) != (2 if config.configuration == "2d" else 3):
        raise FederationError(f"patch-size {config.patch_size} does not fit the configuration {config.configuration}.")
    try:
        settings = config.harmonizer_settings
    except (ValueError, TypeError) as error:
        raise FederationError(f"harmonizer-options is not a JSON object: {config.harmonizer_options!r}.") from error
    check_options(config.harmonizer, settings, private=config.privacy is not None)


def warnings_of(config: FederateConfig) -> list[str]:
    """What is allowed but probably not meant; one sentence each."""
    found = []
    resting = config.phases == "frozen" and not config.harmonizer_rounds and not config.start_from
    if resting and config.harmonizer in LEARNED:
        stays = "maps quantiles, nobody votes" if config.harmonizer == "polarity" else "stays the identity"
        found.append(f"{config.harmonizer!r} learns, but harmonizer-rounds is 0 and phases is frozen: it {stays}.")
    steps = config.local_epochs * config.iterations_per_epoch
    if config.harmonizer_settings.get("one_sided") and config.harmonizer_rounds and steps > 1:
        found.append(
            f"harmonizer.one_sided is meant for one step per exchange, but a round has {steps}: a discriminator that sees one "
            "side only learns nothing. Use local-epochs 1 and iterations-per-epoch 1."
        )
    if config.device != "cpu" and config.parallel_sites > config.gpus:
        found.append(f"{config.parallel_sites} sites share {config.gpus} of {config.device} at the same time.")
    options = {"judge": "linear", **config.harmonizer_settings}  # the preparation's choice where none was asked for
    private = config.privacy is not None
    if against := private_judge(config.harmonizer, options, private=private, start_from=config.start_from):
        found.append(against)
    return found + strategy_warnings(config)
