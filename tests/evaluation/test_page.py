"""Pictures, charts and the page: what a reader sees, without a browser."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_fedharm.errors import ShapeError
from nnunet_fedharm.evaluation.charts import Line, Point, interval_chart, line_chart, ticks
from nnunet_fedharm.evaluation.page import Report, SitePictures, Step, render_page
from nnunet_fedharm.evaluation.pictures import LABEL_COLOURS, data_uri, density, errors, grey_picture, overlay
from nnunet_fedharm.evaluation.segmentation import LabelScore, summarize_scores

SCORES = {"A_1": {"grey": LabelScore(0.8, 2.0)}, "B_1": {"grey": LabelScore(0.6, float("nan"))}}
METRICS = {"sites": summarize_scores(SCORES, {"A_1": "A", "B_1": "B"}, ["grey"], seed=0)}
PIXEL = data_uri(np.zeros((1, 1, 3), np.uint8))
REPORT = Report(
    title="A <title>",
    lead="One sentence.",
    headline=[("0.6 → 0.7", "Dice")],
    pictures=[SitePictures("A", "3 T", [("before", PIXEL), ("after", PIXEL)])],
    overlays=[],
    label_names=["grey"],
    kinds=["none", "curve"],
    metrics={"none": METRICS, "curve": METRICS},
    histograms={"as scanned": {"A": [(0.0, 0.1), (1.0, 0.3)]}},
    training={"Dice": [Line("none", "series-1", [(1, 0.1), (2, 0.4)])], "empty": []},
    steps=[Step("data", "made it", 3.0)],
    notes=["A note."],
)


def test_grey_values_run_from_black_to_white_over_the_window_and_stop_at_the_mask() -> None:
    image = np.array([[-9.0, -1.0, 0.0, 1.0, 9.0]])
    mask = np.array([[True, True, True, True, False]])
    assert grey_picture(image, mask, (-1.0, 1.0))[0, :, 0].tolist() == [0, 0, 127, 255, 0]


def test_an_overlay_colours_labels_and_leaves_the_background() -> None:
    picture = np.full((1, 3, 3), 100, np.uint8)
    coloured = overlay(picture, np.array([[0, 1, 2]]), opacity=1.0)
    assert coloured[0].tolist() == [[100, 100, 100], list(LABEL_COLOURS[0]), list(LABEL_COLOURS[1])]
    with pytest.raises(ShapeError):
        overlay(picture, np.zeros((2, 2), int))


def test_errors_mark_every_wrong_voxel_and_no_other() -> None:
    marked = errors(np.full((1, 3, 3), 100, np.uint8), np.array([[0, 1, 2]]), np.array([[0, 2, 2]]))
    assert (marked[..., 0] > 200).tolist() == [[False, True, False]]
    with pytest.raises(ShapeError):
        errors(np.zeros((1, 3, 3), np.uint8), np.zeros((1, 3), int), np.zeros((1, 2), int))


def test_a_picture_survives_its_data_address() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    content = base64.b64decode(data_uri(picture, scale=2).split(",", 1)[1])
    np.testing.assert_array_equal(np.rint(255 * imread(BytesIO(content))[::2, ::2, :3]).astype(int), picture)


def test_a_density_has_area_one() -> None:
    edges = np.linspace(-3, 3, 31)
    values = density([np.random.default_rng(seed).normal(size=500) for seed in (0, 1)], edges)
    assert sum(values) * 0.2 == pytest.approx(1.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.713, 0.7134), (-3.0, 250.0), (2.0, 2.0)])
def test_ticks_are_few_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_charts_are_well_formed_and_stay_inside_their_frame() -> None:
    lines = [Line("a & b", "series-1", [(1, -0.2), (5, 0.9)]), Line("empty", "series-2", [])]
    groups = [("A", [Point("<none>", "series-1", 0.5, 0.4, 0.6), Point("one case", "series-2", 0.7, None, None)])]
    charts = line_chart(lines, x_label="round", label="x"), interval_chart(groups, label="y", x_label="Dice")
    for chart in charts:
        root = ElementTree.fromstring(chart)
        width = float(root.attrib["viewBox"].split()[2])
        for element in root.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.attrib.get(name, 0)) <= width
    assert line_chart([], x_label="", label="") == interval_chart([], label="", x_label="") == ""


class _Balance(HTMLParser):
    """Counts open tags and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_balanced_escaped_and_loads_nothing() -> None:
    page = render_page(REPORT)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.addresses == [PIXEL, PIXEL]
    assert "A &lt;title&gt;" in page
    assert "0.800" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_does_without_pictures_and_curves() -> None:
    assert "A note." in render_page(replace(REPORT, pictures=[], training={}, steps=[]))
