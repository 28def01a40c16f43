"""Styles of several sites in one place under differential privacy: what they cost, and that they are drawn once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning import private_bank as module
from nnunet_fedharm.planning import style as measuring
from nnunet_fedharm.planning.private_bank import most_sites_of_a_patient, private_bank
from nnunet_fedharm.privacy.accounting import epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile

SITES = ("A", "B", "C", "D")
PLANS = {"configurations": {"2d": {"data_identifier": "x_2d", "normalization_schemes": ["ZScoreNormalization"]}}}
DELTA = 1e-3


def registry(patients: Mapping[str, str] | None = None) -> SitesFile:
    cases = {f"{site}_{number}": site for site in SITES for number in range(3)}
    return SitesFile({site: SiteInfo() for site in SITES}, cases, dict(patients or {}))


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The bank of twelve cases whose style is measured on pure numbers."""
    root = NnunetRoot(tmp_path)
    root.create()
    (root.preprocessed / "Dataset001_X").mkdir()
    folders = dict.fromkeys(registry().cases, tmp_path)
    for name in (module, measuring):
        monkeypatch.setattr(name, "preprocessed_cases", lambda *_: folders)
    rising = np.linspace(-2, 2, len(QUANTILE_LEVELS))[None]
    monkeypatch.setattr(measuring, "_measure", lambda case, folder: (rising, np.ones(1)))

    def make(epsilon: float = 1.0, *, sites: SitesFile | None = None, styled: bool = True, noise: float = 5.0) -> Any:
        privacy = PrivacyOptions(epsilon=epsilon, delta=DELTA, style_noise=noise, fingerprint_noise=0.0)
        return private_bank(
            root, "Dataset001_X", PLANS, "2d", sites=sites or registry(), privacy=privacy, styled=styled
        )

    make.ledger = Ledger(tmp_path / "fedharm")  # type: ignore[attr-defined]
    return make


def test_styles_of_four_sites_cost_what_one_does_and_are_drawn_once(bank: Any) -> None:
    first = bank()
    assert list(first) == list(SITES)
    (entry,) = bank.ledger.releases()
    assert (entry.what, entry.noise_multiplier) == ("style of all sites", 5.0)
    options = PrivacyOptions(epsilon=1.0, delta=DELTA, fingerprint_noise=0.0)
    settled = epsilon_of(list(options.statistics_part(styled=True)), DELTA)
    assert epsilon_of([entry.noise], DELTA) == settled, "what the training's noise leaves room for"
    again = bank()
    assert len(bank.ledger.releases()) == 1
    for site in SITES:
        np.testing.assert_array_equal(first[site].quantiles, again[site].quantiles)
    assert not np.array_equal(first["A"].quantiles, first["B"].quantiles), "each site's noise is its own"


def test_other_cases_are_another_draw_and_held_against_the_budget(bank: Any) -> None:
    bank()
    moved = registry()
    moved.cases["A_0"] = "B"
    bank(sites=moved)
    assert len(bank.ledger.releases()) == 2
    moved.cases["A_1"] = "B"
    with pytest.raises(PrivacyError, match=r"The budget is epsilon 0\.6 "):
        bank(0.6, sites=moved)
    assert len(bank.ledger.releases()) == 2


def test_who_was_scanned_at_two_sites_has_more_noise_at_the_same_cost(
    bank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    measure = module.style_by_site
    monkeypatch.setattr(
        module,
        "style_by_site",
        lambda *words, **named: asked.append(named["noise_multiplier"]) or measure(*words, **named),
    )
    travelled = registry({"A_0": "P", "B_0": "P"})
    assert most_sites_of_a_patient(travelled.cases, registry()) == 1
    assert most_sites_of_a_patient(travelled.cases, travelled) == 2
    bank(sites=travelled)
    assert asked == [pytest.approx(5.0 * 2**0.5)]
    assert bank.ledger.releases()[0].noise_multiplier == 5.0


def test_a_harmonizer_without_styles_costs_nothing_and_tells_nothing(bank: Any) -> None:
    styles = bank(styled=False)
    assert bank.ledger.releases() == []
    assert {style.n_cases for style in styles.values()} == {3}
    for style in styles.values():
        np.testing.assert_array_equal(style.quantiles, styles["A"].quantiles)
    options = PrivacyOptions(epsilon=1.0, delta=DELTA, fingerprint_noise=0.0)
    assert options.statistics_part(styled=False) == ()


def test_styles_as_they_are_have_entries_without_an_epsilon(bank: Any) -> None:
    bank(noise=0.0)
    assert [(entry.what, entry.bounded) for entry in bank.ledger.releases()] == [
        (f"style of {site}", False) for site in SITES
    ]
