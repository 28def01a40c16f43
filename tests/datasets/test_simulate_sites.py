"""A raw dataset rendered as several scanners: shares, travelling subjects, ground truth, records, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.datasets.simulate import simulate_sites
from nnunet_fedharm.datasets.simulate_config import PRESET, Simulation, load_simulation, parse_site, preset
from nnunet_fedharm.datasets.travelling import load_travelling
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.checks import check_raw_dataset
from nnunet_fedharm.sites.registry import SitesFile

EFFECTS = {"tone": [1, 2], "bias": 0.2, "noise": [0.02, 0.04], "resolution_loss": [1, 1, 2], "point_spread_mm": 1.5}


def simulation(**options: object) -> Simulation:
    sites = {
        "A": parse_site({}, where="A"),
        "B": parse_site({"vendor": "GE", "field": 3, "effects": EFFECTS}, where="B"),
        "C": parse_site({"effects": {"scale": [100, 200]}}, where="C"),
    }
    return Simulation(sites=sites, **{"reference": "A", "travelling": 2, **options})  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    return make_raw_dataset(tmp_path / "source", n_labelled=12, n_unlabelled=3, shape=(10, 11, 12))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def test_every_case_goes_to_one_site_and_travellers_to_all(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "Dataset911_Simulated"
    simulate_sites(source, out, simulation())
    registry = SitesFile.load(out / "sites.json")
    assert {site: len(registry.cases_of(site)) for site in "ABC"} == {"A": 5, "B": 5, "C": 5}
    assert len(list((out / "imagesUnlabelled").iterdir())) == 3
    names = sorted(path.name for path in (out / "imagesTravelling").iterdir())
    assert len(names) == 4
    assert {name[0] for name in names} == {"B", "C"}
    assert len(list((out / "labelsTravelling").iterdir())) == 4
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 12
    check_raw_dataset(out, site="all")


def test_ground_truth_pairs_share_geometry_and_labels_and_can_be_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate_sites(source, out, simulation())
    for path in (out / "imagesTravelling").iterdir():
        home = out / "imagesTr" / f"A_{path.name.split('_', 1)[1]}"
        seen, truth = nibabel.load(path), nibabel.load(home)
        np.testing.assert_array_equal(seen.affine, truth.affine)
        assert seen.shape == truth.shape
        label = path.name.replace("_0000", "")
        home_label = home.name.replace("_0000", "")
        assert (out / "labelsTravelling" / label).samefile(out / "labelsTr" / home_label)
    data = load_travelling(out, sites=("A", "B", "C"), reference="A")
    assert {site: len(pairs) for site, pairs in data.pairs.items()} == {"A": 2, "B": 2, "C": 2}
    for seen, truth in data.pairs["C"]:
        np.testing.assert_allclose(seen, truth, atol=1e-4)  # C only scales, which z-scores take out
    assert not np.allclose(*data.pairs["B"][0], atol=0.1)


def test_the_negative_control_and_all_labels_are_the_sources_files(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate_sites(source, out, simulation())
    for path in (out / "imagesTr").glob("A_*"):
        assert path.samefile(source / "imagesTr" / path.name.removeprefix("A_"))
    for path in (out / "labelsTr").iterdir():
        assert path.samefile(source / "labelsTr" / path.name[2:])


def test_results_do_not_depend_on_processes_or_other_cases(source: Path, tmp_path: Path) -> None:
    simulate_sites(source, tmp_path / "one", simulation())
    simulate_sites(source, tmp_path / "two", simulation(), num_processes=2)
    simulate_sites(source, tmp_path / "other", simulation(seed=1))
    first = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*.nii.gz"))
    assert first == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").glob("*/*.nii.gz"))
    for name in first:
        assert (voxels(tmp_path / "one" / name) == voxels(tmp_path / "two" / name)).all()
    assert (tmp_path / "one" / "sites.json").read_text() == (tmp_path / "two" / "sites.json").read_text()
    theirs = sorted(path.relative_to(tmp_path / "other") for path in (tmp_path / "other").glob("*/*.nii.gz"))
    assert first != theirs


def test_sites_json_says_how_to_repeat_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate_sites(source, out, simulation(seed=5))
    info = SitesFile.load(out / "sites.json").sites["B"]
    assert (info.vendor, info.field) == ("GE", 3.0)
    assert info.simulation is not None
    assert info.simulation["seed"] == 5
    again = parse_site({"effects": info.simulation["effects"]}, where="again")
    assert again.effects == simulation().sites["B"].effects
    record = json.loads((out / "simulation.json").read_text())
    assert len(record["travellers"]) == 2
    drawn = next(values for name, values in record["drawn"].items() if name.startswith("B_"))
    assert 1 <= drawn[0]["tone"] <= 2


def test_an_interrupted_rendering_goes_on_and_another_one_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate_sites(source, out, simulation())
    lost, kept = sorted((out / "imagesTr").glob("B_*"))[:2]
    before = (voxels(lost), kept.stat().st_ino)
    lost.unlink()
    simulate_sites(source, out, simulation())
    assert (voxels(lost) == before[0]).all()
    assert kept.stat().st_ino == before[1]
    with pytest.raises(SetupError, match="made with other options"):
        simulate_sites(source, out, simulation(seed=9))
    (out / "imagesTravelling" / "B_old_0000.nii.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="B_old_0000"):
        simulate_sites(source, out, simulation())


def test_too_few_cases_and_wrong_files_are_refused_by_name(
    tmp_path: Path, source: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    small = make_raw_dataset(tmp_path / "small", n_labelled=5)
    with pytest.raises(DataError, match="every site needs two cases"):
        simulate_sites(small, tmp_path / "out", simulation(travelling=0))
    with pytest.raises(DataError, match="every site needs two cases"):
        simulate_sites(source, tmp_path / "out", simulation(travelling=3))
    broken = sorted((source / "imagesTr").iterdir())
    for path in broken:
        nibabel.save(nibabel.Nifti1Image(np.ones((10, 11, 12), np.float32), np.eye(4)), path)
    with pytest.raises(DataError, match=r"Site [BC], case case\d+: .*constant"):
        simulate_sites(source, tmp_path / "out", simulation())
    (source / "imagesTr" / "case-000_0000.nii.gz").write_bytes(broken[0].read_bytes())
    (source / "imagesTr" / "case_000_0000.nii.gz").write_bytes(broken[0].read_bytes())
    with pytest.raises(DataError, match="differ in _ and - only"):
        simulate_sites(source, tmp_path / "out2", simulation())


def test_the_command_reads_yaml_and_prints_a_table(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    sites = tmp_path / "sites.yaml"
    sites.write_text(
        "reference: home\nsites:\n  away:\n    sequence: blurred\n    effects: {point_spread_mm: [2, 3]}\n  home:\n"
    )
    words = ["-d", str(source), "-o", str(tmp_path / "out"), "--sites", str(sites), "--travelling", "1", "--seed", "3"]
    assert main(["simulate-sites", *words]) == 0
    shown = capsys.readouterr().out
    assert "1 at home" in shown
    assert "blurred" in shown
    assert main(["simulate-sites", *words[:4], "--preset", "7"]) == 2
    assert "--preset takes 2 to 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "needs a mapping `sites`"),
        ('{"sites": {"A": {}}}', "at least two sites"),
        ('{"sites": {"A": {}, "B_1": {}}}', "only letters"),
        ('{"sites": {"A": {}, "B": {"colour": 1}}}', "unknown key 'colour'"),
        ('{"sites": {"A": {}, "B": {"effects": {"blur": 1}}}}', "unknown key 'blur'"),
        ('{"sites": {"A": {}, "B": {"effects": {"noise": "much"}}}}', "not understood"),
        ('{"sites": {"A": {}, "B": {"effects": {"pulse_sequence": {"kind": "epi", "tr_ms": 1, "te_ms": 1}}}}}', "epi"),
        ('{"sites": {"A": {}, "B": {}}, "reference": "C"}', "reference C is not among"),
        ('{"sites": {"A": {}, "B": {}}, "tissues": {"bone": 1}}', "Unknown tissues bone"),
        ('{"sites": {"A": {}, "B": {}}, "tissues": {"grey": "one"}}', "needs label values"),
        ('{"sites": {"A": {}, "B": {}}, "contrast": "CT"}', "Unknown contrast"),
        ("no json", "cannot be read"),
    ],
)
def test_wrong_sites_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sites.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_simulation(path)


def test_every_preset_site_can_be_rendered(tmp_path: Path) -> None:
    """On a volume with three tissues, as the pulse sequences need."""
    from nnunet_fedharm.datasets.simulate_render import render
    from tests.datasets.test_simulate_operators import SPACING, phantom

    raw, _ = phantom()
    found = preset(len(PRESET), seed=0)
    seen = {
        name: render(raw, SPACING, site.effects, seed=0, site=name, case="x", channel=0)
        for name, site in found.sites.items()
    }
    inside = raw > 0
    assert np.corrcoef(seen["D"][inside], raw[inside])[0, 1] < -0.5
    for name in "BCF":
        assert 0.5 < np.corrcoef(seen[name][inside], raw[inside])[0, 1] < 1
    assert all(np.isfinite(volume).all() and (volume >= 0).all() for volume in seen.values())


@pytest.mark.benchmark_data
def test_real_hippocampus_crops_can_be_rendered(benchmark_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
        for path in sorted((benchmark_data / name).glob("A_*"))[:8]:
            (source / name / path.name).symlink_to(path)
    (source / "dataset.json").write_text((benchmark_data / "dataset.json").read_text())
    simulate_sites(source, tmp_path / "out", preset(4, travelling=0))
    check_raw_dataset(tmp_path / "out", site="all")
