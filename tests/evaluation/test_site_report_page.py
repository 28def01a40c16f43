"""The page of the site report, from findings that are complete but drawn: what a reader finds, and what must not be there."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.differences.findings import Findings, SiteCard, VariantFinding
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.evaluation.charts import Point
from nnunet_fedharm.evaluation.site_report.charts import marker, matrix_chart, ridge_chart, scatter_chart, track
from nnunet_fedharm.evaluation.site_report.files import differences_csv, write_report
from nnunet_fedharm.evaluation.site_report.page import render_site_report
from nnunet_fedharm.evaluation.site_report.parts import anchor_of
from nnunet_fedharm.evaluation.site_report.slices import CentralSlice, TypicalSlices, typical_slices
from tests.evaluation.site_findings import NAMES, SITES, make_findings

BEFORE_AND_AFTER = ("as scanned", "harmonized by curve to A")
HOSTILE = '<script>alert("x")</script>&'
ALONE = frozenset(("meta", "img", "br", "wbr"))
INSIDE_P = frozenset(("p", "div", "section", "table", "ul", "h2", "h3", "h4", "details", "figure"))


class Checked(HTMLParser):
    """Refuses wrong nesting; collects addresses, texts of pictures and names of places."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.places: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert not (tag in INSIDE_P and "p" in self.open), f"<{tag}> inside of a paragraph"
        found = dict(attributes)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        self.alternatives += [found["alt"] or ""] if "alt" in found else []
        self.places += [found["id"] or ""] if "id" in found else []
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pictures(variants: tuple[str, ...], sites: tuple[str, ...] = SITES) -> list[TypicalSlices]:
    piece = CentralSlice(np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32), (1.0, 2.0))
    cut = {(f"case_of_patient_{site}", "MR"): piece for site in sites}
    chosen = {site: [f"case_of_patient_{site}"] for site in sites}
    return [typical_slices("MR", chosen, dict.fromkeys(variants, cut))]


@pytest.mark.parametrize("variants", [BEFORE_AND_AFTER[:1], BEFORE_AND_AFTER])
def test_the_page_is_well_nested_loads_nothing_and_needs_no_script(variants: tuple[str, ...]) -> None:
    page = render_site_report(make_findings(variants=variants), sentences=["D differs."], slices=pictures(variants))
    found = Checked(page)
    assert "script" not in found.tags
    assert "http" not in page
    assert "url(" not in page
    assert all(address.startswith(("data:image/png;base64,", "#part-")) for address in found.addresses)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.places)
    assert len(set(found.places)) == len(found.places) == 3


def test_the_first_screen_holds_the_answer_scanners_distances_and_what_guessing_gives() -> None:
    findings = make_findings()
    page = render_site_report(findings, sentences=["Sites A and D differ most."], slices=pictures(BEFORE_AND_AFTER[:1]))
    first = page[: page.index("<h3>What differs")]
    assert "Sites A and D differ most." in first
    assert "Siemens, 3 T, T1w MPRAGE" in first
    assert "A and D: 1.90" in first
    assert "Guessing gives 25%" in first
    for site in SITES:
        assert f"Site {site}, typical volume, as scanned" in first


def test_before_and_after_stand_side_by_side_in_the_same_colours() -> None:
    page = render_site_report(make_findings(variants=BEFORE_AND_AFTER), sentences=[], slices=pictures(BEFORE_AND_AFTER))
    first = page[: page.index("<h3>What differs")]
    assert "<b>92%</b> of the volumes as scanned" in first or "<b>93%</b> of the volumes as scanned" in first
    assert "of the volumes harmonized by curve to A" in first
    shades = re.findall(r'fill-opacity="([.\d]+)"/><text[^>]*>([.\d]+)<', first)
    by_text = {text: {shade for shade, other in shades if other == text} for _, text in shades}
    assert len(shades) == 24
    assert all(len(found) == 1 for found in by_text.values())


def test_names_are_escaped_wherever_they_stand() -> None:
    findings = make_findings(sites=("A", HOSTILE))
    findings = replace(
        findings,
        dataset=HOSTILE,
        settings={HOSTILE: HOSTILE},
        sites=[*findings.sites[:1], SiteCard(HOSTILE, HOSTILE, 3.0, HOSTILE, 3, 3, 3)],
        variants=[
            VariantFinding(
                HOSTILE,
                [replace(part, channel=HOSTILE, notes=[HOSTILE]) for part in findings.variants[0].parts],
            )
        ],
        failures=[replace(findings.failures[0], case=HOSTILE, reason=HOSTILE)],
    )
    page = render_site_report(findings, sentences=[HOSTILE], slices=pictures((HOSTILE,), ("A", HOSTILE)))
    found = Checked(page)
    assert "script" not in found.tags
    assert "<script" not in page
    assert len(set(found.places)) == 3


def test_no_picture_names_a_case_but_the_outlier_table_does() -> None:
    page = render_site_report(make_findings(), sentences=[], slices=pictures(BEFORE_AND_AFTER[:1]))
    assert not [text for text in Checked(page).alternatives if "patient" in text]
    assert "case_of_patient_3" in page
    assert "names cases because it stays with who holds the data" in page


def test_a_federated_report_holds_no_case_whatever_it_was_given(tmp_path: Path) -> None:
    leaky = replace(make_findings(), mode="federated", shared=[("reply", "moments", 48_200)])
    page = write_report(leaky, tmp_path, slices=pictures(BEFORE_AND_AFTER[:1])).read_text()
    written = page + (tmp_path / "report.json").read_text() + (tmp_path / "differences.csv").read_text()
    Checked(page)
    assert "case_of_patient" not in written
    assert "A_000" not in written
    assert "<img" not in page
    assert "What left the sites" in page
    assert "48.2 kB" in page
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "differences.csv"}
    assert "The label is empty." in page


def test_the_json_is_the_report(tmp_path: Path) -> None:
    findings = make_findings(variants=BEFORE_AND_AFTER)
    write_report(findings, tmp_path)
    assert from_json(Findings, json.loads((tmp_path / "report.json").read_text())) == findings


def test_the_csv_has_a_line_for_each_variant_part_and_feature() -> None:
    lines = list(csv.DictReader(io.StringIO(differences_csv(make_findings(variants=BEFORE_AND_AFTER)))))
    assert len(lines) == 2 * 3 * len(NAMES)
    assert lines[0]["feature"] == NAMES[0]
    assert float(lines[0]["eta_squared"]) == pytest.approx(0.9)
    assert {"median A", "median D"} <= set(lines[0])


def test_nothing_measured_is_a_page_too() -> None:
    empty = replace(make_findings(), variants=[VariantFinding("as scanned", [])])
    page = render_site_report(empty, sentences=["Nothing could be measured."])
    Checked(page)
    assert "There are no two sites to compare." in page


def test_one_site_is_described_without_comparison() -> None:
    findings = make_findings(sites=("A",))
    parts = [
        replace(part, families={}, share_significant={}, pairs=[], classifiers=[], combat=None, agreement=[])
        for part in findings.variants[0].parts
    ]
    page = render_site_report(replace(findings, variants=[VariantFinding("as scanned", parts)]), sentences=[])
    Checked(page)
    assert "There are no two sites to compare." in page


def test_sites_whose_distances_the_server_does_not_know_are_not_called_one_site() -> None:
    findings = make_findings(mode="federated")
    parts = [replace(part, pairs=[], classifiers=[], embedding=None) for part in findings.variants[0].parts]
    page = render_site_report(replace(findings, variants=[VariantFinding("as scanned", parts)]), sentences=[])
    Checked(page)
    assert "No distance between two sites is known here" in page


def test_parts_of_similar_names_have_different_places() -> None:
    names = [("a b", "c", "d"), ("a_b", "c", "d"), ("a-b", "c", "d"), ("ä", "c", "d")]
    assert len({anchor_of(name) for name in names}) == 4
    assert all(re.fullmatch(r"[\w-]+", anchor_of(name), re.ASCII) for name in names)


def test_charts_are_well_formed_and_stay_inside_their_frame() -> None:
    points = [("A", 0.0, 1.0, "<1>"), ("B", 5.0, -2.0, "")]
    charts = [
        scatter_chart(points, {"A": (0, 0, 2, 1, 30)}, ("A", "B"), axes=("x & y", "y"), label="plane"),
        matrix_chart(
            ("A", "a long name of a site"), ("A",), {("A", "A"): (None, "-", "<tip>")}, highest=0.0, label="m"
        ),
        ridge_chart((0.0, 0.5, 1.0), {"A": (0.2, 0.8)}, ("A", "B"), label="h", medians={"A": 0.6}),
    ]
    for chart in charts:
        root = ElementTree.fromstring(chart)
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for names, most in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
                assert all(0 <= float(element.attrib.get(name, 0)) <= most for name in names)
    line = ElementTree.fromstring(track([Point("v", "series-1", 1.7, -0.2, 2.0)]))
    assert {element.attrib.get("cx") for element in line.iter() if "cx" in element.attrib} == {"100.0%"}
    assert scatter_chart([], {}, (), axes=("", ""), label="") == ridge_chart((), {}, (), label="", medians={}) == ""


def test_neighbouring_sites_and_sites_of_one_colour_have_different_marks() -> None:
    shapes = [re.sub(r' class="[^"]*"', "", marker(index, 0, 0)) for index in range(17)]
    assert len(set(shapes[:8])) == 8
    assert shapes[0] != shapes[8]
