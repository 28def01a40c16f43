"""Our features are pyradiomics', with the stated settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fedharm.errors import DataError, SetupError, ShapeError
from nnunet_fedharm.sites.features import radiomics as ours

pyradiomics = pytest.importorskip("radiomics", reason="pyradiomics is not installed")


@pytest.fixture(scope="module")
def phantom() -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=(9, 10, 12)).astype(np.float32)
    region = np.zeros(image.shape, bool)
    region[2:7, 2:8, 3:10] = True
    return image, region


def test_features_equal_pyradiomics_called_directly(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    image, region = phantom
    spacing = (3.0, 0.5, 1.5)
    picture, mask = sitk.GetImageFromArray(image.astype(np.float64)), sitk.GetImageFromArray(region.astype(np.uint8))
    for item in (picture, mask):
        item.SetSpacing((1.5, 0.5, 3.0))
    expected = {}
    classes = ("firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")
    for name in classes:
        feature_class = pyradiomics.getFeatureClasses()[name]
        instance = feature_class(picture, mask, binCount=32)
        instance.enableAllFeatures()
        expected.update({f"{name}_{feature}": float(value) for feature, value in instance.execute().items()})
    found = ours.extract_features(image, region, spacing)
    assert len(found) == 93
    assert {name: expected[name] for name in found} == pytest.approx(found, rel=1e-9)


def test_first_order_features_equal_numpy(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    image, region = phantom
    found = ours.extract_features(image, region, (1.0, 1.0, 1.0))
    values = image[region].astype(np.float64)
    assert found["firstorder_Mean"] == pytest.approx(values.mean())
    assert found["firstorder_Variance"] == pytest.approx(values.var())
    assert found["firstorder_90Percentile"] == pytest.approx(np.percentile(values, 90))
    assert found["firstorder_TotalEnergy"] == pytest.approx((values**2).sum())
    doubled = ours.extract_features(image, region, (2.0, 1.0, 1.0))
    assert doubled["firstorder_TotalEnergy"] == pytest.approx(2 * (values**2).sum())


def test_texture_does_not_change_with_gain_and_offset(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    """A fixed number of grey levels makes MR's missing unit irrelevant."""
    image, region = phantom
    first, second = (ours.extract_features(v, region, (1.0, 1.0, 1.0)) for v in (image, 64 * image + 16))
    assert first["glcm_Contrast"] == pytest.approx(second["glcm_Contrast"])
    assert first["glszm_ZoneEntropy"] == pytest.approx(second["glszm_ZoneEntropy"])
    assert first["firstorder_Mean"] != pytest.approx(second["firstorder_Mean"])


def test_a_slice_is_taken_as_a_volume_of_one_slice(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    image, region = phantom[0][4], phantom[1][4]
    flat = ours.extract_features(image, region, (0.5, 1.5))
    assert flat == ours.extract_features(image[None], region[None], (1.0, 0.5, 1.5))


def test_a_region_that_fills_its_image_is_measured(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    image = phantom[0]
    margin = np.pad(image, 3)
    inside = ours.extract_features(image, np.ones(image.shape, bool), (1.0, 1.0, 1.0))
    assert inside == pytest.approx(
        ours.extract_features(margin, np.pad(np.ones(image.shape, bool), 3), (1.0, 1.0, 1.0))
    )


def test_regions_and_shapes_that_cannot_work_are_refused(phantom: tuple[np.ndarray, np.ndarray]) -> None:
    image, region = phantom
    with pytest.raises(ShapeError, match="do not fit"):
        ours.extract_features(image, region[1:], (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="0 voxels"):
        ours.extract_features(image, np.zeros_like(region), (1.0, 1.0, 1.0))


@pytest.fixture
def without_pyradiomics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None in sys.modules makes the real import statement fail as it does where the package is missing."""
    monkeypatch.setitem(sys.modules, "radiomics", None)
    monkeypatch.setitem(sys.modules, "radiomics.featureextractor", None)
    ours.feature_extractor.cache_clear()
    yield
    ours.feature_extractor.cache_clear()


def test_a_missing_package_names_the_command_that_installs_it(
    without_pyradiomics: None, phantom: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(SetupError, match=r"pip install --no-build-isolation pyradiomics==3\.0\.1"):
        ours.extract_features(*phantom, (1.0, 1.0, 1.0))
