"""Commands of README and docs are run as they stand, on small made-up data; what is not run is listed below with its reason.

A new or changed command that is neither run nor listed fails, and so does an entry that no page has any more. Sizes for two
cores are put behind a command where it would train for hours (`MORE`); the last option counts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.policy import policy_from_dict
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from tests.datasets.test_convert_brats import CHALLENGE
from tests.datasets.test_convert_brats import write_case as write_brats_case
from tests.datasets.test_convert_mamamia import HEADER
from tests.datasets.volumes import write_volume
from tests.docs.pages import BLOCKS, SHELL, commands_of

NAME = "Dataset910_HippocampusSites"
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
    f"nnunet-fedharm sites check -d ROOT/sites/A/nnUNet_raw/{NAME}",
    "nnunet-fedharm privacy show --root ROOT --delta 1e-5",
    f"{STUDY} init study1 -d {NAME} --reference A --labelled-sites A -c 2d --quick",
    f"{STUDY} init study3d -d 910 --reference A --labelled-sites A C -c 3d_fullres --quick",
)
HOSPITALS = (
    'nnunet-fedharm server init study --host fed.example.org --name "Two hospitals" --sites north south',
    f"nnunet-fedharm sites check -d north/nnUNet_raw/{NAME}",
    "nnunet-fedharm site join consortium.toml --site north --site-root north",
    "nnunet-fedharm site policy north",
    "nnunet-fedharm server register study north north.pub",
    "nnunet-fedharm server register study south south.pub",
    "nnunet-fedharm privacy show --site-root north",
)
BRATS = (
    "nnunet-fedharm convert brats2021 BraTS2021_Training_Data -o $nnUNet_raw -d 137 --regions",
    "nnunet-fedharm sites check -d $nnUNet_raw/Dataset137_BraTS2021",
    "nnunet-fedharm sites split -d $nnUNet_raw/Dataset137_BraTS2021 -o consortium",
    f"{STUDY} init brats-study -d $nnUNet_raw/Dataset137_BraTS2021 --reference site-01",
    f"{STUDY} slurm brats-study -A PROJECT -t 2-00:00:00 --at-once 8",
)
MAMAMIA = (
    "nnunet-fedharm convert mamamia MAMA-MIA -o $nnUNet_raw -d 201 --phases 0 1 2 --skip-missing --official-split",
    "nnunet-fedharm sites check -d $nnUNet_raw/Dataset201_MAMAMIA",
    "nnunet-fedharm sites split -d $nnUNet_raw/Dataset201_MAMAMIA -o consortium --labelled-sites DUKE",
)
SIMULATED = (
    "nnunet-fedharm simulate-sites -d 001 -o $nnUNet_raw/Dataset911_Simulated --preset 4 --travelling 8 --seed 0",
)
PLUGIN = (
    "nnunet-fedharm plan -d 910 -c 3d_fullres --harmonizer polarity --reference A",
    "nnUNetv2_train 910 3d_fullres 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans",
    "nnUNetv2_predict -d 910 -c 3d_fullres -f 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans -i IMAGES -o PREDICTIONS",
    "nnunet-fedharm evaluate -p PREDICTIONS -g LABELS --sites sites.json -o metrics.json",
    "nnunet-fedharm harmonize -m RESULTS_FOLDER -i IMAGES -o OUT --site B",
    'nnunet-fedharm adapt -m MODEL -i IMAGES -o NEW_MODEL --site E --scanner "1.5 T, T2"',
    "nnunet-fedharm predict -m MODEL -i IMAGES -o PREDICTIONS --style volume",
)
WHOLE_STUDY = (
    f"{STUDY} init study1 -d 910 --reference A --labelled-sites A -c 2d --quick",
    f"{STUDY} prepare study1",
    f"{STUDY} run study1 --dry-run",
    f"{STUDY} run study1",
    f"{STUDY} report study1",
)
SMALL = (
    " --base-features 4 --max-features 8 --batch-size 2 --patch-size 16 16 16 --harmonizer-epochs 1 --segmenter-epochs 1"
    " --iterations-per-epoch 2 --val-iterations-per-epoch 1 -np 1 --skip-check"
)
MORE = {
    r"nnunet-fedharm plan ": SMALL,
    r"nnunet-fedharm (predict|harmonize|adapt) ": " --device cpu",
    r"nnUNetv2_(train|predict) ": " -device cpu",
    r"nnunet-fedharm (study )?slurm ": " --dry-run",
    r"nnunet-fedharm sites check ": " -np 1",
    r"nnunet-fedharm study run ": " --device cpu",
}

ELSEWHERE = (
    (
        r"python3 start.py (demo|test)",
        2,
        "makes an environment and runs this suite; tests/packaging/test_start.py has its parts",
    ),
    (r"python benchmarks/.*", 13, "hours of computing; results and their date stand on the page"),
    (r"cp docs/benchmarks/study/study.toml study3d/", 1, "goes with the benchmark above it"),
    (f"{STUDY} (prepare|run|report) study3d", 3, "goes with the benchmark above it"),
    (
        r"nnunet-fedharm (server (start|sites|run)|site (check|start)) .*",
        6,
        "a server under that name: test_real_consortium.py",
    ),
    (
        r"nnunet-fedharm watch .*|nnunet-fedharm status .* --watch",
        2,
        "goes on until it is stopped: tests/evaluation/watch",
    ),
    (r"(if ! )?nnunet-fedharm status .*", 4, "of a run that goes on: tests/evaluation/watch, tests/federation/watch"),
    (r"tensorboard --logdir BOARD|pip install 'nnunet_fedharm\[watch\]'", 2, "starts a server; installs from an index"),
    (
        r"export FLWR_.*(.|\n)*|mkdir -p \$FLWR_HOME|flower-su\w+ .*|flwr run .*",
        12,
        "Flower by hand, between processes that stay: tests/federation/deploy; its own parser checks the words",
    ),
    (
        r"nnunet-fedharm federate .*",
        10,
        "federations at full length: tests/federation/test_flower*.py, test_in_process.py",
    ),
    (r"nnunet-fedharm sites report .*", 9, "minutes of statistics: tests/evaluation/test_site_report.py"),
    (r"nnunet-fedharm audit .*", 8, "of trained models and planned roots: tests/evaluation/audit"),
    (
        r"nnunet-fedharm convert (brats2021|mamamia|bids) +DOWNLOAD .*",
        3,
        "an overview; two run below, bids in its own test",
    ),
    (r"nnunet-fedharm plan .*(--epsilon|-d 137|-d 201).*", 3, "the same command with other data or options runs"),
    (r"nnUNetv2_train (137|201|910 3d_fullres all) .*", 3, "the same command with other data or another fold runs"),
    (r"nnUNetv2_predict -d 137 .*", 1, "the same command with other data runs"),
    (r"nnUNetv2_predict .*(-o OUT|-o segmented|-o OUTPUT).*", 3, "the same command with another folder or fold runs"),
    (
        r"nnUNetv2_predict_from_modelfolder .*",
        4,
        "stock nnU-Net on a model of the steps before: tests/evaluation/test_adapt.py",
    ),
    (r"nnUNetv2_install_pretrained_model_from_zip .*|nnunet-fedharm export .*", 2, "tests/study/test_export.py"),
    (
        r"MODEL=.*|RAW=.*|data=.*(.|\n)*|for SITE in .*(.|\n)*",
        4,
        "models and predictions that a download's federation left",
    ),
    (
        r"nnunet-fedharm evaluate .*(metrics.json|metrics-official.json)",
        1,
        "predictions of a download's model; the short form runs",
    ),
    (r"nnunet-fedharm (predict|harmonize) .*(-d 201|official/).*", 2, "a model of a download"),
    (
        r"nnunet-fedharm (harmonize|quality) .*",
        4,
        "travelling subjects of a trained model: tests/evaluation/test_quality.py",
    ),
    (r"nnunet-fedharm privacy (plan|show) .*", 3, "plans run in test_snippets.py; /data/A is a hospital's folder"),
    (r"nnunet-fedharm slurm .*", 3, "run as dry runs in test_snippets.py"),
    (
        r"export nnUNet_preprocessed=study1/.*|nnUNetv2_(extract_fingerprint|move_plans_\w+|preprocess|train 911) .*",
        5,
        "stock nnU-Net at full length; tests/study/test_study_file.py starts from such a folder",
    ),
    (f"{STUDY} run study1 (--only|--parallel) .*", 2, "certain cells, several GPUs: tests/study"),
    (f"{STUDY} (prepare|run|report) brats-study.*", 3, "a download"),
    (r"export nnUNet_raw=north/.*", 1, "names of folders for the line below it"),
    (r"10 volumes|fold +distance.*|all +0\.117.*", 3, "what a command prints"),
)
"""Commands that are not run here (all of each), how many of them there are, and why; the first entry that fits counts."""
RUN = {*FIRST_LOOK, *LABELS_OF_A, *HOSPITALS, *BRATS, *MAMAMIA, *SIMULATED, *PLUGIN, *WHOLE_STUDY}


def listed(command: str) -> str | None:
    """The entry of ELSEWHERE that a command falls under."""
    return next((item for item, _, _ in ELSEWHERE if re.fullmatch(item, command)), None)


def test_every_command_is_run_or_listed_with_a_reason_and_no_entry_is_old() -> None:
    found = {command: str(block) for block in SHELL for command in commands_of(block)}
    rest = {command: where for command, where in found.items() if command not in RUN}
    missing = [f"{where}: {command}" for command, where in rest.items() if listed(command) is None]
    assert missing == [], "run these in a scenario, or say in ELSEWHERE why they cannot be"
    assert [command for command in RUN if command not in found] == [], "no page has them any more"
    counted = Counter(listed(command) for command in rest)
    wrong = {item: counted[item] for item, count, _ in ELSEWHERE if counted[item] != count}
    assert wrong == {}, "commands came or went: see whether the reason is theirs too, and mend the number"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with nnU-Net's three folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def hospitals(folder: Path, make_raw_dataset: Callable[..., Path]) -> Path:
    """The raw dataset 910 of four hospitals, five small cases each."""
    raw = folder
    for index, site in enumerate("ABCD"):
        raw = make_raw_dataset(
            folder / "nnUNet_raw",
            name=NAME,
            n_labelled=5,
            shape=(16, 16, 16),
            site=f"{site}_",
            gain=1.0 + index,
            seed=index,
        )
    cases = {path.name.removesuffix(".nii.gz"): path.name[0] for path in (raw / "labelsTr").iterdir()}
    SitesFile({site: SiteInfo("GE", 3.0, "T1w") for site in "ABCD"}, cases).save(raw / "sites.json")
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(cases)}))
    return raw


def run(command: str) -> None:
    """A command as it stands, with what MORE puts behind it; ours in this process, nnU-Net's as programs."""
    command += "".join(more for start, more in MORE.items() if re.match(start, command))
    program, *words = (os.path.expandvars(word) for word in shlex.split(command))
    if program == "nnunet-fedharm":
        assert main(words) == 0, command
        return
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, program
    shown = subprocess.run(
        [found, *words], env={**os.environ, "nnUNet_n_proc_DA": "0"}, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, f"{command}\n{shown.stdout[-2000:]}\n{shown.stderr[-2000:]}"


@pytest.mark.parametrize("commands", [FIRST_LOOK, LABELS_OF_A], ids=["tutorial", "labels of one site"])
def test_the_first_steps_with_data_of_four_hospitals(
    commands: tuple[str, ...], hospitals: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in commands:
        run(command)
    assert (folder / "ROOT" / "sites" / "D").is_dir()
    labelled = {path.parents[3].name for path in (folder / "ROOT" / "sites").glob(f"*/nnUNet_raw/{NAME}/labelsTr/*")}
    assert labelled == ({"A"} if commands == LABELS_OF_A else set("ABCD"))
    assert (folder / "study1" / "study.toml").is_file()
    assert "#SBATCH" in capsys.readouterr().out or commands == LABELS_OF_A


def toml_blocks(page: str) -> list[str]:
    return [block.text for block in BLOCKS if block.page == page and block.language == "toml"]


def test_two_hospitals_meet(hospitals: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the page says up to the start of the server; what it writes into files is read by those who read them."""
    shutil.copytree(hospitals, folder / "north" / "nnUNet_raw" / NAME)
    shutil.copytree(hospitals, folder / "south" / "nnUNet_raw" / NAME)
    policy, proxy = toml_blocks("docs/how-to/two-hospitals.md")
    for command in HOSPITALS:
        if command.startswith("nnunet-fedharm site policy"):
            (folder / "north" / "fedharm" / "policy.toml").write_text(policy)
        run(command)
        if "server init" in command:
            shutil.copy(folder / "study" / "consortium.toml", folder)
        if "site join" in command:
            run(command.replace("north", "south"))
            for site in ("north", "south"):
                shutil.copy(folder / site / "fedharm" / "consortium" / "node.pub", f"{site}.pub")
    assert "none, curve" in capsys.readouterr().out
    settings = folder / "north" / "fedharm" / "consortium" / "site.toml"
    text, once = re.subn(r"^proxy = .*$", proxy, settings.read_text(), flags=re.M)
    assert once == 1
    settings.write_text(text)
    assert SiteFolder(folder / "north").settings()["proxy"] == "http://proxy.north.example:3128"


def test_rules_of_a_site_are_rules_that_it_may_have() -> None:
    (text,) = toml_blocks("docs/how-to/privacy.md")
    assert policy_from_dict(tomllib.loads(text), where="the page").private_epsilon == 6.0
    pages = {block.page for block in BLOCKS if block.language == "toml"}
    assert pages == {"docs/how-to/privacy.md", "docs/how-to/two-hospitals.md"}, "read the others by their readers too"


def test_brats_in_its_published_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lines = folder / "BraTS2021_Training_Data", []
    for number in range(8):
        write_brats_case(source / "data", f"BraTS2021_{number:05d}")
        lines.append(f"BraTS2021_{number:05d},,UPENN-GBM,{1 if number < 4 else 18}\n")
    (source / "BraTS21-17_Mapping.csv").write_text(CHALLENGE + "".join(lines))
    for command in BRATS:
        run(command)
    assert sorted(path.name for path in (folder / "consortium" / "sites").iterdir()) == ["site-01", "site-18"]
    assert "#SBATCH --array=0-" in capsys.readouterr().out


def test_mama_mia_in_its_published_form_and_the_script_that_gathers_its_official_test_set(folder: Path) -> None:
    source, rows = folder / "MAMA-MIA", []
    patients = [f"{site}_{number:03d}" for site in ("DUKE", "NACT") for number in range(6)]
    for patient in patients:
        rows.append(f"{patient},{patient[:4]},1,1.5,,GE,model\n")
        for phase in range(3):
            write_volume(source / "images" / patient / f"{patient}_{phase:04d}.nii.gz", seed=phase)
        tumor = write_volume(source / "segmentations" / "expert" / f"{patient}.nii.gz", _tumor())
        shutil.copytree(tumor.parent, source / "segmentations" / "automatic", dirs_exist_ok=True)
    (source / "clinical_and_imaging_info.csv").write_text(HEADER + "".join(rows))
    tested = {patient for patient in patients if patient.endswith(("0", "1"))}
    trained = [patient for patient in patients if patient not in tested]
    pairs = [f"{patient},{test}\n" for patient, test in zip(trained, [*sorted(tested), *[""] * 4], strict=True)]
    (source / "train_test_splits.csv").write_text("train_split,test_split\n" + "".join(pairs))
    for command in MAMAMIA:
        run(command)
    (script,) = [block.text for block in BLOCKS if block.language == "python"]
    exec(compile(script, "docs/how-to/mama-mia.md", "exec"), {})
    assert {path.name[:8] for path in (folder / "official").rglob("*.nii.gz")} == tested
    assert all(path.is_file() and path.parent.name == path.name[:4] for path in (folder / "official").rglob("*.nii.gz"))


def _tumor() -> object:
    import numpy as np

    tumor = np.zeros((6, 7, 8), np.uint8)
    tumor[2:4, 2:4, 2:4] = 1
    return tumor


def test_hospitals_are_simulated(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    make_raw_dataset(folder / "nnUNet_raw", n_labelled=40, shape=(12, 12, 12))
    for command in SIMULATED:
        run(command)
    made = SitesFile.load(folder / "nnUNet_raw" / "Dataset911_Simulated" / "sites.json")
    assert len(made.sites) == 4
    assert all(info.simulation is not None for info in made.sites.values())


@pytest.mark.long
def test_the_plugin_from_plans_to_a_new_hospital(hospitals: Path, folder: Path) -> None:
    """README and the how-to of the plugin, then evaluation and a new site, with the smallest network."""
    (folder / "IMAGES").mkdir()
    (folder / "LABELS").mkdir()
    for name in ("A_case000", "B_case000"):
        shutil.copy(hospitals / "imagesTr" / f"{name}_0000.nii.gz", folder / "IMAGES")
        shutil.copy(hospitals / "labelsTr" / f"{name}.nii.gz", folder / "LABELS")
    shutil.copy(hospitals / "sites.json", folder)
    model = folder / "nnUNet_results" / NAME / "nnUNetTrainerFedHarmPolarity__nnUNetFedHarmPlans__3d_fullres"
    for name in ("RESULTS_FOLDER", "MODEL"):
        (folder / name).symlink_to(model)
    for command in PLUGIN:
        run(command)
    assert (folder / "metrics.json").is_file()
    assert len(list((folder / "OUT").glob("*.nii.gz"))) == 2
    assert (folder / "NEW_MODEL" / "adaptation.json").is_file()


@pytest.mark.long
def test_a_study_from_its_file_to_its_four_answers(hospitals: Path, folder: Path) -> None:
    """As the tutorial says it, with one cell of each kind and two steps in each."""
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    small = {
        "harmonizer_epochs = 10": "harmonizer_epochs = 1",
        "segmenter_epochs = 16": "segmenter_epochs = 1",
        "iterations_per_epoch = 40": "iterations_per_epoch = 2",
        "base_features = 8": "base_features = 4",
        "max_features = 64": "max_features = 8",
        "seeds = [0, 1, 2]": "seeds = [0]",
        'harmonizers = ["polarity", "diffusion"]': 'harmonizers = ["polarity"]',
        'baselines = ["no-augmentation", "augment"]': "baselines = []",
        "oracle = true": "oracle = false",
        "epsilons = []": "epsilons = [8.0]",
    }
    for command in WHOLE_STUDY:
        run(command)
        if " init " in command:
            file = folder / "study1" / "study.toml"
            text = file.read_text()
            for before, after in small.items():
                assert f"\n{before}\n" in text, before
                text = text.replace(f"\n{before}\n", f"\n{after}\n")
            file.write_text(text)
    answers = json.loads((folder / "study1" / "report" / "study.json").read_text())["answers"]
    assert len(answers) == 4
    assert all(answer["measured"] for answer in answers), "all four questions are answered"
