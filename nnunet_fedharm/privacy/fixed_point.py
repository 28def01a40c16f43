"""Real numbers as integers modulo 2^(8 w), so that sums of them are exact and cannot overflow.

A value x of a field is clipped to [-c, c] and becomes q = round(x L / c), with L the field's levels. A site of weight a sends
a q, at most A L in size for the largest weight A; n sites together stay within n A L, and L is chosen so that this is below half
of the ring. So sums never wrap around, whatever the sites send by these rules, and the only error is that of the rounding:
c / (2 L) an entry of a weighted mean, n A times as much of a sum (beside float64's own rounding).

| symbol | here |
|---|---|
| n | `Layout.sites` |
| A | `Layout.max_weight` |
| c | `Field.clip` |
| L | `Layout.levels(field)` |
| w | `Layout.width` |

Noise for the sum (`Share`) is rounded to the same grid and added as integers, so a sum with noise is as exact as one without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import PrivacyError

Ring = npt.NDArray[np.uint64]
"""Elements of the ring in the low `width` bytes of 64-bit numbers; what is above them is ignored."""

MAX_FIELDS, MAX_ENTRIES = 20_000, 2**31
_FINEST = 2**52
"""float64 holds every integer up to here."""
_COARSEST = 2**10


@dataclass(frozen=True)
class Field:
    """One array of a vector.

    Attributes:
        name: of the array.
        shape: of the array; () for a number.
        clip: largest size of an entry; what is larger is cut to it and counted.
        weighted: multiplied by the site's weight before it is summed.
        integer: entries are whole numbers and summed exactly; `clip` is then the largest one, too large ones are refused.
    """

    name: str
    shape: tuple[int, ...]
    clip: float
    weighted: bool = True
    integer: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf or (self.integer and self.clip != int(self.clip)):
            raise PrivacyError(f"clip of {self.name} is {self.clip}; it must be a positive number, whole for counts.")
        if any(extent < 0 for extent in self.shape):
            raise PrivacyError(f"{self.name} has the impossible shape {self.shape}.")

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Sum:
    """What a secure sum reveals.

    Attributes:
        values: name -> sum over sites of weight x value (of the value, where the field is not weighted), float64.
        weight: sum of the weights.
        clipped: entries that were cut to the clip range, over all sites.
        weighted: names of the weighted fields.
    """

    values: dict[str, npt.NDArray[np.float64]]
    weight: int
    clipped: int
    weighted: frozenset[str]

    def mean(self, name: str) -> npt.NDArray[np.float64]:
        """Weighted mean of a weighted field.

        Raises:
            PrivacyError: the field is not weighted, or no site had any weight.
        """
        if name not in self.weighted:
            raise PrivacyError(f"{name} is not weighted; its sum is in values.")
        if not self.weight:
            raise PrivacyError("No site of the secure sum has any weight.")
        return self.values[name] / self.weight


@dataclass(frozen=True)
class Share:
    """A site's own part of the noise of a sum.

    Attributes:
        names: of the fields that get it.
        sigma: standard deviation, in the unit of the values.
        normal: standard normal numbers in double precision, so many.
    """

    names: frozenset[str]
    sigma: float
    normal: Callable[[int], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Layout:
    """A vector of fields in the ring; the same at the server and every site. Two counts follow the fields: weight and clipped.

    Attributes:
        fields: in order.
        sites: largest number of sites in the sum.
        max_weight: largest weight of a site, a whole number.
        width: bytes of an entry on the wire.
    """

    fields: tuple[Field, ...]
    sites: int
    max_weight: int = 1
    width: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 8 or self.sites < 1 or self.max_weight < 1:
            raise PrivacyError(
                f"A sum over {self.sites} sites of weights up to {self.max_weight} in {self.width} bytes is impossible."
            )
        if len(self.fields) > MAX_FIELDS or self.size > MAX_ENTRIES:
            raise PrivacyError(f"A secure sum takes at most {MAX_FIELDS} arrays and {MAX_ENTRIES} entries.")
        if len({field.name for field in self.fields}) != len(self.fields):
            raise PrivacyError("Two arrays of a secure sum have one name.")
        for field in self.fields:
            self._check_fits(field)
        if self.sites * max(self.max_weight, 1) > self._most:
            raise PrivacyError(f"{self.width} bytes cannot hold the sum of the weights; use more.")

    @property
    def size(self) -> int:
        """Entries of the whole vector."""
        return sum(field.size for field in self.fields) + 2

    @property
    def _most(self) -> int:
        return 2 ** (8 * self.width - 1) - 1

    def levels(self, field: Field) -> int:
        """L: the integer that `clip` becomes."""
        if field.integer:
            return int(field.clip)
        return min(_FINEST, self._most // (self.sites * self._weight(field)))

    def step(self, field: Field) -> float:
        """Distance of neighbouring values, in the unit of the value."""
        return field.clip / self.levels(field)

    def mean_error(self, field: Field) -> float:
        """Largest error of an entry of the weighted mean, where nothing was clipped."""
        return 0.0 if field.integer else self.step(field) / 2

    def sum_error(self, field: Field) -> float:
        """Largest error of an entry of the sum, where nothing was clipped."""
        return self.sites * self._weight(field) * self.mean_error(field)

    def encode(self, values: Mapping[str, npt.ArrayLike], weight: int = 1, share: Share | None = None) -> Ring:
        """One site's vector, before masking.

        Args:
            values: name -> array of the field's shape.
            weight: of this site, 0 to `max_weight`.
            share: noise that this site adds to some fields; not multiplied by the weight.

        Raises:
            PrivacyError: names, shapes, NaN, infinity, a count or a weight that does not fit.
        """
        if set(values) != {field.name for field in self.fields}:
            odd = sorted(set(values) ^ {field.name for field in self.fields})[0]
            raise PrivacyError(f"The secure sum and this site's part differ in {odd!r}.")
        if not 0 <= weight <= self.max_weight:
            raise PrivacyError(f"The weight of this site is {weight}; the secure sum takes 0 to {self.max_weight}.")
        vector = np.empty(self.size, dtype=np.int64)
        start = clipped = 0
        for field in self.fields:
            stop = start + field.size
            clipped += self._encode_field(field, np.asarray(values[field.name]), vector[start:stop])
            if field.weighted:
                vector[start:stop] *= weight
            if share is not None and field.name in share.names:
                clipped += self._add_share(field, share, vector[start:stop])
            start = stop
        vector[-2:] = weight, min(clipped, self._most // self.sites)
        return vector.view(np.uint64)

    def decode(self, total: Ring) -> Sum:
        """The sum of the sites' vectors as numbers.

        Raises:
            PrivacyError: the size is not this layout's, or the counts are none that sites following the rules produce.
        """
        if total.shape != (self.size,):
            raise PrivacyError(f"The secure sum has {total.shape[0]} entries, expected {self.size}.")
        unused = np.uint64(64 - 8 * self.width)
        signed = (total << unused).view(np.int64) >> np.int64(unused)
        values, start = {}, 0
        for field in self.fields:
            part = signed[start : start + field.size].astype(np.float64)
            values[field.name] = (part * self.step(field)).reshape(field.shape)
            start += field.size
        weight, clipped = (int(count) for count in signed[-2:])
        if not 0 <= weight <= self.sites * self.max_weight or clipped < 0:
            raise PrivacyError(
                "The secure sum makes no sense: masks are left in it, or a site did not follow the protocol."
            )
        return Sum(values, weight, clipped, frozenset(field.name for field in self.fields if field.weighted))

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        rows = [[field.name, list(field.shape), field.clip, field.weighted, field.integer] for field in self.fields]
        return {"fields": rows, "sites": self.sites, "max_weight": self.max_weight, "width": self.width}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """Inverse of `to_dict`.

        Raises:
            PrivacyError: it is none.
        """
        try:
            rows: Sequence[Any] = data["fields"]
            fields = tuple(
                Field(str(name), tuple(int(extent) for extent in shape), float(clip), bool(weighted), bool(integer))
                for name, shape, clip, weighted, integer in rows
            )
            return cls(fields, int(data["sites"]), int(data["max_weight"]), int(data["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError("The description of the secure sum cannot be read.") from error

    def _add_share(self, field: Field, share: Share, into: npt.NDArray[np.int64]) -> int:
        """Add rounded noise to a field's integers; returns how many had to be cut to keep within the ring."""
        levels = self.levels(field) * self._weight(field)
        noisy = into + np.rint(share.normal(into.size) * (share.sigma / self.step(field))).astype(np.int64)
        np.clip(noisy, -levels, levels, out=into)
        return int(np.count_nonzero(noisy != into))

    def _weight(self, field: Field) -> int:
        return self.max_weight if field.weighted else 1

    def _check_fits(self, field: Field) -> None:
        levels = self.levels(field)
        if self.sites * self._weight(field) * levels > self._most or (levels < _COARSEST and not field.integer):
            raise PrivacyError(
                f"{self.width} bytes are too few for {field.name} of {self.sites} sites with weights up to {self.max_weight}; "
                "use more bytes or smaller weights."
            )

    def _encode_field(self, field: Field, value: npt.NDArray[Any], into: npt.NDArray[np.int64]) -> int:
        """Write a field's integers; returns how many entries were clipped."""
        if value.shape != field.shape:
            raise PrivacyError(f"{field.name} of this site has the shape {value.shape}, expected {field.shape}.")
        flat = value.astype(np.float64).reshape(-1)
        if not np.isfinite(flat).all():
            # Only the site can see it: one NaN inside the sum would pass for any number.
            raise PrivacyError(f"{field.name} of this site holds NaN or infinity; nothing of it was sent.")
        over = int(np.count_nonzero(np.abs(flat) > field.clip))
        if field.integer and (over or not np.array_equal(flat, np.rint(flat))):
            raise PrivacyError(f"{field.name} of this site is no whole number up to {field.clip:g}.")
        levels = self.levels(field)
        into[:] = np.rint(np.clip(flat / field.clip, -1.0, 1.0) * levels)
        return over
