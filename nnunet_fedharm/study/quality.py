"""Predictions of a cell's models, and what its harmonized volumes are worth: travelling subjects against the truth, lesions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from nnunet_fedharm.evaluation.segmentation import write_metrics
from nnunet_fedharm.sites.files import read_dataset_json, read_json, write_json
from nnunet_fedharm.study.cell_files import METRICS_FILE, QUALITY_FILE, cell_folder
from nnunet_fedharm.study.data import TRAVELLING, StudyData
from nnunet_fedharm.study.matrix import Cell, control_arm
from nnunet_fedharm.study.training import link

TRAINED_FILE = "trained.json"
PERMUTATIONS = 100
"""Of the site classifier's null in a cell's quality report."""


def predict(data: StudyData, model: str, style: str, images: Path, output: Path, *, device: str) -> float:
    """Segment a folder of images with a results folder, as stock nnU-Net does; returns seconds.

    Args:
        style: "stored", or the site whose style is used.
    """
    import torch

    from nnunet_fedharm.trainers.predictor import FedHarmPredictor

    output.mkdir(parents=True, exist_ok=True)
    predictor = FedHarmPredictor(
        style=style,
        use_mirroring=data.study.training.mirroring,
        perform_everything_on_device=device == "cuda",
        device=torch.device(device),
        allow_tqdm=False,
    )
    fold = data.study.subject.fold
    predictor.initialize_from_trained_model_folder(model, (fold if fold == "all" else int(fold),))
    began = time.monotonic()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=False, overwrite=True)
    return time.monotonic() - began


def measure_quality(data: StudyData, cell: Cell, *, device: str) -> None:
    """Harmonized travelling subjects against the truth, where the dataset has any; their lesions, where [report] names labels."""
    from nnunet_fedharm.evaluation.quality import Folders
    from nnunet_fedharm.evaluation.quality_report import quality_report

    folder = cell_folder(data.study, cell)
    pairs = travelling_pairs(data)
    if not pairs:
        return
    work = folder / "travelling"
    shutil.rmtree(work, ignore_errors=True)  # of a cell that was stopped
    _gather(data, folder, pairs, work)
    write_json(pairs, work / "pairs.json")
    lesions = data.study.report.lesion_labels
    judged = bool(lesions) and _judge(data, cell, pairs, work, device=device)
    folders = Folders(
        reference=work / "truth",
        before=work / "scans",
        after=work / "harmonized",
        labels=work / "labels",
        predictions_before=work / "predicted-scans" if judged else None,
        predictions_after=work / "predicted-harmonized" if judged else None,
    )
    report = quality_report(
        folders,
        pairs_file=work / "pairs.json",
        region_values=list(lesions) or None,
        permutations=PERMUTATIONS,
        progress=False,
    )
    write_metrics(report, folder / QUALITY_FILE)
    shutil.rmtree(work)


def travelling_pairs(data: StudyData) -> dict[str, dict[str, str]]:
    """Case at another site -> the test case that shows the same subject at the reference, and the case's site.

    One of the two is in imagesTravelling, wherever the subject is at home: two visits of a patient to two hospitals, both in
    imagesTr, may lie years apart.
    """
    registry, reference = data.study.registry, data.study.subject.reference
    away = {
        path.name.removesuffix("_0000.nii.gz")
        for path in (data.study.raw_dataset / TRAVELLING[0]).glob("*_0000.nii.gz")
    }
    tested = {site: _cases(data.test(site) / "labels") for site in data.study.sites}
    truths: dict[str, list[str]] = {}
    for case in tested[reference]:
        truths.setdefault(registry.patient_of(case), []).append(case)
    pairs = {}
    for site in data.study.sites:
        for case in tested[site] if site != reference else ():
            known = [truth for truth in truths.get(registry.patient_of(case), []) if case in away or truth in away]
            if len(known) == 1:  # of several visits nobody knows which one belongs to the scan
                pairs[case] = {"reference": known[0], "site": site}
    return pairs


def _cases(labels: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in labels.glob("*.nii.gz"))


def _gather(data: StudyData, folder: Path, pairs: Mapping[str, Mapping[str, str]], work: Path) -> None:
    """Links to scans, harmonized volumes and truths, every channel of them, and to the truths' labels."""
    reference = data.study.subject.reference
    channels = len(read_dataset_json(data.study.raw_dataset, site="study")["channel_names"])
    for case, pair in pairs.items():
        site, truth = pair["site"], pair["reference"]
        links = {f"labels/{truth}.nii.gz": data.test(reference) / "labels" / f"{truth}.nii.gz"}
        for channel in range(channels):
            scan, known = (f"{name}_{channel:04d}.nii.gz" for name in (case, truth))
            links |= {
                f"truth/{known}": data.test(reference) / "images" / known,
                f"scans/{scan}": data.test(site) / "images" / scan,
                f"harmonized/{scan}": folder / "harmonized" / site / scan,
            }
        for name, source in links.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            link(source, work / name)


def _judge(data: StudyData, cell: Cell, pairs: Mapping[str, Mapping[str, str]], work: Path, *, device: str) -> bool:
    """What the control, which saw no harmonized image, finds in scans and harmonized volumes; False if it is not finished."""
    control = cell_folder(data.study, Cell(control_arm(data.study), cell.seed))
    if not (control / METRICS_FILE).is_file():
        return False
    trained = read_json(control / TRAINED_FILE, what="The record of a trained cell")
    for site in sorted({pair["site"] for pair in pairs.values()}):
        own = cell_folder(data.study, cell) / "harmonized" / site
        model, style = trained["models"][site], trained["styles"][site]
        predict(data, model, style, own, work / "judged" / site, device=device)
    for case, pair in pairs.items():
        name = f"{case}.nii.gz"
        for target, source in (("predicted-scans", control / "predictions"), ("predicted-harmonized", work / "judged")):
            (work / target).mkdir(exist_ok=True)
            link(source / pair["site"] / name, work / target / name)
    return True
