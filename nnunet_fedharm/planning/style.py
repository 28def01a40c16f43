"""Each site's style, measured on its preprocessed training cases: the style bank of the plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.harmonizers.style import FloatArray, Style, volume_quantiles
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.planner import require_configuration
from nnunet_fedharm.planning.preprocess import UNLABELLED_SUFFIX
from nnunet_fedharm.planning.private_style import private_style
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile


def site_style(
    root: NnunetRoot, dataset_name: str, plans: Mapping[str, Any], configuration: str, *, noise_multiplier: float = 0.0
) -> Style:
    """Average over all preprocessed training cases of one site, labelled or not.

    Args:
        noise_multiplier: of `private_style`; 0: the exact average.

    Raises:
        PlanError: nothing is preprocessed for these plans.
        DataError: a preprocessed case cannot be read.
    """
    cases = preprocessed_cases(root, dataset_name, plans, configuration)
    patients = _patients(root.preprocessed / dataset_name / SITES_FILE)
    return _average(
        cases.items(),
        patients,
        description=f"Measuring the style of site {root.path.name}",
        noise_multiplier=noise_multiplier,
    )


def style_by_site(
    root: NnunetRoot,
    dataset_name: str,
    plans: Mapping[str, Any],
    configuration: str,
    *,
    sites: SitesFile | None = None,
    noise_multiplier: float = 0.0,
) -> dict[str, Style]:
    """Central mode: the style of each site whose cases lie together in one preprocessed dataset.

    Args:
        sites: which case is whose; None reads `sites.json` in the preprocessed folder.
        noise_multiplier: of `private_style`; 0: the exact average.

    Returns:
        Site -> style, in the order of sites.json; sites without a training case are left out.

    Raises:
        PlanError: nothing is preprocessed for these plans.
        DataError: sites.json is missing, or does not name the site of a case.
    """
    registry = sites or SitesFile.load(root.preprocessed / dataset_name / SITES_FILE)
    cases = preprocessed_cases(root, dataset_name, plans, configuration)
    homeless = sorted(set(cases) - set(registry.cases))
    if homeless:
        raise DataError(f"{SITES_FILE} does not say which site case {homeless[0]} comes from. Add the case to `cases`.")
    styles = {}
    for site in registry.sites:
        own = [(case, folder) for case, folder in cases.items() if registry.cases[case] == site]
        if own:
            text = f"Measuring the style of site {site}"
            styles[site] = _average(own, registry.patients, description=text, noise_multiplier=noise_multiplier)
    return styles


def preprocessed_cases(
    root: NnunetRoot, dataset_name: str, plans: Mapping[str, Any], configuration: str
) -> dict[str, Path]:
    """Case identifier -> folder, of labelled and unlabelled preprocessed cases.

    Raises:
        PlanError: nothing is preprocessed for these plans.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    require_configuration(plans, configuration)
    labelled = root.preprocessed / dataset_name / plans["configurations"][configuration]["data_identifier"]
    folders = (labelled, labelled.with_name(labelled.name + UNLABELLED_SUFFIX))
    cases = {
        case: folder
        for folder in folders
        if folder.is_dir()
        for case in sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))
    }
    if not cases:
        raise PlanError(
            f"No preprocessed case in {labelled}. Run `nnunet-fedharm plan` (or the federated preparation) first."
        )
    return cases


def _patients(path: Path) -> dict[str, str]:
    return SitesFile.load(path).patients if path.is_file() else {}


def _average(
    cases: Iterable[tuple[str, Path]], patients: Mapping[str, str], *, description: str, noise_multiplier: float
) -> Style:
    """Mean of the cases' quantile functions: the barycentre of their histograms, every case weighing the same.

    With noise every patient weighs the same, whose own cases are averaged first.
    """
    if noise_multiplier > 0:
        found = patient_styles(cases, patients, description=description)
        return private_style(*found, noise_multiplier=noise_multiplier, noise=SecureNoise())
    quantiles, offsets = zip(*_measured(cases, description).values(), strict=True)
    return Style(np.mean(quantiles, axis=0), np.mean(offsets, axis=0), len(quantiles))


def patient_styles(
    cases: Iterable[tuple[str, Path]], patients: Mapping[str, str], *, description: str
) -> tuple[FloatArray, FloatArray]:
    """Quantiles (N, C, Q) and offsets (N, C), a row a patient, the mean over their cases; exact, so they stay at this place.

    Args:
        cases: (identifier, folder).
        patients: case -> patient; a case that is not here is its own patient.
        description: of the progress bar.
    """
    measured = _measured(cases, description)
    members: dict[str, list[str]] = {}
    for case in measured:
        members.setdefault(patients.get(case, case), []).append(case)
    means = [[np.mean([measured[case][i] for case in own], axis=0) for own in members.values()] for i in range(2)]
    return np.stack(means[0]), np.stack(means[1])


def _measured(cases: Iterable[tuple[str, Path]], description: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    return {case: _measure(case, folder) for case, folder in tqdm(list(cases), desc=description, leave=False)}


def _measure(case: str, folder: Path) -> tuple[FloatArray, FloatArray]:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    try:
        data, *_ = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
        image = np.asarray(data[:])
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"The preprocessed case {case} in {folder} cannot be read ({error}). Delete the folder and preprocess again."
        ) from error
    return volume_quantiles(image)
