"""Four audits of the same training with and without differential privacy: membership, canaries, statistics, gradient inversion.

    PYTHONPATH=. python benchmarks/privacy_audit.py run    --data DATA --work WORK
    PYTHONPATH=. python benchmarks/privacy_audit.py report --work WORK > docs/benchmarks/privacy-audit.md

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites`. Site A's 60 cases are split by a coin into 20 members, 20
non-members and 20 for reference models. One 2d network is trained on the members without and with differential privacy, three
reference models on 14 others each, and the commands that a user would type attack them. The statistics of all four hospitals
are audited in one place. The audits of canaries and statistics also run on mechanisms that are broken on purpose. What is done
already is not done again, so an interrupted run goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update({"nnUNet_compile": "f", "nnUNet_def_n_proc": "1", "MPLBACKEND": "Agg"})

import numpy as np
import privacy_audit_statistics as statistics
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_fedharm import cli
from nnunet_fedharm.evaluation.audit.gradient_canaries import CanaryOptions, audit_gradients
from nnunet_fedharm.evaluation.audit.site import AuditedSite, audit_trainer, find_plans
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.patient_gradients import PatientGradients
from nnunet_fedharm.trainers.results import make_trainer
from tests.evaluation.audit import broken as breaking

NAME = "Dataset910_HippocampusSites"
TRAINER = "nnUNetTrainerFedHarmNone"
EPSILON, DELTA = 8.0, 1e-3
CANARIES, STEPS = 2000, 20
PRIVACY = PrivacyOptions(epsilon=EPSILON, delta=DELTA, patients_per_step=4, patches_per_patient=2)
SCHEDULE = Schedule(
    harmonizer_epochs=0, segmenter_epochs=15, iterations_per_epoch=20, val_iterations_per_epoch=1,
    initial_lr=0.05, momentum=0.9, seed=0,
)  # fmt: skip
ARMS: dict[str, tuple[str, Schedule, PrivacyOptions | None]] = {
    "open": ("without DP", SCHEDULE, None),
    "memorizing": ("without DP, memorizing", replace(SCHEDULE, segmenter_epochs=60, augmentation=False), None),
    "private": ("epsilon 8", replace(SCHEDULE, initial_lr=0.002), PRIVACY),
}
"""Name of the plans -> name in the table, schedule, privacy."""
PARTS = {"members": 20, "others": 20, "references": 20}
REFERENCE_CASES, REFERENCES = 14, 3


def prepare(data: Path, work: Path) -> None:
    """Three raw datasets of site A, split by a seeded coin; linked, not copied."""
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").glob("A_*.nii.gz"))
    cases = np.random.default_rng(910).permutation(cases).tolist()
    for part, count in PARTS.items():
        chosen, cases = cases[:count], cases[count:]
        folder = work / part / "nnUNet_raw" / NAME
        for sub in ("imagesTr", "labelsTr"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        for case in chosen:
            for sub, name in (("imagesTr", f"{case}_0000.nii.gz"), ("labelsTr", f"{case}.nii.gz")):
                if not (folder / sub / name).exists():
                    (folder / sub / name).symlink_to((data / sub / name).resolve())
        description = json.loads((data / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": count}))


def plans_of(root: NnunetRoot, name: str) -> dict[str, Any]:
    """Plans of the part, made once."""
    path = root.preprocessed / NAME / f"{name}.json"
    if not path.is_file():
        _, schedule, privacy = ARMS[name]
        options = CentralOptions(
            configurations=("2d",), kind="none", schedule=schedule, privacy=privacy,
            plan=PlanOptions(
                base_features=32, max_features=128, batch_size=8, patch_size=(32, 32), plans_name=name
            ),
        )  # fmt: skip
        plan_central(root.create(), "910", options)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def train(root: NnunetRoot, plans: dict[str, Any], fold: int | str) -> Path:
    """nnU-Net's own training; returns TRAINER__PLANS__2d."""
    folder = root.results / NAME / f"{TRAINER}__{plans['plans_name']}__2d"
    if not (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        os.environ["nnUNet_n_proc_DA"] = "0"
        began = time.process_time()
        with root.activate():
            description = json.loads((root.preprocessed / NAME / "dataset.json").read_text())
            trainer = make_trainer(TRAINER, plans, "2d", fold, description)
            trainer.save_every = 1
            trainer.initialize()
            maybe_load_checkpoint(trainer, True, False)
            trainer.run_training()
        del os.environ["nnUNet_n_proc_DA"]
        note(root.path.parent, f"training {folder.name} fold {fold}", time.process_time() - began)
    return folder


def note(work: Path, what: str, seconds: float) -> None:
    with (work / "seconds.jsonl").open("a") as stream:
        stream.write(json.dumps({"what": what, "cpu_s": seconds}) + "\n")


def command(work: Path, name: str, words: list[Any]) -> None:
    """One audit by its command, unless its report is there."""
    output = work / "reports" / name
    if not (output / "report.json").is_file():
        began = time.process_time()
        print(f"nnunet-fedharm audit {' '.join(map(str, words))}", flush=True)
        cli.main(["audit", *map(str, words), "-o", str(output)])
        note(work, f"audit {name}", time.process_time() - began)


BROKEN: dict[str, Callable[[PatientGradients], None]] = {
    "noise off": breaking.no_noise,
    "clipping off": breaking.no_clipping,
    "the same noise in every step": breaking.noise_repeats,
    "noise divided by the patients of a step": breaking.noise_of_a_mean,
}


def broken(work: Path, root: NnunetRoot, plans_name: str) -> None:
    """The canary audit on mechanisms that are broken on purpose."""
    site = AuditedSite(
        root=root, dataset_name=NAME, plans=find_plans(root, NAME, plans_name, "2d"), configuration="2d", fold="all"
    )
    for name, make_broken in BROKEN.items():
        path = work / "reports" / f"broken {name}.json"
        if path.is_file():
            continue
        began = time.process_time()
        with audit_trainer(site, site.privacy({})) as trainer:
            assert trainer._gradients is not None
            make_broken(trainer._gradients)
            found = audit_gradients(trainer, CanaryOptions(canaries=CANARIES, steps=STEPS), delta=DELTA)
        path.write_text(json.dumps({"gradient_canaries": found.to_dict()}))
        note(work, f"canaries, {name}", time.process_time() - began)


def run(data: Path, work: Path) -> None:
    torch.set_num_threads(1)
    prepare(data, work)
    members, references = NnunetRoot(work / "members"), NnunetRoot(work / "references")
    models = {name: train(members, plans_of(members, name), "all") for name in ARMS}
    plans = plans_of(references, "open")
    splits = references.preprocessed / NAME / "splits_final.json"
    if not splits.is_file():
        cases = sorted(
            path.name.removesuffix(".nii.gz") for path in (references.raw / NAME / "labelsTr").glob("*.nii.gz")
        )
        folds = []
        for fold in range(REFERENCES):
            order = np.random.default_rng(fold).permutation(cases).tolist()
            folds.append({"train": order[:REFERENCE_CASES], "val": order[REFERENCE_CASES:]})
        splits.write_text(json.dumps(folds))
    for fold in range(REFERENCES):
        others = train(references, plans, fold)
    sets = ["--members", members.raw / NAME / "imagesTr", members.raw / NAME / "labelsTr"]
    held = work / "others" / "nnUNet_raw" / NAME
    sets += ["--non-members", held / "imagesTr", held / "labelsTr"]
    for name, model in models.items():
        command(work, f"membership {name}", ["membership", "-m", model, *sets, "--reference-models", others])
    site = ["--site-root", members.path, "-d", 910, "-c", "2d", "-p", "private"]
    command(work, "canaries", ["canaries", *site, "--canaries", CANARIES, "--steps", STEPS, "--patients", 10])
    broken(work, members, "private")
    attack = ["--patch-size", 24, 24, "--targets", 2, "--iterations", 600]
    command(work, "inversion", ["inversion", *site, *attack])
    began = time.process_time()
    statistics.run(data, work, PRIVACY)
    note(work, "statistics", time.process_time() - began)


def report(work: Path) -> str:
    """The page."""

    def read(name: str) -> dict[str, Any]:
        path = work / "reports" / name
        content: dict[str, Any] = json.loads((path / "report.json" if path.is_dir() else path).read_text())
        return content

    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    lines = [HEAD.format(cpu=_minutes(work), machine=machine), ""]
    lines += ["## Membership", "", MEMBERSHIP_TEXT]
    found = {name: read(f"membership {arm}") for arm, (name, _, _) in ARMS.items()}
    lines += [f"| attack | {' | p | '.join(found)} | p |", "|---|" + "---|---|" * len(found)]
    tables = [[*audit["attacks"], audit["blind_control"]] for audit in found.values()]
    for row in zip(*tables, strict=True):
        cells = [
            f"{x['auc']:.2f} ({x['auc_low']:.2f} to {x['auc_high']:.2f}) | {max(x['p_value'], 0.001):.3f}" for x in row
        ]
        lines.append(f"| {row[0]['name']} | {' | '.join(cells)} |")
    lines += ["", "| model | loss of members | of non-members | epsilon >= | claimed <= | a perfect attack shows |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, audit in found.items():
        loss, claim = audit["mean_loss"], audit["claimed"]
        said = "none" if claim is None else f"{claim['epsilon']:.2f}"
        lines.append(
            f"| {name} | {loss['members']:.3f} | {loss['non_members']:.3f} | {audit['epsilon_low']:.2f} | {said} | "
            f"{audit['largest_possible_bound']:.2f} |"
        )
    lines += ["", *(f"- {name}: {audit['reading']}" for name, audit in found.items())]
    lines += ["", "## Canaries", "", CANARY_TEXT]
    lines += ["| mechanism | right guesses | epsilon >= | claimed <= | verdict | what the gradients show |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, file in [("as it is", "canaries"), *((n, f"broken {n}.json") for n in BROKEN)]:
        audit = read(file)["gradient_canaries"]
        best = audit["found"]
        verdict = "**refuted**" if audit["refuted"] else "not refuted"
        lines.append(
            f"| {name} | {best['correct']} of {best['guesses']} | {best['epsilon_low']:.2f} | {audit['claimed']:.2f} | "
            f"{verdict} | "
            f"{' '.join(audit['suspicions']) or 'as promised'} |"
        )
    patients = read("canaries")["patients"]
    lines += [
        "",
        f"Real patients as canaries: {patients['found']['correct']} of {patients['found']['guesses']} guesses right in "
        f"{patients['steps']} steps, epsilon >= {patients['found']['epsilon_low']:.2f} (claimed {patients['claimed']:.2f}); "
        f"{patients['found']['canaries']} patients could show {patients['found']['most']:.2f} at most.",
    ]
    lines += ["", "## Statistics", "", STATISTICS_TEXT, *statistics.table(work)]
    lines += ["", "## Gradient inversion", "", INVERSION_TEXT]
    lines += ["| patch | update | correlation | with another patch | PSNR, dB | SSIM | own patch is nearest |"]
    lines += ["|---|---|---|---|---|---|---|"]
    inversion = read("inversion")
    for number, target in enumerate(inversion["targets"], start=1):
        for r in target["updates"]:
            lines.append(
                f"| {number} | {r['update']} | {r['correlation']:.2f} | {r['nearest_other']:.2f} | {r['psnr_db']:.1f} | "
                f"{r['ssim']:.2f} | {'yes' if r['recognized'] else 'no'} |"
            )
        lines.append(f"| {number} | none: the likest other patch | {target['likeness_of_another_patch']:.2f} | | | | |")
    lines += ["", inversion["reading"]]
    return "\n".join(lines)


def _minutes(work: Path) -> str:
    spent = [json.loads(line) for line in (work / "seconds.jsonl").read_text().splitlines()]
    return f"{sum(entry['cpu_s'] for entry in spent) / 60:.0f}"


HEAD = """# Audits with and without differential privacy

    PYTHONPATH=. python benchmarks/privacy_audit.py run    --data DATA --work WORK
    PYTHONPATH=. python benchmarks/privacy_audit.py report --work WORK > docs/benchmarks/privacy-audit.md

Site A of Dataset910 (60 hippocampus crops), split by a coin into 20 members, 20 non-members and 20 for reference models. A 2d
nnU-Net (features 32 to 128, patches 32 x 32) is trained on the members: for 300 steps as nnU-Net does; for 1200 steps without
augmentation, so that it memorizes what it can; and for 300 steps under differential privacy by patient with epsilon 8 at delta
1e-3, 4 of 20 patients a step. {cpu} CPU minutes in all, one thread ({machine}). One
run each: what differs by little may differ by chance. [What the audits do and what they do not show](../how-to/audit.md)."""
MEMBERSHIP_TEXT = """\
`nnunet-fedharm audit membership` with three reference models, each trained on 14 of the 20 cases that are neither members nor
non-members. AUC 0.5 is chance; in brackets its 95% bootstrap interval; p by permutation, 0.001 at least. Features alone
are the control without a model.
"""
CANARY_TEXT = """\
`nnunet-fedharm audit canaries`: 2000 canary patients, half of them put into 20 private steps of the trainer by a coin;
bounds with 95% confidence by Steinke, Nasr, Jagielski (2023). The claim is the accountant's epsilon of these 20 steps at
the audit's delta, 5e-6. Below it the same audit on mechanisms that are broken on purpose.
"""
STATISTICS_TEXT = """\
`nnunet-fedharm audit statistics` on all four hospitals in one place, with `polarity` in front, so that B, C and D vote: 1000
scores with a canary patient and 1000 without, by the noise of a run at epsilon 8 and delta 1e-3. Bounds and claims are of as many
releases as stand behind a score, with 95% confidence for all rows together. Below it the same audit on mechanisms that are broken
on purpose.
"""
INVERSION_TEXT = """\
`nnunet-fedharm audit inversion`: patches of 24 x 24 voxels from one update, labels known to the attacker, 600 iterations.
A reconstruction is compared with its own patch and with those of 12 other cases at most.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--restart", action="store_true", help="forget what was done before")
    arguments = parser.parse_args()
    if arguments.restart:
        shutil.rmtree(arguments.work, ignore_errors=True)
    if arguments.action == "run":
        run(arguments.data, arguments.work)
    else:
        print(report(arguments.work))


if __name__ == "__main__":
    main()
