"""Integers in a ring instead of real numbers: exact sums, a stated error, no overflow."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.fixed_point import Field, Layout
from nnunet_fedharm.privacy.primitives import narrow, widen


def layout(width: int = 5, sites: int = 4, max_weight: int = 100) -> Layout:
    fields = (
        Field("x", (3, 2), 2.0),
        Field("metric", (), 50.0),
        Field("count", (4,), 1000, weighted=False, integer=True),
    )
    return Layout(fields, sites, max_weight, width)


def random_values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.uniform(-2, 2, (3, 2)), "metric": rng.uniform(0, 50), "count": rng.integers(-1000, 1001, 4)}


@given(st.integers(0, 10**6), st.integers(4, 8), st.lists(st.integers(0, 100), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_the_sum_of_encoded_vectors_is_the_sum_within_the_bound(seed: int, width: int, weights: list[int]) -> None:
    space = layout(width)
    parts = [random_values(seed + number) for number in range(len(weights))]
    total = sum(space.encode(part, weight) for part, weight in zip(parts, weights, strict=True))
    total = widen(narrow(total, width), width)
    result = space.decode(total)
    assert result.weight == sum(weights)
    assert result.clipped == 0
    np.testing.assert_array_equal(result.values["count"], sum(part["count"] for part in parts))
    for field in space.fields[:2]:
        exact = sum(weight * np.asarray(part[field.name]) for part, weight in zip(parts, weights, strict=True))
        rounding = 1e-14 * max(sum(weights), 1) * field.clip  # of float64 itself, which the widest ring comes near to
        assert np.abs(result.values[field.name] - exact).max() <= sum(weights) * space.mean_error(field) + rounding
        if result.weight:
            error = np.abs(result.mean(field.name) - exact / result.weight).max()
            assert error <= space.mean_error(field) + rounding


@pytest.mark.parametrize("width", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_values_of_the_largest_weights_do_not_overflow(width: int, sign: int) -> None:
    space = Layout((Field("x", (2,), 3.0),), sites=20, max_weight=10, width=width)
    part = space.encode({"x": [3.0 * sign, 0.0]}, 10)
    total = widen(narrow(part * np.uint64(20), width), width)
    assert space.decode(total).mean("x") == pytest.approx([3.0 * sign, 0.0])


def test_what_is_beyond_the_clip_range_is_cut_and_counted_over_all_sites() -> None:
    space = layout()
    part = random_values(0) | {"x": np.full((3, 2), 5.0), "metric": 51.0}
    result = space.decode(space.encode(part, 1) + space.encode(random_values(1), 1))
    assert result.clipped == 7
    exact = 2.0 + random_values(1)["x"]
    np.testing.assert_allclose(result.values["x"], exact, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "weight", "words"),
    [
        ({"x": np.full((3, 2), np.nan)}, 1, "x of this site holds NaN"),
        ({"metric": np.inf}, 1, "metric of this site holds NaN or infinity"),
        ({"x": np.zeros(6)}, 1, "x of this site has the shape"),
        ({"count": [0.5, 0, 0, 0]}, 1, "count of this site is no whole number"),
        ({"count": [1001, 0, 0, 0]}, 1, "count of this site is no whole number up to 1000"),
        ({"extra": 1.0}, 1, "differ in 'extra'"),
        ({}, 101, "weight of this site is 101"),
        ({}, -1, "weight of this site is -1"),
    ],
)
def test_a_site_refuses_to_send_what_does_not_fit(change: dict[str, object], weight: int, words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        layout().encode(random_values(0) | change, weight)  # type: ignore[arg-type]


def test_a_ring_that_cannot_hold_the_sum_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(PrivacyError, match="2 bytes are too few for x"):
        layout(width=2)
    with pytest.raises(PrivacyError, match="too few for count"):
        Layout((Field("count", (), 10**9, weighted=False, integer=True),), sites=4, width=4)
    with pytest.raises(PrivacyError, match="one name"):
        Layout((Field("x", (), 1.0), Field("x", (), 1.0)), sites=3)


def test_finer_rings_have_smaller_errors_and_the_description_survives_json() -> None:
    errors = [layout(width).mean_error(layout(width).fields[0]) for width in (4, 5, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[1] == pytest.approx(256, rel=1e-3)
    assert Layout.from_dict(json.loads(json.dumps(layout().to_dict()))) == layout()
    with pytest.raises(PrivacyError, match="cannot be read"):
        Layout.from_dict({"fields": [["x"]], "sites": 3, "max_weight": 1, "width": 5})


def test_a_sum_with_masks_left_in_it_is_refused() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**40, layout().size, dtype=np.uint64)
    with pytest.raises(PrivacyError, match="makes no sense"):
        layout().decode(noise)
