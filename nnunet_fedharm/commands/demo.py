"""`nnunet-fedharm demo`: the whole path on MR anatomy that ships with the packages, and one page about it."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from nnunet_fedharm.datasets.demo import DATASET_ID, DATASET_NAME, HOSPITALS, DemoSize, write_demo
from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.sites.files import read_json, write_json

HELP = "run the whole path on MR anatomy that ships with the packages, in minutes"
KINDS = ("none", "curve")
CONFIGURATION = "2d"
PLANS = "nnUNetFedHarmPlans"
PAGE = "demo.html"
SEED = 2026
"""Not 0: on the subjects of seed 0, held-out ones included, scanner and harmonizer settings of the demo were chosen."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo: small enough for two cores, large enough that the networks learn."""

    size: DemoSize = field(default_factory=DemoSize)
    harmonizer_rounds: int = 4
    segmenter_rounds: int = 12
    iterations: int = 25
    base_features: int = 8
    batch_size: int = 12


QUICK = DemoSettings(
    size=DemoSize(training=2, held_out=1, spacing_mm=4.0),
    harmonizer_rounds=2,
    segmenter_rounds=2,
    iterations=4,
    base_features=4,
    batch_size=4,
)
"""Shows that everything works; its networks learn next to nothing."""


class Steps:
    """Names steps on the terminal and keeps what each did and how long it took."""

    def __init__(self, total: int) -> None:
        self.done: list[tuple[str, str, float]] = []
        self._total = total

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        print(f"\n[{len(self.done) + 1}/{self._total}] {name}: {what}", flush=True)
        start = perf_counter()
        yield
        self.done.append((name, what, perf_counter() - start))
        print(f"    done in {self.done[-1][2]:.0f} s", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("nnunet-fedharm-demo"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny: shows that all steps work, learns next to nothing")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of data and training (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run all steps and print where the page is."""
    page = run_demo(args.output.expanduser().resolve(), QUICK if args.quick else DemoSettings(), seed=args.seed)
    print(f"\nThe page: {page}\n          {page.as_uri()}")
    return 0


def run_demo(root: Path, settings: DemoSettings, *, seed: int = SEED) -> Path:
    """Data, federation without and with a harmonizer, stock prediction, evaluation, page.

    A stopped demo goes on where it stopped when it is started again with the same settings.

    Args:
        root: folder of everything.
        settings: sizes.
        seed: of data and training.

    Returns:
        The page's path.

    Raises:
        FedHarmError: a step failed; its sentence.
    """
    steps = Steps(total=7)
    with steps.step("data", "three hospitals from nilearn's MNI152 anatomy, each with its own subjects and scanner"):
        _make_data(root, settings, seed)
    events: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        with steps.step(f"federate, {kind}", _FEDERATE[kind]):
            events[kind] = _federate(root, kind, settings, seed)
    with steps.step("predict", "stock nnUNetv2_predict on held-out cases, each hospital with its own results folder"):
        _predict_all(root)
    with steps.step("harmonize", "held-out cases as NIfTI on their own grid, with each hospital's stored style"):
        _harmonize_all(root)
    with steps.step("evaluate", "Dice and HD95 per hospital, bootstrap over cases"):
        metrics = {kind: _evaluate(root, kind, seed) for kind in KINDS}
    with steps.step("page", "one self-contained HTML file"):
        page = _write_page(root, settings, steps, events, metrics)
    return page


_FEDERATE = {
    "none": "the control: plain nnU-Net through Flower, cedar's images are of no use",
    "curve": "all three train the harmonizer without labels, then alder and birch train the segmenter behind it",
}


def _make_data(root: Path, settings: DemoSettings, seed: int) -> None:
    made = {"seed": seed, **asdict(settings.size)}
    record = root / "demo_data.json"
    if record.is_file() and read_json(record, what="The record of the demo data") == made:
        print("    already there", flush=True)
        return
    write_demo(root, size=settings.size, seed=seed)
    write_json(made, record)


def _federate(root: Path, kind: str, settings: DemoSettings, seed: int) -> list[dict[str, Any]]:
    """One federated run; returns the events of its rounds."""
    from nnunet_fedharm.federation.config import FederateConfig
    from nnunet_fedharm.federation.launch import federate

    config = FederateConfig(
        root=str(root),
        dataset=str(DATASET_ID),
        configuration=CONFIGURATION,
        harmonizer=kind,
        harmonizer_rounds=settings.harmonizer_rounds if kind == "curve" else 0,
        segmenter_rounds=settings.segmenter_rounds,
        # A tone curve alone: a bias field of cedar's saturated images cannot be told from tissue. A few hundred cheap steps
        # want a larger learning rate than the default's long schedule.
        harmonizer_options='{"gain": false}' if kind == "curve" else "",
        harmonizer_lr=1e-2,
        iterations_per_epoch=settings.iterations,
        val_iterations=2,
        base_features=settings.base_features,
        max_features=4 * settings.base_features,
        batch_size=settings.batch_size,
        plans_name=PLANS,
        seed=seed,
        parallel_sites=min(2, os.cpu_count() or 1),
    )
    federate(config, show=lambda line: print(f"    {line}", flush=True))
    return _events_of_last_run(root)


def _events_of_last_run(root: Path) -> list[dict[str, Any]]:
    """The rounds of the run that started last, also those from before it was stopped and resumed."""
    from nnunet_fedharm.federation.events import EVENTS_FILE, read_events

    events, _ = read_events(root / "server" / "fedharm" / EVENTS_FILE)
    rounds: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    run_id = ""
    for event in events:
        if event["event"] == "started":
            run_id = str(event["run_id"])
        if event["event"] == "round_end":
            rounds.setdefault(run_id, {})[str(event["phase"]), int(event["round"])] = event
    return list(rounds.get(run_id, {}).values())


def _predict_all(root: Path) -> None:
    """Every hospital's held-out cases with both models; two at a time, each with one thread."""
    from tqdm import tqdm

    jobs = [(site, kind) for kind in KINDS for site in HOSPITALS]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        try:
            list(tqdm(pool.map(lambda job: _predict(root, *job), jobs), "predict", len(jobs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure no further prediction starts
            raise


def _predict(root: Path, site: str, kind: str) -> None:
    from nnunet_fedharm.federation.daemon import program

    site_root = NnunetRoot(root / "sites" / site)
    output = predictions(root, site, kind)
    output.mkdir(parents=True, exist_ok=True)
    command = [program("nnUNetv2_predict"), "-i", str(site_root.raw / DATASET_NAME / "imagesTs"), "-o", str(output)]
    command += ["-d", str(DATASET_ID), "-c", CONFIGURATION, "-tr", trainer_name(kind), "-p", PLANS, "-f", "all"]
    # All in one process: each further one would import torch and nnU-Net for a few small cases.
    command += ["-device", "cpu", "-npp", "0", "-nps", "0"]
    log = root / "logs" / f"predict_{kind}_{site}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        ended = subprocess.run(
            command, env=_environment(site_root), stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        raise SetupError(
            f"nnUNetv2_predict failed for {site} ({kind}); {log} says why. `nnunet-fedharm doctor` checks the installation."
        )


def _environment(site_root: NnunetRoot) -> dict[str, str]:
    paths = {
        "nnUNet_raw": str(site_root.raw),
        "nnUNet_preprocessed": str(site_root.preprocessed),
        "nnUNet_results": str(site_root.results),
    }
    # nnU-Net asks torch for as many threads as there are cores; two processes of it then wait for each other's threads and
    # take several times the CPU time. The limit is OpenMP's own and holds against torch.set_num_threads.
    threads = {"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **paths, **threads, "nnUNet_compile": "f"}


def trainer_name(kind: str) -> str:
    """Trainer class of a harmonizer kind, without importing torch."""
    return f"nnUNetTrainerFedHarm{kind.capitalize()}"


def predictions(root: Path, site: str, kind: str) -> Path:
    """Where a site's predictions lie."""
    return root / "predictions" / kind / site


def _harmonize_all(root: Path) -> None:
    from tqdm import tqdm

    from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder

    for site in tqdm(HOSPITALS, "hospitals"):
        site_root = NnunetRoot(root / "sites" / site)
        model = site_root.results / DATASET_NAME / f"{trainer_name('curve')}__{PLANS}__{CONFIGURATION}"
        images = site_root.raw / DATASET_NAME / "imagesTs"
        harmonize_folder(model, images, root / "harmonized" / site, progress=False)


def _evaluate(root: Path, kind: str, seed: int) -> dict[str, Any]:
    from nnunet_fedharm.evaluation.labels import Targets
    from nnunet_fedharm.evaluation.segmentation import format_table, metrics_of, score_cases, write_metrics

    scores: dict[str, Any] = {}
    site_of: dict[str, str] = {}
    for site in HOSPITALS:
        raw = root / "sites" / site / "nnUNet_raw" / DATASET_NAME
        dataset_json = read_json(raw / "dataset.json", what="The dataset description")
        found = score_cases(predictions(root, site, kind), raw / "labelsTs", dataset_json, progress=False)
        scores.update(found)
        site_of.update(dict.fromkeys(found, site))
    metrics = metrics_of(scores, site_of, Targets.from_dataset_json(dataset_json), seed=seed)
    write_metrics(metrics, root / f"metrics_{kind}.json")
    table = "\n".join(f"    {line}" for line in format_table(metrics).splitlines())
    print(f"    harmonizer {kind}\n{table}", flush=True)
    return metrics


def _write_page(
    root: Path,
    settings: DemoSettings,
    steps: Steps,
    events: Mapping[str, list[dict[str, Any]]],
    metrics: Mapping[str, dict[str, Any]],
) -> Path:
    from nnunet_fedharm.commands.demo_page import demo_report
    from nnunet_fedharm.evaluation.page import render_page

    report = demo_report(root, steps=steps.done, events=events, metrics=metrics, settings=asdict(settings))
    page = root / PAGE
    page.write_text(render_page(report), encoding="utf-8")
    return page
