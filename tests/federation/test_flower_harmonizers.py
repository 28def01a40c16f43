"""The learned harmonizers with a site of inverted contrast: through SuperLink and SuperNodes, and with sites missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from nnunet_fedharm.federation.codec import Weights, decode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import error_reply
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW
from nnunet_fedharm.trainers.names import trainer_name_for
from tests.federation.deployment import Deployment
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_flower import check_results, is_event, predict
from tests.federation.test_in_process import PowerCut, cut_at, final_weights, real_sites, tiny

pytestmark = pytest.mark.slow

SMALL: dict[str, dict[str, Any]] = {
    "cyclegan": {"width": 4, "discriminator_width": 8, "dilations": [1, 2], "train_everywhere": True},
    "diffusion": {"width": 4, "judge_width": 8},
}
SITES = "ABC"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Path:
    """A is the reference and has labels, B and C have images only, C's are inverted."""
    root = tmp_path_factory.mktemp("consortium")
    for index, (site, labelled) in enumerate(zip(SITES, (2, 0, 0), strict=True)):
        folder = make_raw_dataset(
            root / "sites" / site / "nnUNet_raw",
            n_labelled=labelled,
            n_unlabelled=2 - labelled,
            site=site,
            gain=1 + 0.5 * index,
            seed=index,
            shape=(24, 24, 24),
        )
        if site == "C":
            turn_over(folder)
    return root


@pytest.fixture
def consortium(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Deployment]:
    """One SuperLink and three SuperNodes for the runs of all kinds; starting them anew takes longer than a round."""
    root = tmp_path_factory.mktemp("deployment") / "consortium"
    shutil.copytree(template, root)
    started = Deployment(root)
    started.start_superlink()
    for site in SITES:
        started.start_site(site)
    yield started
    started.stop()


def turn_over(dataset: Path) -> None:
    """Dark balls in bright noise, as T2 is to T1."""
    for path in dataset.glob("images*/*.nii.gz"):
        volume = nibabel.load(path)
        image = np.asarray(volume.get_fdata(), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(image.max() + image.min() - image, volume.affine), path)


def learned(root: Path, kind: str, rounds: int = 2) -> FederateConfig:
    return tiny(
        root,
        sites=",".join(SITES),
        harmonizer=kind,
        harmonizer_options=json.dumps(SMALL[kind]),
        reference="A",
        harmonizer_rounds=rounds,
        segmenter_rounds=1,
        iterations_per_epoch=25,
        harmonizer_lr=3e-3,
        batch_size=4,
        join_wait_s=200.0,
        deadline_s=300.0,
    )


def harmonizer_of(folder: Path) -> dict[str, Tensor]:
    saved = torch.load(folder / "fold_all" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    prefix = "harmonizer."
    weights = saved["network_weights"].items()
    return {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}


@pytest.mark.long
@pytest.mark.parametrize("kind", list(SMALL))
def test_an_inverted_site_is_found_and_every_site_serves_its_own_row(deployment: Deployment, kind: str) -> None:
    root, config = deployment.root, learned(deployment.root, kind)
    sites = real_sites(config, 3)
    with pytest.raises(PowerCut):  # in one process: everything up to round 2, which costs minutes in a deployment
        run_server(LocalGrid({**sites, 100: cut_at(sites[100], ("harmonizer", 1))}), config)
    before = len(deployment.events())
    deployment.run(config)
    deployment.wait_for(is_event("finished", sites_without_model=[]), after=before, seconds=400.0)

    results = f"nnUNet_results/Dataset001_Blobs/{trainer_name_for(kind)}__nnUNetFedHarmPlans__2d"
    server = harmonizer_of(root / "server" / results)
    votes = server["bank_polarity"].flatten().tolist()
    assert votes[0] == 1.0, "the reference is upright by definition"
    assert 0 < votes[1] < 1
    assert votes[2] < INVERTED_BELOW
    assert server["bank_gate"].tolist()[0] == 0.0
    assert int(server["trained_epochs"]) == 2
    assert not server["source_known"]
    for index, site in enumerate(SITES):
        own = harmonizer_of(root / "sites" / site / results)
        assert own["source_known"]
        torch.testing.assert_close(own["source_quantiles"], server["bank_quantiles"][index])
        torch.testing.assert_close(own["source_polarity"], server["bank_polarity"][index])
        assert own["source_gate"] <= server["bank_gate"][index], "a site may shut its gate, not open it"

    assert own["source_gate"] == 1, "at C harmonization gains"
    up = {
        event["site"]: event["bytes_up"]
        for event in deployment.events()[before:]
        if is_event("site_trained", round=2)(event)
    }
    assert up["B"] == up["C"]
    assert up["C"] < (1000 if kind == "diffusion" else 0.7 * up["A"])
    for name, home, images in (("server", "server", "A"), ("site", "sites/C", "C")):
        check_results(root / home / results)
        folder = root / f"sites/{images}/nnUNet_raw/Dataset001_Blobs"
        cases = folder / ("imagesTr" if images == "A" else "imagesUnlabelled")
        assert predict(root / home / results, cases, root / f"{kind}_{name}") == 2


class Watched:
    """A site's client that fails in some harmonizer rounds, and keeps what it was sent and what it sent back in the others.

    Attributes:
        got, gave: round -> weights.
    """

    def __init__(self, client: Client, *, fails_in: tuple[int, ...] = ()) -> None:
        self.client, self.fails_in = client, fails_in
        self.got: dict[int, Weights] = {}
        self.gave: dict[int, Weights] = {}

    def __call__(self, message: Message) -> Message | None:
        values = message.content.config_records["config"]
        if values.get("phase") != "harmonizer":
            return self.client(message)
        number = int(str(values["round"]))
        self.got[number] = decode(message.content.array_records["weights"], source="the server")
        if number in self.fails_in:
            return Message(error_reply("DataError", "no power."), reply_to=message)
        answer = self.client(message)
        assert answer is not None
        self.gave[number] = decode(answer.content.array_records["weights"], source="the site")
        return answer


@pytest.mark.parametrize("kind", ["cyclegan", pytest.param("diffusion", marks=pytest.mark.long)])
def test_a_missing_site_undoes_nothing_and_its_row_waits_for_it(consortium: Path, kind: str) -> None:
    config = replace(learned(consortium, kind, rounds=3), iterations_per_epoch=4, batch_size=2)
    clients = real_sites(config, 3)
    reference, upright = Watched(clients[100], fails_in=(1,)), Watched(clients[101])
    inverted = Watched(clients[102], fails_in=(2,))
    run_server(LocalGrid({100: reference, 101: upright, 102: inverted}), config)
    after = {0: upright.got[1], 1: upright.got[2], 2: final_weights(config)}  # round -> global weights
    judge = [name for name in after[0] if name.startswith(("harmonizer.polarity_judge.", "harmonizer.network."))]
    assert judge
    for name in judge:
        np.testing.assert_array_equal(after[0][name], reference.gave[0][name], err_msg="only the reference trained it")
        np.testing.assert_array_equal(after[1][name], after[0][name], err_msg="the reference was away")
        np.testing.assert_array_equal(after[2][name], reference.gave[2][name])
    votes = {number: weights["harmonizer.bank_polarity"][:, 0] for number, weights in after.items()}
    for number, site in ((0, inverted), (1, inverted)):
        assert votes[number][2] == site.gave[number]["harmonizer.bank_polarity"][0, 0]
    assert votes[2][2] == votes[1][2], "an absent site's row waits for it"
    assert votes[1][2] < votes[0][2] < 1, "but not for anyone else's"
    for number in range(3):
        assert votes[number][1] == upright.gave[number]["harmonizer.bank_polarity"][0, 0]
        assert votes[number][0] == 1.0
        assert int(after[number]["harmonizer.trained_epochs"]) == number + 1


@pytest.mark.long
@pytest.mark.parametrize(("kind", "rounds"), [("cyclegan", 1), ("diffusion", 1), ("diffusion", 0)])
def test_a_consensus_is_a_reference_too_and_no_round_leaves_the_identity(
    consortium: Path, kind: str, rounds: int
) -> None:
    config = replace(learned(consortium, kind, rounds), reference="consensus", iterations_per_epoch=1)
    results = run_server(LocalGrid(real_sites(config, 3)), config)
    server = harmonizer_of(results.parent)
    assert int(server["trained_epochs"]) == rounds
    assert (server["bank_polarity"] == 1).all() == (rounds == 0)
