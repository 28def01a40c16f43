"""Everything a federated site report can be told; its keys stand in the same run config as the training's.

A run is a report where `task` is "site-report". What the report alone knows has the prefix `report-`: a field `min_patients` is
the key `report-min-patients` in `[tool.flwr.app.config]`, and `--min-patients` on the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.site_names import check_site_names
from nnunet_fedharm.sites.features.table import SCALES

TASKS = ("train", "site-report")
TASK_KEY, PREFIX = "task", "report-"
_SHARED = (
    "root server_root sites dataset seed device num_processes deadline_s prepare_deadline_s join_wait_s parallel_sites"
)
MOST_BINS, MOST_DIMENSIONS, MOST_SIMULATIONS = 256, 20, 1000


def _option(default: Any, text: str, *, launch: bool = False) -> Any:
    return field(default=default, metadata={"help": text, "launch": launch})


@dataclass(frozen=True, kw_only=True)
class SiteReportConfig:
    """One federated site report. Values are checked when it is made.

    Raises:
        FederationError: a value is out of range or contradicts another one.
    """

    root: str = _option("", "folder with sites/<SITE>/ and server/")
    server_root: str = _option("", "the server's folder; default ROOT/server")
    sites: str = _option("", "names of the expected sites, comma separated; default: every folder in ROOT/sites")
    dataset: str = _option("", "nnU-Net dataset id or name, for example 910 or Dataset910_Hippocampus")
    seed: int = _option(0, "seed of folds, bootstrap and null; never of noise")
    device: str = _option("cpu", "not used: features are measured on the CPU")
    num_processes: int = _option(1, "processes for the features at each site")
    deadline_s: float = _option(3600.0, "seconds that an exchange waits for its sites")
    prepare_deadline_s: float = _option(86400.0, "seconds that measuring features may take")
    join_wait_s: float = _option(300.0, "seconds to wait at the start until every expected site is there")
    parallel_sites: int = _option(1, "sites that work at the same time in simulation", launch=True)

    image_region: bool = _option(False, "measure the whole image too, not only the labels and the foreground")
    scales: str = _option(",".join(SCALES), "intensity scales, comma separated: " + ", ".join(SCALES))
    channels: str = _option("", "channels to measure, comma separated; default all")
    regions: str = _option("", "regions that the sites may send, comma separated: foreground, image, label NAME")
    features: str = _option(
        "", "features that the sites may send, comma separated names or families (intensity, texture, shape, quality)"
    )
    min_patients: int = _option(5, "a site with fewer patients sends nothing, and no sum covers fewer of them")
    bins: int = _option(64, "bins of a histogram; with noise at most 16")
    dimensions: int = _option(20, "principal axes that the site classifier uses, at most 20")
    folds: int = _option(5, "folds of the site classifier; fewer where a site is small")
    simulations: int = _option(200, "simulated null of the site classifier; 0 = none")
    bootstrap: int = _option(200, "bootstrap replicates of effect sizes; 0 = no intervals")
    epsilon: float = _option(0.0, "differential privacy for a patient of everything that a site sends; 0 = no noise")
    delta: float = _option(1e-5, "delta of differential privacy")
    secure_sums: bool = _option(False, "the server learns only sums over all sites; sites compare themselves at home")

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_words(self)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Expected sites, sorted."""
        return tuple(sorted(self.list_of("sites")))

    def list_of(self, name: str) -> list[str]:
        """A comma-separated field as a list."""
        return [part.strip() for part in str(getattr(self, name)).split(",") if part.strip()]

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the SHA-256 of all values that the result depends on."""
        place = ("root", "server_root", "device", "num_processes", "parallel_sites")
        values = {key: value for key, value in asdict(self).items() if key not in place}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def to_run_config(self) -> dict[str, bool | int | float | str]:
        """Keys and values for Flower's run config."""
        values = {_key(item.name): getattr(self, item.name) for item in fields(self) if not item.metadata["launch"]}
        return {TASK_KEY: "site-report", **values}

    @classmethod
    def from_run_config(cls, values: Mapping[str, Any]) -> SiteReportConfig:
        """Inverse of `to_run_config`; keys of the training are ignored.

        Raises:
            FederationError: unknown `report-` key, wrong type or value.
        """
        known = {_key(item.name): item for item in fields(cls) if not item.metadata["launch"]}
        unknown = sorted(key for key in values if key.startswith(PREFIX) and key not in known)
        if unknown:
            raise FederationError(f"Unknown run config key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")
        typed = {item.name: _typed(key, item.default, values[key]) for key, item in known.items() if key in values}
        return cls(**typed)


def task_of(values: Mapping[str, Any]) -> str:
    """What a run config asks for: one of TASKS.

    Raises:
        FederationError: another word.
    """
    task = str(values.get(TASK_KEY, TASKS[0]))
    if task not in TASKS:
        raise FederationError(f"task is {task!r}; choose one of {', '.join(TASKS)}.")
    return task


def training_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run config without what only the report reads."""
    return {key: value for key, value in values.items() if key != TASK_KEY and not key.startswith(PREFIX)}


def _key(name: str) -> str:
    plain = name.replace("_", "-")
    return plain if name in _SHARED.split() else PREFIX + plain


def _typed(key: str, default: Any, value: Any) -> Any:
    wanted = type(default)
    if wanted in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return wanted(value)
    if type(value) is not wanted:
        raise FederationError(f"{key} must be {wanted.__name__}, got {value!r}.")
    return value


def _check_ranges(config: SiteReportConfig) -> None:
    allowed: dict[str, tuple[float, float]] = {
        "seed": (0, 2**62),
        "num_processes": (1, 1024),
        "parallel_sites": (1, 1024),
        "min_patients": (2, 10**6),
        "bins": (8, MOST_BINS),
        "dimensions": (2, MOST_DIMENSIONS),
        "folds": (2, 10),
        "simulations": (0, MOST_SIMULATIONS),
        "bootstrap": (0, 10_000),
        "epsilon": (0, 1e6),
        "delta": (1e-15, 0.1),
    }
    allowed |= dict.fromkeys(("deadline_s", "prepare_deadline_s", "join_wait_s"), (1e-3, 1e9))
    for name, (least, most) in allowed.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise FederationError(f"{name.replace('_', '-')} must lie in [{least:g}, {most:g}], got {value}.")
    if 0 < config.bootstrap < 20:
        raise FederationError(f"bootstrap must be 0 or at least 20, got {config.bootstrap}.")
    if config.epsilon and config.secure_sums:
        raise FederationError("epsilon and secure-sums cannot be combined yet. Choose noise or sums.")


def _check_words(config: SiteReportConfig) -> None:
    names = config.site_names
    check_site_names(names)
    least = 3 if config.secure_sums else 2
    if names and len(names) < least:
        raise FederationError(f"A report needs at least {least} sites, got {len(names)} ({config.sites}).")
    for scale in config.list_of("scales"):
        if scale not in SCALES:
            raise FederationError(f"scales names {scale!r}; choose from {', '.join(SCALES)}.")
    if not config.list_of("scales"):
        raise FederationError(f"scales is empty; choose from {', '.join(SCALES)}.")
