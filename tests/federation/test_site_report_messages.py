"""Schemas, sizes and configuration of the site report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.differences.sketch import LOCATE_CELLS
from nnunet_fedharm.errors import FederationError, ShapeError, SiteMismatchError
from nnunet_fedharm.federation.codec import payload_bytes
from nnunet_fedharm.federation.messages import pack, reply, unpack
from nnunet_fedharm.federation.report import messages
from nnunet_fedharm.federation.report.config import SiteReportConfig, task_of, training_keys
from nnunet_fedharm.federation.report.exchange import disagreement
from nnunet_fedharm.federation.report.messages import MOST_FEATURES, MOST_PARTS, Part
from nnunet_fedharm.federation.report.noise import Protection

RUN = "0123456789ab-cdef01"
PARTS = [Part("MR", "foreground", scale, ("a", "b", "c")) for scale in ("z-score", "raw")]
HEADER = 128  # numpy's, for each array


def size(shapes: list[messages.Shapes]) -> int:
    arrays = messages.like(shapes)
    return payload_bytes(messages.send(arrays)) - HEADER * len(arrays)


def test_messages_are_as_large_as_the_documentation_says() -> None:
    features, bins, folds, axes, sites = 107, 64, 5, 20, 4
    assert size([messages.count_shapes(features, LOCATE_CELLS + 1)]) == 1928 * features
    assert size([messages.count_shapes(features, bins + 3)]) == 4 * features * (bins + 3)
    assert size([messages.moment_shapes(features, 1)]) == 8 * (1 + features + features * (features + 1) // 2)
    assert size([messages.moment_shapes(axes, folds)]) == 8 * folds * (1 + axes + axes * (axes + 1) // 2)
    assert size([messages.classify_shapes(sites)]) == 8 * sites
    assert size([messages.rank_shapes(features)]) == 24 * features


def test_the_largest_report_is_bounded() -> None:
    most = [messages.moment_shapes(MOST_FEATURES, 1)] * MOST_PARTS
    assert size(most) < 20 * 2**20
    assert size([messages.count_shapes(MOST_FEATURES, LOCATE_CELLS + 1)] * MOST_PARTS) < 32 * 2**20


def test_parts_come_back_as_they_were_sent_and_too_many_are_refused() -> None:
    assert messages.parts_from_dict(messages.parts_to_dict(PARTS), source="A") == PARTS
    many = [Part("MR", f"label {index}", "raw", ("a",)) for index in range(MOST_PARTS + 1)]
    with pytest.raises(FederationError, match="A speaks of 65 parts"):
        messages.parts_from_dict(messages.parts_to_dict(many), source="A")
    wide = [Part("MR", "foreground", "raw", tuple(str(index) for index in range(MOST_FEATURES + 1)))]
    with pytest.raises(FederationError, match="at most 64 parts and 256 features"):
        messages.parts_from_dict(messages.parts_to_dict(wide), source="A")
    with pytest.raises(FederationError, match="lists a part twice"):
        messages.parts_from_dict(messages.parts_to_dict([PARTS[0], PARTS[0]]), source="A")
    with pytest.raises(FederationError, match="damaged"):
        messages.parts_from_dict({"parts": [{"channel": "MR"}]}, source="A")


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"00.counts": np.zeros((3, 68), np.float32)}, ShapeError),
        ({"00.counts": np.zeros((3, 67), np.float64)}, ShapeError),
        ({"00.counts": np.zeros((3, 67), np.float32), "00.cases": np.zeros(3, np.float32)}, ShapeError),
        ({"00.counts": np.full((3, 67), np.nan, np.float32)}, FederationError),
    ],
)
def test_arrays_that_were_not_asked_for_are_refused(arrays: dict[str, Any], error: type[Exception]) -> None:
    expected = messages.like([messages.count_shapes(3, 67)])
    with pytest.raises(error):
        messages.receive(messages.send(arrays), expected, source="B")


def test_a_request_follows_its_schema() -> None:
    values: dict[str, Any] = {
        "run_id": RUN,
        "step": "histograms",
        "turn": 1,
        "parts": messages.parts_to_dict(PARTS),
        "protection": Protection(epsilon=1.0).to_dict(),
    }
    content = pack(messages.COUNTS, values, messages.send({"00.edges": np.zeros((3, 5))}))
    assert unpack(messages.COUNTS, content, source="the server").values == values
    with pytest.raises(FederationError, match=r"step of the report counts request .* not allowed there"):
        pack(messages.COUNTS, {**values, "step": "cases"}, messages.send({}))
    with pytest.raises(FederationError, match="characters; at most"):
        reply(messages.HELLO_REPLY, {"site": "A", "description": {"x": "y" * 70_000}})


def test_protection_round_trips_and_nonsense_is_refused() -> None:
    for one in (Protection(), Protection(epsilon=2.0, delta=1e-6), Protection(sums=True)):
        assert Protection.from_dict(one.to_dict()) == one
    for data in ({"epsilon": -1.0, "delta": 1e-5}, {"epsilon": 1.0}, {"sums": False}, {"epsilon": 1.0, "delta": 2.0}):
        with pytest.raises(FederationError):
            Protection.from_dict(data)


def test_a_site_that_differs_is_named_with_both_values() -> None:
    with pytest.raises(SiteMismatchError, match="Site C disagrees on versions: it has numpy = '1', the others '2'"):
        disagreement({"A": {"numpy": "2"}, "B": {"numpy": "2"}, "C": {"numpy": "1"}}, "versions")
    disagreement({"A": {"x": [1]}, "B": {"x": [1]}}, "anything")


def test_training_and_report_share_one_run_config() -> None:
    config = SiteReportConfig(root="/x", dataset="910", epsilon=2.0, sites="A,B", deadline_s=5.0)
    values = {**config.to_run_config(), "harmonizer": "curve"}
    assert task_of(values) == "site-report"
    assert SiteReportConfig.from_run_config(values) == config
    assert SiteReportConfig.from_run_config({**values, "report-epsilon": 2}).epsilon == 2.0
    assert not [key for key in training_keys(values) if key.startswith("report-") or key == "task"]
    with pytest.raises(FederationError, match="Unknown run config key 'report-epsilo'"):
        SiteReportConfig.from_run_config({"report-epsilo": 1.0})
    with pytest.raises(FederationError, match="task is 'dance'"):
        task_of({"task": "dance"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_patients": 1}, r"min-patients must lie in \[2"),
        ({"bins": 1000}, "bins must lie in"),
        ({"dimensions": 21}, "dimensions must lie in"),
        ({"bootstrap": 5}, "bootstrap must be 0 or at least 20"),
        ({"scales": "cooked"}, "scales names 'cooked'"),
        ({"scales": ""}, "scales is empty"),
        ({"sites": "A"}, "needs at least 2 sites"),
        ({"sites": "A,A"}, "named twice"),
        ({"sites": "A,../B"}, "not usable"),
        ({"epsilon": -1.0}, "epsilon must lie in"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(FederationError, match=words):
        SiteReportConfig(**values)
