"""Predictions of a cell's models, and what its harmonized volumes are worth: travelling subjects against the truth, lesions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.segmentation import write_metrics
from nnunet_fedharm.sites.files import read_dataset_json, read_json, write_json
from nnunet_fedharm.study.cell_files import QUALITY_FILE, cell_folder, is_finished
from nnunet_fedharm.study.data import TRAVELLING, StudyData
from nnunet_fedharm.study.matrix import Cell, cells_of, control_cell
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import BASELINES, CONTROL
from nnunet_fedharm.study.trained import read_trained
from nnunet_fedharm.study.training import link

ENDINGS = (".nii.gz", ".nii")
"""Of the files that harmonization quality is measured on."""
PERMUTATIONS = 100
"""Of the site classifier's null in a cell's quality report."""


def keeps_harmonized(study: StudyFile, cell: Cell) -> bool:
    """Whether a cell keeps its harmonized volumes: of the first seed, with a harmonizer or Nyul's in front."""
    return cell.arm.harmonizer not in (CONTROL, *BASELINES[:2]) and cell.seed == study.subject.seeds[0]


def lesions_wait(study: StudyFile, cell: Cell) -> bool:
    """Whether a finished cell's quality lacks the lesions that [report] names: the control, which judges them, was not finished.

    Cells run side by side and in any order, so that the control may be the last one.
    """
    labels, file = list(study.report.lesion_labels), cell_folder(study, cell) / QUALITY_FILE
    if not (labels and keeps_harmonized(study, cell) and is_finished(study, cell) and file.is_file()):
        return False
    found = read_json(file, what="The harmonization quality")
    return not found.get("lesions") or found.get("conventions", {}).get("region_values", labels) != labels


def quality_notes(study: StudyFile) -> list[str]:
    """Sentences on what was not measured though the dataset or [report] asks for it."""
    said, control = [], control_cell(study)
    ending = file_ending(study)
    if ending not in ENDINGS and any((study.raw_dataset / TRAVELLING[0]).glob(f"*{ending}")):
        said.append(
            f"Travelling subjects are in {ending} files, so harmonization quality was not measured: it reads {joined(ENDINGS)}."
        )
    waiting = [cell.arm.title for cell in cells_of(study) if lesions_wait(study, cell)]
    if waiting:
        why = f"the control's first training ({control.name}), which judges them, has no result"
        if is_finished(study, control):
            why = "`nnunet-fedharm study run` counts them, or says what is in the way"
        said.append(f"Lesions were not counted in the harmonized volumes of {joined(waiting)}: {why}.")
    return said


def file_ending(study: StudyFile) -> str:
    """Of the dataset's images and labels."""
    return str(read_dataset_json(study.raw_dataset, site="study")["file_ending"])


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
    imagesTr, may lie years apart. Of several visits at one of the two sites nobody knows which one belongs to the other site's
    scan, so such subjects are left out.
    """
    registry, reference, ending = data.study.registry, data.study.subject.reference, file_ending(data.study)
    if ending not in ENDINGS:
        return {}
    first = f"_0000{ending}"
    away = {path.name.removesuffix(first) for path in (data.study.raw_dataset / TRAVELLING[0]).glob(f"*{first}")}
    tested = {site: _cases(data.test(site) / "labels", ending) for site in data.study.sites}
    truths: dict[str, list[str]] = {}
    for case in tested[reference]:
        truths.setdefault(registry.patient_of(case), []).append(case)
    seen: dict[tuple[str, str], list[str]] = {}
    for site in data.study.sites:
        for case in tested[site] if site != reference else ():
            known = [truth for truth in truths.get(registry.patient_of(case), []) if case in away or truth in away]
            if len(known) == 1:
                seen.setdefault((known[0], site), []).append(case)
    return {cases[0]: {"reference": truth, "site": site} for (truth, site), cases in seen.items() if len(cases) == 1}


def _cases(labels: Path, ending: str) -> list[str]:
    return sorted(path.name.removesuffix(ending) for path in labels.glob(f"*{ending}"))


def _gather(data: StudyData, folder: Path, pairs: Mapping[str, Mapping[str, str]], work: Path) -> None:
    """Links to scans, harmonized volumes and truths, every channel of them, and to the truths' labels."""
    reference, ending = data.study.subject.reference, file_ending(data.study)
    channels = len(read_dataset_json(data.study.raw_dataset, site="study")["channel_names"])
    for case, pair in pairs.items():
        site, truth = pair["site"], pair["reference"]
        links = {f"labels/{truth}{ending}": data.test(reference) / "labels" / f"{truth}{ending}"}
        for channel in range(channels):
            scan, known = (f"{name}_{channel:04d}{ending}" for name in (case, truth))
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
    if not is_finished(data.study, control_cell(data.study)):
        return False
    control = cell_folder(data.study, control_cell(data.study))
    trained, _ = read_trained(control)
    for site in sorted({pair["site"] for pair in pairs.values()}):
        own = cell_folder(data.study, cell) / "harmonized" / site
        predict(data, trained.models[site], trained.styles[site], own, work / "judged" / site, device=device)
    for case, pair in pairs.items():
        name = f"{case}{file_ending(data.study)}"
        for target, source in (("predicted-scans", control / "predictions"), ("predicted-harmonized", work / "judged")):
            (work / target).mkdir(exist_ok=True)
            link(source / pair["site"] / name, work / target / name)
    return True
