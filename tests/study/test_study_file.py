"""What study.toml may say, what is refused, and the cells that follow from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.commands import study as study_command
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.planning.section import StartModel
from nnunet_fedharm.sites.registry import SiteInfo, SitesFile
from nnunet_fedharm.study.data import StudyData, _recipe
from nnunet_fedharm.study.estimate import Estimate, Estimator
from nnunet_fedharm.study.matrix import Arm, Cell, arms_of, cells_of, control_arm
from nnunet_fedharm.study.settings import settings_of
from nnunet_fedharm.study.study_file import STUDY_FILE, StudyFile, read_study
from nnunet_fedharm.study.template import write_template
from nnunet_fedharm.study.trained import Trained, read_trained, write_trained
from nnunet_fedharm.study.training import federate_config

HEAD = """
[study]
name = "blobs"
dataset = "{dataset}"
reference = "A"
labelled_sites = ["A"]
seeds = [0, 1]
"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Path:
    raw = tmp_path_factory.mktemp("study")
    folder = raw
    for index, site in enumerate("AB"):
        folder = make_raw_dataset(raw, n_labelled=4, site=f"{site}_", gain=1.0 + index, seed=index)
    cases = {path.name[:-12]: path.name[0] for path in (folder / "imagesTr").glob("*_0000.nii.gz")}
    SitesFile({"A": SiteInfo(), "B": SiteInfo()}, cases).save(folder / "sites.json")
    return folder


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The dataset's cases at three sites, all of B's but one at C."""
    folder = tmp_path_factory.mktemp("three") / dataset.name
    shutil.copytree(dataset, folder)
    cases = {
        case: "C" if case in ("B_case001", "B_case002", "B_case003") else case[0]
        for case in SitesFile.load(dataset / "sites.json").cases
    }
    SitesFile({site: SiteInfo() for site in "ABC"}, cases).save(folder / "sites.json")
    return folder


def study_of(folder: Path, dataset: Path, rest: str = "") -> StudyFile:
    folder.mkdir(exist_ok=True)
    (folder / STUDY_FILE).write_text(HEAD.format(dataset=dataset) + rest)
    return read_study(folder)


def test_the_template_is_a_valid_study_whose_every_value_is_explained(tmp_path: Path, dataset: Path) -> None:
    for configuration, axes in (("2d", 2), ("3d_fullres", 3)):
        folder = tmp_path / configuration
        write_template(folder, dataset, reference=None, labelled_sites=["A"], configuration=configuration, quick=True)
        assert len(read_study(folder).training.patch_size) == axes
    path = write_template(tmp_path / "s", dataset, reference=None, labelled_sites=["A"], quick=False)
    study = read_study(path.parent)
    assert (study.subject.reference, study.labelled_sites, study.unlabelled_sites) == ("A", ("A",), ("B",))
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
    with pytest.raises(SetupError, match="exists"):
        write_template(tmp_path / "s", dataset, reference=None, labelled_sites=[], quick=False)


def test_cells_of_the_first_seed_come_first_and_the_control_before_all(tmp_path: Path, dataset: Path) -> None:
    study = study_of(
        tmp_path / "s",
        dataset,
        '[arms]\nharmonizers = ["polarity"]\nepsilons = [8]\nprivate_harmonizers = ["none", "polarity"]\n',
    )
    names = [cell.name for cell in cells_of(study)]
    assert names[0] == "central_none_seed-0"
    assert [name.endswith("seed-0") for name in names] == sorted([name.endswith("seed-0") for name in names])[::-1]
    assert len(set(names)) == len(names) == 2 * len(arms_of(study))
    expected = {
        Arm("central", "none"),
        Arm("federated", "none"),
        Arm("central", "none", augmentation=False),
        Arm("central", "augment"),
        Arm("central", "polarity"),
        Arm("federated", "polarity"),
        Arm("local", "none", site="A"),
        Arm("local", "none", site="B"),
        *(Arm(mode, kind, epsilon=8.0) for mode in ("central", "federated") for kind in ("none", "polarity")),
    }
    assert set(arms_of(study)) == expected
    assert control_arm(study) == Arm("central", "none")


@pytest.mark.parametrize(
    ("rest", "sentence"),
    [
        ("[arm]\n", r"unknown table \[arm\]"),
        ('[arms]\nharmonizer = ["polarity"]\n', r"unknown key 'harmonizer' in \[arms\]"),
        ('[arms]\nharmonizers = ["none"]\n', "unknown harmonizer 'none'"),
        ('[arms]\nmodes = ["local"]\n', "needs central or federated"),
        ("[arms]\nepsilons = [8]\nprivate_harmonizers = []\n", "without private_harmonizers"),
        ('[arms]\nprivate_harmonizers = ["augment"]\n', "unknown kind in private_harmonizers 'augment'"),
        ("[training]\nsegmenter_epochs = 1.5\n", r"segmenter_epochs in \[training\] must be a whole number"),
        ("[training]\nsegmenter_epochs = 0\n", "segmenter_epochs must be >= 1"),
        ("[training]\npatch_size = [8, 8]\n", "patch_size needs 3 values"),
        ("[report]\nmargin = 0\n", r"margin in \[report\] must lie between 0 and 0.5 Dice, got 0"),
        ("[report]\nmargin = 2.0\n", "got 2"),
        ("[report]\nleast_dice = 1\n", r"least_dice in \[report\] must be at least 0 and below 1"),
        ("[report]\nlesion_labels = [0]\n", "must be label values above 0"),
        ("[report]\nfloor = 0.1\n", r"unknown key 'floor' in \[report\]"),
        (
            "[report]\nlesion_labels = [true]\n",
            r"each item of lesion_labels in \[report\] must be a whole number, got True",
        ),
        ('[arms]\nepsilons = ["eight"]\n', r"each item of epsilons in \[arms\] must be a number, got 'eight'"),
        ("[arms]\nharmonizers = [1]\n", "each item of harmonizers in .arms. must be a text, got 1"),
        (
            '[training]\npatch_size = ["a", "b", "c"]\n',
            "each item of patch_size in .training. must be a whole number, got 'a'",
        ),
        ("[training]\npatch_size = [8, 0, 8]\n", "patch_size must be voxel counts above 0"),
        ('[privacy]\ndelta = "x"\n', r"delta in \[privacy\] must be a number, got 'x'"),
        (
            "[privacy]\npatches_per_patient = 1.5\n",
            r"patches_per_patient in \[privacy\] must be a whole number, got 1.5",
        ),
        ("[privacy]\nepsilon = 8\n", r"unknown key 'epsilon' in \[privacy\]"),
        ("[privacy]\nclip = -1\n", "clip must be a positive number"),
        ("[privacy]\ninitial_lr = -1\n", r"initial_lr in \[privacy\] must be a positive number, or 0 .* got -1"),
        ("[privacy]\nsegmenter_epochs = 0.5\n", r"segmenter_epochs in \[privacy\] must be a whole number"),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(tmp_path: Path, dataset: Path, rest: str, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence) as refusal:
        study_of(tmp_path / "s", dataset, rest)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('held_out_sites = ["Z"]', r"unknown site 'Z'\. Known: A, B, C"),
        ('held_out_sites = ["A"]', "the reference 'A' is in held_out_sites"),
        ('held_out_sites = ["B"]\nlabelled_sites = ["A", "B"]', "'B' is in labelled_sites and in held_out_sites"),
        ('held_out_sites = ["B", "C"]', "leaves A alone to train with, but a federation needs two sites"),
        ('held_out_sites = "B"', "held_out_sites in .study. must be a list"),
        ('held_out_cases = ["A_case001", "X"]', "the case X of held_out_cases is not in .*sites.json"),
        ("held_out_fraction = 0", r"held_out_fraction must lie between 0 and 1, got 0"),
        ('held_out_fraction = 0\nheld_out_cases = ["A_case001"]', "as held_out_cases has none of site B, got 0"),
        ("held_out_fraction = 1.0", "between 0 and 1, got 1.0"),
        ("hours = -1", "hours must be a number from 0 on, got -1"),
    ],
)
def test_sites_that_cannot_be_held_out_are_refused(three: Path, tmp_path: Path, line: str, sentence: str) -> None:
    head = HEAD.format(dataset=three).replace('labelled_sites = ["A"]\n', "")
    (tmp_path / STUDY_FILE).write_text(f"{head}{line}\n")
    with pytest.raises(DataError, match=sentence) as refusal:
        read_study(tmp_path)
    assert "\n" not in str(refusal.value)


def test_every_training_starts_from_the_given_weights_and_a_wrong_path_is_refused_first(
    tmp_path: Path, dataset: Path
) -> None:
    fold = tmp_path / "public" / "fold_all"
    study = study_of(tmp_path / "s", dataset, '[training]\nstart_from = "../public"\n')
    with pytest.raises(DataError, match=r"start_from in .*study.toml: .* holds no checkpoint_final.pth"):
        StudyData(study).prepare()
    assert not StudyData(study).folder.exists()
    assert study.starts == (StartModel("public"),), "a report is made where the start is gone"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    assert study.start == str(fold / "checkpoint_final.pth")
    cell = next(cell for cell in cells_of(study) if cell.arm.mode == "federated")
    assert federate_config(StudyData(study), cell, tmp_path / "cell", device="cpu").start_from == study.start
    assert study_of(tmp_path / "t", dataset).start == ""


def test_a_held_out_site_is_in_no_training_but_its_own(three: Path, tmp_path: Path) -> None:
    head = HEAD.format(dataset=three).replace('labelled_sites = ["A"]\n', 'held_out_sites = ["C"]\n')
    (tmp_path / STUDY_FILE).write_text(head)
    study = read_study(tmp_path)
    assert (study.training_sites, study.held_out_sites) == (("A", "B"), ("C",))
    assert (study.labelled_sites, study.unlabelled_sites) == (("A", "B"), ("C",))
    assert Arm("local", "none", site="C") in arms_of(study)
    (tmp_path / STUDY_FILE).write_text(head.replace('["C"]', '["B", "C"]') + '[arms]\nmodes = ["central"]\n')
    assert read_study(tmp_path).training_sites == ("A",)


def test_the_template_holds_sites_out_and_leaves_no_file_behind_that_is_refused(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with pytest.raises(DataError, match="unknown site 'Z'"):
        write_template(folder, three, reference=None, labelled_sites=[], held_out_sites=["Z"], quick=True)
    assert not (folder / STUDY_FILE).exists()
    write_template(folder, three, reference=None, labelled_sites=[], held_out_sites=["A"], quick=True)
    study = read_study(folder)
    assert (study.held_out_sites, study.subject.reference) == (("A",), "B")
    with pytest.raises(DataError, match="that is not held out has a labelled case"):
        write_template(
            tmp_path / "t", three, reference=None, labelled_sites=[], held_out_sites=["A", "B", "C"], quick=True
        )


def test_init_takes_a_folder_a_number_or_a_name(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(folder: str, dataset: str) -> int:
        return main(["study", "init", str(tmp_path / folder), "-d", dataset, "--quick", "--held-out-sites", "C"])

    assert init("none", "1") == 2
    said = capsys.readouterr().err
    assert "1 is no folder, and it cannot be looked up by number or name: The environment variable nnUNet_raw" in said
    for name, folder in (("raw", three.parent), ("preprocessed", tmp_path), ("results", tmp_path)):
        monkeypatch.setenv(f"nnUNet_{name}", str(folder))
    for number, dataset in enumerate((str(three), "1", "001", "Dataset001_Blobs")):
        assert init(f"s{number}", dataset) == 0
        study = read_study(tmp_path / f"s{number}")
        assert study.raw_dataset == three.resolve()
        assert study.held_out_sites == ("C",)
    capsys.readouterr()
    for wrong in ("7", "Dataset001", "Dataset001_*", str(tmp_path / "Dataset002_Else")):
        assert init("none", wrong) == 2
        said = capsys.readouterr().err
        assert f"was not found in {three.parent}, which holds only: Dataset001_Blobs." in said
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ("[0.5]", "each item of seeds in .study. must be a whole number, got 0.5"),
        ("[0, -1]", "seeds must be different whole numbers from 0 on"),
        ("[0, 0]", "seeds must be different whole numbers from 0 on"),
        ("0", "seeds in .study. must be a list"),
    ],
)
def test_seeds_that_no_generator_takes_are_refused(tmp_path: Path, dataset: Path, seeds: str, sentence: str) -> None:
    (tmp_path / STUDY_FILE).write_text(HEAD.format(dataset=dataset).replace("[0, 1]", seeds))
    with pytest.raises(DataError, match=sentence):
        read_study(tmp_path)


def test_a_value_where_a_table_belongs_is_refused(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / STUDY_FILE).write_text("training = 5\n" + HEAD.format(dataset=dataset))
    with pytest.raises(DataError, match=r"training must be a table, \[training\], got 5"):
        read_study(tmp_path)


def test_data_of_other_values_are_refused_by_the_names_of_the_keys(tmp_path: Path, dataset: Path) -> None:
    data = StudyData(study_of(tmp_path / "s", dataset, "[arms]\noracle = false\n"))
    ready = data.folder / "ready.json"
    ready.parent.mkdir()
    ready.write_text(json.dumps({**_recipe(data.study), "dataset": str(dataset.resolve())}))
    data.prepare()  # a record of a release that wrote the absolute path
    changed = "[arms]\noracle = true\n[training]\nbase_features = 16\npatch_size = [8, 8, 8]\n"
    with pytest.raises(DataError) as refusal:
        StudyData(study_of(tmp_path / "s", dataset, changed)).prepare()
    words = '"oracle is on, or local in modes" was false and is true now; base_features was 32 and is 16 now; '
    assert f"were made for other values: {words}patch_size was [] and is [8, 8, 8] now." in str(refusal.value)
    ready.write_text(json.dumps({**_recipe(data.study), "own": True}))
    study_of(tmp_path / "s", dataset, "[arms]\noracle = false\n")
    data.prepare()  # holds more than the study asks for


def test_named_cases_are_the_test_cases(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        """The test cases are there; plans and preprocessing are not looked at."""

    def stop(data: StudyData) -> None:
        raise EnoughError

    monkeypatch.setattr(StudyData, "_pool", stop)
    named = 'held_out_cases = ["A_case001", "B_case003"]\n'
    (tmp_path / STUDY_FILE).write_text(HEAD.format(dataset=dataset) + f"held_out_fraction = 0\n{named}")
    data = StudyData(read_study(tmp_path))
    with pytest.raises(EnoughError):
        data.prepare()
    for site, case in (("A", "A_case001"), ("B", "B_case003")):
        assert [path.name for path in (data.test(site) / "labels").iterdir()] == [f"{case}.nii.gz"]
        for root in (data.own(site).raw, data.consortium / "sites" / site / "nnUNet_raw"):
            used = [path.name for name in ("labelsTr", "imagesUnlabelled") for path in root.glob(f"*/{name}/*")]
            assert len(used) == 3
            assert not [name for name in used if name.startswith(case)]
    (tmp_path / STUDY_FILE).write_text(HEAD.format(dataset=dataset) + named)
    data = StudyData(read_study(tmp_path))
    with pytest.raises(EnoughError):
        data.prepare()
    assert len(list((data.test("A") / "labels").iterdir())) == 2, "the drawn share comes on top"


def test_a_study_that_was_moved_with_its_dataset_keeps_data_and_models(tmp_path: Path, dataset: Path) -> None:
    for name in ("old", "new"):
        shutil.copytree(dataset, tmp_path / name / dataset.name)
    data = StudyData(study_of(tmp_path / "old" / "s", Path("..") / dataset.name, "[arms]\noracle = false\n"))
    data.folder.mkdir()
    (data.folder / "ready.json").write_text(json.dumps(_recipe(data.study)))
    cell = data.study.folder / "cells" / "x"
    trained = Trained({"A": str(cell / "nnUNet_results" / "m"), "B": "/elsewhere/m"}, {"A": "stored", "B": "stored"})
    write_trained(cell, trained, {"train_s": 1.0, "energy_j": None, "counters": []})
    assert read_trained(cell)[0] == trained
    shutil.move(data.study.folder, tmp_path / "new" / "s")
    moved = tmp_path / "new" / "s"
    StudyData(read_study(moved)).prepare()
    assert read_trained(moved / "cells" / "x")[0].models["A"] == str(moved / "cells" / "x" / "nnUNet_results" / "m")
    record = moved / "cells" / "x" / "trained.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "models": {"A": "/of/an/earlier/release"}}))
    assert read_trained(moved / "cells" / "x")[0].models == {"A": "/of/an/earlier/release"}


def test_sites_that_the_dataset_does_not_have_are_refused(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / STUDY_FILE).write_text(HEAD.format(dataset=dataset).replace('reference = "A"', 'reference = "Z"'))
    with pytest.raises(DataError, match=r"unknown site 'Z'\. Known: A, B"):
        read_study(tmp_path)


def test_a_federated_cell_takes_the_central_cells_values(tmp_path: Path, dataset: Path) -> None:
    study = study_of(
        tmp_path / "s",
        dataset,
        "[arms]\nepsilons = [3]\n[training]\nharmonizer_epochs = 4\nsegmenter_epochs = 6\nlocal_epochs = 2\n"
        "patch_size = [12, 16, 24]\n[privacy]\nclip = 0.5\n",
    )
    config = federate_config(
        StudyData(study), Cell(Arm("federated", "polarity", epsilon=3.0), 1), tmp_path, device="cpu"
    )
    assert isinstance(config, FederateConfig)
    assert (config.harmonizer_rounds, config.segmenter_rounds, config.local_epochs) == (2, 3, 2)
    assert (config.epsilon, config.clip, config.seed, config.patch_size) == (3.0, 0.5, 1, "12x16x24")
    odd = study_of(tmp_path / "odd", dataset, "[training]\nsegmenter_epochs = 5\nlocal_epochs = 2\n")
    with pytest.raises(DataError, match=r"segmenter_epochs 5 in study\.toml is no multiple of local_epochs 2"):
        federate_config(StudyData(odd), Cell(Arm("federated", "none"), 0), tmp_path, device="cpu")


def test_private_arms_may_train_at_another_rate_and_length(tmp_path: Path, dataset: Path) -> None:
    study = study_of(
        tmp_path / "s",
        dataset,
        "[arms]\nepsilons = [3]\n[training]\nharmonizer_epochs = 4\nsegmenter_epochs = 6\ninitial_lr = 0.1\n"
        "[privacy]\nclip = 0.5\ninitial_lr = 0.6\nsegmenter_epochs = 2\niterations_per_epoch = 8\naugmentation = false\n",
    )
    data, arms = StudyData(study), (Arm("federated", "polarity"), Arm("federated", "polarity", epsilon=3.0))
    open_, private = (federate_config(data, Cell(arm, 0), tmp_path, device="cpu") for arm in arms)
    assert (open_.harmonizer_rounds, open_.segmenter_rounds, open_.initial_lr, open_.augmentation) == (4, 6, 0.1, True)
    assert (private.harmonizer_rounds, private.segmenter_rounds, private.initial_lr) == (4, 2, 0.6)
    assert not private.augmentation
    assert private.clip == 0.5
    differing = {
        name: (value, settings_of(study, arms[1])[name])
        for name, value in settings_of(study, arms[0]).items()
        if value != settings_of(study, arms[1])[name]
    }
    assert differing == {"initial_lr": (0.1, 0.6), "segmenter_epochs": (6, 2), "iterations_per_epoch": (250, 8)}
    assert settings_of(study, arms[1])["[privacy] augmentation"] is False


def test_hours_of_cells_whose_time_nobody_knows_are_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, dataset)
    prepared: list[StudyFile] = []
    monkeypatch.setattr(StudyData, "prepare", lambda data: prepared.append(data.study))
    cells = cells_of(study)
    with pytest.raises(DataError, match="How long the cell central_none_seed-0 takes is not known yet"):
        study_command._within(study, cells, "cpu", 0.1)
    assert prepared == [study], "a step is timed on the planned network"
    monkeypatch.setattr(Estimator, "of", lambda *_: Estimate(360.0, "guessed"))
    assert study_command._within(study, cells, "cpu", 0.25) == cells[:2]
