"""The way out of a site: noise, the ledger, and the same answer to the same question."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import load, save

from nnunet_fedharm.errors import DataError, FederationError
from nnunet_fedharm.federation.durable import read_json, write_bytes, write_json
from nnunet_fedharm.federation.entries import digest_of
from nnunet_fedharm.federation.messages import Schema, Unpacked, json_hash, reply
from nnunet_fedharm.federation.report.home import report_folder
from nnunet_fedharm.federation.report.messages import send
from nnunet_fedharm.federation.report.noise import SHARES, Noiser, Protection, sensitivity_of
from nnunet_fedharm.federation.secure.home import ONE, Offer, offer
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_budget import ledger_within
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import GAUSSIAN, NONE, Release

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Outgoing:
    """What one answer of a site passes through before it leaves.

    Attributes:
        plan: noise of the run, as the server asked and the site accepted.
        noiser: adds it.
        question: SHA-256 of the request.
    """

    site: Site
    run_id: str
    question: str
    plan: Protection
    noiser: Noiser

    @classmethod
    def of(cls, site: Site, request: Unpacked) -> Outgoing:
        """For a request.

        Raises:
            DataError: the site sends nothing without noise, and the run has none.
        """
        plan = Protection.from_dict(request.values["protection"])
        if site.max_epsilon and not plan.on:
            raise DataError(
                f"Site {site.name} sends its report with noise only, epsilon at most {site.max_epsilon:g}; this run has none."
            )
        return cls(site, request.values["run_id"], _question(request), plan, Noiser(plan))

    def refuse_beyond_budget(self) -> None:
        """Refuse a run that would cost the site's patients more than `max_epsilon`, with all that was released before.

        Raises:
            PrivacyError: it would, or the ledger is damaged.
        """
        left = [step for step in SHARES if not self._answer_file(step).is_file()]
        ledger_within(self.site, [self._entry(step) for step in left])

    def noised(self, step: str, features: Sequence[int], arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The arrays of one message with the noise of its step.

        Args:
            step: key of `measure_noise.SHARES`.
            features: number of features of each part.
            arrays: sums over patients.
        """
        sensitivity = sensitivity_of(step, list(features))
        return {name: self.noiser.add(step, sensitivity, value) for name, value in arrays.items()}

    def release(
        self, step: str, schema: Schema, values: Mapping[str, Any], arrays: Arrays | None = None, *, turn: int = 0
    ) -> RecordDict:
        """The reply, entered in the site's ledger; with secure sums the arrays are offered to the sum instead.

        With noise a question is answered once: the same one again gets the same bytes, because the mean of many noised
        answers would lose its noise. Another question of the same kind in the same run is refused.

        Args:
            step: key of `measure_noise.SHARES`, or "ranks".
            schema: of the reply.
            values: of the reply.
            arrays: sums over patients; None where the reply has none.
            turn: which of several exchanges of this step it is.

        Raises:
            FederationError: it was asked something else before.
            PrivacyError: the site's budget does not hold it, or the ledger cannot be written.
        """
        entry = self._entry(step)
        if self.plan.on:
            if not self._answer_file(step).is_file():
                # Each message brings its own epsilon: what was asked for at first may be another.
                ledger_within(self.site, [entry])
            values, arrays = self._first_answer(step, values, arrays)
        if self.plan.sums and arrays is not None:
            whole = {name: np.asarray(value, dtype=np.float64) for name, value in arrays.items()}
            digest = hashlib.sha256(b"".join(value.tobytes() for value in whole.values())).hexdigest()
            key = sum_key(self.run_id, step, turn)
            offer(self.site.folder, Offer(key, whole, {ONE: 1}, replace(entry, digest=digest), self.question))
            return reply(schema, values, send({}))
        content = reply(schema, values, None if arrays is None else send(arrays))
        Ledger(self.site.folder).record(replace(entry, digest=digest_of(content)))
        return content

    def _entry(self, step: str) -> Release:
        return Release(
            what=f"site report, {step}",
            mechanism=GAUSSIAN if self.plan.on else NONE,
            noise_multiplier=self.plan.multiplier(step) if self.plan.on else 0.0,
            run_id=self.run_id,
        )

    def _answer_file(self, step: str) -> Path:
        return report_folder(self.site, self.run_id) / "answers" / f"{step}.json"

    def _first_answer(
        self, step: str, values: Mapping[str, Any], arrays: Arrays | None
    ) -> tuple[dict[str, Any], Arrays | None]:
        head = self._answer_file(step)
        body = head.with_suffix(".safetensors")
        if not head.is_file():
            if arrays is not None:
                write_bytes(body, save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
            write_json(head, {"values": dict(values), "question": self.question})
            return dict(values), arrays
        kept = read_json(head)
        if kept["question"] != self.question:
            raise FederationError(
                f"Site {self.site.name} has answered {step} in this run with noise and answers nothing else. Start a new run."
            )
        return kept["values"], None if arrays is None else load(body.read_bytes())


def sum_key(run_id: str, step: str, turn: int) -> str:
    """Name of a secure sum."""
    return f"{run_id}/report/{step}/{turn}"


def _question(request: Unpacked) -> str:
    return digest_of(
        RecordDict({"config": ConfigRecord({"values": json_hash(request.values)}), "arrays": request.weights})
    )
