"""One exchange of the CycleGAN that the page on federations cuts in two, at four sites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from tests.conftest import BENCHMARK
from tests.docs.reading import follow, lines_with, run

pytestmark = pytest.mark.long

RUN = tuple(lines_with("docs/how-to/federate.md", "share_backward"))


def test_every_site_trains_both_networks_and_no_segmenter(hospitals: Path, folder: Path) -> None:
    run("nnunet-fedharm sites split -d 910 -o ROOT")
    follow(RUN)
    server = folder / "ROOT" / "server"
    events = read_events(server / "fedharm" / EVENTS_FILE)[0]
    trained = [(event["phase"], event["site"]) for event in events if event["event"] == "site_trained"]
    assert sorted(trained) == [("harmonizer", site) for site in "ABCD"], "train_everywhere, and no segmenter round"
    model = server / "nnUNet_results" / BENCHMARK / "nnUNetTrainerFedHarmCycleGAN__nnUNetFedHarmPlans__2d"
    section = json.loads((model / "plans.json").read_text())["configurations"]["2d"]["fedharm"]["harmonizer"]
    assert (section["share_backward"], section["one_sided"], section["optimizer"]) == (True, True, "sgd")
