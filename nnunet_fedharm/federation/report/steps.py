"""The exchanges of a report one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.discriminant import Moments, merge_moments
from nnunet_fedharm.differences.findings import ALL_SITES
from nnunet_fedharm.differences.sketch_classifier import principal_axes
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.messages import Unpacked
from nnunet_fedharm.federation.report import messages
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.exchange import Sites, disagreement
from nnunet_fedharm.federation.report.messages import arrays_of, parts_to_dict
from nnunet_fedharm.federation.report.noise import Protection, reach_of, sensitivity_of
from nnunet_fedharm.federation.report.parts import (
    PartState,
    axes_arrays,
    choose_joint,
    common_parts,
    folds_from,
    keep_features,
    model_arrays,
    numbered,
    read_measured,
    standard_arrays,
)
from nnunet_fedharm.federation.report.release import sum_key

Array = npt.NDArray[np.float64]
ZOOMS = 3
NOISY_BINS = 16
"""Most bins under noise, of which each bin has the same."""
_MOST_PATIENTS = 1e6


@dataclass
class Steps:
    """A report in progress.

    Attributes:
        parts: in the order of their keys.
        settings: of the features, the same at every site.
        numbers: site -> n_cases, n_patients, n_labelled, n_failed; empty with noise.
        n_folds: of the classifier; 0 where it is not possible.
    """

    sites: Sites
    config: SiteReportConfig
    parts: list[PartState] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    n_folds: int = 0

    @property
    def plan(self) -> Protection:
        """What lies between the sites' sums and the server."""
        return Protection(self.config.epsilon, self.config.delta, self.config.secure_sums)

    def measure(self) -> None:
        """Which parts and features there are."""
        config = self.config
        options = {
            # A site without labels has nothing but the image, so the others measure it too.
            "image_region": config.image_region or any(one["unlabelled"] for one in self.sites.descriptions.values()),
            "scales": config.list_of("scales"),
            "channels": config.list_of("channels"),
            "regions": config.list_of("regions"),
            "features": config.list_of("features"),
            "min_patients": config.min_patients,
        }
        values = {"run_id": self.sites.run_id, "dataset": config.dataset, "options": options}
        answers = self.sites.ask(
            "report_measure",
            messages.MEASURE,
            {**values, "protection": self.plan.to_dict()},
            messages.MEASURE_REPLY,
            read_measured,
            deadline_s=config.prepare_deadline_s,
        )
        disagreement({site: answer.settings for site, answer in answers.items()}, "how features are measured")
        self.settings = next(iter(answers.values())).settings
        self.numbers = {site: answer.numbers for site, answer in answers.items()}
        self.parts = common_parts(answers)
        if not self.parts:
            raise FederationError("No channel, region and scale was measured at two sites, so nothing can be compared.")

    def histograms(self) -> None:
        """Zoom until every feature is resolved, then count on the final edges; with noise count once on plain edges."""
        bins = self.config.bins
        self._count("locate", 0, [{} for _ in self.parts], sketch.LOCATE_CELLS + 1)
        if self.plan.on:
            self._count_noisy(min(bins, NOISY_BINS))
            return
        for state in self.parts:
            keep_features(state, sites=1 if self.plan.sums else 2)
        self.parts = [state for state in self.parts if state.part.names]
        ranges = [sketch.located_range(state.pooled()) for state in self.parts]
        for turn in range(ZOOMS):
            self._count_on([sketch.equal_edges(low, high, bins) for low, high in ranges], turn)
            coarse = [~sketch.is_resolved(state.pooled()) for state in self.parts]
            if not any(rows.any() for rows in coarse):
                break
            for state, rows, (low, high) in zip(self.parts, coarse, ranges, strict=True):
                closer = sketch.zoomed_range(state.pooled(), state.edges)
                low[rows], high[rows] = closer[0][rows], closer[1][rows]
        self._count_on([sketch.final_edges(state.pooled(), state.edges, bins) for state in self.parts], ZOOMS)

    def ranks(self) -> None:
        """With secure sums: the rank test from sums over sites, and what every site needs to compare itself at home."""
        given = [{"edges": state.edges, "pooled": state.pooled()} for state in self.parts]
        shapes = [messages.rank_shapes(len(state.part.names)) for state in self.parts]
        clip = max(float(state.pooled()[:, :-1].sum(1).max()) for state in self.parts)
        (arrays,) = self._collect("ranks", 0, given, shapes, clip=max(clip, 1.0)).values()
        for index, state in enumerate(self.parts):
            scale = np.maximum(state.pooled()[:, :-1].sum(1), 1) ** 2
            state.ranks = arrays_of(arrays, index)["ranks"] * np.stack([scale, scale, np.ones_like(scale)])

    def moments(self) -> None:
        """Moments of the features that every patient has, principal axes, and moments of each fold on them."""
        for state in self.parts:
            choose_joint(state, everything=self.plan.on)
        used = [state for state in self.parts if state.joint]
        if not used:
            return
        given = [standard_arrays(state, reach_of(len(state.joint))) for state in used]
        answers = self._ask_moments("moments", used, given, [len(state.joint) for state in used], 1)
        for index, state in enumerate(used):
            state.moments = {site: parts[index][0] for site, parts in answers.items() if parts[index][0].n > 1}
            if len(state.moments) > 1:
                state.axes = principal_axes(merge_moments(list(state.moments.values())), self.config.dimensions)
        self._fold_moments([state for state in used if state.axes is not None and state.axes.weights.shape[1] > 1])

    def classify(self) -> None:
        """Discriminants from the other folds, judged at home; a site that is lost meanwhile is left out of the classes."""
        while True:
            used = [state for state in self.parts if len(state.folds) > 1]
            if not used:
                return
            asked = set(self.sites.names)
            given = [{**standard_arrays(state, 1.0), **model_arrays(state)} for state in used]
            like = messages.like([messages.classify_shapes(len(state.folds)) for state in used])
            answers = self.sites.ask(
                "report_classify",
                messages.CLASSIFY,
                {**self._about(used), "folds": self.n_folds, "seed": self.config.seed},
                messages.CLASSIFY_REPLY,
                partial(_arrays, like),
                arrays=messages.send(numbered(given)),
            )
            if set(answers) == asked or self.plan.on:
                break
            for state in self.parts:
                state.folds = {site: folds for site, folds in state.folds.items() if site in answers}
        for index, state in enumerate(used):
            rows = {site: arrays_of(arrays, index)["counts"] for site, arrays in answers.items() if site in state.folds}
            if len(rows) == len(state.folds):
                state.confusion = {site: np.maximum(rows[site], 0) for site in state.folds}

    def _count_noisy(self, bins: int) -> None:
        """One histogram on plain edges over what rises above the noise of the public grid."""
        features = [len(state.part.names) for state in self.parts]
        noise = self.plan.sigma("locate", sensitivity_of("locate", features))
        ranges = [
            sketch.located_range(sketch.above_noise(state.pooled(), noise * len(state.counts) ** 0.5))
            for state in self.parts
        ]
        self._count_on([sketch.equal_edges(low, high, bins) for low, high in ranges], 0)

    def _count_on(self, edges: list[Array], turn: int) -> None:
        for state, own in zip(self.parts, edges, strict=True):
            state.edges = own
        self._count("histograms", turn, [{"edges": own} for own in edges], edges[0].shape[1] + 2)

    def _count(self, step: str, turn: int, given: list[dict[str, Array]], cells: int) -> None:
        """Fill `counts` of every part; of all sites together under one name where sums are secure."""
        shapes = [messages.count_shapes(len(state.part.names), cells) for state in self.parts]
        answers = self._collect(step, turn, given, shapes, clip=_MOST_PATIENTS)
        for index, state in enumerate(self.parts):
            found = {site: arrays_of(arrays, index)["counts"].astype(np.float64) for site, arrays in answers.items()}
            if self.plan.sums:
                state.patients = {site: float(counts.sum(1).max()) for site, counts in found.items()}
            state.patients = {site: count for site, count in state.patients.items() if site in found}
            state.counts = {site: found[site] for site in state.patients}

    def _collect(
        self, step: str, turn: int, given: list[dict[str, Array]], shapes: list[messages.Shapes], *, clip: float
    ) -> dict[str, Weights]:
        """Site -> arrays; with secure sums ALL_SITES -> their sum."""
        like = messages.like(shapes)
        answers = self.sites.ask(
            "report_counts",
            messages.COUNTS,
            {**self._about(self.parts), "step": step, "turn": turn},
            messages.COUNTS_REPLY,
            partial(_arrays, {} if self.plan.sums else like),
            arrays=messages.send(numbered(given)),
        )
        if not self.plan.sums:
            return answers
        key = sum_key(self.sites.run_id, step, turn)
        return {ALL_SITES: self.sites.secure_sum(key, like, clip=clip, integer=step != "ranks", what=step)}

    def _fold_moments(self, used: list[PartState]) -> None:
        least = self.config.min_patients
        sizes = [moments.n for state in used for moments in state.moments.values() if moments.n >= 2 * least]
        self.n_folds = min([self.config.folds, *(size // least for size in sizes)]) if sizes else 0
        if self.n_folds < 2:
            return
        given = [axes_arrays(state) for state in used]
        dimensions = [arrays["axes"].shape[1] for arrays in given]
        answers = self._ask_moments("folds", used, given, dimensions, self.n_folds)
        for index, state in enumerate(used):
            state.folds = {
                site: parts[index] for site, parts in answers.items() if all(fold.n > 1 for fold in parts[index])
            }
            left = sorted(set(state.patients) - set(state.folds))
            if left:
                state.notes.append(
                    f"Not in the classifier, with too few patients for {self.n_folds} folds of {least}: {', '.join(left)}."
                )

    def _ask_moments(
        self, step: str, used: list[PartState], given: list[dict[str, Array]], dimensions: list[int], folds: int
    ) -> dict[str, list[list[Moments]]]:
        """Site -> part -> fold -> moments."""
        like = messages.like([messages.moment_shapes(size, folds) for size in dimensions])
        reach = [float(arrays["reach"][0]) if self.plan.on else 1.0 for arrays in given]

        def read(site: str, message: Unpacked) -> list[list[Moments]]:
            arrays = messages.receive(message.weights, like, source=site)
            return [folds_from(arrays_of(arrays, index), folds, own) for index, own in enumerate(reach)]

        return self.sites.ask(
            "report_moments",
            messages.MOMENTS,
            {**self._about(used), "step": step, "folds": folds, "seed": self.config.seed},
            messages.MOMENTS_REPLY,
            read,
            arrays=messages.send(numbered(given)),
        )

    def _about(self, used: list[PartState]) -> dict[str, Any]:
        whole = used is self.parts
        parts = [state.part if whole else state.joint_part for state in used]
        return {"run_id": self.sites.run_id, "parts": parts_to_dict(parts), "protection": self.plan.to_dict()}


def _arrays(like: Weights, site: str, message: Unpacked) -> Weights:
    return messages.receive(message.weights, like, source=site)
