"""One case: which parts there are, pyradiomics' own numbers in them, and what changes with intensities and what does not."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.checks import CaseVolumes
from nnunet_fedharm.sites.features.measure import measure_volumes, zscore_parameters
from nnunet_fedharm.sites.features.options import FeatureOptions
from nnunet_fedharm.sites.features.radiomics import TEXTURE_CLASSES, extract_features, shape_features
from nnunet_fedharm.sites.features.regions import label_regions

pyradiomics = pytest.importorskip("radiomics", reason="pyradiomics is not installed")
REGIONS = label_regions({"background": 0, "core": 1, "rim": 2})
SPACING = (2.0, 1.0, 0.5)


def volumes(seed: int = 0, channels: int = 1) -> CaseVolumes:
    rng = np.random.default_rng(seed)
    images = rng.normal(200, 30, (channels, 14, 18, 20)).astype(np.float32)
    label = np.zeros(images.shape[1:])
    label[3:10, 4:12, 5:15] = 2
    label[5:8, 6:10, 7:12] = 1
    images[:, label == 2] += 60
    return CaseVolumes(images, label, SPACING)


def directly(image: np.ndarray, mask: np.ndarray, name: str) -> dict[str, float]:
    """pyradiomics' feature class, called without its extractor."""
    pictures = [sitk.GetImageFromArray(item) for item in (image.astype(np.float64), mask.astype(np.uint8))]
    for picture in pictures:
        picture.SetSpacing(SPACING[::-1])
    instance = pyradiomics.getFeatureClasses()[name](*pictures, binCount=32)
    instance.enableAllFeatures()
    return {f"{name}_{feature}": float(value) for feature, value in instance.execute().items()}


def test_each_label_and_the_foreground_have_both_scales_and_quality_stands_with_the_image() -> None:
    found = measure_volumes(volumes(channels=2), ["T1", "T2"], REGIONS, FeatureOptions())
    regions = ("label core", "label rim", "foreground")
    expected = {(c, r, s) for c in ("T1", "T2") for r in regions for s in ("z-score", "raw")}
    assert set(found.parts) == expected | {(c, "image", "raw") for c in ("T1", "T2")}
    assert not found.problems
    assert all(name.startswith("quality_") for name in found.parts["T1", "image", "raw"])


@pytest.mark.parametrize("name", ["firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm", "shape"])
def test_raw_features_are_pyradiomics_own(name: str) -> None:
    case = volumes()
    found = measure_volumes(case, ["MR"], REGIONS, FeatureOptions()).parts["MR", "label rim", "raw"]
    expected = directly(case.images[0], case.label == 2, name)
    own = {feature: value for feature, value in found.items() if feature.startswith(f"{name}_")}
    assert len(own) > 4
    assert own == pytest.approx({feature: expected[feature] for feature in own}, rel=1e-7)


def test_first_order_on_the_z_score_is_pyradiomics_on_nnunets_z_score() -> None:
    case = volumes()
    scaled = (case.images[0].astype(float) - case.images[0].mean(dtype=float)) / case.images[0].std(dtype=float)
    found = measure_volumes(case, ["MR"], REGIONS, FeatureOptions()).parts["MR", "label core", "z-score"]
    expected = directly(scaled, case.label == 1, "firstorder")
    own = {feature: value for feature, value in found.items() if feature.startswith("firstorder_")}
    assert own == pytest.approx({feature: expected[feature] for feature in own}, rel=1e-6)


def test_z_score_parameters_are_nnunets() -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization

    rng = np.random.default_rng(0)
    for size, masked in ((19, False), (8, True)):
        image = np.zeros((1, 20, 20, 20), np.float32)
        image[:, 1 : 1 + size, 1 : 1 + size, 1 : 1 + size] = rng.normal(5, 2, (size,) * 3)
        data, seg, _ = crop_to_nonzero(image)
        assert (data.size < 0.75 * image.size) == masked
        scheme = ZScoreNormalization(masked, {})
        expected = scheme.run(data[0].copy(), seg[0])
        ((mean, deviation),) = zscore_parameters(image, image)
        inside = seg[0] >= 0
        assert ((data[0] - mean) / deviation)[inside] == pytest.approx(expected[inside], abs=1e-5)


def test_intensity_changes_leave_shape_and_a_linear_one_leaves_texture() -> None:
    case = volumes()
    linear, bent = 4 * case.images + 128, (case.images / 100) ** 3
    before, after, other = (
        measure_volumes(case, ["MR"], REGIONS, FeatureOptions(), images).parts["MR", "foreground", "raw"]
        for images in (None, linear, bent)
    )
    shapes = [name for name in before if name.startswith("shape_")]
    textures = [name for name in before if name.split("_")[0] in TEXTURE_CLASSES]
    assert len(shapes) == 14
    assert len(textures) == 75
    assert all(before[name] == after[name] == other[name] for name in shapes)
    assert [after[name] for name in textures] == pytest.approx([before[name] for name in textures])
    assert other["glcm_Contrast"] != pytest.approx(before["glcm_Contrast"], rel=1e-3)
    assert after["firstorder_Mean"] == pytest.approx(4 * before["firstorder_Mean"] + 128)


def test_regions_that_cannot_be_measured_are_told_and_the_others_measured() -> None:
    case = volumes()
    case.label[case.label == 1] = 2
    case.label[0, 0, :10] = 1
    found = measure_volumes(case, ["MR"], REGIONS, FeatureOptions())
    assert found.problems == ["Region label core has 10 voxels, fewer than 32, which texture needs."]
    assert ("MR", "foreground", "raw") in found.parts
    case.label[case.label == 1] = 0
    assert measure_volumes(case, ["MR"], REGIONS, FeatureOptions()).problems == [
        "Region label core is empty in this case."
    ]


def test_a_flat_region_is_told_with_its_channel() -> None:
    case = volumes(channels=2)
    case.images[1, case.label == 1] = 7
    found = measure_volumes(case, ["T1", "T2"], REGIONS, FeatureOptions())
    assert found.problems == ["Channel T2, label core: every voxel has the same value, so there is nothing to measure."]
    assert ("T1", "label core", "raw") in found.parts


def test_a_case_without_label_has_the_body_and_quality() -> None:
    case = CaseVolumes(volumes().images, None, SPACING)
    found = measure_volumes(case, ["MR"], REGIONS, FeatureOptions(scales=("z-score",)))
    assert set(found.parts) == {("MR", "image", "z-score"), ("MR", "image", "raw")}
    body = found.parts["MR", "image", "z-score"]
    assert "glcm_Contrast" in body
    assert not any(name.startswith("shape") for name in body)


def test_texture_of_a_large_region_is_that_of_its_central_part() -> None:
    case = volumes()
    small = measure_volumes(case, ["MR"], REGIONS, FeatureOptions(max_voxels=200)).parts["MR", "foreground", "raw"]
    whole = measure_volumes(case, ["MR"], REGIONS, FeatureOptions()).parts["MR", "foreground", "raw"]
    assert small["firstorder_Mean"] == whole["firstorder_Mean"]
    assert small["shape_MeshVolume"] == whole["shape_MeshVolume"]
    assert small["glrlm_GrayLevelNonUniformity"] < whole["glrlm_GrayLevelNonUniformity"]


def test_only_the_chosen_channels_are_measured() -> None:
    found = measure_volumes(volumes(channels=2), ["T1", "T2"], REGIONS, FeatureOptions(channels=("T2",)))
    assert {channel for channel, _, _ in found.parts} == {"T2"}


def test_pictures_are_measured_in_their_plane() -> None:
    case = volumes()
    flat = CaseVolumes(case.images[:, 6:7], case.label[6:7], (999.0, 1.0, 0.5))
    found = measure_volumes(flat, ["MR"], {"foreground": (1, 2)}, FeatureOptions())
    values = found.parts["MR", "foreground", "raw"]
    assert values["shape_PixelSurface"] == pytest.approx(80 * 0.5)
    assert values["glcm_Contrast"] == pytest.approx(
        extract_features(case.images[0, 6].astype(float), case.label[6] > 0, (1.0, 0.5))["glcm_Contrast"]
    )


def test_a_region_of_one_slice_in_a_volume_is_measured_in_3d() -> None:
    case = volumes()
    case.label[...] = 0
    case.label[6, 4:14, 4:14] = 1
    found = measure_volumes(case, ["MR"], {"foreground": (1, 2)}, FeatureOptions())
    assert found.problems == []
    assert found.parts["MR", "foreground", "raw"]["shape_VoxelVolume"] == pytest.approx(100)


def test_resampling_makes_features_of_two_spacings_alike() -> None:
    rng = np.random.default_rng(0)
    from scipy import ndimage

    fine = ndimage.gaussian_filter(rng.normal(size=(32, 32, 32)), 3)
    mask = np.zeros(fine.shape, bool)
    mask[6:26, 6:26, 6:26] = True
    coarse, coarse_mask = fine[::2, ::2, ::2], mask[::2, ::2, ::2]
    same = extract_features(fine[::2, ::2, ::2], coarse_mask, (2.0,) * 3)
    settings = {"resample_mm": 2.0, "classes": ("glcm",)}
    down = extract_features(fine, mask, (1.0,) * 3, **settings)["glcm_Contrast"]
    plain = extract_features(fine, mask, (1.0,) * 3, classes=("glcm",))["glcm_Contrast"]
    assert extract_features(coarse, coarse_mask, (2.0,) * 3, **settings)["glcm_Contrast"] == same["glcm_Contrast"]
    assert abs(down - same["glcm_Contrast"]) < 0.3 * abs(plain - same["glcm_Contrast"])


def test_the_shape_of_a_large_surface_is_measured_on_fewer_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_fedharm.sites.features import radiomics

    grid = np.indices((40, 40, 40)) - 19.5
    ball = (grid**2).sum(axis=0) < 17**2
    exact = shape_features(ball, (1.0, 1.0, 1.0))
    monkeypatch.setattr(radiomics, "MAX_SURFACE_VOXELS", 1500)
    for name, value in shape_features(ball, (1.0, 1.0, 1.0)).items():
        assert value == pytest.approx(exact[name], rel=0.08), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ("log",)}, "Unknown intensity scales"),
        ({"scales": ()}, "choose from z-score, raw"),
        ({"bin_count": 1}, "bin_count must be at least 2"),
        ({"min_voxels": 9, "max_voxels": 8}, "max_voxels 8"),
        ({"resample_mm": 0.0}, "above 0 mm"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        FeatureOptions(**options)
