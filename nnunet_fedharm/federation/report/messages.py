"""Messages of the site report: who asks for what, and the shape and size of every number that leaves a site.

A part is a channel, region and intensity scale. With P parts of F features, B bins, K sites, f folds and d <= 20 axes:

| reply | numbers | bytes |
|---|---|---|
| hello | scanner, channels, labels, versions | at most 64 KiB |
| measure | names of parts and features, settings, numbers of patients and cases | at most 2 MiB, usually 50 KiB |
| locate | counts (F, 482) on a public grid for each part | 1928 F P |
| histograms | counts (F, B + 3) for each part | 4 F (B + 3) P |
| moments | patients, sums and sums of products | 8 (1 + F + F (F + 1) / 2) P |
| folds | the same of each fold on d principal axes | 8 f (1 + d + d (d + 1) / 2) P |
| classify | patients taken for each site | 8 K P |
| ranks, with secure sums only | shares (3, F) in the rank test for each part | 24 F P |

Nothing in them is a case identifier, and no array has an axis of cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import Weights, decode, encode
from nnunet_fedharm.federation.messages import DATASET, RUN_ID, SITE, Item, Schema

MOST_PARTS, MOST_FEATURES, MOST_FOLDS = 64, 256, 10
_KIB, _MIB = 2**10, 2**20
_PARTS = Item(dict, 2 * _MIB)
_NAMES = Item(dict, 64 * _KIB)
ALSO = ("float64",)
PROTECTION = Item(dict, 1024)
"""See `measure_noise.Protection`."""

HELLO = Schema("report hello request", {"run_id": RUN_ID, "dataset": DATASET})
HELLO_REPLY = Schema("report hello reply", {"site": SITE, "description": Item(dict, 64 * _KIB)})
MEASURE = Schema(
    "report measure request",
    {"run_id": RUN_ID, "dataset": DATASET, "options": Item(dict, 64 * _KIB), "protection": PROTECTION},
)
MEASURE_REPLY = Schema("report measure reply", {"site": SITE, "parts": _PARTS, "settings": _NAMES, "numbers": _NAMES})
COUNTS = Schema(
    "report counts request",
    {
        "run_id": RUN_ID,
        "step": Item(str, 10, pattern="locate|histograms|ranks"),
        "turn": Item(int, 99),
        "parts": _PARTS,
        "protection": PROTECTION,
    },
    weights=True,
)
COUNTS_REPLY = Schema("report counts reply", {"site": SITE}, weights=True)
MOMENTS = Schema(
    "report moments request",
    {
        "run_id": RUN_ID,
        "step": Item(str, 7, pattern="moments|folds"),
        "parts": _PARTS,
        "folds": Item(int, MOST_FOLDS, 1),
        "seed": Item(int, 2**62),
        "protection": PROTECTION,
    },
    weights=True,
)
MOMENTS_REPLY = Schema("report moments reply", {"site": SITE}, weights=True)
CLASSIFY = Schema(
    "report classify request",
    {
        "run_id": RUN_ID,
        "parts": _PARTS,
        "folds": Item(int, MOST_FOLDS, 1),
        "seed": Item(int, 2**62),
        "protection": PROTECTION,
    },
    weights=True,
)
CLASSIFY_REPLY = Schema("report classify reply", {"site": SITE}, weights=True)
KEEP = Schema("report keep request", {"run_id": RUN_ID, "findings": Item(dict, 64 * _MIB)})
KEEP_REPLY = Schema("report keep reply", {"site": SITE})

SCHEMAS = (HELLO_REPLY, MEASURE_REPLY, COUNTS_REPLY, MOMENTS_REPLY, CLASSIFY_REPLY, KEEP_REPLY)
"""Everything that a site sends."""


@dataclass(frozen=True)
class Part:
    """A channel, region and intensity scale, and the features of it that are spoken of."""

    channel: str
    region: str
    scale: str
    names: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.channel, self.region, self.scale

    def only(self, names: Sequence[str]) -> Part:
        """The same part with other features."""
        return Part(*self.key, tuple(names))


def parts_to_dict(parts: Sequence[Part]) -> dict[str, Any]:
    """JSON form."""
    return {"parts": [{**asdict(part), "names": list(part.names)} for part in parts]}


def parts_from_dict(data: Mapping[str, Any], *, source: str) -> list[Part]:
    """Inverse of `parts_to_dict`.

    Raises:
        FederationError: not in this form, or more parts or features than are read.
    """
    try:
        found = [
            Part(str(one["channel"]), str(one["region"]), str(one["scale"]), tuple(str(name) for name in one["names"]))
            for one in data["parts"]
        ]
    except (KeyError, TypeError) as error:
        raise FederationError(f"The list of parts from {source} is damaged ({error}).") from error
    features = max((len(part.names) for part in found), default=0)
    if len(found) > MOST_PARTS or features > MOST_FEATURES:
        raise FederationError(
            f"{source} speaks of {len(found)} parts with up to {features} features; at most {MOST_PARTS} parts and "
            f"{MOST_FEATURES} features are read. Measure fewer channels or regions, or choose features."
        )
    if len({part.key for part in found}) != len(found):
        raise FederationError(f"{source} lists a part twice.")
    return found


def array_name(index: int, what: str) -> str:
    """Name of an array of one part."""
    return f"{index:02d}.{what}"


def arrays_of(arrays: Mapping[str, npt.NDArray[Any]], index: int) -> dict[str, npt.NDArray[Any]]:
    """Arrays of one part, by what they are."""
    prefix = array_name(index, "")
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def triangle(features: int) -> int:
    """Entries of the upper triangle of a matrix, its diagonal included."""
    return features * (features + 1) // 2


Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""What an array is -> shape and dtype."""


def count_shapes(features: int, cells: int) -> Shapes:
    """Arrays of a part in the reply to `locate` and `histograms`."""
    return {"counts": ((features, cells), "float32")}


def rank_shapes(features: int) -> Shapes:
    """Arrays of a part in `ranks`: shares in the sum of R_k^2 / n_k, in its slack, and whether the site has the feature."""
    return {"ranks": ((3, features), "float64")}


def moment_shapes(features: int, folds: int) -> Shapes:
    """Arrays of a part in the reply to `moments`, of features or axes."""
    return {
        "n": ((folds,), "float64"),
        "sum": ((folds, features), "float64"),
        "products": ((folds, triangle(features)), "float64"),
    }


def classify_shapes(sites: int) -> Shapes:
    """Arrays of a part in the reply to `classify`."""
    return {"counts": ((sites,), "float64")}


def like(shapes: Sequence[Shapes]) -> Weights:
    """Arrays that a message has to look like, one mapping for each part."""
    return {
        array_name(index, what): np.zeros(shape, dtype=dtype)
        for index, part in enumerate(shapes)
        for what, (shape, dtype) in part.items()
    }


def send(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Arrays for a message."""
    return encode(arrays, also=ALSO)


def receive(record: ArrayRecord, expected: Weights | None, *, source: str) -> Weights:
    """Arrays of a message; names, shapes and dtypes are checked against what was asked for.

    Raises:
        ShapeError, FederationError: they differ, or are not finite.
    """
    return decode(record, like=expected, source=source, also=ALSO)
