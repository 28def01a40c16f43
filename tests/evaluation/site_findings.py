"""A complete site report made of drawn numbers: what the page is tested and looked at with, before any image is read."""

from __future__ import annotations

import numpy as np

from nnunet_fedharm.differences.findings import (
    AgreementFinding,
    ClassifierFinding,
    CombatFinding,
    EmbeddingFinding,
    Estimate,
    Failure,
    FeatureFinding,
    Findings,
    OutlierFinding,
    PairFinding,
    PartFinding,
    SiteCard,
    VariantFinding,
)

SITES = ("A", "B", "C", "D")
NAMES = (
    "glszm_SmallAreaHighGrayLevelEmphasis",
    "glszm_GrayLevelNonUniformityNormalized",
    "glcm_ClusterProminence",
    "glcm_Contrast",
    "glrlm_LongRunLowGrayLevelEmphasis",
    "firstorder_Skewness",
    "firstorder_Kurtosis",
    "firstorder_90Percentile",
    "ngtdm_Busyness",
    "gldm_DependenceVariance",
    "quality_noise",
    "quality_sharpness",
    "shape_Sphericity",
    "shape_MeshVolume",
)
FAMILY = {"firstorder": "intensity", "shape": "shape", "quality": "quality"}


def make_findings(
    *, mode: str = "pooled", variants: tuple[str, ...] = ("as scanned",), sites: tuple[str, ...] = SITES, seed: int = 0
) -> Findings:
    """Numbers that look like a report's; the further down the variants, the smaller the differences."""
    generator = np.random.default_rng(seed)
    federated = mode == "federated"
    keys = [("MR", "foreground", "z-score"), ("MR", "label anterior", "z-score"), ("MR", "foreground", "raw")]
    return Findings(
        dataset="Dataset910_HippocampusSites",
        created="24 November 2026",
        mode=mode,
        settings={
            "features": {
                "package": "pyradiomics 3.0.1",
                "bin_count": 32,
                "resampling_mm": None,
                "classes": ["glcm", "glszm"],
            },
            "seed": 0,
            "permutations": 200,
        },
        sites=[
            SiteCard(
                site, ["Siemens", "Philips", "GE", None][i % 4], [3.0, 1.5, None][i % 3], "T1w MPRAGE", 45, 45, 40 - i
            )
            for i, site in enumerate(sites)
        ],
        variants=[
            VariantFinding(name, [_part(generator, key, sites, 0.4**index, federated) for key in keys])
            for index, name in enumerate(variants)
        ],
        failures=[Failure(sites[-1], "case_of_patient_7", "The label is empty.")],
        shared=[("measure reply", "moments and histograms of 120 features", 48_200)] if federated else [],
    )


def _part(
    generator: np.random.Generator, key: tuple[str, str, str], sites: tuple[str, ...], size: float, federated: bool
) -> PartFinding:
    centre = {site: size * index for index, site in enumerate(sites)}
    features = [_feature(generator, name, centre, size / (1 + 0.3 * rank)) for rank, name in enumerate(NAMES)]
    families = dict.fromkeys(item.family for item in features)
    return PartFinding(
        *key,
        n=dict.fromkeys(sites, 45),
        families={name: _estimate(generator, 0.7 * size * (0.1 if name == "shape" else 1.0)) for name in families},
        share_significant={name: round(0.9 * size * (0.1 if name == "shape" else 1.0), 2) for name in families},
        features=features,
        pairs=[
            PairFinding(
                first,
                second,
                _estimate(generator, 0.6 * size),
                _estimate(generator, abs(centre[first] - centre[second]) * 0.6 + 0.1),
                mmd=None if federated else 0.2 * size,
                mmd_p=None if federated else 0.005,
                by_family={"intensity": 0.5 * size, "texture": 0.8 * size},
                features=[(NAMES[0], 1.9 * size), (NAMES[2], 1.4 * size)],
            )
            for i, first in enumerate(sites)
            for second in sites[i + 1 :]
        ],
        classifiers=[
            _classifier("linear discriminant on features" if federated else "random forest on features", sites, size),
            *([] if federated else [_classifier("CNN on slices", sites, size)]),
        ],
        embedding=None if federated and size < 1 else _embedding(generator, sites, centre, federated),
        agreement=[
            AgreementFinding(sites[:2], "CCC", "texture", _estimate(generator, 0.7), 0.6, 8, 75),
            AgreementFinding(sites, "ICC(2,1)", "all", _estimate(generator, 0.4), 0.2, 8, 93),
        ],
        combat=CombatFinding(
            _classifier("random forest on features", sites, 0.2 * size), (0.9 * size, 0.05), (0.6, 0.02)
        ),
        outliers=[]
        if federated
        else [OutlierFinding(sites[-1], "case_of_patient_3", 9.4, [("quality_noise", 9.4), ("glcm_Contrast", -6.1)])],
        notes=["Site D has 3 patients: no interval for its medians."],
    )


def _feature(generator: np.random.Generator, name: str, centre: dict[str, float], size: float) -> FeatureFinding:
    draws = {site: generator.normal(3 * size * place, 1.0, 45) for site, place in centre.items()}
    edges = np.linspace(min(d.min() for d in draws.values()), max(d.max() for d in draws.values()), 17)
    return FeatureFinding(
        name=name,
        family=FAMILY.get(name.split("_")[0], "texture"),
        p=0.2 * (1 - size),
        q=0.3 * (1 - size),
        effect=_estimate(generator, 0.9 * size),
        medians={site: float(np.median(values)) for site, values in draws.items()},
        n=180,
        edges=edges.tolist(),
        histogram={site: (np.histogram(values, edges)[0] / 45).tolist() for site, values in draws.items()},
    )


def _classifier(method: str, sites: tuple[str, ...], size: float) -> ClassifierFinding:
    right = int(45 * (0.3 + 0.65 * size))
    wrong = (45 - right) // max(len(sites) - 1, 1)
    confusion = {true: {said: right if true == said else wrong for said in sites} for true in sites}
    accuracy, chance = right / 45, 1 / len(sites)
    return ClassifierFinding(
        method,
        Estimate(accuracy, accuracy - 0.05, accuracy + 0.04),
        chance,
        chance - 0.01,
        chance + 0.08,
        0.005 if size > 0.3 else 0.4,
        200,
        confusion,
        180,
        features=[(NAMES[0], 0.12), (NAMES[10], 0.08)] if "forest" in method else [],
    )


def _embedding(
    generator: np.random.Generator, sites: tuple[str, ...], centre: dict[str, float], federated: bool
) -> EmbeddingFinding:
    points = [
        (site, float(8 * centre[site] + 2 * generator.normal()), float(3 * generator.normal()), f"{site}_{number:03d}")
        for site in sites
        for number in range(45)
    ]
    ellipses = {site: (8 * centre[site], 0.0, 5.0, 7.0, 20.0) for site in sites}
    return EmbeddingFinding("PCA", ("PC 1 (41% of variance)", "PC 2 (17%)"), [] if federated else points, ellipses)


def _estimate(generator: np.random.Generator, value: float) -> Estimate:
    half = 0.04 + 0.05 * float(generator.random())
    return Estimate(value, value - half, value + half)
