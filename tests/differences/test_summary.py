"""Plain sentences: what the tests carry is said, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnunet_fedharm.differences.findings import (
    ClassifierFinding,
    Estimate,
    FeatureFinding,
    Findings,
    PairFinding,
    PartFinding,
    SiteCard,
    VariantFinding,
)
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.scanners import differing_properties, only_one_with, weighting
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.differences.summary import describe, main_part, summarize
from tests.differences.tables import feature_table

CARDS = [
    SiteCard("A", "Siemens", 3.0, "T1w MPRAGE", 60, 60, 60),
    SiteCard("B", "Philips", 3.0, "T1w TFE", 40, 40, 40),
    SiteCard("C", "GE", 1.5, "T1w SPGR", 40, 40, 40),
    SiteCard("D", "Siemens", 1.5, "T2w TSE", 40, 40, 40),
]
DISTANCES = {"AB": 0.3, "AC": 0.4, "BC": 0.3, "AD": 1.8, "BD": 2.0, "CD": 1.7}


def classifier(accuracy: float, p: float | None, method: str = "random forest on features") -> ClassifierFinding:
    return ClassifierFinding(
        method, Estimate(accuracy, accuracy - 0.1, accuracy + 0.1), 0.25, 0.25, 0.3, p, 99, {}, 180
    )


def part(
    distances: dict[str, float] = DISTANCES,
    *,
    p: float | None = 0.001,
    q: float = 0.001,
    shape: float = 0.0,
    width: float = 0.2,
    sizes: dict[str, int] | None = None,
    classifiers: tuple[ClassifierFinding, ...] = (classifier(0.93, 0.01),),
) -> PartFinding:
    sites = sorted(set("".join(distances)))
    pairs = [
        PairFinding(names[0], names[1], Estimate(0.5), Estimate(w, w - width, w + width), 0.1, p)
        for names, w in distances.items()
    ]
    effects = {
        "intensity": Estimate(0.2, 0.1, 0.3),
        "texture": Estimate(0.5, 0.4, 0.6),
        "shape": Estimate(0.9, 0.8, 1.0),
    }
    features = [FeatureFinding("glcm_a", "texture", q, q, Estimate(0.5), {}, 180)]
    shares = {"intensity": float(q < 0.05), "texture": float(q < 0.05), "shape": shape}
    return PartFinding(
        "MR", "foreground", "z-score", sizes or dict.fromkeys(sites, 40), effects, shares, features, pairs,
        list(classifiers), None, [], None, [],
    )  # fmt: skip


def text(found: PartFinding, cards: list[SiteCard] = CARDS) -> str:
    return " ".join(summarize([found], cards))


def test_the_site_that_stands_apart_is_named_with_what_only_its_scanner_has() -> None:
    assert summarize([part()], CARDS) == [
        "D differs from all other sites more than these differ among each other even after z-score: half of the features "
        "differ by 1.7 to 2.0 standard deviations or more.",
        "D is the only site with T2-weighted images (T2w TSE), which may explain it.",
        "They differ mostly in texture: 100% of the texture features and 100% of the intensity features differ significantly.",
        "A classifier recognises the site of 93% of the volumes by their features (guessing: 25%).",
        "Shape, which scanners hardly change, shows no significant difference.",
    ]


def test_a_site_stands_apart_only_if_the_intervals_say_so() -> None:
    assert text(part(width=0.8)).startswith(
        "B and D differ most even after z-score: half of the features differ by 2.0"
    )
    assert "D is the only site with T2-weighted images (T2w TSE), which may explain it." in text(part(width=0.8))
    others = [*CARDS[:3], replace(CARDS[3], sequence="T1w TFE")]
    assert "Their scanners differ in field strength (3 T, 1.5 T) and vendor (Philips, Siemens)." in text(
        part(width=0.8), others
    )
    two = text(part({"AB": 1.0}))
    assert two.startswith("A and B differ even after z-score")
    assert "vendor (Siemens, Philips) and sequence (T1w MPRAGE, T1w TFE)" in two


def test_pairs_that_no_test_carries_are_only_called_furthest_apart() -> None:
    untested = text(part(p=None, width=0.8))
    assert untested.startswith("The sites differ even after z-score; B and D are furthest apart")
    assert "furthest apart" in text(part(p=0.04, width=0.8))
    no_interval = part(p=None)
    no_interval = replace(no_interval, pairs=[replace(pair, wasserstein=Estimate(1.0)) for pair in no_interval.pairs])
    assert "furthest apart" in text(no_interval)


def test_nothing_is_claimed_where_nothing_is_significant() -> None:
    nothing = text(part(p=0.5, q=0.4, classifiers=(classifier(0.3, 0.4),)))
    assert nothing == (
        "No difference between the sites was found: no feature passes the false discovery level of 5% and no classifier "
        "recognises the site better than chance. With 40 patients at the smallest site, a small one can go unnoticed."
    )
    assert "No difference" in text(part(p=0.02, q=0.4, classifiers=(classifier(0.3, 0.04), classifier(0.3, 0.9))))
    assert "No difference" in text(part(p=0.5, q=0.04, classifiers=(classifier(0.3, 0.04),)))
    assert "No difference" not in text(part(p=0.5, q=0.04, classifiers=(classifier(0.6, 0.01),)))
    weak = text(part(classifiers=(classifier(0.3, 0.4),)))
    assert "A classifier does not recognise the site better than chance." in weak


def test_small_sites_are_named_and_take_part_in_no_claim() -> None:
    sizes = {"A": 40, "B": 40, "C": 40, "D": 3}
    found = text(part(sizes=sizes))
    assert "D: fewer than 5 patients, too few to be judged." in found
    assert "D differs" not in found
    assert text(part(sizes=dict.fromkeys("ABCD", 4))).startswith(
        "The sites are too small to be compared: A 4, B 4, C 4 and D 4"
    )
    volumes_of_few = [replace(card, n_patients=2) for card in CARDS]
    assert "too small" in text(part(), volumes_of_few)
    assert text(part(sizes={"A": 9})).startswith("Only one site (A)")
    assert summarize([], CARDS) == ["Nothing was measured."]


def test_shape_and_unknown_scanners_are_admitted() -> None:
    assert "Shape, which scanners hardly change, differs too (30% of its features)" in text(part(shape=0.3))
    unknown = [replace(card, vendor=None, field=None, sequence=None) for card in CARDS]
    assert "sites.json says nothing about scanners." in text(part(), unknown)
    alike = [replace(card, sequence="T1w TFE", vendor="GE", field=3.0) for card in CARDS]
    assert "no property of a scanner that only D has" in text(part(), alike)
    assert "sites.json names no difference between their scanners." in text(part(width=0.8), alike)
    assert "sites.json says nothing about scanners." in text(part(width=0.8), unknown)


def test_scanner_properties() -> None:
    assert [weighting(text) for text in ("T1w MPRAGE", "ax T2 FLAIR", "ep2d", None, "t2*w", "PDw TSE", "3D DCE T1")] == [
        "T1", "FLAIR", None, None, "T2*", "PD", "DCE",
    ]  # fmt: skip
    assert only_one_with("D", CARDS) == "T2-weighted images (T2w TSE)"
    assert only_one_with("A", CARDS) is None
    assert only_one_with("D", [*CARDS, replace(CARDS[0], site="E", sequence=None)]) is None
    ge = [replace(card, vendor="GE" if card.site == "B" else "siemens ", sequence=None, field=3.0) for card in CARDS]
    assert only_one_with("B", ge) == "a GE scanner"
    assert (
        only_one_with("B", [replace(c, field=1.5 if c.site == "B" else 3.0, sequence=None) for c in CARDS])
        == "a field of 1.5 T"
    )
    assert differing_properties("A", "Z", CARDS) == []
    assert differing_properties("A", "D", [CARDS[0], replace(CARDS[3], sequence=None)]) == [
        "field strength (3 T, 1.5 T)"
    ]


def test_the_first_screen_is_about_the_z_scored_foreground_of_the_most_different_channel() -> None:
    raw, small = replace(part(), scale="raw"), replace(part({"AB": 0.5}), channel="T2")
    assert main_part([raw, small, part()]) == part()
    assert main_part([raw]) == raw
    assert "in MR even after z-score" in " ".join(summarize([raw, small, part()], CARDS))


def test_variants_say_what_is_left() -> None:
    after = part(q=0.2, classifiers=(classifier(0.3, 0.4),))
    variants = [VariantFinding("as scanned", [part()]), VariantFinding("harmonized by curve", [after])]
    found = describe(Findings("d", "now", "pooled", {}, CARDS, variants, []))
    assert found[-1] == (
        "Harmonized by curve: 0% of the features differ significantly (100% as scanned) and a classifier recognises 30% of the "
        "volumes (93%)."
    )
    assert describe(Findings("d", "now", "pooled", {}, [], [], [])) == ["Nothing was measured."]


@pytest.mark.parametrize(("shift", "start"), [(0.0, "No difference"), (2.5, "D differs from all other sites")])
def test_real_findings_give_the_right_sentence(shift: float, start: str) -> None:
    options = StatisticsOptions(bootstrap=60, permutations=59, mmd_permutations=299, trees=2, forest_permutations=0)
    table = feature_table({"A": 16, "B": 15, "C": 15, "D": 15}, shift={"D": shift}, seed=3)
    assert summarize(find_differences(table, options=options), CARDS)[0].startswith(start)
