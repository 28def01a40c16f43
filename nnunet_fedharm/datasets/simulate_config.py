"""Which scanners to simulate: read from YAML or JSON, or a preset."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunet_fedharm.datasets.simulate_signal import BRAINWEB, ORDER, PulseSequence
from nnunet_fedharm.errors import DataError, SetupError

Range = tuple[float, float]
NONE: Range = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class SiteEffects:
    """Ranges that one draw per case and channel is taken from; the defaults change nothing."""

    tone: Range = NONE
    """k of the tone curve; > 0 compresses bright tissue, < 0 dark tissue."""
    bias: Range = NONE
    """Largest log gain of the receive field; 0.1 is BrainWeb's 20 %."""
    point_spread_mm: Range = NONE
    """Full width at half maximum of the Gaussian point spread."""
    resolution_loss: tuple[float, ...] | None = None
    """Per voxel axis, how many voxels of the grid a voxel of the scanner spans (k-space truncation)."""
    noise: Range = NONE
    """Standard deviation of the complex noise per channel; 1 is bright tissue."""
    scale: Range | None = None
    """Raw value of bright tissue; None keeps the image's own."""
    pulse_sequence: PulseSequence | None = None
    """MR signal equation on tissue maps."""
    sequence_channels: tuple[int, ...] = (0,)
    """Channels that the pulse sequence renders anew."""

    def __post_init__(self) -> None:
        for name in ("tone", "bias", "point_spread_mm", "noise", "scale"):
            limits = getattr(self, name)
            if limits is None:
                continue
            if limits[0] > limits[1] or (name != "tone" and limits[0] < 0) or (name == "scale" and limits[0] == 0):
                raise DataError(f"{name} has the range {list(limits)}: it must rise, and only tone may be below 0.")
        if self.resolution_loss is not None and (len(self.resolution_loss) != 3 or min(self.resolution_loss) < 1):
            raise DataError(f"resolution_loss needs three numbers of at least 1, got {list(self.resolution_loss)}.")

    @property
    def is_control(self) -> bool:
        """Nothing changes: the site's files are the source's."""
        return self == SiteEffects(sequence_channels=self.sequence_channels)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values."""
        default = SiteEffects()
        found = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value != getattr(default, name)
        }
        if self.pulse_sequence is not None:
            found["pulse_sequence"] = {
                key: value for key, value in asdict(self.pulse_sequence).items() if value is not None
            }
        return found


@dataclass(frozen=True, kw_only=True)
class SimulatedSite:
    """One scanner and what sites.json says of it."""

    effects: SiteEffects = field(default_factory=SiteEffects)
    vendor: str | None = None
    field: float | None = None
    sequence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A whole simulation; with the source dataset it says everything.

    Attributes:
        sites: name -> scanner; the first is the reference unless one is named.
        reference: home of the travelling subjects.
        seed: of every draw.
        travelling: number of travelling subjects.
        tissues: tissue -> label values, where the dataset's labels are tissues; None fits a mixture.
        contrast: of the source's first channel, for the mixture: T1w, T2w or FLAIR.
    """

    sites: dict[str, SimulatedSite]
    reference: str
    seed: int = 0
    travelling: int = 0
    tissues: dict[str, tuple[int, ...]] | None = None
    contrast: str = "T1w"

    def __post_init__(self) -> None:
        if len(self.sites) < 2:
            raise DataError(f"A simulation needs at least two sites, got {len(self.sites)}.")
        for name in self.sites:
            if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
                raise DataError(
                    f"Site name {name!r}: only letters, digits, dots and dashes, because files are named by it."
                )
        if self.reference not in self.sites:
            raise DataError(f"The reference {self.reference} is not among the sites {', '.join(self.sites)}.")
        if self.travelling < 0:
            raise DataError(f"The number of travelling subjects must be 0 or more, got {self.travelling}.")
        if self.contrast not in ORDER:
            raise DataError(f"Unknown contrast {self.contrast!r}. Choose {', '.join(ORDER)}.")
        unknown = sorted(set(self.tissues or {}) - set(BRAINWEB))
        if unknown or (self.tissues is not None and not self.tissues):
            raise DataError(f"Unknown tissues {', '.join(unknown) or '(none given)'}. Known: {', '.join(BRAINWEB)}.")


def load_simulation(path: Path, **options: Any) -> Simulation:
    """Read `sites` (and optionally `tissues`, `contrast`, `reference`) from YAML or JSON.

    Args:
        options: fields of `Simulation` that override the file's.

    Raises:
        DataError: the file is missing, no mapping, or has an unknown key.
        SetupError: YAML without PyYAML.
    """
    data = _read(path)
    if not isinstance(data, Mapping) or not isinstance(data.get("sites"), Mapping) or not data["sites"]:
        raise DataError(f"{path} needs a mapping `sites` of site -> scanner.")
    _refuse_unknown(data, {"sites", "tissues", "contrast", "reference"}, f"{path}")
    sites = {str(name): parse_site(value or {}, where=f"{path}: site {name}") for name, value in data["sites"].items()}
    tissues = data.get("tissues")
    if tissues is not None:
        tissues = {str(name): _values(value, f"{path}: tissue {name}") for name, value in dict(tissues).items()}
    found = {"reference": str(data.get("reference", next(iter(sites)))), "contrast": data.get("contrast", "T1w")}
    return Simulation(sites=sites, tissues=tissues, **{**found, **options})


def parse_site(data: Mapping[str, Any], *, where: str) -> SimulatedSite:
    """One site of the file.

    Raises:
        DataError: an unknown key or a value of the wrong form.
    """
    _refuse_unknown(data, {item.name for item in fields(SimulatedSite)}, where)
    effects = dict(data.get("effects") or {})
    _refuse_unknown(effects, {item.name for item in fields(SiteEffects)}, f"{where}: effects")
    made: dict[str, Any] = {}
    try:
        for name, value in effects.items():
            if name == "pulse_sequence":
                made[name] = PulseSequence(**value)
            elif name == "resolution_loss":
                made[name] = tuple(float(item) for item in value)
            elif name == "sequence_channels":
                made[name] = tuple(int(item) for item in value)
            else:
                low, high = (value, value) if isinstance(value, (int, float)) else value
                made[name] = (float(low), float(high))
        strength = data.get("field")
        return SimulatedSite(
            effects=SiteEffects(**made),
            vendor=data.get("vendor"),
            field=None if strength is None else float(strength),
            sequence=data.get("sequence"),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is not understood ({error}). Ranges are a number or [low, high].") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def preset(number: int, **options: Any) -> Simulation:
    """The first `number` of PRESET.

    Raises:
        DataError: not 2 to the number of preset sites.
    """
    if not 2 <= number <= len(PRESET):
        raise DataError(f"--preset takes 2 to {len(PRESET)} sites, got {number}.")
    sites = {name: parse_site(value, where=f"preset {name}") for name, value in list(PRESET.items())[:number]}
    return Simulation(sites=sites, **{"reference": next(iter(sites)), **options})


PRESET: dict[str, dict[str, Any]] = {
    "A": {"vendor": "simulated", "sequence": "as acquired (negative control)"},
    "B": {
        "vendor": "simulated",
        "field": 1.5,
        "sequence": "dark tissue compressed, blurred",
        "effects": {
            "tone": [-2.2, -1.6],
            "bias": [0.1, 0.2],
            "point_spread_mm": [1.5, 2.5],
            "noise": [0.02, 0.03],
            "scale": [250, 350],
        },
    },
    "C": {
        "vendor": "simulated",
        "field": 3.0,
        "sequence": "bright tissue compressed, thick slices",
        "effects": {
            "tone": [2.5, 3.5],
            "bias": [0.05, 0.15],
            "resolution_loss": [1, 1, 2.5],
            "noise": [0.01, 0.02],
            "scale": [2500, 3500],
        },
    },
    "D": {
        "vendor": "simulated",
        "field": 1.5,
        "sequence": "T2w spin echo",
        "effects": {
            "bias": [0.1, 0.2],
            "noise": [0.015, 0.025],
            "pulse_sequence": {"kind": "spin_echo", "tr_ms": 4000, "te_ms": 90},
        },
    },
    "E": {
        "vendor": "simulated",
        "field": 1.5,
        "sequence": "FLAIR",
        "effects": {
            "bias": [0.05, 0.15],
            "resolution_loss": [1, 1, 2],
            "noise": [0.02, 0.03],
            "pulse_sequence": {"kind": "flair", "tr_ms": 9000, "te_ms": 100, "ti_ms": 1700},
        },
    },
    "F": {
        "vendor": "simulated",
        "field": 1.5,
        "sequence": "T1w gradient echo, noisy",
        "effects": {
            "bias": [0.15, 0.3],
            "noise": [0.04, 0.06],
            "pulse_sequence": {"kind": "gradient_echo", "tr_ms": 20, "te_ms": 5, "flip_degrees": 30},
        },
    },
}
"""FLAIR's inversion time nulls BrainWeb's cerebrospinal fluid."""


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() not in (".yaml", ".yml"):
            return json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"The sites {path} cannot be read ({error}). Give a YAML or JSON file.") from error
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise SetupError(f"Reading {path} needs PyYAML. Write the sites as JSON, or `pip install pyyaml`.") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"The sites {path} are no YAML ({error}). Correct the file.") from error


def _values(value: Any, where: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, int) for item in values):
        raise DataError(f"{where} needs label values, got {value!r}.")
    return tuple(values)


def _refuse_unknown(data: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(map(str, data)) - known)
    if unknown:
        raise DataError(f"{where} has the unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")
