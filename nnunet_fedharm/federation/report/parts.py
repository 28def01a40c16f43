"""What the server knows of one part of a report, and the arrays that say it to the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.discriminant import Moments
from nnunet_fedharm.differences.panel import judged
from nnunet_fedharm.differences.sketch_classifier import Axes, fold_models, moments_from_sums
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.messages import Unpacked
from nnunet_fedharm.federation.report import messages
from nnunet_fedharm.federation.report.messages import Part, array_name, parts_from_dict
from nnunet_fedharm.federation.report.noise import reach_of

Array = npt.NDArray[np.float64]
Key = tuple[str, str, str]

_LEAST_FEATURES = 2
_NUMBERS = ("n_cases", "n_patients", "n_labelled", "n_failed")


@dataclass
class PartState:
    """What the server knows of one part.

    Attributes:
        part: with all features that two sites have.
        patients: site -> patients (with noise: about so many); sites without the part are not there.
        edges: (F, B + 1); counts: site -> (F, B + 3) on them.
        joint: positions of the features that embedding and classifier use.
        standard: of the joint features.
        moments: site -> of the joint features.
        axes: principal axes of the joint features.
        folds: site -> moments of each fold on the axes.
        weights, biases: of the models, (folds, F joint, K) and (folds, K).
        confusion: site -> (K,) patients, in the order of `folds`.
        ranks: with secure sums: (3, F) sums over sites of R_k^2 / n_k and its slack, and how many sites have a feature.
        notes: sentences for the page.
    """

    part: Part
    patients: dict[str, float]
    edges: Array = field(default_factory=lambda: np.zeros((0, 0)))
    counts: dict[str, Array] = field(default_factory=dict)
    joint: tuple[int, ...] = ()
    standard: sketch.Standard | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    axes: Axes | None = None
    folds: dict[str, list[Moments]] = field(default_factory=dict)
    weights: Array = field(default_factory=lambda: np.zeros((0, 0, 0)))
    biases: Array = field(default_factory=lambda: np.zeros((0, 0)))
    confusion: dict[str, Array] = field(default_factory=dict)
    ranks: Array = field(default_factory=lambda: np.zeros((3, 0)))
    notes: list[str] = field(default_factory=list)

    def pooled(self) -> Array:
        """(F, B + 3) counts of all sites."""
        return np.sum(list(self.counts.values()), axis=0)

    @property
    def joint_part(self) -> Part:
        """The part with its joint features only."""
        return self.part.only([self.part.names[index] for index in self.joint])


@dataclass(frozen=True)
class Measured:
    """One site's answer to `measure`.

    Attributes:
        parts: with all features that the site has.
        patients: of each part; none with secure sums.
        settings, numbers: see `Steps`.
    """

    parts: dict[Key, Part]
    patients: dict[Key, float]
    settings: dict[str, Any]
    numbers: dict[str, int]


def read_measured(site: str, message: Unpacked) -> Measured:
    """Check and unpack a reply to `measure`.

    Raises:
        FederationError: it is not in the form that its own list of parts promises.
    """
    values = message.values
    parts = parts_from_dict(values["parts"], source=site)
    patients = values["numbers"].get("patients", [0] * len(parts))
    whole = isinstance(patients, list) and len(patients) == len(parts)
    if not whole or not all(isinstance(n, int | float) for n in patients):
        raise FederationError(f"{site} did not say how many patients each part has.")
    numbers = {name: values["numbers"][name] for name in _NUMBERS if name in values["numbers"]}
    if not all(isinstance(number, int) and number >= 0 for number in numbers.values()):
        raise FederationError(f"{site} sent numbers of cases that are none.")
    return Measured(
        {part.key: part for part in parts},
        {part.key: float(count) for part, count in zip(parts, patients, strict=True)},
        dict(values["settings"]),
        numbers,
    )


def common_parts(answers: Mapping[str, Measured]) -> list[PartState]:
    """Parts that two sites have, with all features that one of them has."""
    found = []
    for key in sorted({key for answer in answers.values() for key in answer.parts}):
        having = {site: answer for site, answer in answers.items() if key in answer.parts}
        names = tuple(dict.fromkeys(name for answer in having.values() for name in answer.parts[key].names))
        if len(having) > 1:
            patients = {site: answer.patients[key] for site, answer in having.items()}
            found.append(PartState(Part(*key, names[: messages.MOST_FEATURES]), patients))
    return found[: messages.MOST_PARTS]


def keep_features(state: PartState, *, sites: int) -> None:
    """Leave out the features that fewer than so many sites (of `state.counts`) have."""
    there = np.sum([counts[:, :-1].sum(1) > 0.5 for counts in state.counts.values()], axis=0)
    kept = np.flatnonzero(there >= sites)
    state.part = state.part.only([state.part.names[index] for index in kept])
    state.counts = {site: counts[kept] for site, counts in state.counts.items()}


def choose_joint(state: PartState, *, everything: bool) -> None:
    """Features for methods that need all at once: not the control, there for every patient of every site, and varying.

    Args:
        everything: with noise nobody can tell whether a feature is missing somewhere.
    """
    pooled = state.pooled()
    good = judged(state.part.names) & (np.array([everything]) | (pooled[:, -1] == 0))
    varies = (pooled[:, :-1] > 0).sum(1) > 1
    chosen = tuple(int(index) for index in np.flatnonzero(good & varies))
    if len(chosen) < _LEAST_FEATURES or len(state.counts) < 2:
        state.notes.append("No embedding and no classifier: fewer than two features are there for every patient.")
        return
    gone = int(judged(state.part.names).sum() - len(chosen))
    if gone:
        state.notes.append(
            f"{gone} features, missing for some patients or constant, left out of classifier and embedding."
        )
    state.joint = chosen
    rows = list(chosen)
    state.standard = sketch.standard_of(pooled[rows], state.edges[rows])


def standard_arrays(state: PartState, reach: float) -> dict[str, Array]:
    """What a site needs to standardise a part; `reach` bounds a patient's vector under noise."""
    if state.standard is None:
        return {}
    return {"centre": state.standard.centre, "scale": state.standard.scale, "reach": np.array([reach])}


def axes_arrays(state: PartState) -> dict[str, Array]:
    """What a site needs to put its patients on the principal axes."""
    if state.axes is None:
        return {}
    arrays = standard_arrays(state, reach_of(float(state.axes.variances.sum())))
    return {**arrays, "origin": state.axes.centre, "axes": state.axes.weights}


def model_arrays(state: PartState) -> dict[str, Array]:
    """Discriminants of each fold as affine maps of the standardised features; kept in the state too."""
    if state.axes is None:
        return {}
    weights, biases = fold_models(state.folds)
    state.weights = np.einsum("fd,gdk->gfk", state.axes.weights, weights)
    state.biases = biases - np.einsum("f,gfk->gk", state.axes.centre, state.weights)
    return {"weights": state.weights, "biases": state.biases}


def folds_from(arrays: Mapping[str, npt.NDArray[Any]], folds: int, reach: float) -> list[Moments]:
    """Moments of each fold from a site's sums, which are of vectors over `reach`."""
    return [
        moments_from_sums(float(arrays["n"][fold]), reach * arrays["sum"][fold], reach**2 * arrays["products"][fold])
        for fold in range(folds)
    ]


def numbered(given: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Arrays of all parts under their names in a message."""
    return {array_name(index, what): value for index, arrays in enumerate(given) for what, value in arrays.items()}
