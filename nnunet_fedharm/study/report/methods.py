"""The methods section, from the study file and what the cells recorded: Markdown with citations, ready for a thesis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_fedharm.differences.agreement import GOOD
from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.distances import CONVENTIONS
from nnunet_fedharm.evaluation.fidelity import SSIM_WINDOW
from nnunet_fedharm.evaluation.lesions import DETECTED_OVERLAP
from nnunet_fedharm.evaluation.words import count
from nnunet_fedharm.harmonizers import LEARNED
from nnunet_fedharm.study.controls import KNOWN_INVERSE, TRAVELLING
from nnunet_fedharm.study.findings import FEWEST_SEEDS, StudyFindings
from nnunet_fedharm.study.held_out import ADAPTED_WITH, left_out
from nnunet_fedharm.study.matrix import arms_of, cells_of
from nnunet_fedharm.study.report.names import measured_cases
from nnunet_fedharm.study.results import StudyResults, read_environment
from nnunet_fedharm.study.study_file import StudyFile

HARMONIZERS = {
    "curve": "`curve`: a learned monotone tone curve and a smooth multiplicative gain for each volume",
    "polarity": "`polarity`: a vote of each site, by a small network that is trained at the reference, on whether its contrast "
    "is the reference's inverse; where it is, images are turned over and brought to the reference's quantiles",
    "cyclegan": "`cyclegan`: a CycleGAN with one shared generator from all sites to the reference [@zhu2017cyclegan]",
    "diffusion": "`diffusion`: a bridge from another appearance to the reference's, trained on pairs of reference patches and "
    "the same patches under random appearances, related to flow matching [@lipman2023flow]",
}
BASELINES = {
    "no-augmentation": "plain nnU-Net without its augmentation",
    "augment": "strong random augmentation of appearance on top of nnU-Net's [@ouyang2023causality]",
    "nyul": "histogram landmarks mapped to the reference's [@nyul2000]",
}


def methods(results: StudyResults, found: StudyFindings, sites: Findings | None = None) -> str:
    """The section as Markdown.

    Args:
        sites: the site report of the dataset, where there is one.
    """
    study = results.study
    parts = [
        "## Methods",
        "### Data\n\n" + _data(study, found),
        *(["### Differences between the sites\n\n" + _differences(sites)] if sites and sites.variants else []),
        "### Compared trainings\n\n" + _arms(study, found),
        "### Training\n\n" + _training(study),
        *(["### Federation\n\n" + _federation(study)] if "federated" in study.arms.modes else []),
        *(["### Differential privacy\n\n" + _privacy(study)] if study.arms.epsilons else []),
        "### Evaluation and statistics\n\n" + _statistics(found),
        *(["### Harmonization quality\n\n" + _quality(study, found)] if found.quality else []),
        "### Software\n\n" + _software(results) + _energy(found),
    ]
    return "\n\n".join(parts) + "\n"


def _data(study: StudyFile, found: StudyFindings) -> str:
    registry = study.registry
    scanners = []
    for site, info in registry.sites.items():
        stated = [info.vendor, None if info.field is None else f"{info.field:g} T", info.sequence]
        known = ", ".join(str(word) for word in stated if word)
        simulated = "; simulated" if info.simulation is not None else ""
        scanners.append(
            f"{site} ({known or 'scanner not stated'}{simulated}; {found.patients.get(site, 0)} test patients)"
        )
    words = f"Dataset `{found.dataset}`, {count(len(study.sites), 'site')}: {'; '.join(scanners)}. "
    named, share = study.subject.held_out_cases, study.subject.held_out_fraction
    words += f"{count(len(named), 'case')} named beforehand and the others of the same patients" if named else ""
    if share:
        words += f"{' and a' if named else 'A'} share of {share:g} of each site's labelled cases, by a seeded draw,"
    words += f" {'were' if named else 'was'} held out for testing before any training; "
    words += "travelling subjects, where the dataset has any, were tested on and never trained on. "
    withheld = [site for site in found.targets if site not in (*found.held_out, *found.labelled)]
    if found.targets != found.sites:
        words += f"Labels of {joined(found.labelled)} were used for training. "
        if withheld:
            words += f"Those of {joined(withheld)} were withheld, and their images took part in harmonization only. "
    return words + _held_out(found) + f"Images were harmonized to the appearance of site {found.reference}."


def _held_out(found: StudyFindings) -> str:
    if not found.held_out:
        return ""
    return (
        f"{left_out(found.held_out)}: neither images nor labels, style or fingerprint from there were used. Each finished model "
        f"with a harmonizer was adapted there {ADAPTED_WITH}: style, polarity and gate were measured, and no weight was changed. "
        "Models without a harmonizer were used as they were. "
    )


def _differences(sites: Findings) -> str:
    """Of the tests that the first answer stands on."""
    volumes, cases = count(sum(card.n_cases for card in sites.sites), "volume"), measured_cases(sites)
    chosen = f" ({cases}, evenly spread by name)" if cases else ""
    return (
        f"How the sites differ was measured on {volumes} as scanned{chosen}: radiomics features "
        "[@vangriethuysen2017radiomics] of labelled regions, z-scored, and image quality. Features were compared by "
        "Kruskal-Wallis tests with false discovery rates after Benjamini and Hochberg, pairs of sites by Wasserstein distances "
        "and a permutation test of the maximum mean discrepancy (Holm), and classifiers told the site in cross-validation by "
        "patient against shuffled sites (Bonferroni). Shape features are the control."
    )


def _arms(study: StudyFile, found: StudyFindings) -> str:
    arms = study.arms
    control = found.arm(found.control)
    said = [f"The control was plain nnU-Net with its own augmentation [@isensee2021nnunet], {control.mode} training."]
    if arms.baselines:
        said.append(f"Baselines: {joined([BASELINES[name] for name in arms.baselines])}.")
    if arms.harmonizers:
        said.append(
            f"Harmonizers in front of the same nnU-Net: {'; '.join(HARMONIZERS.get(k, f'`{k}`') for k in arms.harmonizers)}."
        )
    said.append(f"Modes: {joined(arms.modes)}.")
    if arms.oracle:
        said.append("As the upper end, plain nnU-Net was trained on each site's own labels.")
    said.append(_trainings(study, found))
    return " ".join(said)


def _trainings(study: StudyFile, found: StudyFindings) -> str:
    """How often each arm was trained: what is finished, not what was planned."""
    seeds = study.subject.seeds
    each, named = count(len(seeds), "time"), joined([str(seed) for seed in seeds])
    if not found.missing:
        return f"Each arm was trained {each}, with {'seed' if len(seeds) == 1 else 'seeds'} {named}."
    total = len(cells_of(study))
    finished = {arm.title: arm.seeds for arm in found.arms}
    fewer = [f"{title} ({n})" for title, n in finished.items() if n < len(seeds)]
    none = [arm.title for arm in arms_of(study) if arm.title not in finished]
    words = f"Each arm was to be trained {each}, with {'seed' if len(seeds) == 1 else 'seeds'} {named}; "
    words += f"{total - len(found.missing)} of {total} trainings were finished when this report was written."
    words += f" Fewer than planned: {'; '.join(fewer)}." if fewer else ""
    return words + (f" None: {'; '.join(none)}." if none else "")


def _training(study: StudyFile) -> str:
    size = study.training
    words = (
        f"nnU-Net v2 planned the network of configuration `{study.subject.configuration}` for {size.gpu_memory_gb:g} GB of "
        "GPU memory, "
        f"{size.base_features} features in the first stage; preprocessing, loss, deep supervision and sliding-window "
        "prediction are "
        f"nnU-Net's own. Segmenters took {size.segmenter_epochs} epochs of {size.iterations_per_epoch} steps (SGD, initial "
        "learning "
        f"rate {size.initial_lr:g}, momentum {size.momentum:g}), harmonizers {size.harmonizer_epochs} epochs (learning rate "
        f"{size.harmonizer_lr:g}), fold {study.subject.fold}."
    )
    if size.start_from:
        words += f" Every training started from the weights of `{Path(size.start_from).name}` instead of random ones."
    return words + ("" if size.mirroring else " Predictions were made without mirroring.")


def _federation(study: StudyFile) -> str:
    size = study.training
    return (
        "Federated arms ran through Flower [@beutel2020flower]: weights were averaged after "
        f"{count(size.local_epochs, 'local epoch')} "
        f"[@mcmahan2017fedavg], weighted by {size.weighting}, with as many steps at each site as in central training. nnU-Net's "
        "fingerprint was merged from bounded summaries of the sites; no image and no label left a site."
    )


def _privacy(study: StudyFile) -> str:
    options = study.private(study.arms.epsilons[0])
    words = (
        f"Private arms used DP-SGD [@abadi2016dpsgd] with the patient as unit: the gradient of each patient was clipped to norm "
        f"{options.clip:g} over {count(options.patches_per_patient, 'patch', 'patches')}, an expected "
        f"{options.patients_per_step:g} "
        "patients took part in a step, and Gaussian noise was calibrated to epsilon "
        f"{joined([f'{e:g}' for e in study.arms.epsilons])} "
        f"at delta {options.delta:g}. The epsilon that is reported is the one spent, at the site that spent most."
    )
    size = study.training_at(study.arms.epsilons[0])
    if set(study.private_changes) - {"augmentation"}:
        words += (
            f" Their segmenters took {size.segmenter_epochs} epochs of {size.iterations_per_epoch} steps (initial learning rate "
            f"{size.initial_lr:g})"
        )
        with_own = set(study.arms.private_harmonizers) & set(LEARNED)
        words += f", their harmonizers {size.harmonizer_epochs} epochs." if with_own else "."
    return words + ("" if study.private_training.augmentation else " They were trained without nnU-Net's augmentation.")


def _statistics(found: StudyFindings) -> str:
    settings = found.settings
    return (
        f"Dice ({CONVENTIONS['dice']}) and the 95% Hausdorff distance ({CONVENTIONS['hd95_mm']}) were computed for each "
        "label and "
        "averaged over labels in each case. Means over cases and trainings have 95% percentile intervals from "
        f"{settings['resamples']} bootstrap draws of patients and of trainings [@efron1993bootstrap]; a patient seen at "
        "several sites "
        "was drawn with all scans, and arms were compared on the same draws. The gap recovered by an arm is its gain over "
        "the control "
        "divided by that of a training on the sites' own labels, both summed over the sites; it is stated where the "
        "interval of the gap "
        "excludes 0. Two arms were compared by the Wilcoxon signed-rank test [@wilcoxon1945] of each patient's difference, "
        "a mean over "
        "trainings, with zeros after Pratt [@pratt1959] and the exact distribution under zeros and ties; p values were "
        "adjusted by Holm "
        "within each family of questions [@holm1979]. A difference is called one only if the adjusted p is below 0.05 and "
        "the bootstrap "
        "interval excludes 0. Federated training is called as good as central if two one-sided t tests "
        "[@schuirmann1987tost] reject a "
        f"mean difference of {settings['margin']:g} Dice or more on either side (Holm, 0.05) and the 90% bootstrap interval "
        "lies within "
        f"that margin, {_when(settings['fixed_beforehand'])}. Target sites where the central arm's mean Dice is below "
        f"{settings['least_dice']:g} are in no such comparison, for two arms that failed are not equally good; private arms are "
        "compared without the sites where the same arm without privacy failed. "
        f"With fewer than {FEWEST_SEEDS} trainings of an arm, statements are called exploratory. " + _controls(found)
    )


def _when(fixed_beforehand: bool) -> str:
    return "which was fixed beforehand" if fixed_beforehand else "which was changed after the first trainings"


def _controls(found: StudyFindings) -> str:
    names = {item.name for item in found.controls}
    said = "Controls: Dice at the reference site, whose images must not change, against plain nnU-Net of the same mode"
    if KNOWN_INVERSE in names:
        said += "; and, as sites were simulated, harmonized volumes against the known truth"
    elif TRAVELLING in names:
        said += "; and harmonized volumes of travelling subjects against the same patients at the reference"
    return said + "."


def _quality(study: StudyFile, found: StudyFindings) -> str:
    """Of the numbers that the page shows."""
    reports = list(found.quality.values())

    def measured(name: str) -> bool:
        return any(report.get(name) for report in reports)

    words = (
        f"Travelling subjects were compared with the same patients at {found.reference}, as scanned and as harmonized by each "
        "arm's first training, every channel z-scored over the foreground: root mean squared error over the truth's standard "
        f"deviation (nRMSE), structural similarity in windows of {SSIM_WINDOW} voxels (SSIM) [@wang2004ssim], correlation of "
        "gradient magnitudes with the volume as scanned (edges kept), and the labelled region's contrast-to-noise ratio over the "
        "truth's. Intervals are 95% percentile bootstrap over patients."
    )
    if measured("features"):
        words += (
            " Radiomics features of the labelled region [@vangriethuysen2017radiomics] were compared by Lin's concordance "
            "correlation coefficient (CCC) at each site [@lin1989ccc] and by ICC(2,1) over all sites [@shrout1979icc], as "
            f"medians over features; {GOOD:g} is called good."
        )
    if any((report.get("site_classifier") or {}).get("before") for report in reports):
        words += (
            " A random forest [@breiman2001forests] told the site from these features, in cross-validation that keeps a "
            "patient's volumes together; its balanced accuracy stands beside the 95th percentile with shuffled sites."
        )
    if measured("lesions"):
        values = [str(value) for value in study.report.lesion_labels]
        words += (
            f" Lesions are connected components of {f'labels {joined(values)}' if values else 'the labels'}. The control's first "
            "training, which saw no harmonized volume, segmented both; a lesion is found where it covers "
            f"{100 * DETECTED_OVERLAP:g}% or more of it, and a component that touches no lesion is a false one."
        )
    return words


def _energy(found: StudyFindings) -> str:
    counters = list(dict.fromkeys(name for cost in found.costs for name in cost.counters))
    if not counters:
        return ""
    return f" Energy of the trainings was read from {joined(counters)}: processor packages of the whole machine, visible GPUs."


def _software(results: StudyResults) -> str:
    recorded = [entry for cell in results.finished if (entry := read_environment(cell))]
    if not recorded:
        return "Versions were not recorded."
    used = [
        *recorded,
        *(part for entry in recorded for part in (*entry.get("earlier", ()), entry.get("scored")) if part),
    ]
    versions: dict[str, list[str]] = {}
    for entry in used:
        for name, version in (entry.get("versions") or {}).items():
            versions.setdefault(name, [])
            if version not in versions[name]:
                versions[name].append(version)
    shown = [f"{name} {' and '.join(found)}" for name, found in versions.items()]
    commits, machines = _distinct(used, "git"), _distinct(recorded, "machine")
    words = f"{joined(shown)}; Python {joined(_distinct(used, 'python'))}." if shown else ""
    if commits:
        words += f" Commit {joined([f'`{commit[:12]}`' for commit in commits])}."
    return words + (f" Trained on {joined(machines)}." if machines else "")


def _distinct(recorded: Sequence[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(str(entry[key]) for entry in recorded if entry.get(key)))
