"""Strategies on four hospitals with labels everywhere, and one of them sending poisoned updates: Dice and HD95 per site.

    PYTHONPATH=. python benchmarks/federated_strategies.py run    --data DATA --work WORK [--arms fedavg scaffold …]
    PYTHONPATH=. python benchmarks/federated_strategies.py report --work WORK  # the tables of docs/benchmarks

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`; cases are held out as in
`hippocampus_sites.py`. Server and sites are the real apps in one process, without Flower's runtime, so a message costs nothing
and a site's reply can be poisoned on its way. Every site is predicted with its own results folder by the stock predictor.

An arm whose metrics exist is not run again; one that was stopped goes on at its round. Several `run` at once share the work: each
arm is done by whoever comes first. Set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federated_strategies_report import report
from flwr.app import Message
from hippocampus_sites import NAME, PREDICT, mean_over_labels, prepare

from nnunet_fedharm.evaluation.segmentation import score_cases
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.client_app import app
from nnunet_fedharm.federation.codec import Weights, decode, encode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.server_app import run_server
from tests.federation.local_grid import Client, LocalGrid, app_client

SITES = ("A", "B", "C", "D")
POISONED = "B"
CONFIGURATION = "3d_fullres"
FLOATS = "f"


@dataclass(frozen=True)
class Attack:
    """What the poisoned site sends instead of its update u.

    Attributes:
        kind: "scaled" (s u), "flipped" (-s u) or "random" (normal numbers whose norm is s times that of u).
        strength: s.
    """

    kind: str
    strength: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.strength:g}"


@dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        name: of the strategy as a reader knows it.
        options: of FederateConfig, beside the common ones.
        attack: by one of the four sites; None: all are honest.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    attack: Attack | None = None

    @property
    def key(self) -> str:
        return self.name if self.attack is None else f"{self.name}_{self.attack.name}"


@dataclass(frozen=True)
class Size:
    """Length of a run; the network is that of the other benchmarks on this data set.

    Attributes:
        cases: test cases of each site, the first by name; 0 = all of them.
    """

    rounds: int = 16
    local_epochs: int = 1
    iterations: int = 40
    seed: int = 0
    cases: int = 0


HONEST = (
    Arm("fedavg"),
    Arm("fedavg-equal", {"weighting": "sites"}),
    Arm("fedprox-0.01", {"proximal_mu": 0.01}),
    Arm("fedprox-1", {"proximal_mu": 1.0}),
    Arm("fedavgm-0.5", {"strategy": "fedavgm", "server_momentum": 0.5}),
    Arm("fedadam", {"strategy": "fedadam"}),
    Arm("fedyogi", {"strategy": "fedyogi"}),
    Arm("scaffold", {"strategy": "scaffold"}),
    Arm("ema-0.7", {"server_ema": 0.7}),
    Arm("median", {"strategy": "median"}),
    Arm("trimmed-mean", {"strategy": "trimmed-mean"}),
    Arm("norm-bound-3", {"norm_bound": 3.0}),
    Arm("local-norm (FedBN)", {"local_groups": "norm"}),
    Arm("local-heads", {"local_groups": "heads"}),
    Arm("local-encoder", {"local_groups": "encoder"}),
)
ATTACKS = (Attack("scaled", 10.0), Attack("flipped", 10.0), Attack("random", 10.0), Attack("flipped", 1.0))
DEFENCES = ("fedavg", "norm-bound-3", "median", "trimmed-mean")
POLARITY = {"harmonizer": "polarity", "reference": "A", "harmonizer_rounds": 6}
HARMONIZED = (
    Arm("polarity, fedavg", POLARITY),
    Arm("polarity, median", {**POLARITY, "strategy": "median"}),
    Arm("polarity, trimmed-mean", {**POLARITY, "strategy": "trimmed-mean"}),
)
"""Once D's contrast is turned over, honest sites are alike, which is what a robust mean takes for granted."""
ARMS = (
    *HONEST,
    *(Arm(arm.name, arm.options, attack) for attack in ATTACKS for arm in HONEST if arm.name in DEFENCES),
    *HARMONIZED,
    *(Arm(arm.name, arm.options, attack) for attack in ATTACKS for arm in HARMONIZED),
)
# Krum is no row: against one bad site it needs five sites.


def configuration(arm: Arm, root: Path, size: Size) -> FederateConfig:
    common: dict[str, Any] = {
        "root": str(root),
        "sites": ",".join(SITES),
        "dataset": "910",
        "configuration": CONFIGURATION,
        "segmenter_rounds": size.rounds,
        "local_epochs": size.local_epochs,
        "iterations_per_epoch": size.iterations,
        "val_iterations": 2,
        # nnU-Net's momentum of 0.99 is made for 250 000 steps; 0.9 at ten times the rate has the same effective step.
        "initial_lr": 0.1,
        "momentum": 0.9,
        "base_features": 8,
        "max_features": 64,
        "batch_size": 2,
        "patch_size": "32x40x32",
        "weighting": "cases",
        "seed": size.seed,
        "plans_name": "plans_strategies",
        "join_wait_s": 5.0,
    }
    return FederateConfig(**{**common, **arm.options})


def poisoned(client: Client, attack: Attack, seed: int) -> Client:
    """The site's node, but its update is replaced on the way out; what it trained and claims is honest."""

    def sending(message: Message) -> Message | None:
        answer = client(message)
        if message.metadata.message_type != "train" or answer is None or not answer.has_content():
            return answer
        request = messages.unpack(messages.TRAIN, message.content, source="the server")
        received = decode(request.weights, source="the server")
        sent = decode(answer.content.array_records["weights"], source=POISONED)
        generator = np.random.default_rng((seed, int(request.values["round"])))
        answer.content.array_records["weights"] = encode(falsified(received, sent, attack, generator))
        return answer

    return sending


def falsified(received: Weights, sent: Weights, attack: Attack, generator: np.random.Generator) -> Weights:
    """The tensors that the attack puts in the place of what was trained; rows and integers stay."""
    names = [
        name for name in sorted(sent) if sent[name].dtype.kind == FLOATS and sent[name].shape == received[name].shape
    ]
    update = {name: sent[name].astype(np.float64) - received[name] for name in names}
    if attack.kind == "random":
        noise = {name: generator.normal(size=value.shape) for name, value in update.items()}
        ratio = norm(update) / norm(noise)
        update = {name: ratio * value for name, value in noise.items()}
    sign = -1.0 if attack.kind == "flipped" else 1.0
    changed = {name: received[name] + sign * attack.strength * value for name, value in update.items()}
    return sent | {name: value.astype(np.float32) for name, value in changed.items()}


def norm(weights: Mapping[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in weights.values())))


class Prepared(BaseException):
    """Raised by a site that is asked to train while the data are being prepared."""


def refuse_training(client: Client) -> Client:
    def preparing(message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            raise Prepared
        return client(message)

    return preparing


def sites_of(config: FederateConfig) -> dict[int, Client]:
    return {
        100 + index: app_client(app, {"partition-id": index}, config.to_run_config()) for index in range(len(SITES))
    }


def own_folder(work: Path, arm: Arm, size: Size) -> Path:
    """A consortium whose data are everybody's and whose results and states are the arm's."""
    root = work / "strategies" / f"{arm.key}_{'-'.join(str(value) for value in asdict(size).values())}"
    for site in SITES:
        shared = work / "labels-all" / "sites" / site
        own = root / "sites" / site
        own.mkdir(parents=True, exist_ok=True)
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (shared / name).mkdir(exist_ok=True)
            if not (own / name).is_symlink():
                (own / name).symlink_to(shared / name)
    return root


def preprocess(work: Path, size: Size) -> None:
    """Plans and preprocessed cases once for all arms."""
    ready = work / "strategies.ready"
    with file_lock(work / "strategies.lock"):
        if not ready.exists():
            config = configuration(HONEST[0], own_folder(work, Arm("preparation"), size), size)
            try:
                run_server(LocalGrid({node: refuse_training(site) for node, site in sites_of(config).items()}), config)
            except Prepared:
                ready.touch()


def train(arm: Arm, root: Path, size: Size) -> dict[str, Any]:
    """Run the arm, or the rest of it; what its event log says."""
    config = configuration(arm, root, size)
    sites = sites_of(config)
    if arm.attack is not None:
        node = 100 + SITES.index(POISONED)
        sites[node] = poisoned(sites[node], arm.attack, size.seed)
    began = time.process_time()
    with (root / "train.log").open("a") as log, redirect_stdout(log):  # nnU-Net prints the plans for every trainer
        run_server(LocalGrid(sites), config)
    events = read_events(root / "server" / "fedharm" / EVENTS_FILE)[0]
    rounds = [event for event in events if event["event"] == "round_end"]
    aside = [event["site"] for event in events if event["event"] == "site_set_aside"]
    return {
        "cpu_s": time.process_time() - began,
        "bytes_up": [event["bytes_up"] for event in rounds],
        "dice": [event["dice"] for event in rounds],
        "set_aside": {site: aside.count(site) for site in sorted(set(aside))},
    }


def evaluate(root: Path, work: Path, count: int) -> dict[str, Any]:
    """Every site's test cases, segmented with its own results folder."""
    jobs = []
    for site in SITES:
        (model,) = (root / "sites" / site / "nnUNet_results" / NAME).glob("*__plans_strategies__*")
        output, tested = root / "predictions" / site, root / "tested" / site
        for folder in (output, tested / "images", tested / "labels"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for label in sorted((work / "test" / site / "labels").glob("*.nii.gz"))[: count or None]:
            image = label.name.replace(".nii.gz", "_0000.nii.gz")
            (tested / "labels" / label.name).symlink_to(label)
            (tested / "images" / image).symlink_to(work / "test" / site / "images" / image)
        jobs.append([str(model), str(tested / "images"), str(output)])
    subprocess.run([sys.executable, "-c", PREDICT, json.dumps(jobs)], check=True, stdout=subprocess.DEVNULL)
    scores = {}
    for site, (model, _, output) in zip(SITES, jobs, strict=True):
        description = json.loads((Path(model) / "dataset.json").read_text())
        found = score_cases(
            Path(output), root / "tested" / site / "labels", description, num_processes=1, progress=False
        )
        scores[site] = {case: mean_over_labels(score) for case, score in found.items()}
    return scores


def run(work: Path, size: Size, arms: list[Arm]) -> None:
    preprocess(work, size)
    for arm in arms:
        root = own_folder(work, arm, size)
        with file_lock(root / "arm.lock", wait_s=0) as mine:  # ends with its process, however that ends
            if not mine or (root / "metrics.json").exists():
                continue
            entry = {
                "arm": arm.name,
                "attack": None if arm.attack is None else arm.attack.name,
                "options": arm.options,
                "size": asdict(size),
                "trained": train(arm, root, size),
                "sites": evaluate(root, work, size.cases),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            }
            (root / "metrics.json").write_text(json.dumps(entry, indent=1))
        dice = {site: np.mean([case["dice"] for case in cases.values()]) for site, cases in entry["sites"].items()}
        print(arm.key, {site: round(float(value), 4) for site, value in dice.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path, help=f"folder of {NAME}")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--arms", nargs="*", default=[], help=f"of {', '.join(arm.key for arm in ARMS)}; default all")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    size = Size(**{name: getattr(arguments, name) for name in asdict(Size())})
    work = arguments.work.resolve()
    if arguments.action == "report":
        print(report(work / "strategies"), end="")
        return
    unknown = sorted(set(arguments.arms) - {arm.key for arm in ARMS})
    if unknown:
        raise SystemExit(f"There is no arm {unknown[0]!r}; choose of {', '.join(arm.key for arm in ARMS)}.")
    os.environ.setdefault("nnUNet_compile", "f")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.data, work)
    run(work, size, [arm for arm in ARMS if not arguments.arms or arm.key in arguments.arms])


if __name__ == "__main__":
    main()
