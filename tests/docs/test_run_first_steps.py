"""What a reader does first: look at the machine and the data, split, simulate, convert, begin a study, write jobs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest

from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import Release
from nnunet_fedharm.sites.registry import SitesFile
from tests.conftest import BENCHMARK
from tests.datasets.test_convert_bids import write_session
from tests.datasets.test_convert_brats import CHALLENGE
from tests.datasets.test_convert_brats import write_case as write_brats_case
from tests.datasets.test_convert_mamamia import HEADER
from tests.datasets.volumes import write_volume
from tests.docs.pages import REPOSITORY
from tests.docs.reading import follow, lines_with, run

STUDY = "nnunet-fedharm study"
FIRST_LOOK = (
    "nnunet-fedharm doctor",
    "nnunet-fedharm sites check -d 910",
    "nnunet-fedharm sites split -d 910 -o ROOT",
    f"{STUDY} init study1 -d 910 --reference A --labelled-sites A -c 2d --quick",
    f"{STUDY} status study1",
    f'{STUDY} slurm study1 -A PROJECT -t 08:00:00 --at-once 8 --setup "module load Miniforge3" --setup "conda activate fedharm"',
)
LABELS_OF_A = (
    "nnunet-fedharm sites split -d 910 -o ROOT --labelled-sites A",
    f"nnunet-fedharm sites check -d ROOT/sites/A/nnUNet_raw/{BENCHMARK}",
    "nnunet-fedharm privacy show --root ROOT --delta 1e-5",
    f"{STUDY} init study1 -d {BENCHMARK} --reference A --labelled-sites A -c 2d --quick",
    f"{STUDY} init study3d -d 910 --reference A --labelled-sites A C -c 3d_fullres --quick",
    "cp docs/benchmarks/study/study.toml study3d/",
)
SIMULATED = tuple(lines_with("docs/how-to/simulate.md", "simulate-sites"))
CONVERTED = tuple(lines_with("docs/how-to/convert.md", "convert bids"))
JOBS = tuple(lines_with("docs/how-to/slurm.md", "slurm simulate"))
REPORT = tuple(lines_with("docs/how-to/site-report.md", "-o report -np 2"))
NOISE = tuple(lines_with("docs/how-to/privacy.md", "privacy plan"))
EXTRA = tuple(line for line in lines_with("docs/how-to/watch.md", "pip install") if line.startswith("pip "))
RUN = (*FIRST_LOOK, *LABELS_OF_A, *NOISE, *SIMULATED, *CONVERTED, *JOBS, *REPORT, *EXTRA)


@pytest.mark.parametrize("commands", [FIRST_LOOK, LABELS_OF_A], ids=["tutorial", "labels of one site"])
def test_the_first_steps_with_data_of_four_hospitals(commands: tuple[str, ...], hospitals: Path, folder: Path) -> None:
    (folder / "docs").symlink_to(REPOSITORY / "docs")
    said = follow(commands)
    assert (folder / "ROOT" / "sites" / "D").is_dir()
    labelled = {
        path.parents[3].name for path in (folder / "ROOT" / "sites").glob(f"*/nnUNet_raw/{BENCHMARK}/labelsTr/*")
    }
    assert labelled == ({"A"} if commands == LABELS_OF_A else set("ABCD"))
    assert (folder / "study1" / "study.toml").is_file()
    assert "#SBATCH" in said or commands == LABELS_OF_A


def test_noise_for_an_epsilon_is_planned_with_what_a_site_has_spent(hospitals: Path, folder: Path) -> None:
    """ROOT/sites/A is /data/A, and has released one noisy sum before."""
    run("nnunet-fedharm sites split -d 910 -o ROOT")
    release = Release(what="a sum", mechanism="gaussian", noise_multiplier=1.0)
    Ledger(folder / "ROOT" / "sites" / "A" / "fedharm").record(release)
    said = [run(line.replace("/data/A", "ROOT/sites/A")) for line in NOISE]
    alone, after = (float(re.findall(r"noise multiplier ([\d.]+)", text)[0]) for text in said)
    assert after > alone, "the training and what was spent before stay within epsilon together"


def test_hospitals_are_simulated(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """Eight of the reference's cases are seen by three other sites, at home under the names that the page gives."""
    raw = make_raw_dataset(folder / "nnUNet_raw", n_labelled=40, shape=(12, 12, 12))
    follow(SIMULATED)
    made = folder / "nnUNet_raw" / "Dataset911_Simulated"
    sites = SitesFile.load(made / "sites.json")
    assert len(sites.sites) == 4
    assert all(info.simulation is not None for info in sites.sites.values())
    travelling = sorted((made / "imagesTravelling").iterdir())
    assert len(travelling) == 8 * 3
    assert all((made / "imagesTr" / f"A{path.name[1:]}").is_file() for path in travelling)
    assert all((raw / "labelsTr" / path.name.split("_", 1)[1]).samefile(path) for path in (made / "labelsTr").iterdir())
    assert (made / "simulation.json").is_file()


def test_published_layouts_are_converted(folder: Path) -> None:
    """The overview's three lines, DOWNLOAD being another folder in each."""
    brats, mamamia, bids = (folder / name for name in ("brats", "mamamia", "bids"))
    for number in range(2):
        write_brats_case(brats / "data", f"BraTS2021_{number:05d}")
    (brats / "BraTS21-17_Mapping.csv").write_text(
        f"{CHALLENGE}BraTS2021_00000,,UPENN-GBM,1\nBraTS2021_00001,,UPENN-GBM,18\n"
    )
    rows = [f"{patient},{patient[:4]},1,1.5,,GE,model\n" for patient in ("DUKE_001", "DUKE_002", "NACT_01")]
    (mamamia / "segmentations").mkdir(parents=True)
    (mamamia / "clinical_and_imaging_info.csv").write_text(HEADER + "".join(rows))
    for patient, phases in (("DUKE_001", 3), ("DUKE_002", 2), ("NACT_01", 4)):  # one without the third phase
        for phase in range(phases):
            write_volume(mamamia / "images" / patient / f"{patient}_{phase:04d}.nii.gz", seed=phase)
        volume = write_volume(mamamia / "segmentations" / "expert" / f"{patient}.nii.gz", seed=1)
        assert volume.is_file()
    for subject in ("sub-01", "sub-02"):
        write_session(bids, subject)
    (bids / "participants.tsv").write_text("participant_id\tsite\nsub-01\tRome\nsub-02\tOslo\n")
    (bids / "dataset_description.json").write_text(json.dumps({"Name": "Lesions", "BIDSVersion": "1.10.0"}))
    (bids / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n0\tnothing\n5\tlesion\n9\tcyst\n")
    said = [
        run(command.replace("DOWNLOAD", str(place)))
        for command, place in zip(CONVERTED, (brats, mamamia, bids), strict=True)
    ]
    assert all("nnunet-fedharm sites check -d" in text for text in said)
    assert "DUKE_002" in said[1], "left out and listed"
    names = {path.name for path in (folder / "nnUNet_raw").iterdir()}
    assert names == {"Dataset137_BraTS2021", "Dataset201_MAMAMIA", "Dataset300_Lesions"}
    assert SitesFile.load(folder / "nnUNet_raw" / "Dataset300_Lesions" / "sites.json").cases == {
        "sub-01": "Rome",
        "sub-02": "Oslo",
    }


def test_jobs_are_written_as_the_page_on_clusters_says(folder: Path) -> None:
    said = [run(command) for command in JOBS]
    assert all("\n#SBATCH --account=PROJECT\n" in text for text in said)
    assert ["--requeue" in text for text in said] == [True] * 3


def test_sites_are_compared(hospitals: Path, folder: Path) -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(REPORT)
    for report in (folder / "nnUNet_results" / BENCHMARK / "site_report", folder / "report"):
        assert {"report.html", "report.json", "differences.csv", "features.csv", "cache"} <= {
            path.name for path in report.iterdir()
        }
    assert json.loads((folder / "report" / "report.json").read_text())["mode"] == "pooled"


@pytest.mark.skipif(not Path(sys.executable).with_name("pip").exists(), reason="this environment has no pip")
def test_the_extra_for_tensorboard_is_one_that_the_installed_package_has() -> None:
    """pip takes the words without an index; it passes over an extra that it does not know, so the metadata are asked for it."""
    assert "already satisfied: nnunet_fedharm[watch]" in follow(EXTRA)
    assert any(need.startswith("tensorboard") and '"watch"' in need for need in requires("nnunet_fedharm") or [])
