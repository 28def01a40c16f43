"""The operators of a simulated scanner: signal equations, tissue maps, truncation, noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.datasets.simulate_config import SiteEffects
from nnunet_fedharm.datasets.simulate_render import draw_effects, render, signal_unit
from nnunet_fedharm.datasets.simulate_signal import (
    BRAINWEB,
    PulseSequence,
    label_maps,
    mixture_maps,
    render_sequence,
    tissue_signal,
)
from nnunet_fedharm.datasets.site_effects import truncate_k_space
from nnunet_fedharm.errors import DataError

SPACING = (1.0, 1.0, 1.0)
T2W = PulseSequence(kind="spin_echo", tr_ms=4000, te_ms=90)


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """Three tissues in air, with texture: intensities as in a T1w image, and their labels."""
    generator = np.random.default_rng(0)
    label = np.zeros((24, 24, 24), np.uint8)
    for value, low in ((1, 4), (2, 9), (3, 14)):
        label[4:20, 4:20, low : low + 5] = value
    mean = np.asarray([0.0, 200.0, 550.0, 900.0])[label]
    return np.where(label > 0, mean + generator.normal(0, 15, label.shape), 0.0), label


def test_signal_equations_have_their_textbook_limits() -> None:
    white = BRAINWEB["white"]
    proton_density = PulseSequence(kind="spin_echo", tr_ms=1e6, te_ms=0)
    assert tissue_signal(white, proton_density) == pytest.approx(white.density)
    ernst = float(np.degrees(np.arccos(np.exp(-20 / white.t1))))
    signals = [
        tissue_signal(white, PulseSequence(kind="gradient_echo", tr_ms=20, te_ms=0, flip_degrees=angle))
        for angle in (ernst - 3, ernst, ernst + 3)
    ]
    assert max(signals) == signals[1]
    null = float(-BRAINWEB["csf"].t1 * np.log((1 + np.exp(-9000 / BRAINWEB["csf"].t1)) / 2))
    assert tissue_signal(BRAINWEB["csf"], PulseSequence(kind="flair", tr_ms=9000, te_ms=100, ti_ms=null)) < 1e-9


def test_weightings_order_the_tissues_as_radiology_does() -> None:
    def order(sequence: PulseSequence) -> list[str]:
        return sorted(BRAINWEB, key=lambda name: tissue_signal(BRAINWEB[name], sequence))

    assert order(PulseSequence(kind="spin_echo", tr_ms=500, te_ms=12)) == ["csf", "grey", "white"]
    assert order(T2W) == ["white", "grey", "csf"]
    assert order(PulseSequence(kind="flair", tr_ms=9000, te_ms=100, ti_ms=1700)) == ["csf", "white", "grey"]


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "epi", "tr_ms": 1, "te_ms": 1},
        {"kind": "spin_echo", "tr_ms": 0, "te_ms": 1},
        {"kind": "flair", "tr_ms": 9000, "te_ms": 100},
        {"kind": "spin_echo", "tr_ms": 500, "te_ms": 10, "flip_degrees": 20},
    ],
)
def test_impossible_sequences_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(DataError):
        PulseSequence(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("from_labels", [True, False])
def test_a_t2_weighted_site_inverts_the_tissues_and_keeps_their_texture(from_labels: bool) -> None:
    raw, label = phantom()
    offset, unit = signal_unit(raw)
    signal = (raw - offset) / unit
    tissues = {"csf": (1,), "grey": (2,), "white": (3,)}
    maps = label_maps(label, tissues) if from_labels else mixture_maps(signal, np.random.default_rng(0), contrast="T1w")
    seen = render_sequence(signal, maps, T2W)
    inner = [np.s_[8:16, 8:16, low + 1 : low + 4] for low in (4, 9, 14)]
    csf, grey, white = (seen[part].mean() for part in inner)
    assert csf > grey > white > 0
    expected = tissue_signal(BRAINWEB["white"], T2W) / tissue_signal(BRAINWEB["csf"], T2W)
    assert white / csf == pytest.approx(expected, rel=0.1)
    assert np.corrcoef(seen[inner[1]].ravel(), signal[inner[1]].ravel())[0, 1] > 0.9
    assert (seen[:2] == 0).all()


def test_tissue_maps_that_cannot_be_used_are_refused() -> None:
    signal = np.ones((4, 4, 4))
    with pytest.raises(DataError, match="Unknown tissue 'bone'"):
        render_sequence(signal, {"bone": signal}, T2W)
    with pytest.raises(DataError, match="are empty"):
        render_sequence(signal, {"grey": 0 * signal}, T2W)
    with pytest.raises(DataError, match="30 different intensities"):
        mixture_maps(signal, np.random.default_rng(0), contrast="T1w")


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(1, 4)] * 3), st.integers(0, 100))
def test_truncation_keeps_the_mean_and_removes_high_frequencies(loss: tuple[float, ...], seed: int) -> None:
    signal = np.random.default_rng(seed).uniform(0, 1, (8, 9, 10))
    seen = truncate_k_space(signal, loss)
    assert seen.mean() == pytest.approx(signal.mean())
    np.testing.assert_allclose(truncate_k_space(seen, loss), seen, atol=1e-12)
    for axis, factor in enumerate(loss):
        cut = np.abs(np.fft.fftfreq(signal.shape[axis])) > 0.5 / factor
        spectrum = np.moveaxis(np.fft.fftn(seen), axis, 0)
        assert np.abs(spectrum[cut]).max(initial=0) < 1e-9


def test_no_loss_changes_nothing_and_thick_slices_ring_along_their_axis_only() -> None:
    step = np.zeros((8, 8, 32))
    step[..., 8:24] = 1.0
    np.testing.assert_allclose(truncate_k_space(step, (1, 1, 1)), step, atol=1e-12)
    seen = truncate_k_space(step, (1, 1, 3))
    assert seen.max() > 1.05
    np.testing.assert_allclose(seen, np.broadcast_to(seen[:1, :1], seen.shape), atol=1e-12)


def test_noise_in_air_has_the_mean_and_spread_of_a_rayleigh_distribution() -> None:
    raw = np.full((40, 40, 40), 1e-6)
    raw[10:30, 10:30, 10:30] = 500.0 + np.arange(20)
    effects = SiteEffects(noise=(0.05, 0.05), scale=(1000.0, 1000.0))
    seen = render(raw, SPACING, effects, seed=0, site="B", case="x", channel=0)
    air, sigma = seen[raw < 1], 0.05 * 1000
    assert air.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.02)
    assert air.std() == pytest.approx(sigma * np.sqrt(2 - np.pi / 2), rel=0.02)
    bright = raw > 1
    clean = render(raw, SPACING, SiteEffects(scale=(1000.0, 1000.0)), seed=0, site="B", case="x", channel=0)
    assert (seen - clean)[bright].std() == pytest.approx(sigma, rel=0.05)


def test_masked_images_keep_their_zeros_and_others_get_noise_everywhere() -> None:
    raw, _ = phantom()
    effects = SiteEffects(noise=(0.05, 0.05), bias=(0.2, 0.2), resolution_loss=(1, 1, 2))
    seen = render(raw, SPACING, effects, seed=0, site="B", case="x", channel=0)
    assert ((seen == 0) == (raw == 0)).all()
    assert (render(raw + 1, SPACING, effects, seed=0, site="B", case="x", channel=0) > 0).all()


def test_a_site_without_effects_returns_the_voxels() -> None:
    raw, _ = phantom()
    assert (render(raw, SPACING, SiteEffects(), seed=0, site="A", case="x", channel=0) == raw.astype(np.float32)).all()
    assert SiteEffects().is_control
    assert not SiteEffects(noise=(0.0, 0.1)).is_control


def test_draws_depend_on_seed_site_case_and_channel_and_on_nothing_else() -> None:
    effects = SiteEffects(tone=(1, 2), bias=(0.1, 0.3), noise=(0.1, 0.2))
    first = draw_effects(effects, seed=0, site="B", case="x", channel=0)
    assert draw_effects(effects, seed=0, site="B", case="x", channel=0) == first
    without_noise = draw_effects(SiteEffects(tone=(1, 2), bias=(0.1, 0.3)), seed=0, site="B", case="x", channel=0)
    assert (without_noise["tone"], without_noise["bias"]) == (first["tone"], first["bias"])
    others = [
        draw_effects(effects, seed=seed, site=site, case=case, channel=channel)["tone"]
        for seed, site, case, channel in ((1, "B", "x", 0), (0, "C", "x", 0), (0, "B", "y", 0), (0, "B", "x", 1))
    ]
    assert len({first["tone"], *others}) == 5


def test_unusable_voxels_and_effects_are_refused() -> None:
    effects = SiteEffects(noise=(0.1, 0.1))
    for raw in (np.ones((4, 4, 4)), np.full((4, 4, 4), np.nan)):
        with pytest.raises(DataError, match="NaN or infinity, or is constant"):
            render(raw, SPACING, effects, seed=0, site="B", case="x", channel=0)
    with pytest.raises(DataError, match="noise has the range"):
        SiteEffects(noise=(0.2, 0.1))
    with pytest.raises(DataError, match="resolution_loss"):
        SiteEffects(resolution_loss=(0.5, 1, 1))
    labels = SiteEffects(pulse_sequence=T2W)
    with pytest.raises(DataError, match="has no label"):
        render(phantom()[0], SPACING, labels, seed=0, site="B", case="x", channel=0, tissues={"grey": (1,)})
